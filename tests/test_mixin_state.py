"""State of the mixin in state dicts, copies, pickles and moves: kept, and nothing added."""

import copy
import io
import pickle

import pytest
import torch
from agents_for_tests import (
    CUM_ACTION_MAX_PARAMS,
    HIDDEN,
    LAYERS,
    PAIRS,
    MyAgent,
    Net,
    SmallPolicy,
    assert_equal,
    make_actions,
    make_agent,
    make_env,
    make_observations,
    on_gpu,
    parameters_of,
    pickled,
    set_tables,
)
from tensordict import TensorDict
from torch import nn

from metta_fastagent import Fast, LSTMWrapper
from metta_fastagent.agents.fast import FastPolicy

B, T = 2, 3


def save_and_load(agent):
    buffer = io.BytesIO()
    torch.save(agent, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


copies = pytest.mark.parametrize(
    "copied", [copy.deepcopy, pickled, save_and_load], ids=["deepcopy", "pickle", "torch.save"]
)


def used_agent(**kwargs):
    """An agent whose every method has run, so that all its caches are filled."""
    agent = make_agent(clip_range=0.3, **kwargs)
    run_inference(agent)
    run_training(agent)
    agent.clip_weights()
    agent.l2_init_loss()
    agent.compute_weight_metrics()
    return agent


def run_inference(agent):
    torch.manual_seed(0)
    with torch.no_grad():
        return agent(TensorDict({"env_obs": make_observations(B)}, batch_size=[B]))


def run_training(agent):
    return agent(TensorDict({"env_obs": make_observations(B, T)}, batch_size=[B, T]), action=make_actions(B, T))


def assert_same_outputs(actual, expected):
    for key in ("act_log_prob", "full_log_probs"):
        assert_equal(actual[key].detach(), expected[key].detach())


@pytest.mark.parametrize(
    ("with_mixin", "without"),
    [
        (lambda: MyAgent(make_env(), SmallPolicy(), 6, 6, 2), lambda: LSTMWrapper(make_env(), SmallPolicy(), 6, 6, 2)),
        (lambda: Fast(make_env()), lambda: LSTMWrapper(make_env(), FastPolicy(make_env()), 128, 128, 2)),
    ],
    ids=["small", "Fast"],
)
def test_construction_is_that_of_the_agent_without_the_mixin(with_mixin, without):
    torch.manual_seed(3)
    expected = without()
    expected_rng = torch.get_rng_state()
    torch.manual_seed(3)
    agent = with_mixin()
    assert_equal(torch.get_rng_state(), expected_rng)
    assert list(agent.state_dict()) == list(expected.state_dict())
    assert_equal(dict(agent.state_dict()), dict(expected.state_dict()))
    assert [name for name, _ in agent.named_modules()] == [name for name, _ in expected.named_modules()]
    assert list(dict(agent.named_buffers())) == list(dict(expected.named_buffers()))


@pytest.mark.parametrize("clip_mode", ["absolute", "init_scaled"])
def test_use_adds_nothing_to_the_state_dict(clip_mode):
    agent = used_agent(clip_mode=clip_mode)
    expected = LSTMWrapper(make_env(), SmallPolicy(), HIDDEN, HIDDEN, LAYERS)
    assert list(agent.state_dict()) == list(expected.state_dict())
    expected.load_state_dict(agent.state_dict(), strict=True)


def tensors_of(agent):
    """Everything of an agent that a copy must have of its own, by name."""
    tables = {"pairs": agent.action_index_tensor, "offsets": agent.cum_action_max_params}
    return {**dict(agent.named_parameters()), **{f"initial {n}": w for n, w in agent.initial_weights.items()}, **tables}


@copies
def test_copies_have_an_equal_state_of_their_own(copied):
    agent = used_agent(clip_mode="init_scaled")
    twin = copied(agent)
    mine, theirs = tensors_of(agent), tensors_of(twin)
    assert_equal(theirs, mine)
    assert [name for name in mine if mine[name].data_ptr() == theirs[name].data_ptr()] == []
    assert twin.initial_weight_magnitudes == agent.initial_weight_magnitudes
    for name in ("clip_range", "clip_mode", "analyze_weights_interval", "l2_init_scale", "clip_scale"):
        assert getattr(twin, name) == getattr(agent, name)


@copies
def test_copies_compute_the_same_and_by_themselves(copied):
    agent = used_agent()
    twin = copied(agent)
    first, second = run_inference(agent), run_inference(twin)
    assert_equal(second["actions"], first["actions"])
    assert_same_outputs(second, first)
    assert_same_outputs(run_training(twin), run_training(agent))
    assert_equal(twin.l2_init_loss().detach(), agent.l2_init_loss().detach())
    before = parameters_of(agent), agent.l2_init_loss().detach()
    with torch.no_grad():
        for param in twin.parameters():
            param.add_(1)
    assert twin.l2_init_loss() > before[1]
    twin.clip_weights()
    assert all(layer.weight.abs().max() <= 0.3 for layer in twin.policy.children())
    assert_equal((parameters_of(agent), agent.l2_init_loss().detach()), before)


def test_pickles_take_no_cache_along():
    net = set_tables(Net([nn.Linear(2, 2)], clip_range=0.5))
    size = len(pickle.dumps(net))
    net.set_tensordict_fields(TensorDict({}, batch_size=[]), torch.zeros(50, 50, 1, 3))
    net.clip_weights()
    net.l2_init_loss()
    # The names of the caches themselves take a few bytes, the fields of 2500 rows 40 000.
    assert len(pickle.dumps(net)) < size + 300


def test_a_copied_agent_reads_its_own_fields():
    agent = set_tables(Net())
    td = TensorDict({}, batch_size=[B * T])
    agent.set_tensordict_fields(td, make_observations(B, T))
    twin = copy.deepcopy(agent)
    out = twin.handle_training_mode(td, make_actions(B * T), torch.zeros(B * T, 7), torch.zeros(B * T, 1))
    assert out.batch_size == (B, T)


@pytest.mark.parametrize(
    ("move", "dtype"),
    [
        (lambda net: net.double(), torch.float64),
        (lambda net: net.bfloat16(), torch.bfloat16),
        (lambda net: net.type(torch.float64), torch.float64),
        (lambda net: net.to("cpu"), torch.float32),
        (lambda net: net.share_memory(), torch.float32),
        (lambda net: net.to(memory_format=torch.channels_last), torch.float32),
    ],
)
def test_casts_leave_the_tables_and_take_the_initial_weights_along(move, dtype):
    net = set_tables(Net([nn.Linear(2, 3), nn.Conv2d(1, 2, 2)]))
    assert move(net) is net
    assert_equal(net.cum_action_max_params, torch.tensor(CUM_ACTION_MAX_PARAMS))
    assert_equal(net.action_index_tensor, torch.tensor(PAIRS, dtype=torch.int32))
    assert {weight.dtype for weight in net.initial_weights.values()} == {dtype}
    assert net.l2_init_loss() == 0


def test_initial_weights_survive_a_trip_over_the_meta_device():
    net = set_tables(Net([nn.Linear(2, 3)]))
    weight = net.layers[0].weight.detach().clone()
    net.to("meta").to_empty(device="cpu")
    nn.init.zeros_(net.layers[0].weight)
    assert_equal(net.initial_weights["layers.0"], weight)
    torch.testing.assert_close(net.l2_init_loss().detach(), weight.square().sum())
    assert_equal(net.action_index_tensor, torch.tensor(PAIRS, dtype=torch.int32))


def test_agents_without_tables_can_be_moved():
    for net in (Net([nn.Linear(2, 2)]), make_agent(active=False)):
        net.to(torch.float64)
        assert getattr(net, "action_index_tensor", None) is None


@pytest.mark.gpu
@on_gpu
def test_tables_and_initial_weights_follow_the_agent_to_the_gpu():
    agent = used_agent().cuda()
    assert agent.action_index_tensor.is_cuda
    assert agent.cum_action_max_params.is_cuda
    assert all(weight.is_cuda for weight in agent.initial_weights.values())
    td = TensorDict({"env_obs": make_observations(B).cuda()}, batch_size=[B])
    assert agent(td)["actions"].is_cuda
    assert agent.l2_init_loss().is_cuda
    assert not agent.cpu().action_index_tensor.is_cuda


def test_the_state_dict_loads_into_another_agent_with_equal_outputs():
    agent, other = used_agent(), make_agent(seed=2)
    other.load_state_dict(agent.state_dict(), strict=True)
    assert_same_outputs(run_training(other), run_training(agent))
    # The start of the L2-init loss is that of the agent's own construction until it is refreshed.
    assert other.l2_init_loss() > 0
    other.update_l2_init_weight_copy()
    assert other.l2_init_loss() == 0
