"""The script for a CUDA machine, rehearsed with made-up stages: one that fails or overruns costs only itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes_for_tests import has_ended

from benchmarks import gpu
from benchmarks.gpu import FAILED, PASSED, SKIPPED, TIMED_OUT, Stage

ROOT = Path(__file__).resolve().parent.parent
MACHINE = '{"cuda": true, "name": "made-up GPU"}'


def stage(name, code, seconds: float | None = 60.0, **options):
    return Stage(name, [sys.executable, "-c", code], seconds, **options)


def versions(text=MACHINE):
    return stage("versions", f"print({text!r})", needs_gpu=False, judge=gpu.judge_versions)


def run(tmp_path, *stages, seconds=120.0):
    results, facts = gpu.run_stages([versions(), *stages], tmp_path, seconds)
    assert facts == json.loads(MACHINE)
    return {result.stage: result for result in results[1:]}


SLEEPS = "import time; time.sleep(100)"
# A child in the same group and one in a group of its own, as benchmarks start them.
WITH_CHILDREN = f"""
import subprocess, sys, time
for own_group in (False, True):
    child = subprocess.Popen([sys.executable, "-c", {SLEEPS!r}], start_new_session=own_group)
    print(child.pid, flush=True)
"""


def test_each_stage_has_a_status_a_reason_and_a_log_and_the_others_run(tmp_path):
    results = run(
        tmp_path,
        stage("fails", "print('it is broken'); raise SystemExit(3)"),
        stage("overruns", f"print('begun', flush=True); {SLEEPS}", 2.0),
        stage("lacks", "", modules=("json", "no_such_module")),
        stage("blocked", "", blocked="no such tool"),
        stage("missing", "")._replace(command=["/no/such/program"]),
        stage("works", "print('done')"),
    )
    assert {name: result.status for name, result in results.items()} == {
        "fails": FAILED,
        "overruns": TIMED_OUT,
        "lacks": SKIPPED,
        "blocked": SKIPPED,
        "missing": FAILED,
        "works": PASSED,
    }
    assert results["fails"].why == "exit status 3: it is broken"
    assert results["overruns"].why == "killed at its limit of 2 s: begun"
    assert results["lacks"].why == "not installed: no_such_module"
    assert results["blocked"].why == "no such tool"
    assert "/no/such/program" in results["missing"].why
    assert (tmp_path / results["works"].file).read_text() == "done\n"
    assert 2 <= results["overruns"].seconds < 30


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_what_an_overrunning_stage_has_started_is_killed(tmp_path):
    run(tmp_path, stage("overruns", WITH_CHILDREN + "time.sleep(100)", 4.0))
    children = (tmp_path / "overruns.log").read_text().split()
    assert len(children) == 2
    assert all(has_ended(child) for child in children)


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_what_a_stage_leaves_in_its_group_is_killed(tmp_path):
    assert run(tmp_path, stage("leaves", WITH_CHILDREN))["leaves"].status == PASSED
    first, second = (tmp_path / "leaves.log").read_text().split()
    assert has_ended(first)
    os.kill(int(second), 9)


def test_without_a_gpu_its_stages_are_skipped_with_the_reason(tmp_path):
    told = versions('{"cuda": false, "why": "no device"}')
    stages = [told, stage("needs", "raise SystemExit(1)"), stage("does not", "", needs_gpu=False)]
    results, _ = gpu.run_stages(stages, tmp_path, 60)
    assert [(result.status, result.why) for result in results[1:]] == [
        (SKIPPED, "no CUDA device: no device"),
        (PASSED, ""),
    ]


@pytest.mark.parametrize("code", ["raise SystemExit(1)", "print('no JSON')"])
def test_without_a_description_of_the_machine_nothing_needs_it(tmp_path, code):
    first = stage("versions", code, needs_gpu=False, judge=gpu.judge_versions)
    results, facts = gpu.run_stages([first, stage("needs", ""), stage("does not", "", needs_gpu=False)], tmp_path, 60)
    assert [result.status for result in results] == [FAILED, SKIPPED, PASSED]
    assert results[1].why == f"no CUDA device: {facts['why']}"


def test_the_time_is_shared_and_ends(tmp_path):
    fixed, open_ended = stage("fixed", "", 30.0), stage("open", "", None)
    assert gpu.limit_of([fixed], 100) == 30
    assert gpu.limit_of([fixed], 10) == 10
    assert gpu.limit_of([open_ended, fixed], 100) == 70
    assert gpu.limit_of([open_ended, open_ended, fixed], 100) == 35
    results = run(tmp_path, stage("long", SLEEPS), stage("late", ""), seconds=2.0)
    assert results["long"].status in (TIMED_OUT, SKIPPED)
    assert (results["late"].status, results["late"].why) == (SKIPPED, "the time is used up")


def test_the_benchmarks_are_told_their_time_and_the_report_their_results(tmp_path):
    command = ["run", "--seconds", "{seconds}", gpu.RESULTS]
    assert gpu.filled_in(command, tmp_path, 100) == ["run", "--seconds", f"{100 - gpu.BENCH_RESERVE_SECONDS:.0f}"]
    report = Stage("report", [sys.executable, gpu.RESULTS], 10)
    assert run(tmp_path, report)["report"] == gpu.Result("report", SKIPPED, 0.0, "there are no results", "")
    written = tmp_path / "results" / "some-gpu" / "run.json"
    written.parent.mkdir(parents=True)
    written.write_text("{}")
    assert gpu.filled_in(command, tmp_path, 100)[3:] == [str(written)]


@pytest.mark.parametrize(
    ("code", "expected"), [("", 0), ("raise SystemExit(1)", 1), (SLEEPS, 1)], ids=["passed", "failed", "timed out"]
)
def test_the_exit_status_and_the_summary(tmp_path, monkeypatch, capsys, code, expected):
    made = [versions(), stage("explain", code, 2.0), stage("report", "", modules=("no_such_module",))]
    monkeypatch.setattr(gpu, "make_stages", lambda out, quick: made)
    assert gpu.main([str(tmp_path / "out"), "--quick"]) == expected
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [each["stage"] for each in summary["stages"]] == ["versions", "explain", "report"]
    assert summary["stages"][1]["status"] == {0: PASSED, 1: TIMED_OUT if code == SLEEPS else FAILED}[expected]
    assert summary["machine"]["name"] == "made-up GPU"
    table = (tmp_path / "out" / "summary.md").read_text()
    assert "| report | skipped | 0 | not installed: no_such_module |  |" in table
    assert table in capsys.readouterr().out


def test_a_stage_that_is_unknown_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path), "--only", "tests,nonsense"])
    assert "nonsense" in capsys.readouterr().err


def test_results_of_two_runs_are_not_mixed(tmp_path, capsys):
    (tmp_path / "summary.md").write_text("of another run")
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path)])
    assert f"OUT: {tmp_path} is not empty" in capsys.readouterr().err
    assert (tmp_path / "summary.md").read_text() == "of another run"


@pytest.mark.parametrize(("quick", "seconds", "least"), [(True, gpu.QUICK_SECONDS, 40), (False, gpu.FULL_SECONDS, 120)])
def test_the_limits_leave_the_benchmarks_some_time(tmp_path, quick, seconds, least):
    stages = gpu.make_stages(tmp_path, quick)
    assert [each.name for each in stages] == gpu.stage_names()
    assert {each.name for each in stages if each.seconds is None} == {"bench", "sweep"}
    assert {each.name for each in stages if not each.needs_gpu} == {"versions", "explain"}
    assert seconds <= {True: 300, False: 480}[quick]
    assert sum(each.seconds or 0 for each in stages) <= seconds - least


def test_sanitizers_see_each_tensor_in_memory_of_its_own(monkeypatch, tmp_path):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    made = {name: gpu.sanitizer_stage(name, 30) for name in gpu.SANITIZERS}
    assert {name for name, each in made.items() if each.environment} == {"memcheck", "initcheck"}
    assert all(each.command[:3] == [str(tool), "--tool", name] for name, each in made.items())
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: None)
    assert "neither on the PATH" in gpu.sanitizer_stage("memcheck", 30).blocked


LAUNCHED = "30 launches of 15 kernels on cuda\n"
NO_ERRORS, NO_HAZARDS = "ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"


@pytest.mark.parametrize(
    ("code", "log", "expected"),
    [
        (0, f"{LAUNCHED}========= {NO_ERRORS}\n", (PASSED, f"{LAUNCHED.strip()}; {NO_ERRORS}")),
        (0, f"{LAUNCHED}========= {NO_HAZARDS}\n", (PASSED, f"{LAUNCHED.strip()}; {NO_HAZARDS}")),
        (86, f"{LAUNCHED}========= ERROR SUMMARY: 3 errors\n", (FAILED, "ERROR SUMMARY: 3 errors")),
        (0, f"{LAUNCHED}========= ERROR SUMMARY: 1 error\n", (FAILED, "ERROR SUMMARY: 1 error")),
        (
            0,
            f"{LAUNCHED}========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n",
            (FAILED, "RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)"),
        ),
        (1, f"a traceback\n========= {NO_ERRORS}\n", (FAILED, f"exit status 1: {NO_ERRORS}")),
        (0, f"========= {NO_ERRORS}\n", (FAILED, f"exit status 0: {NO_ERRORS}")),
        (0, LAUNCHED, (FAILED, f"exit status 0: {LAUNCHED.strip()}")),
        (1, "========= Device not supported. Please refer\n", (SKIPPED, None)),
    ],
)
def test_what_a_sanitizer_says(code, log, expected):
    status, why = gpu.judge_sanitizer(code, log)
    assert status == expected[0]
    assert why == expected[1] or expected[1] is None


def training_log(bound, backend="triton on cuda"):
    return f"learned - random  0.3, 95 % lower bound {bound}\nscore  0.4 = ...\nbackend           {backend}\n"


@pytest.mark.parametrize(
    ("code", "log", "status"),
    [
        (0, training_log("0.829"), PASSED),
        (0, training_log("-0.010"), FAILED),
        (0, training_log("0.829", "eager on cuda"), FAILED),
        (1, training_log("0.829"), FAILED),
        (0, "nothing of the kind\n", FAILED),
    ],
)
def test_a_training_has_to_beat_a_random_policy_on_the_kernels(code, log, status):
    assert gpu.judge_training(code, log)[0] == status


@pytest.mark.parametrize(
    ("code", "log", "status"),
    [
        (0, "91 passed, 3 skipped in 40.2s\n", PASSED),
        (0, "94 skipped in 2.1s\n", FAILED),
        (1, "1 failed, 90 passed in 40.2s\n", FAILED),
        (5, "no tests ran in 2.1s\n", FAILED),
    ],
)
def test_tests_have_to_run(code, log, status):
    assert gpu.judge_tests(code, log)[0] == status


def test_the_training_prints_what_is_read_off_it(tmp_path, capsys):
    from metta_fastagent.train import cli

    arguments = ["--steps", "32", "--num-envs", "4", "--segment-length", "4", "--minibatches", "1", "--epochs", "1"]
    assert cli.main([*arguments, "--quiet", "--out", str(tmp_path)]) == 0
    status, why = gpu.judge_training(0, capsys.readouterr().out)
    assert status == FAILED
    assert why.startswith("learned - random ")
    assert why.endswith(" on cpu")


def command_of(name, out, quick=True):
    """Module and arguments of a stage, filled in for 100 seconds."""
    (made,) = [each for each in gpu.make_stages(out, quick) if each.name == name]
    python, option, module, *arguments = gpu.filled_in(made.command, out, 100)
    assert (python, option) == (sys.executable, "-m")
    return module, arguments


@pytest.mark.parametrize("quick", [True, False])
def test_the_training_takes_the_arguments_that_it_gets(tmp_path, quick):
    from metta_fastagent.train import cli

    module, arguments = command_of("training", tmp_path, quick)
    options = vars(cli.make_parser().parse_args(arguments))
    assert module == "metta_fastagent.train"
    assert (options["device"], options["quiet"], options["out"]) == ("cuda", True, tmp_path / "training")
    assert options["steps"] == (gpu.QUICK_STEPS if quick else gpu.FULL_STEPS)


@pytest.mark.parametrize("quick", [True, False])
def test_the_benchmarks_take_the_arguments_that_they_get(tmp_path, monkeypatch, quick):
    from benchmarks import __main__ as entry

    calls = []
    monkeypatch.setattr(entry, "_run", lambda *arguments: calls.append(arguments) or 0)
    module, arguments = command_of("bench", tmp_path, quick)
    assert (module, entry.main(arguments)) == ("benchmarks", 0)
    seconds = 100 - gpu.BENCH_RESERVE_SECONDS
    assert calls == [(list(entry.SUITES), quick, tmp_path / "results", seconds, ["--device", "cuda"])]


def test_the_report_takes_the_arguments_that_it_gets(tmp_path, monkeypatch):
    from benchmarks import __main__ as entry

    written = tmp_path / "results" / "some-gpu" / "run.json"
    written.parent.mkdir(parents=True)
    written.write_text("{}")
    calls = []
    monkeypatch.setattr(entry.report, "write", lambda path, out: calls.append((path, out)) or [])
    module, arguments = command_of("report", tmp_path)
    assert (module, entry.main(arguments)) == ("benchmarks", 0)
    assert calls == [(written, tmp_path / "report")]


def test_the_sweep_takes_the_arguments_that_it_gets(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from benchmarks import sweep

    monkeypatch.setattr(sweep, "EXPERIMENTS", [sweep.EXPERIMENTS[0]._replace(sizes=[])])
    module, arguments = command_of("sweep", tmp_path)
    assert (module, sweep.main(arguments)) == ("benchmarks.sweep", 0)
    assert json.loads((tmp_path / "sweep.json").read_text())["rows"] == []


# Runs the program that it is given in Triton's interpreter, and says what the real one says.
SANITIZER = """#!/usr/bin/env bash
while [ "$1" != "$PYTHON" ]; do shift; done
TRITON_INTERPRET=1 "$@" --device cpu || exit 1
echo "========= ERROR SUMMARY: $ERRORS errors"
[ "$ERRORS" = 0 ] || exit 86
"""


@pytest.mark.parametrize(("errors", "status"), [("0", PASSED), ("2", FAILED)])
def test_a_sanitizer_watches_every_kernel(tmp_path, monkeypatch, errors, status):
    pytest.importorskip("triton")
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: str(tool))
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("ERRORS", errors)
    result = run(tmp_path, gpu.sanitizer_stage("memcheck", 90))["memcheck"]
    assert result.status == status
    assert f"ERROR SUMMARY: {errors} errors" in result.why
    assert " launches of " in (tmp_path / "memcheck.log").read_text()


def test_every_file_with_a_test_for_a_gpu_is_run():
    # Written in two parts, so that this file is none of them.
    mark = "pytest.mark." + "gpu"
    marked = {path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py") if mark in path.read_text()}
    run_there = [Path(name) for name in gpu.GPU_TESTS]
    assert all((ROOT / name).exists() for name in run_there)
    assert {path for path in marked if not any(path.is_relative_to(name) for name in run_there)} == set()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device, where the script would do all of its work")
def test_the_script_runs_to_its_end_on_a_machine_without_a_gpu(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "tools" / "gpu.sh"), "--quick", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = json.loads((tmp_path / "out" / "summary.json").read_text())["stages"]
    assert [each["stage"] for each in stages] == [name for name in gpu.stage_names() if name != "sweep"]
    assert [each["status"] for each in stages] == [PASSED] * 2 + [SKIPPED] * (len(stages) - 2)
    assert all(each["why"].startswith("no CUDA device: ") for each in stages[2:])
    assert torch.__version__ in (tmp_path / "out" / "summary.md").read_text()
