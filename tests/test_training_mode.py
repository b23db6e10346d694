"""Rollout or training: an explicit `training`, else the rank of the observation space, else tokens."""

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from metta_fastagent import LSTMWrapper, PyTorchAgentMixin

ROWS, STEPS, HIDDEN = 4, 3, 16
SHAPES = {"vector": (5,), "scalar": (), "image": (3, 6, 6), "tokens": (8, 3)}


class Policy(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.features = max(1, torch.Size(shape).numel())
        self.encoder, self.actor, self.critic = (
            nn.Linear(self.features, HIDDEN),
            nn.Linear(HIDDEN, 9),
            nn.Linear(HIDDEN, 1),
        )

    def encode_observations(self, observations, state=None):
        return torch.tanh(self.encoder(observations.reshape(-1, self.features).float()))

    def decode_actions(self, hidden, rows):
        return self.actor(hidden), self.critic(hidden)


class Agent(PyTorchAgentMixin, LSTMWrapper):
    """The README's agent, reading its observations from `key`; `explicit` passes `training`."""

    def __init__(self, shape, known=True, explicit=False, key="env_obs"):
        space = SimpleNamespace(shape=shape) if known else None
        super().__init__(SimpleNamespace(single_observation_space=space), Policy(shape), HIDDEN, HIDDEN, num_layers=1)
        self.init_mixin()
        self.explicit, self.key = explicit, key

    def forward(self, td, state=None, action=None):
        observations = td[self.key]
        training = action is not None if self.explicit else None
        B, TT = self.set_tensordict_fields(td, observations, training)
        hidden = self.run_lstm(td, self.policy.encode_observations(observations), B, TT)
        logits, value = self.policy.decode_actions(hidden, B * TT)
        if action is None:
            return self.handle_inference_mode(td, logits, value)
        return self.handle_training_mode(td, action, logits, value)


def make_agent(*args, **kwargs):
    torch.manual_seed(0)
    agent = Agent(*args, **kwargs)
    agent.activate_actions(["noop", "move", "press"], [0, 3, 3])
    return agent


def roll_out(agent, shape, steps=STEPS):
    """Steps of a rollout, and the segments and actions to replay it."""
    h = torch.randn(ROWS, 1, HIDDEN)
    agent.set_memory(({0: h.transpose(0, 1)}, {0: h.transpose(0, 1)}))
    observations, dones = torch.randn(ROWS, steps, *shape), torch.rand(ROWS, steps) < 0.3
    log_probs, actions = [], []
    for t in range(steps):
        td = TensorDict({agent.key: observations[:, t], "dones": dones[:, t]}, batch_size=[ROWS])
        with torch.no_grad():
            agent(td)
        log_probs.append(td["act_log_prob"])
        actions.append(td["actions"])
    entries = {agent.key: observations, "dones": dones, "lstm_h": h, "lstm_c": h}
    return TensorDict(entries, batch_size=[ROWS]), torch.stack(actions, 1), torch.stack(log_probs, 1)


@pytest.mark.parametrize("steps", [1, STEPS])
@pytest.mark.parametrize("key", ["env_obs", "observation"])
@pytest.mark.parametrize("how", ["known", "explicit"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_rollout_is_repeated_by_its_segments(name, how, key, steps):
    shape = SHAPES[name]
    agent = make_agent(shape, known=how == "known", explicit=how == "explicit", key=key)
    segments, actions, log_probs = roll_out(agent, shape, steps)
    memory = agent.get_memory()
    result = agent(segments, action=actions)
    torch.testing.assert_close(result["act_log_prob"], log_probs)
    assert result.batch_size == (ROWS, steps)
    torch.testing.assert_close(agent.get_memory(), memory, rtol=0, atol=0)


def test_tokens_need_neither_a_space_nor_the_argument():
    agent = make_agent((8, 3), known=False)
    segments, actions, log_probs = roll_out(agent, (8, 3))
    torch.testing.assert_close(agent(segments, action=actions)["act_log_prob"], log_probs)


@pytest.mark.parametrize(
    ("shape", "observations", "expected"),
    [
        (
            (5,),
            torch.zeros(4),
            r"expected 2 dimensions \[B, ...\] in rollout or 3 dimensions \[B, T, ...\] in training",
        ),
        ((5,), torch.zeros(2, 3, 4, 5), "for observations of shape \\[5\\]"),
        ((3, 6, 6), torch.zeros(2, 3), "expected 4 dimensions"),
    ],
)
def test_the_error_names_the_expected_rank(shape, observations, expected):
    agent = make_agent(shape)
    td = TensorDict({}, batch_size=[])
    with pytest.raises(ValueError, match=rf"^observations: got .*{expected}"):
        agent.set_tensordict_fields(td, observations)
    assert list(td.keys()) == []


def test_training_of_observations_without_a_time_dimension_is_an_error():
    with pytest.raises(ValueError, match=r"^observations: got .* expected \[B, T, ...\] for training=True"):
        make_agent(()).set_tensordict_fields(TensorDict({}, batch_size=[]), torch.zeros(4), training=True)


def test_the_argument_overrides_the_rank():
    agent = make_agent((5,))
    td = TensorDict({}, batch_size=[2])
    assert agent.set_tensordict_fields(td, torch.zeros(2, 3, 5), training=False) == (2, 1)
    assert agent.set_tensordict_fields(td, torch.zeros(2, 3, 5), training=True) == (2, 3)


@pytest.mark.parametrize("flags", [True, False])
def test_functional_call_differentiates_segments(flags):
    agent = make_agent((5,))
    segments, actions, _ = roll_out(agent, (5,))
    segments = segments if flags else segments.exclude("dones")
    weights = {name: param.detach() for name, param in agent.named_parameters()}

    def loss(params):
        out = torch.func.functional_call(agent, params, (segments.copy(),), {"action": actions})
        return out["act_log_prob"].sum() + out["entropy"].sum() + out["value"].sum()

    found = torch.func.grad(loss)(weights)
    expected = torch.autograd.grad(loss(dict(agent.named_parameters())), list(agent.parameters()))
    for (name, one), other in zip(found.items(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)
