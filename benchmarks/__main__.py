"""Run the benchmarks, or report what a run has written, also in the README.

python -m benchmarks run [--quick] [--only clip,sample] [--seconds 240] [pytest's options]
python -m benchmarks report RESULT.json [RESULT.json ...] [--out FOLDER]
python -m benchmarks readme
"""

import argparse
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import readme, report

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
README = FOLDER.parent / "README.md"
# In the order in which they run, with their shares of a run's time where that is limited.
SHARES = {
    "clip": 2,
    "conversions": 1,
    "evaluate": 3,
    "sample": 2,
    "l2_init": 2,
    "lstm": 2,
    "tokens_to_grid": 1,
    "tensordict_fields": 1,
    "weight_metrics": 1,
    "train_step": 4,
}
SUITES = tuple(SHARES)
# pytest's, where no benchmark was selected.
NOTHING_SELECTED = 5
# A suite is killed, and its results are lost, after this multiple of its share and these seconds: the shape that is
# under way when the share is used up may compile for the first time.
HARD_SHARES, HARD_SECONDS = 2.0, 15.0


def main(arguments: list[str] | None = None) -> int:
    """The exit code: pytest's for `run`, 0 for the others."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure; what is not known here goes to pytest")
    run.add_argument("--quick", action="store_true", help="few shapes and rounds: under a minute on two cores")
    run.add_argument("--only", default=",".join(SUITES), help="comma-separated, of " + ", ".join(SUITES))
    run.add_argument("--results", type=Path, default=RESULTS, help="folder of the results by machine")
    run.add_argument(
        "--seconds", type=float, default=math.inf, help="for all suites: each has a process and a share of its own then"
    )
    shown = commands.add_parser("report", help="Markdown and plots of results")
    shown.add_argument("results", type=Path, nargs="+", help="JSON that a run has written")
    shown.add_argument("--out", type=Path, help="folder to write to; default: beside each JSON")
    commands.add_parser("readme", help="the newest full result of each kind of device into the README's tables")
    known, others = parser.parse_known_args(arguments)
    if known.command == "run":
        unknown = sorted(set(known.only.split(",")) - set(SUITES))
        if unknown:
            parser.error(f"--only: got {', '.join(unknown)}, expected some of {', '.join(SUITES)}")
        if importlib.util.find_spec("pytest_benchmark") is None:
            parser.error("pytest-benchmark is not installed; the extra `test` brings it")
        return _run(known.only.split(","), known.quick, known.results, known.seconds, others)
    if others:
        parser.error(f"unknown arguments: {' '.join(others)}")
    if known.command == "readme":
        readme.update(README, RESULTS)
        return 0
    for path in known.results:
        for written in report.write(path, known.out or path.parent):
            print(written)
    return 0


def _run(names: Sequence[str], quick: bool, results: Path, seconds: float, others: Sequence[str]) -> int:
    deadline = time.monotonic() + seconds
    groups = [list(names)] if math.isinf(seconds) else [[name] for name in names]
    options = ["-q", "--no-header", "--benchmark-columns=median,iqr,rounds", *(["--quick"] if quick else []), *others]
    parts, codes, killed = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for position, group in enumerate(groups):
            part = Path(folder) / f"{position}.json"
            weights = [sum(SHARES[name] for name in each) for each in groups[position:]]
            share = (deadline - time.monotonic()) * weights[0] / sum(weights)
            code = run_suites(group, part, share, deadline, options)
            killed += group if code is None else []
            codes += [] if code is None else [code]
            # pytest-benchmark makes the file before it knows whether there will be anything to write.
            if part.exists() and part.stat().st_size > 0:
                parts.append(json.loads(part.read_text()))
    for name in killed:
        print(f"benchmarks: {name} was stopped, its time was used up; it has no results", file=sys.stderr)
    if parts:
        path = _sort_in(merged(parts, killed), results)
        print("\n".join(map(str, [path, *report.write(path, path.parent)])))
    # Where each suite has a process, a selection may well be empty in some.
    failures = [code for code in codes if code not in (0, NOTHING_SELECTED)] + [1] * len(killed)
    return max(failures, default=0 if 0 in codes else NOTHING_SELECTED)


def run_suites(names: Sequence[str], result: Path, share: float, deadline: float, options: Sequence[str]) -> int | None:
    """pytest's exit code for some suites, whose JSON goes to `result`; None where they had to be killed.

    Args:
        names: of the suites.
        result: file for pytest-benchmark's JSON.
        share: seconds after which no further shape is begun; infinite for no limit.
        deadline: moment of `time.monotonic` by which everything has to be over.
        options: for pytest.
    """
    suites = [str(FOLDER / f"bench_{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", *suites, f"--benchmark-json={result}", *options]
    if math.isinf(share):
        return subprocess.run(command, cwd=FOLDER.parent).returncode
    left = deadline - time.monotonic()
    if left <= 0:
        return None
    process = subprocess.Popen([*command, f"--seconds={share:.1f}"], cwd=FOLDER.parent, start_new_session=True)
    try:
        return process.wait(min(HARD_SHARES * share + HARD_SECONDS, left))
    except subprocess.TimeoutExpired:
        return None
    finally:
        # What compiles for it, too.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def merged(parts: Sequence[dict[str, Any]], killed: Sequence[str]) -> dict[str, Any]:
    """One result of the suites' results: machine and commit are the first one's, the load is the last one's."""
    conditions = [part["conditions"] for part in parts]
    return {
        **parts[0],
        "benchmarks": [entry for part in parts for entry in part["benchmarks"]],
        "conditions": {
            **conditions[-1],
            "skipped": {name: reason for each in conditions for name, reason in each["skipped"].items()},
            "left_out": [shape for each in conditions for shape in each.get("left_out", [])],
            "killed": list(killed),
        },
    }


def _sort_in(result: dict[str, Any], results: Path) -> Path:
    """Write a result to the folder of its machine; its name is its moment and its commit."""
    commit = (result["commit_info"].get("id") or "unknown")[:9]
    folder = results / report.folder_of(result)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{time.strftime('%Y-%m-%d-%H%M%S', time.gmtime())}-{commit}.json"
    path.write_text(json.dumps(result, indent=4))
    return path


if __name__ == "__main__":
    sys.exit(main())
