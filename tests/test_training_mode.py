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
        self.encoder = nn.Linear(self.features, HIDDEN)
        self.actor, self.critic = nn.Linear(HIDDEN, 9), nn.Linear(HIDDEN, 1)

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
@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, how) for name in SHAPES for how in ("known", "explicit")), ("tokens", "neither")],
)
def test_a_rollout_is_repeated_by_its_segments(name, how, key, steps):
    shape = SHAPES[name]
    agent = make_agent(shape, known=how == "known", explicit=how == "explicit", key=key)
    segments, actions, log_probs = roll_out(agent, shape, steps)
    memory = agent.get_memory()
    result = agent(segments, action=actions)
    torch.testing.assert_close(result["act_log_prob"], log_probs)
    assert result.batch_size == (ROWS, steps)
    torch.testing.assert_close(agent.get_memory(), memory, rtol=0, atol=0)


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


@pytest.mark.parametrize("shape", [(5,), (6, 6, 3)], ids=["vector", "image"])
@pytest.mark.parametrize("batch_size", [[ROWS], [ROWS, STEPS]], ids=str)
def test_observations_of_an_unknown_rank_are_an_error_that_names_training(shape, batch_size):
    agent = make_agent(shape, known=False)
    # segments of vectors look like a step, a step of images looks like segments
    lead, action = ((ROWS, STEPS), torch.zeros(ROWS, STEPS, 2).int()) if len(shape) == 1 else ((ROWS,), None)
    if len(shape) > 1:
        batch_size = batch_size[:1]
    td = TensorDict({"env_obs": torch.randn(*lead, *shape)}, batch_size=batch_size)
    with pytest.raises(ValueError, match="pass training= to set_tensordict_fields"):
        agent(td, action=action)
    assert not agent.get_memory()[0]
