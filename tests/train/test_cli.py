"""The command line: a whole small run and its resumption, and one line with exit code 2 for every wrong request."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metta_fastagent.train import cli, report
from metta_fastagent.train.checkpoint import load_checkpoint
from metta_fastagent.train.config import DEFAULTS, TrainConfig
from metta_fastagent.train.evaluate import Evaluation, mean_and_lower_bound
from metta_fastagent.train.trainer import COLUMNS

SMALL = ["--num-envs", "8", "--segment-length", "6", "--minibatches", "2"]
UPDATE_STEPS = 48


def lines_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command in an empty folder; what was left of threads is put back."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield lambda *arguments: cli.main([str(argument) for argument in arguments])
    torch.set_num_threads(threads)


def test_a_run_leaves_its_files_and_a_summary(run, tmp_path, capsys):
    assert run(*SMALL, "--steps", 4 * UPDATE_STEPS, "--seed", 3, "--analyze-weights-interval", 2) == 0
    folder = tmp_path / "runs" / "memory-seed3"
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    rows = lines_of(folder / "log.csv")
    assert tuple(rows[0]) == COLUMNS
    assert [int(row["update"]) for row in rows] == [1, 2, 3, 4]
    assert [int(row["steps"]) for row in rows] == [48, 96, 144, 192]
    for row in rows:
        assert all(math.isfinite(float(value)) for name, value in row.items() if name != "mean_return" or value)
    metrics = [json.loads(line) for line in (folder / "weight_metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in metrics] == [2, 4]
    assert {"policy.fc1", "policy.critic_1"} <= {layer["name"] for layer in metrics[0]["metrics"]}
    out, err = capsys.readouterr()
    assert err == ""
    for text in ("random 0.", "scripted 1.000", "learned 0.", "score", "backend", " on cpu", "environment "):
        assert text in out, text
    assert f"learning curve    {folder.relative_to(tmp_path)}/learning_curve.png" in out
    assert "resume" in out and "--resume runs/memory-seed3/checkpoint.pt --steps 384" in out


def test_a_resumed_run_continues_the_log_and_equals_the_whole_run(run, tmp_path):
    assert run(*SMALL, "--quiet", "--steps", 6 * UPDATE_STEPS, "--out", "whole") == 0
    assert run(*SMALL, "--quiet", "--steps", 3 * UPDATE_STEPS, "--out", "halves") == 0
    assert run("--quiet", "--resume", "halves/checkpoint.pt", "--steps", 6 * UPDATE_STEPS) == 0
    assert [int(row["update"]) for row in lines_of(tmp_path / "halves" / "log.csv")] == [1, 2, 3, 4, 5, 6]
    whole, halves = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "halves"))
    for name, value in whole["model"].items():
        assert torch.equal(value, halves["model"][name]), name
    assert halves["counters"]["steps"] == 6 * UPDATE_STEPS


def test_a_resumed_run_on_another_backend_says_so(run, capsys, monkeypatch):
    assert run(*SMALL, "--quiet", "--steps", UPDATE_STEPS, "--out", "a") == 0
    assert run("--quiet", "--resume", "a/checkpoint.pt", "--steps", 2 * UPDATE_STEPS, "--out", "b") == 0
    assert "note:" not in capsys.readouterr().err
    monkeypatch.setattr(cli.metta_fastagent, "backend", lambda device: "another")
    assert run("--quiet", "--resume", "a/checkpoint.pt", "--steps", 2 * UPDATE_STEPS, "--out", "c") == 0
    assert "this run goes on with another: its random draws differ" in capsys.readouterr().err


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


def test_a_foreign_log_beside_the_checkpoint_is_one_line(run, tmp_path, capsys, saved_run):
    (tmp_path / "saved.pt").write_bytes(saved_run.read_bytes())
    (tmp_path / "log.csv").write_text("date,temperature\n1,2\n")
    assert run("--quiet", "--resume", "saved.pt", "--steps", 2 * UPDATE_STEPS) == 2
    err = capsys.readouterr().err
    assert "log.csv is no log of this trainer" in err and err.count("\n") == 1
    assert (tmp_path / "log.csv").read_text() == "date,temperature\n1,2\n"


def test_a_second_run_does_not_overwrite_the_first(run, tmp_path, capsys):
    arguments = (*SMALL, "--quiet", "--steps", UPDATE_STEPS)
    assert run(*arguments) == run(*arguments) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["memory-seed1", "memory-seed1-2"]
    capsys.readouterr()
    assert run(*arguments, "--out", "runs/memory-seed1") == 2
    assert "holds a run; go on with --resume runs/memory-seed1/checkpoint.pt" in capsys.readouterr().err


def test_the_module_runs_and_is_quiet_without_a_terminal(tmp_path):
    command = [sys.executable, "-m", "metta_fastagent.train", *SMALL, "--steps", str(UPDATE_STEPS), "--threads", "1"]
    # the working tree, where the package is not installed
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "48 of 48 steps" in done.stdout and "\x1b" not in done.stdout


WRONG = [
    (["--env", "chess"], "env must be one of memory, mettagrid, got 'chess'"),
    (["--steps", "-5"], "steps must be an integer above 0, got -5"),
    (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    (["--seed", "-1"], "seed must be an integer from 0 to 2**31 - 1, got -1"),
    (["--device", "cuda:99"], "device must be a device that torch can use here, got 'cuda:99'"),
    (["--device", "abacus"], "device must be a device that torch can use here, got 'abacus'"),
    (["--device", "meta"], "device must be a device that torch can use here, got 'meta'"),
    (["--device", ""], "device must be the name of a device, got ''"),
    (["--num-envs", "0"], "num_envs must be an integer above 0, got 0"),
    (["--num-envs", "10", "--minibatches", "4"], "minibatches must divide num_envs (10), got 4"),
    (["--num-envs", "12", "--accumulate", "2"], "accumulate must divide the rows of a minibatch (3), got 2"),
    (["--accumulate", "0"], "accumulate must be an integer above 0, got 0"),
    (["--vf-clip-coef", "-1"], "vf_clip_coef must be a finite number of at least 0, got -1.0"),
    (["--target-kl", "nan"], "target_kl must be a finite number of at least 0, got nan"),
    (["--check-ranks", "-1"], "check_ranks must be an integer of at least 0, got -1"),
    (["--segment-length", "0"], "segment_length must be an integer above 0, got 0"),
    (["--epochs", "0"], "epochs must be an integer above 0, got 0"),
    (["--lr", "nan"], "lr must be a finite number above 0, got nan"),
    (["--lr", "0"], "lr must be a finite number above 0, got 0.0"),
    (["--gamma", "1.5"], "gamma must be a number from 0 to 1, got 1.5"),
    (["--gae-lambda", "-0.1"], "gae_lambda must be a number from 0 to 1, got -0.1"),
    (["--clip-coef", "inf"], "clip_coef must be a finite number above 0, got inf"),
    (["--clip-range", "-1"], "clip_range must be a finite number of at least 0, got -1.0"),
    (["--clip-mode", "soft"], "clip_mode must be one of absolute, init_scaled, got 'soft'"),
    (["--ent-coef", "-1"], "ent_coef must be a finite number of at least 0, got -1.0"),
    (["--max-grad-norm", "0"], "max_grad_norm must be a finite number above 0, got 0.0"),
    (["--threads", "-2"], "threads must be an integer of at least 0, got -2"),
    (["--speed", "11"], "unrecognized arguments: --speed 11"),
    (["--resume", "nowhere.pt"], "nowhere.pt does not exist"),
    (["--resume", "folder"], "folder is a folder; give the checkpoint file inside it"),
    (["--resume", "text.pt"], "text.pt is damaged or no checkpoint"),
    (["--resume", "foreign.pt"], "foreign.pt is no checkpoint of this trainer"),
    (["--resume", "saved.pt", "--lr", "0.5"], "lr is 0.001 in the checkpoint and can not change to 0.5"),
    (["--resume", "saved.pt", "--env", "mettagrid"], "env is 'memory' in the checkpoint"),
    (["--out", "text.pt"], "--out text.pt can not be written to"),
    (["--out", "text.pt/below"], "--out text.pt/below can not be written to"),
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


def test_a_missing_package_is_one_line(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mettagrid", None)
    monkeypatch.delitem(sys.modules, "metta_fastagent.train.environments.mettagrid", raising=False)
    assert run("--env", "mettagrid", "--num-envs", 24) == 2
    err = capsys.readouterr().err
    assert "mettagrid" in err and err.count("\n") == 1


def test_a_diverging_run_stops_with_one_line(run, capsys):
    assert run(*SMALL, "--quiet", "--steps", 100 * UPDATE_STEPS, "--lr", 1e30) == 1
    err = capsys.readouterr().err
    assert "not finite in update" in err and err.count("\n") == 1


@pytest.mark.parametrize("env", DEFAULTS)
def test_defaults_round_trip(env):
    config = TrainConfig.for_environment(env)
    assert TrainConfig.from_dict(config.to_dict()) == config
    for ranks in (1, 3):
        size = config.steps_per_update(ranks)
        assert size == ranks * config.num_envs * config.segment_length
        assert config.updates(ranks) * size >= config.steps > (config.updates(ranks) - 1) * size


@pytest.mark.parametrize(("name", "value"), [("steps", 1.5), ("lr", "fast"), ("anneal_lr", 1), ("seed", True)])
def test_a_value_of_another_type_names_the_field(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be"):
        TrainConfig.for_environment("memory", **{name: value})


def test_a_config_of_another_version_is_refused():
    values = TrainConfig.for_environment("memory").to_dict()
    with pytest.raises(ValueError, match="momentum"):
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


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    bar = report.make_progress(total_steps=1000, done=0, quiet=False)
    row = dict.fromkeys(COLUMNS, 1.0) | {"steps": 500.0, "steps_per_second": 1234.0, "mean_return": math.nan}
    bar.update(row)
    bar.close()
    assert isinstance(bar, report.Bar)
    out = capsys.readouterr().out
    for text in ("500/1000", "1,234 steps/s", "no episode ended", "learning 25 %"):
        assert text in out, text


def test_no_checkpoint_after_an_action_out_of_range(run, tmp_path, monkeypatch):
    def report(*args, **kwargs):
        raise ValueError("actions[3]: got parameter 7")

    monkeypatch.setattr("metta_fastagent.ops.raise_if_reported", report)
    with pytest.raises(ValueError, match="parameter 7"):
        run(*SMALL, "--quiet", "--steps", UPDATE_STEPS, "--out", "run")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
