"""The layout of the rollout storage, and the timer of phases."""

import pytest
import torch

from metta_fastagent.train.experience import Experience
from metta_fastagent.train.timer import PHASES, PhaseTimer

ROWS, LENGTH, TOKENS, LAYERS, HIDDEN = 5, 4, 7, 2, 3


def filled() -> tuple[Experience, dict[str, torch.Tensor]]:
    """A storage of random numbers, and the same numbers stacked over time."""
    experience = Experience(
        torch.zeros(ROWS, TOKENS, 3, dtype=torch.uint8), LENGTH, (torch.zeros(LAYERS, ROWS, HIDDEN),) * 2
    )
    generator = torch.Generator().manual_seed(0)
    shapes = {"observations": (TOKENS, 3), "actions": (2,)}
    put: dict[str, list[torch.Tensor]] = {}
    for t in range(LENGTH):
        step = {}
        for name in ("observations", "actions", "log_probs", "values", "rewards", "dones", "truncateds", "terminals"):
            stored = getattr(experience, name)
            step[name] = torch.randint(0, 200, (ROWS, *shapes.get(name, ())), generator=generator).to(stored.dtype)
            put.setdefault(name, []).append(step[name])
        experience.store(t, **step)
    return experience, {name: torch.stack(steps, dim=1) for name, steps in put.items()}


def test_store_is_by_row_and_time():
    experience, put = filled()
    for name, value in put.items():
        assert torch.equal(getattr(experience, name), value), name
    assert experience.length == LENGTH


def test_store_refuses_an_unknown_name():
    experience, _ = filled()
    with pytest.raises(AttributeError, match="reward"):
        experience.store(0, reward=torch.zeros(ROWS))


def test_a_step_without_valid_counts_every_row():
    experience, _ = filled()
    experience.store_valid(1, None)
    assert experience.valid is None
    experience.store_valid(1, torch.arange(ROWS) > 2)
    assert experience.valid.sum() == ROWS * LENGTH - 3
    # the next rollout reuses the storage
    experience.store_valid(1, None)
    assert experience.valid.all()


def test_the_initial_state_is_copied():
    experience, _ = filled()
    h, c = torch.randn(LAYERS, ROWS, HIDDEN), torch.randn(LAYERS, ROWS, HIDDEN)
    wanted = h.clone(), c.clone()
    experience.store_initial_state((h, c))
    # the agent updates its memory in place
    h.zero_()
    c.zero_()
    assert torch.equal(experience.lstm_h, wanted[0].transpose(0, 1))
    assert torch.equal(experience.lstm_c, wanted[1].transpose(0, 1))


def test_segments_are_the_chosen_rows_in_their_order():
    experience, put = filled()
    experience.store_initial_state((torch.randn(LAYERS, ROWS, HIDDEN), torch.randn(LAYERS, ROWS, HIDDEN)))
    rows = torch.tensor([3, 0])
    td = experience.segments(rows)
    assert td.batch_size == torch.Size([2])
    assert torch.equal(td["env_obs"], put["observations"][rows]) and td["env_obs"].shape == (2, LENGTH, TOKENS, 3)
    assert torch.equal(td["dones"], put["dones"][rows])
    assert torch.equal(td["truncateds"], put["truncateds"][rows])
    assert torch.equal(td["lstm_h"], experience.lstm_h[rows]) and td["lstm_h"].shape == (2, LAYERS, HIDDEN)
    assert torch.equal(td["lstm_c"], experience.lstm_c[rows])


def test_the_timer_separates_phases_and_resets_on_read():
    timer = PhaseTimer(torch.device("cpu"))
    with timer("learning"):
        sum(range(10_000))
    first, second = timer.read(), timer.read()
    assert tuple(first) == PHASES
    assert first["learning"] > 0 and first["environment"] == first["clip"] == 0
    assert set(second.values()) == {0.0}
