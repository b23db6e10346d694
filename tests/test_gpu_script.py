"""The script for a CUDA machine, where there is none: its stages are skipped, or run by a stand-in for Python."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from processes_for_tests import has_ended

ROOT = Path(__file__).resolve().parent.parent
STAGES = ["versions", "explain", "tests", "kernels", "memcheck", "initcheck", "racecheck", "training", "bench"]
SKIPPED = dict.fromkeys(STAGES[2:], "skipped")

# What the modules print on a machine with a GPU, so that each stage passes; FAULT comes first and may end the script.
PYTHON = """#!/usr/bin/env bash
module="$2"
FAULT
case "$module" in
  *machine) echo '{"cuda": true}' ;;
  *launch_kernels) echo "20 launches of 10 kernels on cuda; ERROR SUMMARY: 0 errors" ;;
  *train) echo "lower bound 0.7"; echo "backend triton" ;;
  *) echo "3 passed" ;;
esac
"""
SANITIZER = '#!/usr/bin/env bash\nwhile [ "$1" != -m ]; do last="$1"; shift; done\n"$last" "$@"\n'


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the script in an empty folder; returns its exit status and messages, and its rows: stage -> result, why."""
    for name in ("CUDA_HOME", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def run_script(*arguments, python="./python", fault="", sanitizer=SANITIZER):
        for name, text in (("python", PYTHON.replace("FAULT", fault)), ("compute-sanitizer", sanitizer)):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        command = ["bash", str(ROOT / "tools" / "gpu.sh"), *arguments, "out"]
        environment = {**os.environ, "PYTHON": python}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        summary = tmp_path / "out" / "summary.md"
        lines = summary.read_text().splitlines()[4:] if summary.exists() else []
        rows = [[cell.strip("| ") for cell in line.split(" | ")] for line in lines]
        return done, {row[0]: (row[1], row[3]) for row in rows}

    return run_script


def results(rows):
    return {stage: result for stage, (result, _) in rows.items()}


def test_without_a_device_all_but_the_versions_is_skipped(run, tmp_path):
    done, rows = run(python=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(rows) == {"versions": "passed", "explain": "passed"} | SKIPPED
    assert all(rows[stage][1] == "no CUDA device" for stage in SKIPPED)
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as archive:
        assert {"logs/versions.log", "logs/explain.log"} <= set(archive.getnames())


def test_all_stages_pass_and_leave_few_files(run, tmp_path):
    training = '[[ $module == *train ]] && mkdir -p "${@: -1}" && touch "${@: -1}"/{curve.png,checkpoint.pt,log.csv}'
    done, rows = run("--only", ",".join([*STAGES, "sweep"]), fault=training)
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(rows) == dict.fromkeys([*STAGES, "sweep"], "passed")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"summary.md", "logs.tar.gz", "curve.png"}
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as archive:
        names = set(archive.getnames())
    assert {f"logs/{stage}.log" for stage in STAGES} <= names
    assert "logs/training/log.csv" in names and "logs/training/checkpoint.pt" not in names


UNWATCHED = "[[ $module == *launch_kernels && -z $PYTORCH_NO_CUDA_MEMORY_CACHING ]]"
FAULTS = [
    (
        "tests",
        '[[ $module == pytest ]] && echo "1 failed | 2 passed" && exit 1',
        r"exit status 1: 1 failed \| 2 passed",
    ),
    ("kernels", f"{UNWATCHED} && echo nothing && exit", "no line matches 'launches of': nothing"),
    (
        "training",
        "[[ $module == *train ]] && echo 'backend triton, lower bound -0.1' && exit",
        "no line matches 'lower bo",
    ),
]


@pytest.mark.parametrize(("stage", "fault", "why"), FAULTS)
def test_a_failure_costs_only_its_stage(run, stage, fault, why):
    done, rows = run(fault=fault)
    assert done.returncode == 1
    assert results(rows) == dict.fromkeys(STAGES, "passed") | {stage: "failed"}
    assert rows[stage][1].startswith(why)


@pytest.mark.parametrize(
    ("sanitizer", "result"),
    [
        (SANITIZER + "exit 86\n", "failed"),
        ("#!/bin/sh\necho '20 launches of 10 kernels; ERROR SUMMARY: 2 errors'\n", "failed"),
        ("#!/bin/sh\necho 'Error: Device not supported.'\nexit 1\n", "skipped"),
        ("#!/bin/sh\nexit 127\n", "skipped"),
    ],
    ids=["errors", "status", "unsupported", "missing"],
)
def test_sanitizer(run, sanitizer, result):
    done, rows = run("--only", "memcheck", sanitizer=sanitizer)
    assert results(rows) == {"versions": "passed", "memcheck": result}
    assert done.returncode == (result == "failed")


def test_missing_module_is_named_with_a_remedy(run):
    _, rows = run(fault="""echo "ModuleNotFoundError: No module named 'tensordict'"; exit 1""")
    assert results(rows) == {"versions": "failed", "explain": "failed"} | SKIPPED
    assert rows["versions"][1].startswith("exit status 1: No module named 'tensordict'; bring wheels")
    assert "pip install --no-index --no-deps --target DIR *.whl" in rows["versions"][1]
    assert rows["tests"][1] == "an earlier stage failed"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_hung_stage_is_killed_with_its_children_after_its_share_of_the_seconds(run, tmp_path):
    hang = f"[[ $module == pytest ]] && echo test_a PASSED && {{ sleep 1000 & echo $! > {tmp_path}/pid; wait; }}"
    done, rows = run("--only", "tests,kernels", "--seconds", "20", fault=hang)
    assert done.returncode == 1
    assert rows["tests"] == ("timed out", "killed after 3 s: test_a PASSED")
    assert rows["kernels"][0] == "passed"
    assert has_ended(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("arguments", [("--only", "tests,nonsense"), ("--seconds", "x"), ("--nonsense",)])
def test_bad_arguments_run_nothing(run, tmp_path, arguments):
    done, rows = run(*arguments)
    assert (done.returncode, rows) == (2, {})
    assert ", expected " in done.stderr and not (tmp_path / "out").exists()


def test_results_of_two_runs_do_not_mix(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other").write_text("")
    done, _ = run()
    assert done.returncode == 2 and "expected a new or empty folder" in done.stderr
