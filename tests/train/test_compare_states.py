"""Stored state against zero state: the ablation, the command, and that only the stored state learns."""

import statistics
from functools import partial

import pytest
import torch

from examples import compare_states
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.environments.memory import MemoryEnvironment
from metta_fastagent.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("zero", [False, True])
def test_the_ablation_zeroes_the_segments_state_and_not_the_rollouts(zero):
    sizes = {"num_envs": 8, "segment_length": 3, "minibatches": 1}
    trainer = Trainer(TrainConfig.for_environment("memory", zero_segment_state=zero, **sizes))
    trainer.train_update()
    states = [state.clone() for state in trainer.memory()]
    assert all(state.abs().max() > 0.01 for state in states)
    trainer.collect()
    for stored, state in zip((trainer.experience.lstm_h, trainer.experience.lstm_c), states, strict=True):
        assert torch.equal(stored, torch.zeros_like(stored) if zero else state.transpose(0, 1))


def test_the_command_trains_both_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare_states, "NUM_ENVS", 16)
    monkeypatch.setattr(compare_states, "evaluate", lambda *args, **options: evaluation)
    evaluation = compare_states.Evaluation((0.1, 0.2), (0.3, 0.5), (1.0, 1.0))
    path = tmp_path / "both.png"
    assert compare_states.main(["--out", str(path), "--steps", "1600"]) == 0
    output = capsys.readouterr().out
    assert "stored state: mean return 0.400, score 0.294" in output
    assert "zero state: mean return 0.400" in output
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps: got 0, expected an integer above 0"),
        (["--out", "nowhere/a.png"], "--out: got nowhere/a.png, expected a file in an existing folder"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        compare_states.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


# In the command's run stored state gets there after a quarter million steps.
LEARNED, MOST_STEPS = 0.4, 600_000


def trainer_of(zero: bool) -> Trainer:
    config = compare_states.configuration(zero, seed=1, steps=compare_states.STEPS)
    torch.set_num_threads(config.threads)
    return Trainer(config, partial(MemoryEnvironment, **compare_states.TASK))


def recent_return(rows: list[dict[str, float]]) -> float:
    return statistics.fmean(row["mean_return"] for row in rows[-10:])


@pytest.mark.slow
def test_stored_state_learns_what_zero_state_does_not():
    stored, zero = trainer_of(zero=False), trainer_of(zero=True)
    # in the very first updates no episode ends
    rows = [stored.train_update() for _ in range(20)]
    # a policy that does not remember the cue has a mean return of at most 1/4
    while recent_return(rows) < LEARNED and stored.steps < MOST_STEPS:
        rows.append(stored.train_update())
    assert recent_return(rows) >= LEARNED
    assert recent_return([zero.train_update() for _ in rows]) < 0.3
