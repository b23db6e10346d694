"""What a CUDA machine is asked for, in one go: tests, sanitizers, a short training, benchmarks and a report.

    bash tools/gpu.sh [--quick] [--only tests,bench] [--seconds 480] OUT

Each stage is a command with a limit, a log and a result of its own: one that fails or overruns costs only itself. At
the end OUT holds summary.md and summary.json. Needs nothing but what the stages import: no network, no installation.
Nothing here imports PyTorch, so that the summary is written whatever becomes of it.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PASSED, FAILED, SKIPPED, TIMED_OUT = "passed", "failed", "skipped", "timed out"
# Of a whole run; the benchmarks get what the other stages leave.
QUICK_SECONDS, FULL_SECONDS = 300.0, 480.0
# The benchmarks' own end and their report.
BENCH_RESERVE_SECONDS = 15.0
GPU_TESTS = (
    "tests/kernels",
    "tests/benchmarks/test_harness.py",
    "tests/benchmarks/test_launch_kernels.py",
    "tests/benchmarks/test_train_step.py",
    "tests/test_mixin_clip_weights.py",
    "tests/test_mixin_state.py",
    "tests/test_recurrent_segments.py",
    "tests/test_weight_metrics.py",
    "tests/train/test_environments.py",
    "tests/train/test_ratio.py",
)
TEST_PROCESSES = 8
SANITIZERS = ("memcheck", "initcheck", "racecheck")
# Apart from what a program under it ends with.
SANITIZER_FOUND = 86
# Where a policy beats a random one on the memory task: it is at the plateau of pressing any switch, or beyond.
QUICK_STEPS, FULL_STEPS = 80_000, 150_000
WHY_LENGTH = 200
# Stands for the JSON files that the benchmarks have written.
RESULTS = "{results}"

Verdict = tuple[str, str]  # status and why


def by_exit_code(code: int, log: str) -> Verdict:
    """Passed for 0; the log's last line otherwise."""
    return (PASSED, "") if code == 0 else (FAILED, f"exit status {code}: {last_line(log)}")


class Stage(NamedTuple):
    """One command and its limit; None for the seconds that the other stages leave."""

    name: str
    command: Sequence[str]
    seconds: float | None
    needs_gpu: bool = True
    environment: Mapping[str, str] = {}
    # Without one of these modules the stage is skipped.
    modules: Sequence[str] = ()
    # Why it cannot run here, where that is known beforehand.
    blocked: str = ""
    # What the exit code and the log mean.
    judge: Callable[[int, str], Verdict] = by_exit_code


class Result(NamedTuple):
    """What became of a stage."""

    stage: str
    status: str
    seconds: float
    why: str
    file: str


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where no stage failed or overran, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for logs and results, new or empty")
    parser.add_argument("--quick", action="store_true", help=f"fits in {QUICK_SECONDS / 60:g} minutes")
    parser.add_argument("--only", help="comma-separated, of " + ", ".join(stage_names()) + "; sweep runs only if named")
    parser.add_argument("--seconds", type=float, help=f"for everything; default {FULL_SECONDS:g}")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        parser.error(f"OUT: {options.out} is not empty")
    stages = make_stages(out, options.quick)
    wanted = set(options.only.split(",")) if options.only else set(stage_names()) - {"sweep"}
    if wanted - set(stage_names()):
        parser.error(f"--only: got {options.only}, expected some of {', '.join(stage_names())}")
    stages = [stage for stage in stages if stage.name in wanted | {"versions"}]
    seconds = options.seconds or (QUICK_SECONDS if options.quick else FULL_SECONDS)
    results, facts = run_stages(stages, out, seconds)
    write_summary(results, facts, out, options.quick, seconds)
    print((out / "summary.md").read_text())
    return int(any(result.status in (FAILED, TIMED_OUT) for result in results))


def stage_names() -> list[str]:
    """In the order in which they run."""
    return ["versions", "explain", "tests", "kernels", *SANITIZERS, "training", "bench", "sweep", "report"]


def make_stages(out: Path, quick: bool) -> list[Stage]:
    """All stages; limits in seconds for the full form and the quick one."""

    def limit(full: float, short: float) -> float:
        return short if quick else full

    python = (sys.executable, "-m")
    steps = str(QUICK_STEPS if quick else FULL_STEPS)
    training = ("--env", "memory", "--device", "cuda", "--seed", "1", "--steps", steps, "--quiet")
    bench = ("--device", "cuda", "--results", f"{out}/results", "--seconds", "{seconds}")
    return [
        Stage("versions", [*python, "benchmarks.machine"], limit(40, 40), needs_gpu=False, judge=judge_versions),
        Stage("explain", [*python, "metta_fastagent"], limit(20, 20), needs_gpu=False),
        Stage("tests", test_command(out), limit(95, 55), modules=("pytest",), judge=judge_tests),
        Stage("kernels", [*python, "benchmarks.launch_kernels"], limit(25, 20)),
        *(sanitizer_stage(tool, limit(35, 25)) for tool in SANITIZERS),
        Stage(
            "training",
            [*python, "metta_fastagent.train", *training, "--out", f"{out}/training"],
            limit(50, 35),
            modules=("matplotlib",),
            judge=judge_training,
        ),
        Stage(
            "bench",
            [*python, "benchmarks", "run", *(["--quick"] if quick else []), *bench],
            None,
            modules=("pytest", "pytest_benchmark"),
        ),
        Stage("sweep", [*python, "benchmarks.sweep", "--seconds", "{seconds}", "--out", f"{out}/sweep.json"], None),
        Stage("report", [*python, "benchmarks", "report", "--out", f"{out}/report", RESULTS], limit(20, 15)),
    ]


def test_command(out: Path) -> list[str]:
    """pytest for the tests that need a GPU, in several processes where pytest-xdist is there."""
    processes = min(TEST_PROCESSES, (os.cpu_count() or 1) // 2)
    spread = ["-n", str(processes)] if processes > 1 and importlib.util.find_spec("xdist") else []
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={out}/tests.xml"]
    return [sys.executable, "-m", "pytest", *GPU_TESTS, *options, *spread]


def sanitizer_stage(tool: str, seconds: float) -> Stage:
    """compute-sanitizer over the program that launches each kernel once, at small odd sizes."""
    program = find_sanitizer()
    options = ["--tool", tool, "--target-processes", "application-only", "--report-api-errors", "no"]
    options += ["--print-limit", "20", "--error-exitcode", str(SANITIZER_FOUND)]
    return Stage(
        tool,
        [program or "compute-sanitizer", *options, sys.executable, "-m", "benchmarks.launch_kernels"],
        seconds,
        # Each tensor in memory of its own: what lies beside it, or was there before, is not another tensor's.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool != "racecheck" else {},
        blocked="" if program else "compute-sanitizer is neither on the PATH nor in CUDA's folder",
        judge=judge_sanitizer,
    )


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer."""
    folders = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = os.pathsep.join(f"{folder}/bin" for folder in (*folders, "/usr/local/cuda") if folder)
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=places)


def judge_versions(code: int, log: str) -> Verdict:
    """Passed where the machine was described: `why` is that line of JSON."""
    described = [line for line in log.splitlines() if line.startswith("{")]
    if code != 0 or not described:
        return FAILED, f"exit status {code}: {last_line(log)}"
    return PASSED, described[-1]


def judge_tests(code: int, log: str) -> Verdict:
    """Passed where tests ran and none failed."""
    if code != 0:
        return by_exit_code(code, log)
    return (PASSED, last_line(log)) if re.search(r"\b\d+ passed", log) else (FAILED, f"no test ran: {last_line(log)}")


def judge_sanitizer(code: int, log: str) -> Verdict:
    """Passed where every kernel was launched and nothing was found."""
    if "Device not supported" in log:
        return SKIPPED, "compute-sanitizer does not support this device or the machine around it"
    summaries = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", log, re.MULTILINE)
    why = summaries[-1] if summaries else last_line(log)
    # Hazards come as "N hazards displayed (E errors, W warnings)".
    found = any(int(count) for count in re.findall(r"(\d+) (?:errors?|hazards?)", why))
    launched = re.search(r"^\d+ launches of \d+ kernels.*$", log, re.MULTILINE)
    if code == 0 and summaries and not found and launched:
        return PASSED, f"{launched.group()}; {why}"
    return FAILED, why if found else f"exit status {code}: {why}"


def judge_training(code: int, log: str) -> Verdict:
    """Passed where the policy beats a random one for sure, and ran on Triton's kernels."""
    if code != 0:
        return by_exit_code(code, log)
    bound = re.search(r"^learned - random .*lower bound (-?[\d.]+)", log, re.MULTILINE)
    backend = re.search(r"^backend +(.*)$", log, re.MULTILINE)
    if bound is None or backend is None:
        return FAILED, f"no summary: {last_line(log)}"
    why = f"{' '.join(bound.group().split())}; {backend.group(1)}"
    learned = float(bound.group(1)) > 0
    return (PASSED, why) if learned and backend.group(1).startswith("triton") else (FAILED, why)


def last_line(log: str) -> str:
    """The last line with anything in it, shortened."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:WHY_LENGTH] if lines else "no output"


def run_stages(stages: Sequence[Stage], out: Path, seconds: float) -> tuple[list[Result], dict[str, Any]]:
    """Run one stage after the other; their results, and what the stage `versions` has told of the machine."""
    deadline = time.monotonic() + seconds
    results: list[Result] = []
    facts: dict[str, Any] = {"cuda": False, "why": "the stage versions has told nothing"}
    for position, stage in enumerate(stages):
        limit = limit_of(stages[position:], deadline - time.monotonic())
        command = filled_in(stage.command, out, limit)
        why_not = blocker(stage, command, facts, limit)
        print(f"{stage.name}: {f'skipped: {why_not}' if why_not else f'at most {limit:.0f} s'}", flush=True)
        if why_not:
            results.append(Result(stage.name, SKIPPED, 0.0, why_not, ""))
            continue
        result = run_stage(stage, command, out / f"{stage.name}.log", limit)
        print(f"{stage.name}: {result.status} after {result.seconds:.0f} s {result.why}", flush=True)
        results.append(result)
        if stage.name == "versions" and result.status == PASSED:
            facts = json.loads(result.why)
            results[-1] = result._replace(why="")
    return results, facts


def limit_of(stages: Sequence[Stage], left: float) -> float:
    """Seconds for the first of these stages; those without a limit share what the others leave."""
    if stages[0].seconds is not None:
        return min(stages[0].seconds, left)
    return (left - sum(stage.seconds or 0.0 for stage in stages)) / sum(stage.seconds is None for stage in stages)


def blocker(stage: Stage, command: Sequence[str], facts: Mapping[str, Any], limit: float) -> str:
    """Why a stage cannot run, or nothing."""
    if stage.needs_gpu and not facts["cuda"]:
        return f"no CUDA device: {facts['why']}"
    missing = [module for module in stage.modules if importlib.util.find_spec(module) is None]
    if stage.blocked or missing:
        return stage.blocked or f"not installed: {', '.join(missing)}"
    if RESULTS in stage.command and not any(part.endswith(".json") for part in command):
        return "there are no results"
    return "the time is used up" if limit <= 0 else ""


def filled_in(command: Sequence[str], out: Path, limit: float) -> list[str]:
    """The command with its seconds and the benchmarks' results."""
    filled: list[str] = []
    for part in command:
        if part == RESULTS:
            filled += sorted(map(str, (out / "results").glob("*/*.json")))
        else:
            filled.append(part.replace("{seconds}", f"{max(1.0, limit - BENCH_RESERVE_SECONDS):.0f}"))
    return filled


def run_stage(stage: Stage, command: Sequence[str], log: Path, limit: float) -> Result:
    """Run a command with its output in `log`; after `limit` seconds it is killed with all that it has started."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **stage.environment}
    started = time.monotonic()
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                list(command),
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Result(stage.name, FAILED, 0.0, str(error), log.name)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill_all(process)
    seconds = time.monotonic() - started
    text = log.read_text(errors="replace")
    if code is None:
        return Result(
            stage.name, TIMED_OUT, seconds, f"killed at its limit of {limit:.0f} s: {last_line(text)}", log.name
        )
    status, why = stage.judge(code, text)
    return Result(stage.name, status, seconds, why, log.name)


def kill_all(process: subprocess.Popen) -> None:
    """Kill what is left of a process, of its group and, while it runs, of its descendants in groups of their own."""
    for pid in descendants(process.pid) if process.poll() is None else []:
        _kill(os.kill, pid)
    _kill(os.killpg, process.pid)
    process.wait()


def _kill(how: Callable[[int, int], None], pid: int) -> None:
    try:
        how(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def descendants(pid: int) -> list[int]:
    """Children of a process, their children, and so on; empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, waiting = [], [pid]
    while waiting:
        own = children.get(waiting.pop(), [])
        found += own
        waiting += own
    return found


def write_summary(results: Sequence[Result], facts: Mapping[str, Any], out: Path, quick: bool, seconds: float) -> None:
    """summary.json and summary.md."""
    whole = {"quick": quick, "limit_seconds": seconds, "machine": dict(facts)}
    whole["stages"] = [result._asdict() for result in results]
    (out / "summary.json").write_text(json.dumps(whole, indent=1) + "\n")
    lines = [f"# GPU run, {'quick' if quick else 'full'}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "| stage | status | seconds | why | file |", "| --- | --- | ---: | --- | --- |"]
    for result in results:
        why = result.why.replace("|", "\\|")
        lines.append(f"| {result.stage} | {result.status} | {result.seconds:.0f} | {why} | {result.file} |")
    (out / "summary.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
