"""The guide's own example, on our LSTMWrapper and on a stand-in of the one that it was written for."""

import pytest
import torch
from agents_for_tests import (
    HIDDEN,
    LAYERS,
    MyAgent,
    assert_equal,
    make_actions,
    make_agent,
    make_observations,
    upstream_inference,
    upstream_training,
)
from tensordict import TensorDict
from torch import nn

from metta_fastagent import PyTorchAgentMixin, use_backend

B, T = 3, 4


class DictMemoryLSTM(nn.Module):
    """A base class of the older kind: memory is always read and written, the environment id is read from a tensor."""

    def __init__(self, env, policy, input_size=128, hidden_size=128, num_layers=2):
        super().__init__()
        self.policy = policy
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.is_continuous = policy.is_continuous
        self.lstm = nn.LSTM(input_size, hidden_size, num_layers)
        self.lstm_h, self.lstm_c = {}, {}

    def _manage_lstm_state(self, td, B, TT, device):
        start = td.get("training_env_id_start", None)
        env_id = 0 if start is None else start[0].item()
        if env_id not in self.lstm_h or self.lstm_h[env_id].shape[1] != B:
            zeros = torch.zeros(self.num_layers, B, self.hidden_size, device=device)
            return zeros, zeros.clone(), env_id
        lstm_h, lstm_c = self.lstm_h[env_id], self.lstm_c[env_id]
        dones, truncateds = td.get("dones", None), td.get("truncateds", None)
        if dones is not None and truncateds is not None and dones.numel() == B:
            ended = (dones.bool() | truncateds.bool()).view(1, -1, 1)
            lstm_h, lstm_c = lstm_h.masked_fill(ended, 0), lstm_c.masked_fill(ended, 0)
        return lstm_h, lstm_c, env_id

    def _store_lstm_state(self, lstm_h, lstm_c, env_id):
        self.lstm_h[env_id], self.lstm_c[env_id] = lstm_h.detach(), lstm_c.detach()


class MyAgentOverDictMemory(PyTorchAgentMixin, DictMemoryLSTM):
    def __init__(self, env, policy=None, input_size=128, hidden_size=128, num_layers=2, **kwargs):
        mixin_params = self.extract_mixin_params(kwargs)
        super().__init__(env, policy, input_size, hidden_size, num_layers=num_layers)
        self.init_mixin(**mixin_params)

    forward = MyAgent.forward


both_bases = pytest.mark.parametrize("cls", [MyAgent, MyAgentOverDictMemory])


def plain_forward(agent, observations, state=None):
    """Logits, values and new state from the agent's torch layers alone; observations [B, T, tokens, 3]."""
    rows, steps = observations.shape[:2]
    state = state or (torch.zeros(LAYERS, rows, HIDDEN), torch.zeros(LAYERS, rows, HIDDEN))
    hidden = agent.policy.encode_observations(observations).view(rows, steps, HIDDEN).transpose(0, 1)
    hidden, state = agent.lstm(hidden, state)
    hidden = hidden.transpose(0, 1).reshape(rows * steps, HIDDEN)
    return agent.policy.actor(hidden), agent.policy.value_head(hidden), state


def gradients(agent, outputs, seed=9):
    """Gradients of all parameters for random upstream gradients on every floating-point output."""
    generator = torch.Generator().manual_seed(seed)
    loss = sum(
        (outputs[key].flatten() * torch.randn(outputs[key].numel(), generator=generator)).sum()
        for key in sorted(outputs)
        if outputs[key].is_floating_point()
    )
    params = dict(agent.named_parameters())
    return dict(zip(params, torch.autograd.grad(loss, list(params.values()), allow_unused=True), strict=True))


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@both_bases
@use_backend("eager")
def test_inference_matches_the_formulas_over_steps_and_resets(cls):
    agent = make_agent(cls)
    state = None
    for step in range(3):
        ended = torch.tensor([False, step == 2, False])
        td = TensorDict(
            {
                "env_obs": make_observations(B, seed=step),
                "dones": ended,
                "truncateds": torch.zeros(B, dtype=torch.bool),
                "training_env_id_start": torch.full((B,), 5),
            },
            batch_size=[B],
        )
        if state is not None:
            state = tuple(memory.detach().masked_fill(ended.view(1, -1, 1), 0) for memory in state)
        logits, value, state = plain_forward(agent, td["env_obs"].unsqueeze(1), state)
        torch.manual_seed(step)
        expected = upstream_inference(logits, value)
        torch.manual_seed(step)
        out = agent(td)
        assert out is td
        assert_equal(td["actions"], expected["actions"])
        assert_equal(td["bptt"], torch.full((B,), 1))
        assert_equal(td["batch"], torch.full((B,), B))
        assert_close({key: td[key] for key in expected}, expected)
        assert_close(gradients(agent, {key: td[key] for key in expected}), gradients(agent, expected))
    assert agent.lstm_h.keys() == {5}


@both_bases
@pytest.mark.parametrize(
    ("steps", "batch_size", "action_shape"),
    [(T, [B, T], (B, T)), (T, [B, T], (B * T,)), (T, [B], (B, T)), (T, [B], (B * T,)), (1, [B], (B, 1))],
)
def test_training_matches_the_formulas(cls, steps, batch_size, action_shape):
    agent = make_agent(cls)
    td = TensorDict({"env_obs": make_observations(B, steps)}, batch_size=batch_size)
    action = make_actions(*action_shape)
    logits, value, _ = plain_forward(agent, td["env_obs"])
    expected = upstream_training(action, logits, value)
    out = agent(td, action=action)
    assert out.batch_size == (B, steps)
    assert out["value"].shape == (B, steps, 1)
    assert_equal(out["env_obs"], make_observations(B, steps))
    assert_equal(out["bptt"], torch.full((B, steps), steps))
    assert_equal(out["batch"], torch.full((B, steps), B))
    results = {key: out[key].flatten(0, 1) for key in expected}
    assert_close(results, expected)
    assert_close(gradients(agent, results), gradients(agent, expected))


def test_every_step_of_the_guide_runs_with_its_configuration():
    agent = make_agent(clip_range=0.05, analyze_weights_interval=7, something_new=3)
    assert (agent.clip_range, agent.analyze_weights_interval) == (0.05, 7)
    agent.clip_weights()
    assert all(layer.weight.abs().max() <= 0.05 for layer in agent.policy.children())


@both_bases
def test_training_is_stable_over_optimizer_steps(cls):
    agent = make_agent(cls, clip_range=0.5)
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.5)
    action = torch.tensor([1, 2]).expand(B, T, 2)
    observations = make_observations(B, T)
    first = None
    for _ in range(20):
        out = agent(TensorDict({"env_obs": observations}, batch_size=[B, T]), action=action)
        loss = -out["act_log_prob"].mean() - 0.01 * out["entropy"].mean() + out["value"].square().mean()
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        agent.clip_weights()
    assert loss.item() < first
