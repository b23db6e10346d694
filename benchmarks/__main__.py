"""Run the benchmarks: python -m benchmarks [--quick] [--only clip,sample] [--out FOLDER] [pytest's options]

pytest-benchmark measures; this adds a Markdown page next to its JSON, and prints the table of ratios last.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import report

FOLDER = Path(__file__).parent
SUITES = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
# Seconds per measurement; one pytest-benchmark option limits its rounds and those of the ratios.
QUICK_SECONDS, FULL_SECONDS = 0.15, 0.5


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks and return pytest's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="pytest takes the other options: --device cpu|cuda, --compile on|off|auto, --threads N, --seconds N "
        "(shapes that have not begun by then are skipped), -k, and those of pytest-benchmark, such as "
        "--benchmark-compare=FILE",
    )
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds: under a minute on two cores")
    parser.add_argument("--only", default=",".join(SUITES), help="comma-separated, of " + ", ".join(SUITES))
    parser.add_argument("--out", type=Path, help="folder for JSON and page; default: a new one for temporary files")
    known, others = parser.parse_known_args(arguments)
    names = known.only.split(",")
    if unknown := sorted(set(names) - set(SUITES)):
        parser.error(f"--only: got {', '.join(unknown)}, expected some of {', '.join(SUITES)}")
    if importlib.util.find_spec("pytest_benchmark") is None:
        parser.error("pytest-benchmark is not installed; the extra `test` brings it")
    out = known.out or Path(tempfile.mkdtemp(prefix="metta-fastagent-bench-"))
    out.mkdir(parents=True, exist_ok=True)
    target = (out / time.strftime("%Y-%m-%d-%H%M%S.json", time.gmtime())).resolve()
    command = [sys.executable, "-m", "pytest", *(str(FOLDER / f"bench_{name}.py") for name in names)]
    # A comparison needs pytest-benchmark's own tables.
    quiet = [] if any(option.startswith("--benchmark-compare") for option in others) else ["--benchmark-quiet"]
    command += ["-q", "--no-header", *quiet, "--benchmark-disable-gc", "--benchmark-min-time=0.001"]
    command += [f"--benchmark-max-time={QUICK_SECONDS if known.quick else FULL_SECONDS}", f"--benchmark-json={target}"]
    code = subprocess.run([*command, *(["--quick"] if known.quick else []), *others], cwd=FOLDER.parent).returncode
    # pytest-benchmark creates the file before it knows whether it has anything to write.
    if not target.exists() or target.stat().st_size == 0:
        target.unlink(missing_ok=True)
        return code
    result = json.loads(target.read_text())
    target.with_suffix(".md").write_text(report.markdown(result))
    print(f"\n{target}\n{target.with_suffix('.md')}\n\n{report.ratio_table(result)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
