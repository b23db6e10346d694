"""Masks, temperature, greedy actions, logit indices, bad logits and diagnostics of the mixin."""

import copy
import math

import pytest
import torch
from agents_for_tests import (
    NUM_ACTIONS,
    PAIRS,
    Net,
    assert_equal,
    make_actions,
    make_agent,
    make_fast,
    make_observations,
    set_tables,
)
from tensordict import TensorDict
from torch import nn
from torch._subclasses import FakeTensorMode

from metta_fastagent import _agent_state, ops

B, T = 3, 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def net():
    return set_tables(Net([nn.Linear(3, 2)]))


def make_mask(*shape, allowed=()):
    mask = torch.rand(*shape, NUM_ACTIONS, generator=torch.Generator().manual_seed(9)) < 0.5
    mask[..., 0] = True
    mask[..., list(allowed)] = True
    return mask


def train(agent, action, logits, batch_size=(B * T,), **entries):
    td = TensorDict({"env_obs": torch.zeros(*batch_size, 1), **entries}, batch_size=batch_size)
    return agent.handle_training_mode(td, action, logits, torch.zeros(len(logits), 1))


def act(agent, logits, **entries):
    td = TensorDict({"env_obs": torch.zeros(len(logits), 1), **entries}, batch_size=[len(logits)])
    return agent.handle_inference_mode(td, logits, torch.zeros(len(logits), 1))


@pytest.mark.parametrize("batch_size", [(B, T), (B,), (B * T,)], ids=str)
def test_training_under_a_mask_and_a_temperature(net, batch_size):
    logits, actions = torch.randn(B * T, NUM_ACTIONS), make_actions(B, T)
    mask = make_mask(B, T, allowed=range(0, NUM_ACTIONS, 2))
    net.temperature = 0.5
    fields = {"batch": torch.full((B, T), B), "bptt": torch.full((B, T), T)} if batch_size != (B * T,) else {}
    given = mask if fields else mask.flatten(0, 1)
    out = train(net, actions, logits, batch_size, action_mask=given, **fields)
    full = torch.where(mask.flatten(0, 1), logits.double() / 0.5, -torch.inf).log_softmax(-1)
    torch.testing.assert_close(out["full_log_probs"].reshape(B * T, -1).double(), full, rtol=1e-5, atol=1e-5)
    index = net._convert_action_to_logit_index(actions.reshape(-1, 2))
    torch.testing.assert_close(out["act_log_prob"].flatten().double(), full[range(B * T), index], rtol=1e-5, atol=1e-5)


def test_only_allowed_actions_are_drawn_and_training_agrees(net):
    logits, mask = torch.randn(500, NUM_ACTIONS), make_mask(500)
    net.temperature = torch.tensor(2.0)
    out = act(net, logits, action_mask=mask)
    index = net._convert_action_to_logit_index(out["actions"])
    assert mask[range(500), index].all()
    assert len(index.unique()) == NUM_ACTIONS
    again = train(net, out["actions"], logits, (500,), action_mask=mask)
    assert_equal(again["act_log_prob"], out["act_log_prob"])


def test_greedy_is_a_context(net):
    logits = torch.randn(B, NUM_ACTIONS)
    likeliest = torch.tensor(PAIRS, dtype=torch.int32)[logits.argmax(-1)]
    with net.greedy():
        with net.greedy():
            pass
        assert_equal(act(net, logits)["actions"], likeliest)
    with pytest.raises(KeyError), net.greedy():
        raise KeyError
    draws = {tuple(act(net, torch.zeros(B, NUM_ACTIONS))["actions"].flatten().tolist()) for _ in range(20)}
    assert len(draws) > 1


def test_the_defaults_change_nothing(net):
    logits = torch.randn(B, NUM_ACTIONS)
    torch.manual_seed(3)
    out = act(net, logits)
    torch.manual_seed(3)
    index, log_prob, _, full = ops.sample_actions(logits)
    assert_equal(out["actions"], torch.tensor(PAIRS, dtype=torch.int32)[index])
    assert_equal([out["act_log_prob"], out["full_log_probs"]], [log_prob, full])
    assert set(net.state_dict()) == {"layers.0.weight", "layers.0.bias"}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("shape", [(B, T), (B * T,)], ids=str)
def test_actions_may_be_logit_indices(net, shape, dtype):
    logits, pairs = torch.randn(B * T, NUM_ACTIONS), make_actions(B, T)
    index = net._convert_action_to_logit_index(pairs).to(dtype)
    fields = {"batch": torch.full((B, T), B), "bptt": torch.full((B, T), T)}
    by_pairs = train(net, pairs, logits, (B, T), **fields)
    by_index = train(net, index.reshape(shape), logits, (B, T), **fields)
    for name in ("act_log_prob", "entropy", "full_log_probs"):
        assert_equal(by_index[name], by_pairs[name])


def test_indices_of_two_steps_are_not_pairs(net):
    logits, index = torch.randn(2, NUM_ACTIONS), torch.tensor([[1, 2]])
    out = train(net, index, logits, (2,))
    expected = logits.double().log_softmax(-1)[range(2), [1, 2]].float()
    torch.testing.assert_close(out["act_log_prob"], expected)


def test_inference_writes_indices_if_asked():
    agent = set_tables(Net(action_format="index"))
    logits = torch.randn(B, NUM_ACTIONS)
    out = act(agent, logits)
    assert (out["actions"].dtype, out["actions"].shape) == (torch.int64, (B,))
    assert_equal(out["act_log_prob"], train(agent, out["actions"], logits, (B,))["act_log_prob"])


@pytest.mark.parametrize("step", [train, act])
def test_bad_logits_are_an_error_that_names_the_row(net, step):
    logits = torch.zeros(B * T, NUM_ACTIONS)
    logits[7, 2] = torch.nan
    arguments = (make_actions(B, T), logits) if step is train else (logits,)
    with pytest.raises(ValueError, match=r"logits\[7\]: holds NaN"):
        step(net, *arguments)
    mask = torch.ones(B * T, NUM_ACTIONS, dtype=torch.bool)
    mask[7, 2] = False
    step(net, *arguments, action_mask=mask)
    mask[5] = False
    with pytest.raises(ValueError, match=r"mask\[5\]: got no allowed action"):
        step(net, *arguments, action_mask=mask)


def test_bad_logits_are_counted_if_asked():
    agent = set_tables(Net(on_nonfinite_logits="count"))
    logits = torch.zeros(B * T, NUM_ACTIONS)
    logits[2, 1], logits[7] = torch.inf, -torch.inf
    out = act(agent, logits)
    assert out["act_log_prob"].isnan().nonzero().flatten().tolist() == [2, 7]
    assert out["actions"][[2, 7]].tolist() == [PAIRS[0]] * 2
    out = train(agent, make_actions(B, T), logits)
    assert out["entropy"].isnan().nonzero().flatten().tolist() == [2, 7]
    assert agent.diagnostics()["nonfinite_rows"] == 4


def test_diagnostics(net):
    net.clip_range = 0.25
    net.layers[0].weight.data = torch.tensor([[0.5, -0.1, -0.7], [0.2, 0.0, 0.25]])
    net.clip_weights()
    logits = torch.zeros(B * T, NUM_ACTIONS)
    for _ in range(2):
        act(net, logits)
    train(net, make_actions(B, T), logits, action_mask=torch.arange(NUM_ACTIONS).expand(B * T, -1) < 1)
    found = net.diagnostics()
    entropy = found.pop("mean_entropy")
    assert entropy == {"inference": pytest.approx(torch.tensor(NUM_ACTIONS).log().item()), "training": 0}
    assert found.pop("backend") in ("native", "eager")
    rates = found.pop("rows_per_second")
    assert 0 < rates["inference"] < math.inf and math.isnan(rates["training"])
    assert found == {
        "calls": {"inference": 2, "training": 1},
        "rows": {"inference": 2 * B * T, "training": B * T},
        "bad_actions": 0,
        "nonfinite_rows": 0,
        "clipped": {"layers.0": 0.5},
    }
    assert copy.deepcopy(net).diagnostics()["calls"] == {}


def test_clipped_fractions_of_scaled_bounds():
    agent = Net([nn.Linear(2, 1)], clip_range=2, clip_mode="init_scaled")
    largest = agent.initial_weight_magnitudes["layers.0"]
    agent.layers[0].weight.data = torch.tensor([[5 * largest, 0.1 * largest]])
    agent.clip_weights()
    assert agent.diagnostics()["clipped"] == {"layers.0": 0.5}
    agent.clip_range = 0
    assert agent.diagnostics()["clipped"] == {}


def test_an_agents_own_temperature_parameter_stays_its_own():
    class Tempered(Net):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(3.0))

    agent, logits = set_tables(Tempered()), torch.randn(B, NUM_ACTIONS)
    assert_equal(act(agent, logits)["full_log_probs"], act(set_tables(Net()), logits)["full_log_probs"])
    assert set(agent.state_dict()) == {"temperature"}


class Cold(Net):
    temperature = 0.5


class Annealed(Net):
    @property
    def temperature(self):
        return 0.5

    @temperature.setter
    def temperature(self, value):
        raise AttributeError("read-only")


def with_buffer():
    agent = Net()
    del agent.temperature
    agent.register_buffer("temperature", torch.tensor(0.5))
    return agent


@pytest.mark.parametrize("make", [Cold, Annealed, with_buffer], ids=["class attribute", "property", "buffer"])
def test_a_temperature_counts_wherever_the_agent_keeps_it(net, make):
    agent, logits, actions = set_tables(make()), torch.randn(B * T, NUM_ACTIONS), make_actions(B, T)
    net.temperature = 0.5
    assert_equal(train(agent, actions, logits)["full_log_probs"], train(net, actions, logits)["full_log_probs"])
    assert_equal(act(agent, logits)["full_log_probs"], act(net, logits)["full_log_probs"])


@pytest.mark.parametrize(
    "shape", [(B * T * NUM_ACTIONS,), (T, B, NUM_ACTIONS), (B, NUM_ACTIONS, T), (NUM_ACTIONS, B * T)]
)
def test_a_mask_of_another_layout_is_refused(net, shape):
    mask, logits, value = torch.ones(shape, dtype=torch.bool), torch.zeros(B * T, NUM_ACTIONS), torch.zeros(B * T)
    td = TensorDict({"action_mask": mask}, batch_size=[])
    with pytest.raises(
        ValueError, match=r"^action_mask: got a bool tensor .* expected bool values of shape .*\[12, 7\]"
    ):
        net.handle_training_mode(td, make_actions(B, T), logits, value)
    with pytest.raises(ValueError, match=r"^action_mask: got a bool tensor .* expected bool values of shape \[12, 7\]"):
        net.handle_inference_mode(td, logits, value)


@pytest.mark.parametrize("options", [{}, {"on_nonfinite_logits": "count"}], ids=["raise", "count"])
def test_training_follows_a_rollout_in_inference_mode(options):
    agent = set_tables(Net(**options))
    with torch.inference_mode():
        act(agent, torch.randn(B, NUM_ACTIONS))
    logits = torch.randn(B * T, NUM_ACTIONS, requires_grad=True)
    train(agent, make_actions(B, T), logits)["act_log_prob"].sum().backward()
    assert agent.diagnostics()["nonfinite_rows"] == 0


def test_a_temperature_moves_with_the_agent(net):
    net.temperature = torch.tensor(2.0)
    assert net.to(torch.float64).temperature.dtype == torch.float32
    assert net.to("meta").temperature.device.type in ("cpu", "meta")


@pytest.mark.parametrize("make", [make_agent, make_fast])
def test_masks_reach_the_handlers_of_whole_agents(make):
    agent = make()
    mask = torch.zeros(B, NUM_ACTIONS, dtype=torch.bool)
    mask[:, 5] = True
    td = agent(TensorDict({"env_obs": make_observations(B), "action_mask": mask}, batch_size=[B]))
    assert td["actions"].tolist() == [PAIRS[5]] * B
    segment = TensorDict(
        {"env_obs": make_observations(B, T), "action_mask": mask[:, None].expand(B, T, -1)}, batch_size=[B, T]
    )
    out = agent(segment, action=torch.tensor(PAIRS[5]).expand(B, T, 2))
    assert_equal(out["act_log_prob"], torch.zeros_like(out["act_log_prob"]))


def test_no_host_read_with_every_option():
    agent = Net(action_format="index", on_nonfinite_logits="count")
    with FakeTensorMode():
        agent.cum_action_max_params = torch.zeros(4, dtype=torch.int64)
        agent.action_index_tensor = torch.zeros(NUM_ACTIONS, 2, dtype=torch.int32)
        agent.temperature = torch.ones(())
        logits = torch.zeros(B * T, NUM_ACTIONS, requires_grad=True)
        mask = torch.ones(B * T, NUM_ACTIONS, dtype=torch.bool)
        with agent.greedy():
            out = act(agent, logits, action_mask=mask)
        out = train(agent, out["actions"], logits, action_mask=mask)
        torch.autograd.grad(out["act_log_prob"].sum(), logits)


def test_a_profiler_shows_the_parts():
    agent = make_agent()
    agent.clip_range = 1.0
    with torch.profiler.profile() as profile:
        agent(TensorDict({"env_obs": make_observations(B)}, batch_size=[B]))
        agent(TensorDict({"env_obs": make_observations(B, T)}, batch_size=[B, T]), action=make_actions(B, T))
        agent.clip_weights()
    names = {event.key for event in profile.key_averages()}
    expected = {"handle_inference_mode", "handle_training_mode", "clip_weights"}
    assert {f"metta_fastagent.{name}" for name in expected} <= names


def test_many_small_steps_on_several_threads_are_told_once(net, monkeypatch, caplog):
    monkeypatch.setattr(_agent_state, "_told", False)
    monkeypatch.setattr(_agent_state, "MANY_STEPS", 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)

    def messages_after(steps, rows):
        for _ in range(steps):
            act(net, torch.zeros(rows, NUM_ACTIONS))
        return [record.getMessage() for record in caplog.records]

    assert messages_after(2, B) == []
    (message,) = messages_after(1, B)
    assert message.startswith(f"batches of {B} run on 4 threads")
    net._agent_state.calls.calls.clear()
    assert messages_after(5, B) == [message]


@pytest.mark.parametrize(("threads", "rows"), [(1, B), (4, 1000)])
def test_one_thread_and_large_steps_are_not_told(net, monkeypatch, caplog, threads, rows):
    monkeypatch.setattr(_agent_state, "_told", False)
    monkeypatch.setattr(_agent_state, "MANY_STEPS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    act(net, torch.zeros(rows, NUM_ACTIONS))
    assert not caplog.records
