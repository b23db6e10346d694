"""Checkpoints: written atomically, refused if damaged; a resumed run equals an uninterrupted one."""

import os

import pytest
import torch

from metta_fastagent.train import checkpoint
from metta_fastagent.train.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.trainer import Trainer, TrainingDiverged

SMALL = {"num_envs": 8, "segment_length": 6, "minibatches": 2, "steps": 8 * 6 * 8}
pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(**changes) -> Trainer:
    return Trainer(TrainConfig.for_environment("memory", **{**SMALL, **changes}))


@pytest.fixture
def saved(tmp_path):
    made = trainer()
    made.train_update()
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, made.state_dict())
    return made, path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_range": 0.05},
        {"l2_init_coef": 0.1},
        {"anneal_lr": 1.0},
        {"normalize_returns": True},
        {"reset_state_every_step": True},
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_same_parameters(tmp_path, changes):
    whole = trainer(**changes)
    whole.run(lambda row: None)
    first = trainer(**changes)
    for _ in range(4):
        first.train_update()
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, first.state_dict())
    # resuming must not depend on the random state
    torch.manual_seed(12345)
    second = trainer(**changes)
    second.load_state_dict(load_checkpoint(path))
    second.run(lambda row: None)
    assert (second.updates, second.steps) == (whole.updates, whole.steps) == (8, SMALL["steps"])
    expected = whole.agent.policy.state_dict()
    for name, value in second.agent.policy.state_dict().items():
        assert torch.equal(value, expected[name]), name
    for ours, theirs in zip(second.memory(), whole.memory(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_corrupted_action_stops_the_next_update_and_the_checkpoint_before_it_resumes(tmp_path):
    run, path = trainer(), tmp_path / "checkpoint.pt"
    run.train_update()
    save_checkpoint(path, run.state_dict())
    collect = run.collect

    def corrupted():
        episodes = collect()
        run.experience.actions[3, 4] = torch.tensor([1, 7])
        return episodes

    run.collect = corrupted
    message = r"update 2: actions\[\d+\]: got parameter 7 for action type 1, expected 0 to 3"
    with pytest.raises(TrainingDiverged, match=message):
        run.train_update()
    resumed = trainer()
    resumed.load_state_dict(load_checkpoint(path))
    resumed.run(lambda row: None)
    assert resumed.updates == 8


def test_the_file_holds_what_the_next_update_depends_on(saved):
    made, path = saved
    state = load_checkpoint(path)
    assert set(checkpoint.REQUIRED) < set(state)
    assert state["config"] == made.config.to_dict()
    assert state["action_names"] == made.env.action_names and state["max_action_args"] == made.env.max_action_args
    assert state["counters"]["steps"] == 48 and state["counters"]["updates"] == 1
    for name, value in made.agent.policy.state_dict().items():
        assert torch.equal(state["model"][name], value), name
    for name, value in made.agent.policy.initial_weights.items():
        assert torch.equal(state["initial_weights"][name], value), name


def test_clip_bounds_of_the_initial_weights_come_from_the_file():
    # another version of torch may initialise the weights a little differently
    made, resumed = (trainer(clip_range=0.5, clip_mode="init_scaled") for _ in range(2))
    state = made.state_dict()
    assert state["initial_weight_magnitudes"]["policy.fc1"] > 0
    state["initial_weight_magnitudes"]["policy.fc1"] = 0.125
    resumed.load_state_dict(state)
    assert resumed.agent.policy.initial_weight_magnitudes == state["initial_weight_magnitudes"]
    resumed.agent.clip_weights()
    assert resumed.agent.policy.policy.fc1.weight.abs().max().item() == 0.0625


def test_saving_leaves_the_run_as_it_was(tmp_path):
    undisturbed, saving = trainer(), trainer()
    torch.manual_seed(7)
    for _ in range(2):
        undisturbed.train_update()
    torch.manual_seed(7)
    for _ in range(2):
        saving.train_update()
        save_checkpoint(tmp_path / "checkpoint.pt", saving.state_dict())
    for ours, theirs in zip(saving.agent.parameters(), undisturbed.agent.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_crash_while_writing_keeps_the_previous_file(saved, monkeypatch):
    made, path = saved
    before = path.read_bytes()

    def half(state, file):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, made.state_dict())
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_saving_refuses_a_state_with_holes(tmp_path):
    with pytest.raises(ValueError, match="optimizer"):
        save_checkpoint(tmp_path / "checkpoint.pt", {"model": {}})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_cut_off_file_is_refused(saved, share):
    _, path = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: got a damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_flipped_bit_is_noticed(saved, share):
    _, path = saved
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt"):
        load_checkpoint(path)


class Foreign:
    """Unpickling this would create a file."""

    def __reduce__(self):
        return os.mkdir, ("made-by-a-checkpoint",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.zeros(2)}, "expected a checkpoint of this trainer"),
        ([1, 2, 3], "expected a checkpoint of this trainer"),
        ({"format": checkpoint.FORMAT, "version": 99}, "version 99"),
        ({"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "model": {}}, "without .*optimizer"),
        (Foreign(), "expected a checkpoint of this trainer"),
    ],
    ids=["state dict", "list", "version", "holes", "code"],
)
def test_a_foreign_file_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "other.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "other.pt")
    assert os.listdir(tmp_path) == ["other.pt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["model"].pop("lstm.weight_ih_l0"), "got an incompatible state"),
        (lambda state: state["action_names"].append("jump"), "action_names"),
        (lambda state: state["feature_mapping"].clear(), "feature_mapping"),
        (lambda state: state["ranks"][0]["environment"].clear(), "got an incompatible state"),
        (
            lambda state: state["ranks"].append({}),
            "got 2 ranks, expected 1 as in this run; resume with torchrun --nproc-per-node=2",
        ),
    ],
    ids=["model", "actions", "features", "environment", "ranks"],
)
def test_a_checkpoint_of_another_run_is_refused(saved, change, message):
    _, path = saved
    state = load_checkpoint(path)
    change(state)
    with pytest.raises(CheckpointError, match=message):
        trainer().load_state_dict(state)
