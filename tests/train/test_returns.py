"""The size of returns: sums and moments against their definitions, and training that does not depend on it."""

import copy

import numpy as np
import pytest
import torch
from test_own import Agent, Cue, SavedCue

from metta_fastagent.train import returns
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.environments import make_environment
from metta_fastagent.train.evaluate import evaluate
from metta_fastagent.train.trainer import Trainer

CPU = torch.device("cpu")
SIZES = {"num_envs": 8, "segment_length": 4, "minibatches": 2, "steps": 6 * 32}
pytestmark = pytest.mark.usefixtures("one_thread")


def test_sums_restart_with_the_episode_and_continue_over_rollouts():
    rewards = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 0.0, 0.0, 0.0]])
    ends = torch.tensor([[False, True, False, True], [False, False, False, False]])
    sums, after = returns.discounted_sums(rewards, ends, torch.tensor([16.0, 2.0]), 0.5)
    assert sums.tolist() == [[9.0, 6.5, 4.0, 10.0], [2.0, 1.0, 0.5, 0.25]]
    assert after.tolist() == [0.0, 0.25]


def test_merged_moments_are_those_of_all_samples():
    generator = np.random.default_rng(0)
    moments, seen = returns.no_moments(CPU), []
    for size, valid in (((3, 5), True), ((4, 7), False), ((2, 2), None), ((1, 1), True)):
        samples = generator.normal(100, 3 + len(seen), size).astype(np.float32)
        counts = generator.random(size) < 0.7 if valid is None else np.full(size, valid)
        moments = returns.merged(moments, torch.tensor(samples), None if valid else torch.tensor(counts))
        seen.extend(samples[counts].astype(np.float64))
        assert moments[0] == len(seen)
        np.testing.assert_allclose(moments[1:], [np.mean(seen), np.var(seen)], rtol=1e-12)


@pytest.mark.parametrize(
    ("moments", "expected"),
    [((0, 0, 0), 1), ((9, 0, 0), 1), ((9, -5, 0), 0.05), ((9, 5, 4), 2), ((9, 1e4, 4), 100), ((9, 0, 1e-40), 1e-20)],
)
def test_the_scale_is_the_deviation_where_it_tells_returns_apart(moments, expected):
    assert returns.scale(torch.tensor(moments, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-12)


class Paying(SavedCue):
    """Pays `pay` where SavedCue pays 1."""

    pay = 1.0

    def step(self, actions):
        observations, rewards, ends = super().step(actions)
        return observations, self.pay * rewards, ends


# powers of two: products with them are exact
PAYING = {pay: type("Paying", (Paying,), {"pay": pay}) for pay in (1.0, 2.0**-20, 2.0**20)}


def trained(pay, updates=6, **changes):
    trainer, rows = Trainer(TrainConfig(**SIZES, lr=3e-3, **changes), PAYING[pay], Agent), []
    for _ in range(updates):
        rows.append(trainer.train_update())
    return trainer, rows


@pytest.mark.parametrize("pay", [2.0**-20, 2.0**20])
def test_what_is_learned_does_not_depend_on_the_size_of_rewards(pay):
    (ours, rows), (expected, expected_rows) = trained(pay), trained(1.0)
    for name, value in ours.agent.state_dict().items():
        assert torch.equal(value, expected.agent.state_dict()[name]), name
    # the log and evaluations show what the environment paid
    assert [row["mean_return"] for row in rows] == [pay * row["mean_return"] for row in expected_rows]
    played = [
        evaluate(each.agent, make_environment(PAYING[size], 8, CPU), each.config, worlds=2).learned
        for each, size in ((ours, pay), (expected, 1.0))
    ]
    assert played[0] == tuple(pay * value for value in played[1]) and max(played[0]) > 0
    (raw, _), (other, _) = (trained(size, normalize_returns=False) for size in (pay, 1.0))
    assert any(not torch.equal(value, other.agent.state_dict()[name]) for name, value in raw.agent.state_dict().items())


def test_rewards_are_divided_by_the_deviation_of_all_sums_so_far():
    trainer, seen = Trainer(TrainConfig(**SIZES, gamma=0.5), Paying, Agent), []
    train_update, running = trainer._measure_returns, torch.zeros(8, dtype=torch.float64)

    def measured():
        nonlocal running
        for t in range(4):
            running = trainer.experience.rewards[:, t] + 0.5 * running
            seen.extend(running.tolist())
            running = running * ~trainer.experience.terminals[:, t]
        train_update()

    trainer._measure_returns = measured
    for _ in range(5):
        trainer.train_update()
        assert returns.scale(trainer.return_moments).item() == pytest.approx(np.std(seen), rel=1e-6)
    with_scale = trainer.advantages()
    trainer.experience.rewards /= np.std(seen)
    trainer.return_moments.zero_()
    torch.testing.assert_close(with_scale, trainer.advantages(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make_env", [Paying, Cue], ids=["with its state", "new episodes"])
def test_a_resumed_run_has_the_moments(make_env):
    config = TrainConfig(**SIZES)
    first = Trainer(config, make_env, Agent)
    for _ in range(3):
        first.train_update()
    state, moments = copy.deepcopy(first.state_dict()), first.return_moments
    first.run(lambda row: None)
    second = Trainer(config, make_env, Agent)
    second.load_state_dict(state)
    assert moments[0] == 96 and torch.equal(second.return_moments, moments)
    if make_env is Paying:
        second.run(lambda row: None)
        assert torch.equal(second.return_moments, first.return_moments)
        for name, value in second.agent.state_dict().items():
            assert torch.equal(value, first.agent.state_dict()[name]), name


def test_all_ranks_divide_by_the_same(two_ranks):
    from rank_jobs import return_moments

    samples = torch.arange(48.0).view(8, 6) ** 2
    valid = samples.long() % 3 > 0
    for given, expected in ((None, samples), (valid, samples[valid])):
        for moments in two_ranks(return_moments, samples, given):
            size, mean, variance = moments.tolist()
            assert size == expected.numel() / 2
            assert (mean, variance) == pytest.approx((expected.mean().item(), expected.var(correction=0).item()))
