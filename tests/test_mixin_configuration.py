"""The mixin's parameters, the names that callers use, the order of base classes, calls passed on to the policy."""

import inspect
import logging
import re

import numpy as np
import pytest
import torch
from agents_for_tests import MyAgent, Net, assert_equal, make_actions, make_agent, make_observations, parameters_of
from tensordict import TensorDict
from torch import nn

from metta_fastagent import Fast, LSTMWrapper, PyTorchAgentMixin
from metta_fastagent.testing import AgentCheckError


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


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0, "absolute", 300)),
        ({"clip_range": 0.75, "clip_mode": "init_scaled", "analyze_weights_interval": 5}, (0.75, "init_scaled", 5)),
    ],
)
def test_parameters_reach_an_agent_through_its_keyword_arguments(given, expected):
    for agent in (Net(**given), make_agent(**given)):
        assert (agent.clip_range, agent.clip_mode, agent.analyze_weights_interval) == expected
        assert (agent.l2_init_scale, agent.clip_scale) == (1, 1)


def test_one_info_line_names_the_configuration(caplog):
    with caplog.at_level(logging.DEBUG, logger="metta_fastagent"):
        Net(clip_range=0.25, analyze_weights_interval=12, validate="sync")
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith("Net: ") and "\n" not in record.getMessage()
    parts = ("clip_range=0.25", "analyze_weights_interval=12", "absolute", "sync")
    assert [part for part in parts if part not in record.getMessage()] == []


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


def test_the_mixin_brings_no_constructor_and_no_forward():
    assert "__init__" not in vars(PyTorchAgentMixin)
    assert "forward" not in vars(PyTorchAgentMixin)
    assert not issubclass(PyTorchAgentMixin, nn.Module)


OPTIONS = ["clip_mode", "validate", "action_format", "on_nonfinite_logits", "training_values", "check_first_update"]
OPTIONS += ["l2_init_scale", "clip_scale", "temperature"]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("extract_mixin_params", ["kwargs"]),
        ("init_mixin", ["clip_range", "analyze_weights_interval", "extra_kwargs", *OPTIONS]),
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
    with pytest.raises(TypeError, match=rf"comes before PyTorchAgentMixin, .* write class {re.escape(right_order)}$"):
        type("MyAgent", bases, {})


@pytest.mark.parametrize(
    "bases",
    [
        (PyTorchAgentMixin, LSTMWrapper),
        (OtherMixin, PyTorchAgentMixin, LSTMWrapper),
        (PyTorchAgentMixin, OtherMixin, Base),
        (Agent,),
        # The order that the error suggests.
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
def test_environment_calls_are_passed_on_to_a_policy_that_has_the_method(method):
    net = Net()
    assert getattr(net, method)(["a_0"], "cpu") is None
    net.policy = nn.Linear(1, 1)
    assert getattr(net, method)(["a_0"], "cpu") is None
    net.policy = Recorder()
    names, device = ["a_0", "b_0"], torch.device("cpu")
    getattr(net, method)(names, device)
    assert net.policy.calls == [(method, names, device)]


def test_feature_hooks_return_none_and_change_nothing():
    net = Net([nn.Linear(2, 2)])
    before, attributes = parameters_of(net), set(vars(net))
    assert net._apply_feature_remapping(torch.arange(256, dtype=torch.uint8)) is None
    assert net.update_normalization_factors({"wall": {"id": 0, "normalization": 2.0}}, None) is None
    assert set(vars(net)) == attributes
    assert_equal(parameters_of(net), before)


def test_activate_actions_sets_the_tables_and_activates_embeddings_first():
    net = Net([nn.Linear(1, 1)])
    net.policy = Recorder()
    net.activate_actions(["noop", "move", "turn"], [0, 3, 1])
    assert net.cum_action_max_params.tolist() == [0, 0, 3, 4]
    assert net.action_index_tensor.tolist() == [[0, 0], [1, 0], [1, 1], [1, 2], [1, 3], [2, 0], [2, 1]]
    assert (net.cum_action_max_params.dtype, net.action_index_tensor.dtype) == (torch.int64, torch.int32)
    assert [(method, len(names)) for method, names, _ in net.policy.calls] == [
        ("activate_action_embeddings", 7),
        ("initialize_to_environment", 7),
    ]


# Parameters of later versions


class OwnTemperature(Net):
    """An agent whose own constructor names a parameter and two attributes."""

    def __init__(self, temperature=0.25, **kwargs):
        self.l2_init_scale, self.clip_scale = 3, 4
        self.temperature = temperature
        super().__init__(**kwargs)


def test_scales_and_temperature_are_parameters():
    net = Net(l2_init_scale=0.5, clip_scale=0.25, temperature=2.0)
    assert (net.l2_init_scale, net.clip_scale, net.temperature) == (0.5, 0.25, 2.0)
    assert net.extra_kwargs == {}
    assert extract({"temperature": 2.0})["temperature"] == 2.0
    warm = torch.tensor(1.5)
    assert Net(temperature=warm).temperature is warm


@pytest.mark.parametrize("given", [{}, {"temperature": 0.75}])
def test_an_agent_keeps_what_it_has_set_itself(given):
    net = OwnTemperature.__new__(OwnTemperature)
    nn.Module.__init__(net)
    OwnTemperature.__init__(net, **given)
    assert (net.l2_init_scale, net.clip_scale, net.temperature) == (3, 4, given.get("temperature", 0.25))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"temperature": 0}, ValueError, "temperature: got 0, expected a finite number > 0"),
        ({"temperature": float("inf")}, ValueError, "temperature: got inf, expected a finite number > 0"),
        ({"temperature": "hot"}, TypeError, "temperature: got 'hot'"),
        ({"temperature": torch.ones(2)}, ValueError, "temperature: got a float32 tensor of shape \\[2\\]"),
        ({"clip_scale": -1}, ValueError, "clip_scale: got -1, expected a number >= 0"),
        ({"l2_init_scale": True}, TypeError, "l2_init_scale: got True"),
        ({"training_values": 1}, TypeError, "training_values: got 1 .*expected True or False"),
        ({"check_first_update": "yes"}, TypeError, "check_first_update: got 'yes' .*expected True or False"),
        (
            {"action_format": "index64"},
            ValueError,
            "action_format: got 'index64', expected one of pair, index, index32",
        ),
    ],
)
def test_wrong_values_of_them(given, error, message):
    with pytest.raises(error, match=f"^{message}"):
        extract(dict(given))


def test_unknown_parameters_are_kept():
    net = Net(zeta=1, clip_range=0.5)
    assert net.extra_kwargs == {"zeta": 1}


class Forgetful(MyAgent):
    """Its heads see nothing of the state."""

    def _manage_lstm_state(self, td, B, TT, device, training=None):
        h, c, env_id = super()._manage_lstm_state(td, B, TT, device, training)
        return torch.zeros_like(h), torch.zeros_like(c), env_id


class Fine(MyAgent):
    def forward(self, td, state=None, action=None):
        B, TT = self.set_tensordict_fields(td, td["env_obs"])
        hidden = self.run_lstm(td, self.policy.encode_observations(td["env_obs"]), B, TT)
        logits, value = self.policy.decode_actions(hidden, B * TT)
        if action is None:
            return self.handle_inference_mode(td, logits, value)
        return self.handle_training_mode(td, action, logits, value)


def update(agent):
    td = TensorDict({"env_obs": make_observations(3, 4)}, batch_size=[3, 4])
    return agent(td, action=make_actions(3, 4))


def test_the_first_update_checks_the_agent_where_asked_for(caplog):
    agent = make_agent(Fine, check_first_update=True)
    before, torch_state = parameters_of(agent), torch.get_rng_state()
    with caplog.at_level(logging.INFO, logger="metta_fastagent"):
        update(agent)
        update(agent)
    assert sum("6 of 6 checks passed" in record.getMessage() for record in caplog.records) == 1
    assert_equal(parameters_of(agent), before)
    assert_equal(torch.get_rng_state(), torch_state)
    assert agent.get_memory() == ({}, {}) and agent.check_first_update


def test_an_agent_that_fails_its_checks_does_not_train():
    agent = make_agent(Forgetful, check_first_update=True)
    with pytest.raises(AgentCheckError, match="recurrent replay"):
        update(agent)
    update(make_agent(Forgetful))
