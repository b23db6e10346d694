"""The command line: a small run, resuming and interrupting it, and one line for each invalid request."""

import csv
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from examples import compare_states
from metta_fastagent.runtime.install import how_to_install
from metta_fastagent.train import cli, evaluate, report, resume
from metta_fastagent.train import run as train_run
from metta_fastagent.train.checkpoint import load_checkpoint, save_checkpoint
from metta_fastagent.train.config import DEFAULTS, TrainConfig
from metta_fastagent.train.environments import make_environment
from metta_fastagent.train.environments.memory import MemoryEnvironment
from metta_fastagent.train.evaluate import Evaluation, mean_and_lower_bound
from metta_fastagent.train.trainer import COLUMNS, Trainer

SMALL = ["--num-envs", "8", "--segment-length", "6", "--minibatches", "2"]
UPDATE_STEPS = 48


def lines_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command in an empty folder; restores threads and the mode of subnormal numbers."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield lambda *arguments: cli.main([str(argument) for argument in arguments])
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def test_a_run_leaves_its_files_and_a_summary(run, tmp_path, capsys):
    assert run(*SMALL, "--steps", 4 * UPDATE_STEPS, "--seed", 3, "--analyze-weights-interval", 2) == 0
    folder = tmp_path / "runs" / "memory-seed3"
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    rows = lines_of(folder / "log.csv")
    assert tuple(rows[0]) == COLUMNS
    assert [int(row["update"]) for row in rows] == [1, 2, 3, 4]
    assert [int(row["steps"]) for row in rows] == [48, 96, 144, 192]
    for row in rows:
        assert all(math.isfinite(float(value)) for name, value in row.items() if value)
    assert [bool(row["evaluated_return"]) for row in rows] == [False, False, False, True]
    metrics = [json.loads(line) for line in (folder / "weight_metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in metrics] == [2, 4]
    assert {"policy.fc1", "policy.critic_1"} <= {layer["name"] for layer in metrics[0]["metrics"]}
    out, err = capsys.readouterr()
    assert err == ""
    for text in ("random 0.", "scripted 1.000", "learned 0.", "score", "backend", " on cpu", "environment "):
        assert text in out, text
    assert f"learning curve    {folder.relative_to(tmp_path)}/learning_curve.png" in out
    assert re.search(r"last episodes +(no episode ended|return 0\.\d+, length \d+\.\d)\n", out)
    assert re.search(r"last update +entropy 2\.\d+, KL 0\.\d+, policy loss -?0\.\d+, value loss 0\.\d+\n", out)
    assert all(len(line) < 80 for line in out.splitlines() if "/" not in line or "steps/s" in line)
    assert "stopped" not in out
    assert "resume" in out and "--resume runs/memory-seed3/checkpoint.pt --steps 384" in out


def test_subnormal_numbers_are_flushed(run):
    def product() -> float:
        return (torch.tensor([1000], dtype=torch.int32).view(torch.float32) * 1).item()

    assert product() != 0
    assert run(*SMALL, "--quiet", "--steps", UPDATE_STEPS) == 0
    assert product() == 0


def test_a_resumed_run_continues_the_log_and_equals_the_whole_run(run, tmp_path):
    assert run(*SMALL, "--quiet", "--steps", 6 * UPDATE_STEPS, "--out", "whole") == 0
    assert run(*SMALL, "--quiet", "--steps", 3 * UPDATE_STEPS, "--out", "halves") == 0
    assert run("--quiet", "--resume", "halves/checkpoint.pt", "--steps", 6 * UPDATE_STEPS) == 0
    assert [int(row["update"]) for row in lines_of(tmp_path / "halves" / "log.csv")] == [1, 2, 3, 4, 5, 6]
    whole, halves = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "halves"))
    for name, value in whole["model"].items():
        assert torch.equal(value, halves["model"][name]), name
    assert halves["counters"]["steps"] == 6 * UPDATE_STEPS


def test_a_run_that_is_made_longer_does_not_raise_the_learning_rate(run, tmp_path, capsys):
    annealed = ("--quiet", "--evaluation-interval", 0, "--lr", 0.008, "--anneal-lr", 0.5)
    assert run(*SMALL, *annealed, "--steps", 8 * UPDATE_STEPS, "--out", "run") == 0
    # 1 - 7/8 of all updates are left, a quarter of the last half
    falling = [0.008] * 5 + [0.006, 0.004, 0.002]
    assert [float(row["lr"]) for row in lines_of(tmp_path / "run" / "log.csv")] == pytest.approx(falling)
    assert run("--quiet", "--resume", "run/checkpoint.pt", "--steps", 16 * UPDATE_STEPS) == 0
    assert "the learning rate has fallen to 0.002 and stays there" in capsys.readouterr().err
    rates = [float(row["lr"]) for row in lines_of(tmp_path / "run" / "log.csv")]
    assert rates == pytest.approx(falling + [0.002] * 7 + [0.001])


def test_a_resumed_run_on_another_backend_says_so(run, capsys, monkeypatch):
    assert run(*SMALL, "--quiet", "--steps", UPDATE_STEPS, "--out", "a") == 0
    assert run("--quiet", "--resume", "a/checkpoint.pt", "--steps", 2 * UPDATE_STEPS, "--out", "b") == 0
    assert "note:" not in capsys.readouterr().err
    monkeypatch.setattr(train_run.metta_fastagent, "backend", lambda device: "another")
    assert run("--quiet", "--resume", "a/checkpoint.pt", "--steps", 2 * UPDATE_STEPS, "--out", "c") == 0
    assert "this run uses another: its random numbers differ" in capsys.readouterr().err


def test_rows_after_the_checkpoint_are_dropped_on_resume(run, tmp_path):
    arguments = ("--quiet", "--steps", 2 * UPDATE_STEPS, "--analyze-weights-interval", 1)
    assert run(*SMALL, *arguments, "--out", "killed") == 0
    log, metrics = tmp_path / "killed" / "log.csv", tmp_path / "killed" / "weight_metrics.jsonl"
    log.write_text(log.read_text() + log.read_text().splitlines()[-1].replace("2,96", "3,144", 1) + "\n4,192,1.")
    metrics.write_text(metrics.read_text() + '{"update": 3, "metrics": []}\n{"upda')
    assert run("--quiet", "--resume", "killed/checkpoint.pt", "--steps", 4 * UPDATE_STEPS, "--out", "elsewhere") == 0
    assert [int(row["update"]) for row in lines_of(tmp_path / "elsewhere" / "log.csv")] == [1, 2, 3, 4]
    kept = (tmp_path / "elsewhere" / "weight_metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in kept] == [1, 2, 3, 4]


def test_resuming_without_steps_left_says_so_and_only_evaluates(run, capsys):
    assert run(*SMALL, "--quiet", "--steps", 90, "--out", "done") == 0
    before = load_checkpoint(Path("done/checkpoint.pt"))
    summary = capsys.readouterr().out
    assert run("--quiet", "--resume", "done/checkpoint.pt", "--out", "again") == 0
    out, err = capsys.readouterr()
    assert err.endswith(
        "note: the checkpoint has 96 steps and --steps is 90: nothing to train, only evaluating; "
        "to continue, pass e.g. --steps 192\n"
    )
    assert err.count("\n") == 1 and out == summary.replace("done/", "again/")
    # the summary names this file
    again = load_checkpoint(Path("again/checkpoint.pt"))
    assert run("--quiet", "--resume", "done/checkpoint.pt", "--steps", 1) == 0
    assert load_checkpoint(Path("done/checkpoint.pt"))["config"]["steps"] == 90
    assert again["counters"] == before["counters"]
    assert all(torch.equal(value, before["model"][name]) for name, value in again["model"].items())


def test_the_resume_command_names_this_python(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = ["-m", "metta_fastagent.train", "--resume", "a b/checkpoint.pt"]
    for python, named in (
        ("/elsewhere/my env/bin/python3", "/elsewhere/my env/bin/python3"),
        (f"{tmp_path}/.venv/bin/python", ".venv/bin/python"),
        # a name without a slash would be looked up on the PATH
        (f"{tmp_path}/python", f"{tmp_path}/python"),
    ):
        monkeypatch.setattr(sys, "executable", python)
        assert shlex.split(resume.resume_command(Path("a b/checkpoint.pt"))) == [named, *arguments]


def start_run(tmp_path, *arguments):
    """A run in a process of its own, with SIGINT as in a terminal."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "metta_fastagent.train", *SMALL, *arguments]
    return subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_ctrl_c_saves_a_checkpoint_and_prints_the_command_that_resumes(run, tmp_path):
    process = start_run(tmp_path, "--quiet", "--steps", str(10**9), "--checkpoint-interval", "0", "--out", "my run")
    log = tmp_path / "my run" / "log.csv"
    # a row of the log: updates are under way
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    announced, command = err.splitlines()[-2:]
    assert announced.endswith("interrupted; resume with:")
    assert command == f"{sys.executable} -m metta_fastagent.train --resume 'my run/checkpoint.pt'"
    updates = load_checkpoint(tmp_path / "my run" / "checkpoint.pt")["counters"]["updates"]
    assert updates == len(lines_of(log)) >= 2
    steps = (updates + 2) * UPDATE_STEPS
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(f"{command} --quiet --steps {steps}", shell=True, cwd=tmp_path, env=environment, check=True)
    assert run(*SMALL, "--quiet", "--steps", steps, "--out", "whole") == 0
    resumed, whole = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("my run", "whole"))
    assert resumed["counters"]["updates"] == whole["counters"]["updates"] == updates + 2
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name]), name


def test_a_second_ctrl_c_stops_at_once(capfd):
    with train_run.deferred_interrupt() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "Ctrl-C again to stop now" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_ctrl_c_stays_ignored():
    # as in a job that a shell has started in the background
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with train_run.deferred_interrupt() as interrupted:
            signal.raise_signal(signal.SIGINT)
            assert not interrupted()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("function", "hint"), [("prepare", " before training"), ("report", "; resume with:\n")])
def test_ctrl_c_outside_of_training_is_no_traceback(run, capsys, monkeypatch, function, hint):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, function, interrupt)
    assert run(*SMALL, "--quiet", "--steps", UPDATE_STEPS) == 130
    err = capsys.readouterr().err
    assert f"interrupted{hint}" in err and err.count("\n") == 1 + hint.count("\n")


def test_a_second_run_does_not_overwrite_the_first(run, tmp_path, capsys):
    arguments = (*SMALL, "--quiet", "--steps", UPDATE_STEPS)
    assert run(*arguments) == run(*arguments) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["memory-seed1", "memory-seed1-2"]
    capsys.readouterr()
    assert run(*arguments, "--out", "runs/memory-seed1") == 2
    err = capsys.readouterr().err
    assert "expected a folder without one" in err and "pass --resume runs/memory-seed1/checkpoint.pt" in err
    # nor does a run that is resumed into the folder of another one
    resumed = ("--quiet", "--resume", "runs/memory-seed1/checkpoint.pt", "--steps", 2 * UPDATE_STEPS, "--out")
    assert run(*resumed, "runs/memory-seed1-2") == 2
    assert "got runs/memory-seed1-2, which has a checkpoint" in capsys.readouterr().err
    assert run(*resumed, "./runs/memory-seed1") == 0


def test_the_module_runs_and_is_quiet_without_a_terminal(tmp_path):
    command = [sys.executable, "-m", "metta_fastagent.train", *SMALL, "--steps", str(UPDATE_STEPS), "--threads", "1"]
    # the working tree, where the package is not installed
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\n100 %, " in f"\n{done.stdout}" and "\x1b" not in done.stdout


WRONG = [
    (["--env", "chess"], "env: got 'chess', expected one of memory, mettagrid"),
    (["--steps", "-5"], "steps: got -5, expected an integer above 0"),
    (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    (["--seed", "-1"], "seed: got -1, expected an integer from 0 to 2**31 - 1"),
    (["--device", "cuda:99"], "device: got 'cuda:99', expected an available torch device"),
    (["--device", "abacus"], "device: got 'abacus', expected an available torch device"),
    (["--device", "meta"], "device: got 'meta', expected an available torch device"),
    (["--device", ""], "device: got '', expected the name of a device"),
    (["--num-envs", "0"], "num_envs: got 0, expected an integer above 0"),
    (["--num-envs", "10", "--minibatches", "4"], "minibatches: got 4, expected a divisor of num_envs (10)"),
    (["--num-envs", "12", "--accumulate", "2"], "accumulate: got 2, expected a divisor of a minibatch's rows (3)"),
    (["--accumulate", "0"], "accumulate: got 0, expected an integer above 0"),
    (["--vf-clip-coef", "-1"], "vf_clip_coef: got -1.0, expected a finite number of at least 0"),
    (["--target-kl", "nan"], "target_kl: got nan, expected a finite number of at least 0"),
    (["--check-ranks", "-1"], "check_ranks: got -1, expected an integer of at least 0"),
    (["--segment-length", "0"], "segment_length: got 0, expected an integer above 0"),
    (["--epochs", "0"], "epochs: got 0, expected an integer above 0"),
    (["--lr", "nan"], "lr: got nan, expected a finite number above 0"),
    (["--lr", "0"], "lr: got 0.0, expected a finite number above 0"),
    (["--gamma", "1.5"], "gamma: got 1.5, expected a number from 0 to 1"),
    (["--gae-lambda", "-0.1"], "gae_lambda: got -0.1, expected a number from 0 to 1"),
    (["--clip-coef", "inf"], "clip_coef: got inf, expected a finite number above 0"),
    (["--clip-range", "-1"], "clip_range: got -1.0, expected a finite number of at least 0"),
    (["--clip-mode", "soft"], "clip_mode: got 'soft', expected one of absolute, init_scaled"),
    (["--ent-coef", "-1"], "ent_coef: got -1.0, expected a finite number of at least 0"),
    (["--max-grad-norm", "0"], "max_grad_norm: got 0.0, expected a finite number above 0"),
    (["--threads", "-2"], "threads: got -2, expected an integer of at least 0"),
    (["--speed", "11"], "unrecognized arguments: --speed 11; see --help"),
    (["--resume", "nowhere.pt"], "nowhere.pt: got no such file, expected a checkpoint of this trainer"),
    (["--resume", "folder"], "folder: got a folder, expected a checkpoint file such as checkpoint.pt inside it"),
    (["--resume", "text.pt"], "text.pt: got a damaged or foreign file"),
    (["--resume", "foreign.pt"], "foreign.pt: got a file without the format"),
    (["--resume", "saved.pt", "--lr", "0.5"], "lr: got 0.5, expected 0.001 as in the checkpoint"),
    (["--resume", "saved.pt", "--env", "mettagrid"], "env: got 'mettagrid', expected 'memory' as in the checkpoint"),
    (["--out", "text.pt"], "--out: got text.pt (File exists), expected a writable folder"),
    (["--out", "text.pt/below"], "--out: got text.pt/below (Not a directory), expected a writable folder"),
]


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    assert cli.main([*SMALL, "--quiet", "--steps", str(UPDATE_STEPS), "--lr", "0.001", "--out", str(folder)]) == 0
    return folder / "checkpoint.pt"


@pytest.mark.parametrize(
    ("arguments", "message"), WRONG, ids=lambda case: " ".join(case) if isinstance(case, list) else ""
)
def test_wrong_requests_are_one_line(run, tmp_path, capsys, saved_run, arguments, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "foreign.pt")
    (tmp_path / "saved.pt").write_bytes(saved_run.read_bytes())
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"python -m metta_fastagent.train: error: {message}") and err.count("\n") == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_comparison_without_matplotlib_says_how_to_install_it_before_training(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(Trainer, "__init__", lambda *arguments, **options: pytest.fail("started"))
    with pytest.raises(SystemExit) as stopped:
        compare_states.main([])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert "matplotlib: " in err and how_to_install("matplotlib") in err
    assert not list(tmp_path.iterdir())


def test_a_run_without_matplotlib_has_no_curve_and_says_how_to_get_it(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(*SMALL, "--steps", UPDATE_STEPS, "--out", "run") == 0
    out = capsys.readouterr().out
    assert f"not drawn without matplotlib, which this installs:\n{how_to_install('matplotlib')}" in out
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    assert not (tmp_path / "run" / "learning_curve.png").exists()


def test_a_missing_tensorboard_is_one_line(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert run("--tensorboard") == 2
    err = capsys.readouterr().err
    assert how_to_install("tensorboard") in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_tensorboard_has_the_numbers_of_the_log(run, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="an extra")
    arguments = (*SMALL, "--quiet", "--tensorboard", "--evaluation-interval", 1)
    assert run(*arguments, "--steps", 2 * UPDATE_STEPS, "--out", "run") == 0
    resumed = ("--quiet", "--tensorboard", "--resume", "run/checkpoint.pt", "--steps", 3 * UPDATE_STEPS)
    assert run(*resumed) == 0
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rows = lines_of(tmp_path / "run" / "log.csv")
    logged = events.Scalars("entropy")
    assert [event.step for event in logged] == [48, 96, 144] == [int(row["steps"]) for row in rows]
    for event, row in zip(logged, rows, strict=True):
        assert event.value == pytest.approx(float(row["entropy"]), rel=1e-6)
    assert len(events.Scalars("evaluated_return")) == 3


def test_best_is_the_checkpoint_with_the_highest_evaluated_return(run, tmp_path, monkeypatch):
    returns = iter([0.25, 0.75, 0.5, 0.75, 0.125])
    monkeypatch.setattr(
        train_run,
        "play_worlds",
        lambda *_, **options: {"learned": [torch.tensor([next(returns) if "worlds" in options else 0.0])]},
    )
    arguments = (*SMALL, "--quiet", "--evaluation-interval", 2, "--out", "run")
    assert run(*arguments, "--steps", 6 * UPDATE_STEPS) == 0
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    assert (best["counters"]["updates"], best["counters"]["best_return"]) == (4, 0.75)
    # an equal return later is of a longer training; a lower one of a resumed run keeps the file
    resumed = ("--quiet", "--resume", "run/checkpoint.pt", "--out", "more", "--steps", 10 * UPDATE_STEPS)
    assert run(*resumed) == 0
    assert load_checkpoint(tmp_path / "more" / "best.pt")["counters"]["updates"] == 8


def returning(monkeypatch, *returns):
    """Evaluations during training return these, one after the other."""
    left = iter(returns)
    monkeypatch.setattr(
        train_run,
        "play_worlds",
        lambda *_, **options: {"learned": [torch.tensor([next(left) if "worlds" in options else 0.0])]},
    )


STOPPING = ("--quiet", "--evaluation-interval", 2, "--stop-return", 0.75, "--out", "run")


def test_two_evaluations_in_a_row_at_the_goal_stop_the_run(run, tmp_path, monkeypatch, capsys):
    returning(monkeypatch, 0.75, 0.5, 0.875, 0.75, 0.25)
    assert run(*SMALL, *STOPPING, "--steps", 20 * UPDATE_STEPS) == 0
    rows = lines_of(tmp_path / "run" / "log.csv")
    assert [row["evaluated_return"] for row in rows] == ["", "0.75", "", "0.5", "", "0.875", "", "0.75"]
    out, err = capsys.readouterr()
    assert "stopped           two evaluations in a row, 0.875 and 0.750, reach --stop-return 0.75\n" in out
    assert "--resume run/checkpoint.pt --stop-return inf\n" in out
    assert err == ""
    # a resumed run has nothing to do, unless it is told to go on
    assert run("--quiet", "--resume", "run/checkpoint.pt") == 0
    assert "nothing to train, only evaluating; to continue, pass --stop-return inf\n" in capsys.readouterr().err
    assert run("--quiet", "--resume", "run/checkpoint.pt", "--stop-return", "inf", "--steps", 10 * UPDATE_STEPS) == 0
    assert len(lines_of(tmp_path / "run" / "log.csv")) == 10
    assert "stopped" not in capsys.readouterr().out


@pytest.mark.parametrize("update", [3, 4])
def test_an_interruption_does_not_change_when_a_run_stops(run, tmp_path, monkeypatch, update):
    returning(monkeypatch, 0.5, 0.75, 1.0)
    train_update = Trainer.train_update

    def interrupted(trainer):
        row = train_update(trainer)
        if trainer.updates == update:
            signal.raise_signal(signal.SIGINT)
        return row

    monkeypatch.setattr(Trainer, "train_update", interrupted)
    assert run(*SMALL, *STOPPING, "--steps", 20 * UPDATE_STEPS) == 130
    monkeypatch.setattr(Trainer, "train_update", train_update)
    assert run("--quiet", "--resume", "run/checkpoint.pt") == 0
    assert [row["evaluated_return"] for row in lines_of(tmp_path / "run" / "log.csv")][1::2] == ["0.5", "0.75", "1"]


def test_the_best_and_the_last_agent_are_judged_in_worlds_that_chose_neither(run, tmp_path, monkeypatch, capsys):
    seeds, reset = [], MemoryEnvironment.reset
    monkeypatch.setattr(MemoryEnvironment, "reset", lambda env, seed=None: seeds.append(seed) or reset(env, seed))
    assert run(*SMALL, "--quiet", "--steps", 2 * UPDATE_STEPS, "--evaluation-interval", 1, "--out", "run") == 0
    chosen = {seed for seed in seeds if seed is not None and seed >= evaluate.CHOICE_SEED}
    judged = [seed for seed in seeds if seed is not None and evaluate.FIRST_SEED <= seed < evaluate.CHOICE_SEED]
    assert len(chosen) == train_run.BEST_WORLDS and len(set(judged)) == evaluate.WORLDS
    # a best.pt of an earlier update plays the same worlds with its own weights
    state = load_checkpoint(tmp_path / "run" / "best.pt")
    state["counters"] |= {"updates": 1, "best_return": 0.5}
    state["model"] = {name: 10 * value for name, value in state["model"].items()}
    save_checkpoint(tmp_path / "run" / "best.pt", state)
    trainer = Trainer(TrainConfig.from_dict(state["config"]))
    trainer.agent.policy.load_state_dict(state["model"])
    env = make_environment(MemoryEnvironment, evaluate.ROWS, trainer.device)
    expected = evaluate.evaluate(trainer.agent, env, trainer.config).learned
    capsys.readouterr()
    assert run("--quiet", "--resume", "run/checkpoint.pt") == 0
    out = capsys.readouterr().out
    assert f"best              mean return {sum(expected) / 16:.3f}, 0.500 when it was chosen: run/best.pt\n" in out
    assert f"learned {sum(expected) / 16:.3f}" not in out


def test_the_evaluation_of_a_checkpoint(run, saved_run, capsys, monkeypatch):
    monkeypatch.setattr(
        cli, "play_worlds", lambda *_, greedy, **__: {"learned": [torch.tensor([1.0, 2.0, 3.0 + greedy])]}
    )
    assert run("evaluate", saved_run) == 0
    assert capsys.readouterr().out == "mean return 2.000, deviation 1.000, 3 episodes\n"
    assert run("evaluate", saved_run, "--greedy") == 0
    assert capsys.readouterr().out == "mean return 2.333, deviation 1.528, 3 episodes\n"
    assert run("evaluate", "nowhere.pt") == 2
    err = capsys.readouterr().err
    assert "error: nowhere.pt: got no such file" in err and err.count("\n") == 1


def test_an_evaluation_runs_on_the_threads_of_its_checkpoint(run, saved_run, monkeypatch):
    threads = []
    monkeypatch.setattr(
        cli, "play_worlds", lambda *_, **__: threads.append(torch.get_num_threads()) or {"learned": [torch.zeros(2)]}
    )
    torch.set_num_threads(2)
    assert run("evaluate", saved_run) == 0
    assert threads == [1]


def test_the_help_rounds_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.make_parser().parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: 0, 0.333 for memory, 0.5 for mettagrid, 1 for gym:ID)" in shown


def test_a_missing_package_is_one_line(run, capsys, monkeypatch):
    # An earlier test may have imported it.
    for name in ("mettagrid", *(name for name in sys.modules if name.startswith("mettagrid."))):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "metta_fastagent.train.environments.mettagrid", raising=False)
    assert run("--env", "mettagrid", "--num-envs", 24) == 2
    err = capsys.readouterr().err
    assert "mettagrid" in err and err.count("\n") == 1


def test_a_diverging_run_stops_with_one_line(run, capsys):
    assert run(*SMALL, "--quiet", "--steps", 100 * UPDATE_STEPS, "--lr", 1e30) == 1
    err = capsys.readouterr().err
    assert re.search(r"update \d+: logits\[0\]: holds NaN", err)
    assert err.count("\n") == 1


def test_gymnasium_has_a_discount_of_its_own():
    assert TrainConfig.for_environment("gym:CartPole-v1").gamma == 0.99
    assert TrainConfig.for_environment("gym:CartPole-v1", gamma=0.5).gamma == 0.5
    assert TrainConfig.for_environment("memory").gamma == TrainConfig().gamma == 0.95


@pytest.mark.parametrize("env", [*DEFAULTS, "gym:CartPole-v1"])
def test_defaults_round_trip(env):
    config = TrainConfig.for_environment(env)
    assert TrainConfig.from_dict(config.to_dict()) == config
    for ranks in (1, 3):
        size = config.steps_per_update(ranks)
        assert size == ranks * config.num_envs * config.segment_length
        assert config.updates(ranks) * size >= config.steps > (config.updates(ranks) - 1) * size


@pytest.mark.parametrize(("name", "value"), [("steps", 1.5), ("lr", "fast"), ("anneal_lr", True), ("seed", True)])
def test_a_value_of_another_type_names_the_field(name, value):
    with pytest.raises(TypeError, match=f"^{name}: got .* expected "):
        TrainConfig.for_environment("memory", **{name: value})


def test_a_config_holds_plain_numbers():
    # those of numpy could not be read back from a checkpoint
    config = TrainConfig.for_environment("memory", steps=np.int64(96), lr=np.float64(0.5))
    assert (type(config.steps), type(config.lr)) == (int, float)


def test_a_config_of_another_version_is_refused():
    values = TrainConfig.for_environment("memory").to_dict()
    with pytest.raises(TypeError, match="momentum"):
        TrainConfig.from_dict(values | {"momentum": 0.9})


def test_score_and_paired_bound():
    evaluation = Evaluation(random=(0.0, 0.2), learned=(0.5, 0.9), scripted=(1.0, 1.0))
    assert evaluation.score == pytest.approx((0.7 - 0.1) / (1.0 - 0.1))
    # differences 0.5 and 0.7: mean 0.6, standard error 0.1, t(1) = 12.706
    assert evaluation.difference == pytest.approx((0.6, 0.6 - 12.706 * 0.1))
    assert Evaluation(random=(0.0,), learned=(1.0,), scripted=None).score is None
    assert mean_and_lower_bound([2.0]) == (2.0, -math.inf)
    # 40 samples: the table ends at 30 degrees of freedom, whose quantile is the wider one
    samples = [float(i % 2) for i in range(40)]
    assert mean_and_lower_bound(samples)[1] == pytest.approx(0.5 - 2.042 * (10 / 39 / 40) ** 0.5)


def test_smoothing_is_a_running_mean():
    values = [float(i) for i in range(100)]
    assert report.smoothed(values)[:4] == [0.0, 0.5, 1.0, 2.0]
    assert report.smoothed([]) == []


ROW = {"mean_return": -1.125, "mean_length": 12.5, "steps_per_second": 12_345.0}
ROW |= {"entropy": 1.5, "approx_kl": 0.0123, "policy_loss": -0.25, "value_loss": 0.5}


@pytest.mark.parametrize(
    ("changes", "episodes", "ending"),
    [
        ({"mean_return": 0.125}, "return 0.125, length 12.5", ", entropy 1.500, KL 0.012"),
        ({"mean_return": math.nan}, "no episode ended", ", entropy 1.500, KL 0.012"),
        ({"mean_return": -123456.0}, "return -123456.000, length 12.5", ", entropy 1.500"),
    ],
)
def test_progress_fits_80_columns_and_on_a_terminal_one_line(monkeypatch, capsys, changes, episodes, ending):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = report.Progress(10_000_000)
    for steps in (5_000_000.0, 10_000_000.0):
        progress.update(ROW | {"steps": steps} | changes)
    first, second = capsys.readouterr().out.removeprefix("\r\x1b[K").split("\r\x1b[K")
    assert first == f"50 %, {episodes}, 12,345/s, 06:45 left{ending}" and len(first) < 80
    assert second == f"100 %, {episodes}, 12,345/s, 00:00 left{ending}\n"


def test_a_log_gets_a_line_every_ten_seconds(monkeypatch, capsys):
    now = iter([0.0, 1.0, 10.0, 11.0, 19.0, 20.0])
    monkeypatch.setattr(report.time, "monotonic", lambda: next(now))
    progress = report.Progress(600)
    for steps in (100.0, 200.0, 300.0, 400.0, 600.0):
        progress.update(ROW | {"steps": steps})
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == ["33 %", "100 %"]


def test_no_checkpoint_after_an_action_out_of_range(run, tmp_path, monkeypatch):
    def report(*args, **kwargs):
        raise ValueError("actions[3]: got parameter 7")

    def updates_with_a_report(*given):
        monkeypatch.setattr("metta_fastagent.ops.raise_if_reported", report)
        run_updates(*given)

    run_updates = cli.run_updates
    monkeypatch.setattr(cli, "run_updates", updates_with_a_report)
    with pytest.raises(ValueError, match="parameter 7"):
        run(*SMALL, "--quiet", "--steps", UPDATE_STEPS, "--out", "run")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
