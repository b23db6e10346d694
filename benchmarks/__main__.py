"""Run the benchmarks, or report what a run has written.

python -m benchmarks run [--quick] [--only clip,sample] [pytest's options]
python -m benchmarks report RESULT.json [RESULT.json ...] [--out FOLDER]
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import report

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
SUITES = (
    "clip",
    "conversions",
    "evaluate",
    "sample",
    "l2_init",
    "lstm",
    "tokens_to_grid",
    "tensordict_fields",
    "weight_metrics",
    "train_step",
)


def main(arguments: list[str] | None = None) -> int:
    """The exit code: pytest's for `run`, 0 for `report`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure; what is not known here goes to pytest")
    run.add_argument("--quick", action="store_true", help="few shapes and rounds: under a minute on two cores")
    run.add_argument("--only", default=",".join(SUITES), help="comma-separated, of " + ", ".join(SUITES))
    run.add_argument("--results", type=Path, default=RESULTS, help="folder of the results by machine")
    shown = commands.add_parser("report", help="Markdown and plots of results")
    shown.add_argument("results", type=Path, nargs="+", help="JSON that a run has written")
    shown.add_argument("--out", type=Path, help="folder to write to; default: beside each JSON")
    known, others = parser.parse_known_args(arguments)
    if known.command == "run":
        unknown = sorted(set(known.only.split(",")) - set(SUITES))
        if unknown:
            parser.error(f"--only: got {', '.join(unknown)}, expected some of {', '.join(SUITES)}")
        if importlib.util.find_spec("pytest_benchmark") is None:
            parser.error("pytest-benchmark is not installed; the extra `test` brings it")
        return _run(known.only.split(","), known.quick, known.results, others)
    if others:
        parser.error(f"unknown arguments: {' '.join(others)}")
    for path in known.results:
        for written in report.write(path, known.out or path.parent):
            print(written)
    return 0


def _run(names: list[str], quick: bool, results: Path, others: list[str]) -> int:
    results.mkdir(parents=True, exist_ok=True)
    unsorted = results / f"{time.strftime('%Y-%m-%d-%H%M%S', time.gmtime())}.json"
    suites = [str(FOLDER / f"bench_{name}.py") for name in names]
    options = ["-q", "--no-header", "--benchmark-columns=median,iqr,rounds", f"--benchmark-json={unsorted}"]
    selection = ["--quick"] if quick else []
    command = [sys.executable, "-m", "pytest", *suites, *options, *selection, *others]
    code = subprocess.run(command, cwd=FOLDER.parent).returncode
    if not unsorted.exists() or unsorted.stat().st_size == 0:
        # pytest-benchmark makes the file before it knows whether there will be anything to write.
        unsorted.unlink(missing_ok=True)
        return code
    path = _sort_in(unsorted, results)
    print("\n".join(map(str, [path, *report.write(path, path.parent)])))
    return code


def _sort_in(unsorted: Path, results: Path) -> Path:
    """Move a result to the folder of its machine; its name is its moment and its commit."""
    result = json.loads(unsorted.read_text())
    commit = (result["commit_info"].get("id") or "unknown")[:9]
    folder = results / report.folder_of(result)
    folder.mkdir(parents=True, exist_ok=True)
    return unsorted.rename(folder / f"{unsorted.stem}-{commit}.json")


if __name__ == "__main__":
    sys.exit(main())
