"""The trainer's rollout: bootstrap values of truncated episodes, and that computing them has no side effects."""

from functools import partial

import pytest
import torch

from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.environments.memory import MemoryEnvironment
from metta_fastagent.train.trainer import Trainer

# episodes of at most 4 steps in segments of 10: most are truncated, some inside a segment
ROOM = {"room_size": 2, "delay": 1, "time_limit": 4}
SMALL = {"num_envs": 16, "segment_length": 10, "minibatches": 2}


def trainer(**changes) -> Trainer:
    made = Trainer(TrainConfig.for_environment("memory", **{**SMALL, **changes}), partial(MemoryEnvironment, **ROOM))
    with torch.no_grad():
        # with weights as they start, values hardly depend on the state
        for parameter in made.agent.parameters():
            parameter.mul_(2)
    return made


class Recorder:
    """Keeps each step of an environment, and the agent's memory after the observation that was acted on."""

    def __init__(self, made: Trainer) -> None:
        self.steps, self.memories = [], []
        step = made.env.step

        def recorded(actions):
            self.memories.append(tuple(part.clone() for part in made.memory()))
            self.steps.append(step(actions))
            return self.steps[-1]

        made.env.step = recorded


def values_by_hand(made: Trainer, observations: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Encoder, nn.LSTM and critic, one after the other."""
    agent = made.agent.policy
    with torch.no_grad():
        encoded = agent.policy.encode_observations(observations)
        output, _ = agent.lstm(encoded.unsqueeze(0), state)
        return agent.policy.decode_actions(output.squeeze(0), len(observations))[1].squeeze(1)


@pytest.mark.parametrize("ablation", [False, True])
def test_a_truncation_is_followed_by_the_value_of_its_final_observation(ablation):
    made = trainer(reset_state_every_step=ablation)
    recorder = Recorder(made)
    made.collect()
    made.collect()
    experience, steps = made.experience, recorder.steps[-made.experience.length :]
    assert experience.truncations.sum() > 5 and experience.terminals.any()
    for t, (step, state) in enumerate(zip(steps, recorder.memories[-len(steps) :], strict=True)):
        if ablation:
            state = tuple(torch.zeros_like(part) for part in state)
        expected = torch.where(step.truncations, values_by_hand(made, step.final_observations, state), 0)
        torch.testing.assert_close(experience.bootstrap_values[:, t], expected, rtol=1e-5, atol=1e-6)
    assert experience.bootstrap_values[experience.truncations].abs().min() > 1e-3


def test_on_other_devices_every_row_is_evaluated_with_the_same_result():
    made = trainer()
    recorder = Recorder(made)
    made.collect()
    step = next(step for step in recorder.steps if step.truncations.any())
    chosen = made._bootstrap_values(step)
    # what a device without free reads takes; the tensors stay on the CPU
    made.device = torch.device("meta")
    torch.testing.assert_close(made._bootstrap_values(step), chosen, rtol=1e-5, atol=1e-6)


def test_advantages_bootstrap_truncations_and_not_terminations():
    made = trainer()
    made.collect()
    experience = made.experience
    wanted = torch.zeros_like(experience.values)
    running = made.next_value()
    following = running
    for t in reversed(range(experience.length)):
        ended = experience.terminals[:, t] | experience.truncations[:, t]
        # what comes after step t, and the advantage that flows back from there
        target = torch.where(experience.truncations[:, t], experience.bootstrap_values[:, t], following)
        target = torch.where(experience.terminals[:, t], 0.0, target)
        flow = torch.zeros_like(running) if t + 1 == experience.length else wanted[:, t + 1]
        delta = experience.rewards[:, t] + made.config.gamma * target - experience.values[:, t]
        wanted[:, t] = delta + made.config.gamma * made.config.gae_lambda * torch.where(ended, 0.0, flow)
        following = experience.values[:, t]
    torch.testing.assert_close(made.advantages(), wanted, rtol=1e-6, atol=1e-6)


def test_bootstrapping_advances_neither_memory_nor_random_numbers():
    with_it, without = trainer(), trainer(bootstrap_truncations=False)
    states = []
    for made in (with_it, without):
        torch.manual_seed(5)
        made.collect()
        made.collect()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    for ours, theirs in zip(with_it.memory(), without.memory(), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = with_it.experience, without.experience
    for name in ("observations", "actions", "log_probs", "values", "rewards", "lstm_h", "lstm_c"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert not theirs.bootstrap_values.any() and ours.bootstrap_values.any()


def test_rows_without_a_truncation_have_the_same_advantages_either_way():
    with_it, without = trainer(), trainer(bootstrap_truncations=False)
    for made in (with_it, without):
        torch.manual_seed(5)
        made.collect()
    # no truncation at or after these steps of the row
    untouched = ~with_it.experience.truncations.flip(1).cumsum(1).flip(1).bool()
    terminated = untouched & with_it.experience.terminals
    assert terminated.any()
    ours, theirs = with_it.advantages(), without.advantages()
    assert torch.equal(ours[untouched], theirs[untouched])
    assert not torch.equal(ours, theirs)


def test_no_truncation_costs_no_evaluation(monkeypatch):
    made = trainer()
    recorder = Recorder(made)
    made.collect()
    step = next(step for step in recorder.steps if not step.truncations.any())
    monkeypatch.setattr(made, "_value", lambda *arguments: pytest.fail("evaluated"))
    assert made._bootstrap_values(step) is None
    made.config = TrainConfig.for_environment("memory", **SMALL, bootstrap_truncations=False)
    cut = next(step for step in recorder.steps if step.truncations.any())
    assert made._bootstrap_values(cut) is None
