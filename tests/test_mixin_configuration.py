import inspect
import logging

import numpy as np
import pytest
import torch
from agents_for_tests import MyAgent, Net, make_agent
from torch import nn

from metta_fastagent import Fast, LSTMWrapper, PyTorchAgentMixin


def extract(kwargs):
    """Called as agents do: before the module's own __init__ has run."""
    return Net.__new__(Net).extract_mixin_params(kwargs)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({}, {"clip_range": 0, "analyze_weights_interval": 300}),
        ({"clip_range": 0.5}, {"clip_range": 0.5, "analyze_weights_interval": 300}),
        ({"analyze_weights_interval": 0}, {"clip_range": 0, "analyze_weights_interval": 0}),
        (
            {"clip_mode": "init_scaled", "clip_range": np.float32(1.5)},
            {"clip_range": 1.5, "analyze_weights_interval": 300, "clip_mode": "init_scaled"},
        ),
    ],
)
def test_extract_takes_its_own_parameters_and_leaves_the_rest(given, taken):
    kwargs = {**given, "unknown": 1, "another": None}
    params = extract(kwargs)
    extra = params.pop("extra_kwargs")
    assert params == taken
    assert extra is kwargs
    assert kwargs == {"unknown": 1, "another": None}


@pytest.mark.parametrize("wrong", [{"clip_range": "0.5"}, {"analyze_weights_interval": -1}, {"clip_mode": "soft"}])
def test_extract_takes_nothing_where_a_value_is_wrong(wrong):
    kwargs = {"clip_range": 1, "analyze_weights_interval": 2, "unknown": 3} | wrong
    before = dict(kwargs)
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        extract(kwargs)
    assert kwargs == before


def test_init_mixin_defaults():
    net = Net()
    assert (net.clip_range, net.clip_mode, net.analyze_weights_interval) == (0, "absolute", 300)
    assert (net.l2_init_scale, net.clip_scale) == (1, 1)


def test_init_mixin_takes_what_extract_returned():
    params = extract({"clip_range": 2, "clip_mode": "init_scaled", "analyze_weights_interval": 5, "unknown": 1})
    net = Net()
    net.init_mixin(**params)
    assert (net.clip_range, net.clip_mode, net.analyze_weights_interval) == (2, "init_scaled", 5)


def test_parameters_reach_agents_through_their_keyword_arguments():
    agent = make_agent(clip_range=0.75, analyze_weights_interval=11, clip_mode="init_scaled")
    assert (agent.clip_range, agent.analyze_weights_interval, agent.clip_mode) == (0.75, 11, "init_scaled")


def test_one_info_line_names_the_configuration(caplog):
    with caplog.at_level(logging.DEBUG, logger="metta_fastagent"):
        Net(clip_range=0.25, analyze_weights_interval=12)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    message = record.getMessage()
    assert "\n" not in message
    assert [part for part in ("Net", "0.25", "12", "absolute") if part not in message] == []


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"zeta": 1, "alpha": "x"}, "zeta, alpha"),
        ({"clip_rage": 0.5}, "clip_rage (did you mean clip_range?)"),
        ({"validates": "off"}, "validates (did you mean validate?)"),
    ],
)
def test_unknown_parameters_are_a_warning(caplog, extra, named):
    with caplog.at_level(logging.WARNING, logger="metta_fastagent"):
        Net(**extra)
    (record,) = caplog.records
    assert record.getMessage() == f"Net: ignored unknown parameters: {named}"


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda net: net.clip_weights(), "clip_range"),
        (lambda net: net.maybe_compute_weight_metrics(300), "analyze_weights_interval"),
    ],
)
def test_a_forgotten_init_mixin_is_named(call, name):
    class Forgetful(PyTorchAgentMixin, nn.Module):
        pass

    expected = rf"{name} not set: call self\.init_mixin\(\*\*mixin_params\) at the end of Forgetful\.__init__"
    with pytest.raises(RuntimeError, match=expected):
        call(Forgetful())


def test_the_mixin_brings_no_constructor_and_no_forward():
    assert "__init__" not in vars(PyTorchAgentMixin)
    assert "forward" not in vars(PyTorchAgentMixin)
    assert not issubclass(PyTorchAgentMixin, nn.Module)


OPTIONS = ["clip_mode", "validate", "action_format", "on_nonfinite_logits"]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("extract_mixin_params", ["kwargs"]),
        (
            "init_mixin",
            ["clip_range", "analyze_weights_interval", "extra_kwargs", *OPTIONS],
        ),
        ("clip_weights", []),
        ("set_tensordict_fields", ["td", "observations", "training"]),
        ("handle_training_mode", ["td", "action", "logits_list", "value"]),
        ("handle_inference_mode", ["td", "logits_list", "value"]),
        ("forward_training", ["td", "action", "logits_list", "value"]),
        ("forward_inference", ["td", "logits_list", "value"]),
        ("_convert_action_to_logit_index", ["flattened_action"]),
        ("_convert_logit_index_to_action", ["action_logit_index"]),
        ("initialize_to_environment", ["full_action_names", "device"]),
        ("activate_action_embeddings", ["full_action_names", "device"]),
        ("create_action_heads", ["env", "input_size"]),
        ("l2_init_loss", []),
        ("update_l2_init_weight_copy", []),
        ("compute_weight_metrics", ["delta"]),
        ("_store_initial_weights", []),
        ("_is_regularizable_layer", ["module"]),
        ("_apply_feature_remapping", ["remap_tensor"]),
        ("update_normalization_factors", ["features", "original_feature_mapping"]),
    ],
)
def test_methods_have_the_names_and_parameters_that_callers_use(method, parameters):
    assert list(inspect.signature(getattr(Net(), method)).parameters) == parameters


def test_create_action_heads_has_the_old_default_width():
    assert inspect.signature(PyTorchAgentMixin.create_action_heads).parameters["input_size"].default == 528


# The order of the base classes


class Base(nn.Module):
    pass


class OtherMixin:
    pass


class Agent(PyTorchAgentMixin, Base):
    pass


@pytest.mark.parametrize(
    ("bases", "right_order"),
    [
        ((LSTMWrapper, PyTorchAgentMixin), "MyAgent(PyTorchAgentMixin, LSTMWrapper)"),
        ((nn.Module, PyTorchAgentMixin), "MyAgent(PyTorchAgentMixin, Module)"),
        ((OtherMixin, LSTMWrapper, PyTorchAgentMixin), "MyAgent(PyTorchAgentMixin, OtherMixin, LSTMWrapper)"),
        ((LSTMWrapper, Agent), "MyAgent(Agent, LSTMWrapper)"),
    ],
)
def test_the_wrong_base_class_order_is_an_error_at_definition(bases, right_order):
    with pytest.raises(TypeError) as error:
        type("MyAgent", bases, {})
    assert right_order in str(error.value)
    assert "before PyTorchAgentMixin" in str(error.value)


@pytest.mark.parametrize(
    "bases",
    [
        (PyTorchAgentMixin, LSTMWrapper),
        (OtherMixin, PyTorchAgentMixin, LSTMWrapper),
        (PyTorchAgentMixin, OtherMixin, Base),
        (Agent,),
        (Agent, LSTMWrapper),
        (MyAgent, OtherMixin),
        (Fast,),
        (PyTorchAgentMixin,),
    ],
)
def test_right_orders_are_accepted_at_every_level(bases):
    first = type("First", bases, {})
    second = type("Second", (first,), {})
    assert second.clip_weights is PyTorchAgentMixin.clip_weights


def test_the_suggested_order_can_be_defined():
    cls = type("MyAgent", (Agent, LSTMWrapper), {})
    assert cls.__mro__.index(PyTorchAgentMixin) < cls.__mro__.index(nn.Module)


# Passing on to the policy


class Recorder(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = []

    def activate_action_embeddings(self, full_action_names, device):
        self.calls.append(("activate_action_embeddings", full_action_names, device))

    def initialize_to_environment(self, full_action_names, device):
        self.calls.append(("initialize_to_environment", full_action_names, device))


@pytest.mark.parametrize("method", ["activate_action_embeddings", "initialize_to_environment"])
def test_environment_calls_are_passed_on_to_the_policy(method):
    net = Net()
    net.policy = Recorder()
    names, device = ["a_0", "b_0"], torch.device("cpu")
    getattr(net, method)(names, device)
    assert net.policy.calls == [(method, names, device)]


@pytest.mark.parametrize("policy", [None, nn.Linear(1, 1)])
@pytest.mark.parametrize("method", ["activate_action_embeddings", "initialize_to_environment"])
def test_environment_calls_do_nothing_where_the_policy_has_no_such_method(method, policy):
    net = Net()
    if policy is not None:
        net.policy = policy
    assert getattr(net, method)(["a_0"], "cpu") is None


def test_feature_hooks_return_none_and_change_nothing():
    net = Net([nn.Linear(2, 2)])
    before = {key: value.clone() for key, value in net.state_dict().items()}
    attributes = set(vars(net))
    assert net._apply_feature_remapping(torch.arange(256, dtype=torch.uint8)) is None
    assert net.update_normalization_factors({"wall": {"id": 0, "normalization": 2.0}}, None) is None
    assert set(vars(net)) == attributes
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_activate_actions_sets_the_tables_and_activates_embeddings_first():
    net = Net([nn.Linear(1, 1)])
    net.policy = Recorder()
    net.activate_actions(["noop", "move", "turn"], [0, 3, 1])
    assert net.cum_action_max_params.tolist() == [0, 0, 3, 4]
    assert net.action_index_tensor.tolist() == [[0, 0], [1, 0], [1, 1], [1, 2], [1, 3], [2, 0], [2, 1]]
    assert (net.cum_action_max_params.dtype, net.action_index_tensor.dtype) == (torch.int64, torch.int32)
    ((method, names, _),) = net.policy.calls
    assert (method, len(names)) == ("activate_action_embeddings", 7)


def test_activate_actions_changes_nothing_where_an_argument_is_wrong():
    net = Net([nn.Linear(1, 1)])
    net.policy = Recorder()
    net.activate_actions(["noop"], [1])
    tables, calls = (net.cum_action_max_params, net.action_index_tensor), list(net.policy.calls)
    with pytest.raises(ValueError, match="action_max_params"):
        net.activate_actions(["noop", "move"], [1, -1])
    assert net.cum_action_max_params is tables[0]
    assert net.action_index_tensor is tables[1]
    assert net.policy.calls == calls
