"""Several ranks: equal to one process on all rows, failing and stopping together; and killed runs."""

import csv
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
import torch
from rank_pool import RankPool, running

from metta_fastagent.train import cli, ranks
from metta_fastagent.train.checkpoint import load_checkpoint
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.trainer import Trainer

SMALL = ("--num-envs", "8", "--segment-length", "6", "--minibatches", "2", "--epochs", "2")
STEPS = 48
pytestmark = pytest.mark.usefixtures("one_thread")


def config(**changes) -> TrainConfig:
    return TrainConfig.for_environment("memory", **{"num_envs": 8, "segment_length": 6, "minibatches": 2, **changes})


# Two ranks equal one


@pytest.fixture(scope="module")
def rollout():
    """(model, tensors) of a rollout of 16 rows whose segments start in the middle of episodes, some of which end."""
    trainer = Trainer(config(num_envs=16, segment_length=8))
    trainer.collect()
    trainer.collect()
    advantages = trainer.advantages()
    tensors = {name: getattr(trainer.experience, name) for name in rank_jobs.ENTRIES}
    model = {name: value.clone() for name, value in trainer.agent.policy.state_dict().items()}
    return model, tensors | {"advantages": advantages, "returns": advantages + trainer.experience.values}


# 20 passes over one minibatch are 20 optimizer steps; many weights start above the bound
WHOLE = config(
    num_envs=16,
    segment_length=8,
    minibatches=1,
    epochs=20,
    lr=1e-3,
    clip_range=0.05,
    l2_init_coef=0.01,
    vf_clip_coef=0.2,
)


# Adam in float64: it divides by the gradient's size, so that parameters whose exact gradient is 0 (a constant on all
# logits, say) move by rounding errors alone. In float32 two ways to sum one process's batch differ as much.
OPTIMIZERS = [(torch.optim.Adam, torch.float64, 1e-3), (torch.optim.SGD, torch.float32, 0.1)]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("optimizer", "dtype", "lr"), OPTIMIZERS, ids=["Adam float64", "SGD float32"])
def test_two_ranks_on_half_batches_equal_one_on_the_whole(two_ranks, rollout, optimizer, dtype, lr, accumulate):
    whole, arguments = replace(WHOLE, lr=lr), (dtype, *rollout, optimizer)
    expected, statistics, _ = rank_jobs.learn(whole, *arguments)
    results = two_ranks(rank_jobs.learn, replace(whole, accumulate=accumulate), *arguments)
    for parameters, _, _ in results:
        for name, value in parameters.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert all(torch.equal(value, results[1][0][name]) for name, value in results[0][0].items())
    tolerance = 1e-6 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close((results[0][1] + results[1][1]) / 2, statistics, rtol=tolerance, atol=1e-3 * tolerance)


def test_that_comparison_has_clipped_weights_and_moved_all_parameters(rollout):
    model, _ = rollout
    parameters, _, _ = rank_jobs.learn(WHOLE, torch.float64, *rollout)
    unclipped, _, _ = rank_jobs.learn(replace(WHOLE, clip_range=0.0), torch.float64, *rollout)
    fc1 = parameters["policy.policy.fc1.weight"]
    at_the_bound = (fc1.abs() == 0.05).double().mean().item()
    assert 0.1 < at_the_bound < 0.9 and unclipped["policy.policy.fc1.weight"].abs().max() > 0.06
    for name, value in parameters.items():
        if name != "policy.policy.actor_bias":
            assert (value - model[name.removeprefix("policy.")]).abs().max() > 1e-4, name


# State that the ranks share, and state that they do not


def test_ranks_start_with_the_same_parameters_and_their_own_worlds(two_ranks):
    first, second = two_ranks(rank_jobs.start, config(seed=11))
    alone = rank_jobs.start(config(seed=11))
    assert first["parameters"] == second["parameters"] == alone["parameters"]
    for name, weight in first["initial_weights"].items():
        assert torch.equal(weight, second["initial_weights"][name])
        assert torch.equal(weight, alone["initial_weights"][name])
    # rank 0 is the run of one process; rank 1 is another one
    for name in ("observations", "draws"):
        assert torch.equal(first[name], alone[name])
        assert not torch.equal(first[name], second[name])
    assert (first["seed"], second["seed"]) == (11, (11 + ranks.SEED_STRIDE) % 2**31)


def test_seeds_differ_in_the_bits_that_torch_looks_at(monkeypatch):
    seeds = set()
    for seed in (0, 1, 2, 3, 2**31 - 1):
        for rank in range(64):
            monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
            seeds.add(ranks.seed(seed))
    assert len(seeds) == 5 * 64 and all(0 <= seed < 2**31 for seed in seeds)


def test_steps_and_statistics_are_those_of_all_ranks(two_ranks):
    (rows, own), (other_rows, other) = two_ranks(rank_jobs.two_updates, config(steps=500))
    assert [row["steps"] for row in rows] == [96, 192] and own["steps"] == 192
    assert own["last_update"] == other["last_update"] == 6
    assert rows[1]["episodes"] == own["episodes"] + other["episodes"]
    for row, same in zip(rows, other_rows, strict=True):
        # times are each rank's own, and no update has an evaluation
        names = [name for name in row if "second" not in name and name != "evaluated_return"]
        assert [row[name] for name in names] == [same[name] for name in names]


@pytest.mark.parametrize(("target_kl", "passes"), [(0.03, 1), (0.08, 3)])
def test_ranks_stop_together_for_the_mean_of_their_kl(two_ranks, target_kl, passes):
    # k3 of a ratio exp(-0.5) is 0.1065, and 0 of a ratio of 1: the mean over both ranks is 0.053
    changes = {"epochs": 3, "minibatches": 1, "lr": 1e-7, "target_kl": target_kl}
    results = two_ranks(rank_jobs.shifted_kl, config(**changes), 0.5)
    (kl, epochs), (other_kl, other_epochs) = results
    assert other_kl < 0.001 < target_kl < 0.1 < kl
    assert epochs == other_epochs == passes


def test_parameters_that_differ_are_reported_with_the_rank(two_ranks):
    message = "after update 2, the parameters of rank 1 differ from those of rank 0"
    assert two_ranks(rank_jobs.different_parameters, config(check_ranks=2)) == [message, message]
    assert two_ranks(rank_jobs.different_parameters, config(check_ranks=3)) == ["no error", "no error"]


def test_all_ranks_stop_at_a_bad_reward_of_one(two_ranks):
    first, second = two_ranks(rank_jobs.diverging, config())
    assert first == f"rank 1: {second}"
    assert second.startswith("step: rewards: got nan in row 0, step 1 of ")


@pytest.mark.parametrize("options", [{}, {"l2_init_coef": 0.1, "accumulate": 2}])
def test_parameters_that_a_rank_does_not_use_do_not_stop_the_others(two_ranks, options):
    first, second = two_ranks(rank_jobs.with_unused_parameters, config(**options))
    assert first == second
    assert "sometimes.weight" in first and "never.weight" not in first and "policy.actor.weight" in first


@pytest.mark.parametrize("first", [True, False])
def test_a_rank_may_be_the_only_one_with_steps_that_are_not_valid(two_ranks, first):
    hashes = two_ranks(rank_jobs.valid_on_one_rank, config(), first)
    assert hashes[0] == hashes[1]


def test_the_hash_sees_a_single_bit_and_a_name():
    module = torch.nn.Linear(3, 2)
    before = ranks.parameter_hash(module)
    assert before == ranks.parameter_hash(module) and before != ranks.parameter_hash(torch.nn.Sequential(module))
    module.weight.data.view(torch.int32)[1, 2] ^= 1
    assert ranks.parameter_hash(module) != before


# Errors


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_on_one_rank_is_an_error_on_all(two_ranks, failing):
    answers = two_ranks(rank_jobs.failing_alone, failing)
    assert answers[failing] == ("OSError", "[Errno 28] No space left on device")
    assert answers[1 - failing] == ("RankError", f"rank {failing}: [Errno 28] No space left on device")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "nan"], "lr: got nan, expected a finite number above 0"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--out", "/dev/null"], "--out: got /dev/null (File exists), expected a writable folder"),
        (["--resume", "/nowhere.pt"], "/nowhere.pt: got no such file"),
    ],
)
def test_a_wrong_request_is_one_line_of_the_first_rank(two_ranks, arguments, message):
    (code, _, err), (other_code, _, other_err) = two_ranks(rank_jobs.command, *SMALL, *arguments)
    assert code == other_code == 2
    assert message in err and err.count("\n") == 1 and other_err == ""


LAUNCH = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_PORT": None}, "MASTER_PORT: got no value, expected all of torchrun's variables; use torchrun"),
        (
            {"RANK": None, "LOCAL_RANK": ""},
            "RANK, LOCAL_RANK: got no value, expected all of torchrun's variables",
        ),
        ({"RANK": "2"}, "RANK: got '2', expected an integer from 0 to 1"),
        ({"RANK": "-1"}, "RANK: got '-1', expected an integer from 0 to 1"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK: got 'first', expected an integer from 0 to 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: got '0', expected an integer from 1 to"),
        ({"MASTER_PORT": "80000"}, "MASTER_PORT: got '80000', expected an integer from 0 to 65535"),
    ],
)
def test_broken_launch_variables_are_named(changes, message):
    variables = {name: value for name, value in (LAUNCH | changes).items() if value is not None}
    with pytest.raises(ranks.LaunchError) as raised:
        ranks.read_launch(variables)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("broken", ["RANK", "MASTER_PORT"])
def test_the_command_fails_in_one_line_if_the_ranks_cannot_connect(monkeypatch, capsys, broken):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        # rank 0 is to listen there itself
        variables = LAUNCH | {"RANK": "0", "MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in (variables | ({"RANK": "9"} if broken == "RANK" else {})).items():
            monkeypatch.setenv(name, value)
        assert cli.main([*SMALL]) == 2
    err = capsys.readouterr().err
    assert ("RANK: got" if broken == "RANK" else "rank 0 could not join the other ranks at 127.0.0.1:") in err
    assert err.count("error:") == 1 and ranks.world_size() == 1


def test_launch_variables():
    assert ranks.read_launch({}) == ranks.read_launch({"MASTER_ADDR": "here"}) == ranks.Launch(0, 1, 0)
    assert ranks.read_launch(LAUNCH) == ranks.Launch(1, 2, 1)


def test_a_numbered_device_is_refused_where_there_are_several_ranks(monkeypatch):
    assert ranks.device("cuda:1") == torch.device("cuda:1")
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    assert ranks.device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device: got 'cuda:1', expected 'cuda' without an index"):
        ranks.device("cuda:1")
    for name, value in LAUNCH.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="device: got 'cuda' with 1 GPUs, expected cuda:1 for rank 0"):
        ranks.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ranks.device("cuda") == torch.device("cuda:1")


def test_the_command_of_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "metta_fastagent.train", *SMALL, "--steps", str(4 * STEPS), "--out", "run"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        assert [row["steps"] for row in csv.DictReader(file)] == ["96", "192"]
    assert done.stdout.count("\nscore ") == done.stdout.count("00:00 left") == 1
    assert (
        "-m torch.distributed.run --nproc-per-node=2 -m metta_fastagent.train --resume run/checkpoint.pt --steps 384"
        in done.stdout
    )
    assert len(load_checkpoint(tmp_path / "run" / "checkpoint.pt")["ranks"]) == 2
    # one process does not resume it
    with pytest.raises(ValueError, match="got 2 ranks, expected 1"):
        rank_jobs.train("--resume", str(tmp_path / "run" / "checkpoint.pt"))


THREADS = """
import os, sys
from metta_fastagent.train import cli
status = cli.main(sys.argv[1:])
names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
print("threads", status, [name for name in names if "gloo" in name])
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_no_thread_of_the_ranks_outlives_the_command(tmp_path):
    (tmp_path / "threads.py").write_text(THREADS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "threads.py"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command += [*SMALL, "--steps", str(STEPS), "--out", "run", "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("threads 0 []") == 2, done.stdout + done.stderr


# Killed runs


def assert_same(ours: Any, theirs: Any, where: str) -> None:
    """Nested dicts, lists and tuples of the same values, tensors bit for bit."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}[{key!r}]")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    else:
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs, where


def assert_same_end(ours: Path, theirs: Path) -> None:
    """Two checkpoints have the same state, apart from times and options that a resumed run may change."""
    first, second = load_checkpoint(ours), load_checkpoint(theirs)
    assert first["counters"]["updates"] == second["counters"]["updates"]
    for name in ("model", "optimizer", "return_moments", "initial_weights", "feature_mapping", "ranks"):
        assert_same(first[name], second[name], name)


# from three ranks on, sums over ranks depend on their order
@pytest.mark.parametrize("count", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_the_same_parameters(pools, tmp_path, count):
    run = running(pools, count).run
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = (*SMALL, "--accumulate", "2", "--clip-range", "0.1", "--checkpoint-interval", "2")
    arguments = (*arguments, "--steps", str(count * 6 * STEPS), "--out")
    run(rank_jobs.train, *arguments, str(whole))
    dying = RankPool(count)
    codes = dying.run_to_death(rank_jobs.train_until_killed, 5, *arguments, str(killed))
    assert codes == [-signal.SIGKILL] * count
    assert load_checkpoint(killed / "checkpoint.pt")["counters"]["updates"] == 4
    run(rank_jobs.train, "--resume", str(killed / "checkpoint.pt"))
    assert load_checkpoint(whole / "checkpoint.pt")["counters"]["updates"] == 6
    assert_same_end(killed / "checkpoint.pt", whole / "checkpoint.pt")


def test_ctrl_c_on_one_rank_saves_and_stops_all(two_ranks, tmp_path):
    arguments = (*SMALL, "--steps", str(100 * STEPS), "--checkpoint-interval", "0", "--out", str(tmp_path / "run"))
    assert two_ranks(rank_jobs.interrupted_on_one_rank, *arguments) == ["KeyboardInterrupt", "KeyboardInterrupt"]
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["counters"]["updates"] == 2


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint after update 2 of 4 and what an undisturbed run ends with."""
    folder = tmp_path_factory.mktemp("written")
    for name, updates in (("half", 2), ("whole", 4)):
        # An annealed rate would follow the length of each run.
        rank_jobs.train(*SMALL, "--anneal-lr", "0", "--steps", str(updates * STEPS), "--out", str(folder / name))
    return folder / "half" / "checkpoint.pt", folder / "whole" / "checkpoint.pt"


@pytest.mark.parametrize("point", rank_jobs.KILL_POINTS)
def test_a_kill_during_a_write_loses_at_most_that_checkpoint(one_rank, written, tmp_path, point):
    half, whole = written
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(half.read_bytes())
    assert one_rank(rank_jobs.in_a_fork, rank_jobs.write_until_killed, point, path) == [signal.SIGKILL]
    assert load_checkpoint(path)["counters"]["updates"] == (3 if point == "after the rename" else 2)
    rank_jobs.train("--resume", str(path), "--steps", str(4 * STEPS))
    assert_same_end(path, whole)
    assert not list(tmp_path.glob(".checkpoint*"))
