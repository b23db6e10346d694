"""The script for a CUDA machine, with a stand-in for Python: each stage passes, fails or times out by itself."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from processes_for_tests import has_ended

ROOT = Path(__file__).resolve().parent.parent
STAGES = ["versions", "explain", "tests", "kernels", "memcheck", "initcheck", "racecheck", "training", "bench"]

# Reports a GPU and does what each stage expects; BEHAVIOUR comes first and may end the script.
PYTHON = """#!/usr/bin/env bash
[ "$1" = -c ] && exit 1
module="$2"
BEHAVIOUR
while [ $# -gt 1 ]; do [ "$1" = --out ] && out="$2"; shift; done
case "$module" in
  *benchmarks.machine*) echo '{"cuda": true, "name": "a GPU"}' ;;
  *pytest*) echo "3 passed, 1 skipped in 2.0s" ;;
  *launch_kernels*) echo "20 launches of 10 kernels on cuda" ;;
  *.train*) mkdir -p "$out"; touch "$out/curve.png" "$out/checkpoint.pt" "$out/log.csv"
    echo "learned - random  0.8, 95 % lower bound 0.700"; echo "backend           triton on cuda" ;;
  *sweep*) touch "$out" ; echo done ;;
  *benchmarks*) mkdir -p "$out"; touch "$out/run.md" "$out/run.json"; echo "the table" ;;
  *) echo "metta_fastagent on a GPU" ;;
esac
"""
SANITIZER = """#!/usr/bin/env bash
while [ "$1" != -m ]; do last="$1"; shift; done
"$last" "$@"
echo "========= ERROR SUMMARY: ${ERRORS:-0} errors"
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the script in an empty folder; returns its exit status and its rows: stage -> result and why."""
    for name in ("CUDA_HOME", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)

    def run_script(behaviour="", *arguments, sanitizer=SANITIZER):
        for name, text in (("python", PYTHON), ("compute-sanitizer", sanitizer)):
            (tmp_path / name).write_text(text.replace("BEHAVIOUR", behaviour))
            (tmp_path / name).chmod(0o755)
        environment = {**os.environ, "PYTHON": "./python", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = ["bash", str(ROOT / "tools" / "gpu.sh"), *arguments, "out"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        summary = tmp_path / "out" / "summary.md"
        lines = summary.read_text().splitlines()[4:] if summary.exists() else []
        rows = [[cell.strip() for cell in line.split(" | ")] for line in lines]
        return done, {row[0].strip("| "): (row[1], row[3].strip(" |")) for row in rows}

    return run_script


def results(rows):
    return {stage: result for stage, (result, _) in rows.items()}


def test_all_stages_pass_and_leave_few_files(run, tmp_path):
    done, rows = run("", "--only", ",".join([*STAGES, "sweep"]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(rows) == dict.fromkeys([*STAGES, "sweep"], "passed")
    assert rows["memcheck"][1] == "========= ERROR SUMMARY: 0 errors"
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) <= 8
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as archive:
        names = archive.getnames()
    assert {f"logs/{stage}.log" for stage in STAGES} <= set(names)
    assert "logs/training/log.csv" in names and "logs/training/checkpoint.pt" not in names


def test_failures_cost_only_their_stage(run):
    behaviour = """case "$module" in
      *pytest*) echo "1 failed | 2 passed"; exit 1 ;;
      *launch_kernels*) echo "nothing"; exit 0 ;;
      *.train*) echo "backend triton"; echo "learned - random, lower bound -0.100"; exit 0 ;;
    esac"""
    done, rows = run(behaviour)
    assert done.returncode == 1
    assert results(rows) == {
        stage: "passed" if stage in ("versions", "explain", "bench") else "failed" for stage in STAGES
    }
    assert rows["tests"][1] == r"exit status 1: 1 failed \| 2 passed"
    assert rows["kernels"][1] == "no line matches 'launches of': nothing"
    assert rows["training"][1].startswith("no line matches 'lower bound")


@pytest.mark.parametrize(
    ("script", "result"),
    [
        (SANITIZER.replace("${ERRORS:-0}", "2"), "failed"),
        (SANITIZER + "exit 86\n", "failed"),
        ("#!/bin/sh\necho 'Error: Device not supported.'\nexit 1\n", "skipped"),
        ("#!/bin/sh\nexit 127\n", "skipped"),
    ],
    ids=["errors", "status", "unsupported", "missing"],
)
def test_sanitizer(run, script, result):
    done, rows = run("", "--only", "memcheck", sanitizer=script)
    assert results(rows) == {"versions": "passed", "memcheck": result}
    assert done.returncode == (result == "failed")


def test_missing_module_is_named_with_a_remedy(run):
    _, rows = run("""echo "ModuleNotFoundError: No module named 'tensordict'"; exit 1""")
    assert results(rows) == {"versions": "failed", "explain": "failed"} | dict.fromkeys(STAGES[2:], "skipped")
    assert rows["versions"][1].startswith("exit status 1: No module named 'tensordict'; bring wheels")
    assert "pip install --no-index --no-deps --target DIR *.whl" in rows["versions"][1]
    assert rows["tests"][1] == "an earlier stage failed"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_hung_stage_is_killed_with_its_children(run, tmp_path):
    hang = f"""case "$module" in *pytest*) echo "test_a PASSED"; sleep 1000 & echo $! > {tmp_path}/pid; wait ;; esac"""
    done, rows = run(hang, "--only", "tests,kernels", "--seconds", "20")
    assert done.returncode == 1
    assert rows["tests"] == ("timed out", "killed after 3 s: test_a PASSED")
    assert rows["kernels"][0] == "passed"
    assert has_ended(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(("seconds", "limit"), [("480", 95), ("960", 190), ("48", 9)])
def test_limits_grow_with_the_seconds(run, tmp_path, seconds, limit):
    (tmp_path / "timeout").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/limits\nshift 2\nexec "$@"\n')
    (tmp_path / "timeout").chmod(0o755)
    run("", "--only", "tests", "--seconds", seconds)
    first, second = (tmp_path / "limits").read_text().splitlines()
    assert first.split()[1] == str(min(120, int(seconds)))
    assert second.split()[1] == str(limit)


def test_no_cuda_device(run):
    done, rows = run("""case "$module" in *machine*) echo '{"cuda": false}'; exit ;; esac""")
    assert done.returncode == 0
    assert results(rows) == {"versions": "passed", "explain": "passed"} | dict.fromkeys(STAGES[2:], "skipped")
    assert all(rows[stage][1] == "no CUDA device" for stage in STAGES[2:])


@pytest.mark.parametrize("arguments", [("--only", "tests,nonsense"), ("--seconds", "x"), ("--nonsense",)])
def test_bad_arguments_run_nothing(run, tmp_path, arguments):
    done, rows = run("", *arguments)
    assert (done.returncode, rows) == (2, {})
    assert ", expected " in done.stderr and not (tmp_path / "out").exists()


def test_results_of_two_runs_do_not_mix(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other").write_text("")
    done, _ = run()
    assert done.returncode == 2 and "expected a new or empty folder" in done.stderr
