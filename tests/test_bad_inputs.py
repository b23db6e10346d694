"""Wrong inputs in tables: each error names the argument, what came and what was expected, and changes nothing."""

import re
from functools import cached_property
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from agents_for_tests import (
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
    make_fast,
    make_observations,
    rollout_td,
    set_tables,
)
from tensordict import TensorDict
from torch import nn

from metta_fastagent import ActionSpace, Fast, LSTMWrapper, MettaAgent, PyTorchAgentMixin

B, T = 3, 4
NAN, INF = float("nan"), float("inf")
TABLE, OFFSETS = "action_index_tensor", "cum_action_max_params"
TO_INDEX, TO_PAIR = "_convert_action_to_logit_index", "_convert_logit_index_to_action"
KEY = "td['training_env_id_start']: "
INTERVAL = "analyze_weights_interval"
INIT_MIXIN = "call self.init_mixin(**mixin_params) at the end of Forgetful.__init__"
RANKS = "...2 dimensions [B, ...] in rollout or 3 dimensions [B, T, ...] in training, for observations of shape [5]"
BAD_PARAMETER = "actions[5]: got parameter ... for action type 1, expected 0 to 3"
# A state of the LSTM for three rows
H = torch.zeros(2, B, 4)
BAD_START = {"layers.0": H}
WALL = {"wall": {"id": 1}}
LIST_ENV = make_env(feature_normalizations=[1.0])


def tokens(*shape):
    return torch.zeros(shape, dtype=torch.uint8)


def integers(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def mask(*shape):
    return torch.zeros(shape, dtype=torch.bool)


def meta(tensor):
    return tensor.to("meta")


def logits(rows=B * T, columns=7):
    return torch.zeros(rows, columns)


def values(rows=B * T):
    return torch.zeros(rows, 1)


def row_of(bad):
    """Logits whose row 1 holds `bad`."""
    result = logits(B)
    result[1] = bad
    return result


def pairs_with(pair):
    """Legal pairs [B, T, 2] but for row 5."""
    actions = make_actions(B, T)
    actions.view(-1, 2)[5] = torch.tensor(pair)
    return actions


def state(layers=2, hidden=4):
    """A stored state of three segments."""
    return torch.zeros(B, layers, hidden)


def wrapper(**given):
    return LSTMWrapper(None, **{"policy": nn.Linear(1, 1)} | given)


def lstm_with(kind=nn.LSTM, **options):
    agent = wrapper(input_size=5, hidden_size=4, num_layers=1)
    agent.lstm = kind(5, 4, **options)
    return agent


def spaced(*shape):
    """An agent that knows the shape of one observation."""
    env = make_env(single_observation_space=SimpleNamespace(shape=shape))
    return MyAgent(env, SmallPolicy(), HIDDEN, HIDDEN, LAYERS)


class Forgetful(PyTorchAgentMixin, nn.Module):
    """Never calls init_mixin."""


def state_of(thing, ignored=()):
    """The objects in a dict, a TensorDict or an agent's public attributes, and the values of their tensors."""
    if isinstance(thing, nn.Module):
        objects = {
            (name, key): value
            for name, module in thing.named_modules()
            for key, value in vars(module).items()
            if not key.startswith("_")
        }
        # Fast may store its state before a handler refuses the call.
        memory = thing.get_memory() if type(thing) is LSTMWrapper else None
        return objects, (memory, {key: value.clone() for key, value in thing.state_dict().items()})
    objects = {key: value for key, value in thing.items() if key not in ignored}
    tensors = {key: value.clone() for key, value in objects.items() if isinstance(value, torch.Tensor)}
    return objects, (getattr(thing, "batch_size", None), tensors)


class Setting:
    """The objects of a row, each with its state from before the wrong call."""

    def __init__(self):
        self.watched = {}

    def watch(self, thing):
        self.watched[id(thing)] = (thing, *state_of(thing))
        return thing

    def assert_unchanged(self, except_for=()):
        """No object differs; entries `except_for` may have come to TensorDicts that had none."""
        for thing, objects, tensors in self.watched.values():
            now, tensors_now = state_of(thing, set(except_for) - objects.keys())
            assert now.keys() == objects.keys()
            assert [key for key, value in now.items() if value is not objects[key]] == []
            assert_equal(tensors_now, tensors)

    # TensorDicts

    def td(self, batch_size, **entries):
        """A TensorDict of that batch size, holding `env_obs` to match unless given."""
        return self.watch(TensorDict({"env_obs": make_observations(*batch_size)} | entries, batch_size=batch_size))

    def with_fields(self, batch_size, rows=B, steps=T):
        td = TensorDict({"env_obs": make_observations(*batch_size)}, batch_size=batch_size)
        self.net.set_tensordict_fields(td, make_observations(rows, steps))
        return self.watch(td)

    # Agents

    @cached_property
    def net(self):
        return self.watch(set_tables(Net([nn.Linear(2, 2)])))

    @cached_property
    def lstm(self):
        return self.after_a_step(wrapper(input_size=5, hidden_size=4))

    @cached_property
    def rows(self):
        return self.after_a_step(wrapper(input_size=5, hidden_size=4, num_envs=6))

    def after_a_step(self, agent):
        """The agent with a memory that an error could spoil."""
        agent.run_lstm(rollout_td(B), torch.randn(B, 5), B, 1)
        return self.watch(agent)

    @cached_property
    def fast(self):
        agent = make_fast()
        agent(TensorDict({"env_obs": make_observations(B)}, batch_size=[B]))
        return self.watch(agent)

    @cached_property
    def host(self):
        return self.watch(MettaAgent(make_env(), self.fast))

    def changed(self, name, value, agent=None):
        """The agent with another attribute."""
        agent = self.net if agent is None else agent
        setattr(agent, name, value)
        return self.watch(agent)

    # Calls

    def extract(self, **kwargs):
        self.net.extract_mixin_params(self.watch(kwargs))

    def heads(self, max_action_args):
        self.net.create_action_heads(make_env(max_action_args=max_action_args))

    def fields(self, observations, batch_size=(), agent=None, **kwargs):
        agent = self.net if agent is None else agent
        agent.set_tensordict_fields(self.td(batch_size), observations, **kwargs)

    def train(self, agent=None, **changes):
        given = {"td": self.td([B, T]), "action": make_actions(B, T), "logits_list": logits(), "value": values()}
        (self.net if agent is None else agent).handle_training_mode(**given | changes)

    def draw(self, agent=None, **changes):
        given = {"td": self.td([B]), "logits_list": logits(B), "value": values(B)}
        (self.net if agent is None else agent).handle_inference_mode(**given | changes)

    def roll(self, agent, rows=B, env_id=None, **entries):
        agent.run_lstm(self.watch(rollout_td(rows, env_id, **entries)), torch.randn(rows, 5), rows, 1)

    def segment(self, agent=None, **entries):
        (self.lstm if agent is None else agent).run_lstm(self.td([B], **entries), torch.randn(B * T, 5), B, T)

    def set_rows(self, h, c):
        """set_memory with tensors of so many rows."""
        self.rows.set_memory(tuple({i: torch.ones(2, n, 4) for i, n in part.items()} for part in (h, c)))

    def initialize(self, **changes):
        right = {"features": WALL, "action_names": ["a"], "action_max_params": [99]}
        self.host.initialize_to_environment(**right | changes)

    def act(self, observations, batch_size=None, agent=None, **entries):
        """A rollout step of Fast."""
        batch_size = observations.shape[:1] if batch_size is None else batch_size
        (self.fast if agent is None else agent)(self.td(batch_size, env_obs=observations, **entries))

    def learn(self, action=None, batch_size=(B,), agent=None, **entries):
        """A call of Fast with segments."""
        td = self.td(batch_size, env_obs=make_observations(B, T), **entries)
        (self.fast if agent is None else agent)(td, action=make_actions(B, T) if action is None else action)


# A row: the call or its arguments, the error, and its message from the start, "..." standing for any text.
CONFIGURATION = [
    ({"clip_range": "0.5"}, TypeError, "clip_range: got '0.5' (str), expected a number >= 0"),
    ({"clip_range": None}, TypeError, "clip_range: got None (NoneType), expected a number >= 0"),
    ({"clip_range": True}, TypeError, "clip_range: got True (bool), expected a number >= 0"),
    ({"clip_range": torch.ones(())}, TypeError, "clip_range: got a float32 tensor...expected a number >= 0"),
    ({"clip_range": NAN}, ValueError, "clip_range: got nan, expected a number >= 0"),
    ({"clip_range": -0.1}, ValueError, "clip_range: got -0.1, expected a number >= 0"),
    ({"clip_mode": "soft"}, ValueError, "clip_mode: got 'soft', expected one of absolute, init_scaled"),
    ({"clip_mode": None}, ValueError, "clip_mode: got None, expected one of absolute, init_scaled"),
    ({"validate": "on"}, ValueError, "validate: got 'on', expected one of deferred, sync, off"),
    ({"action_format": "pairs"}, ValueError, "action_format: got 'pairs', expected one of pair, index"),
    ({"on_nonfinite_logits": True}, ValueError, "on_nonfinite_logits: got True, expected one of raise, count"),
    ({"analyze_weights_interval": 2.5}, TypeError, "analyze_weights_interval: got 2.5 (float), expected an integer"),
    ({"analyze_weights_interval": False}, TypeError, "analyze_weights_interval: got False (bool), expected an integer"),
    ({"analyze_weights_interval": -3}, ValueError, "analyze_weights_interval: got -3, expected an integer >= 0"),
]

MIXIN = [
    (lambda s: s.net.extract_mixin_params(None), TypeError, "kwargs: got None (NoneType), expected the dict"),
    (lambda s: s.extract(clip_range="0.5", other=3), TypeError, "clip_range: got '0.5'"),
    (lambda s: s.extract(clip_range=1, analyze_weights_interval=-1), ValueError, INTERVAL + ": got -1"),
    (lambda s: s.extract(clip_range=1, clip_mode="soft"), ValueError, "clip_mode: got 'soft'"),
    (lambda s: s.net.init_mixin(extra_kwargs=["x"]), TypeError, "extra_kwargs: got ['x'], expected a dict or None"),
    (lambda s: Forgetful().clip_weights(), RuntimeError, "clip_range not set: " + INIT_MIXIN),
    (lambda s: Forgetful().maybe_compute_weight_metrics(3), RuntimeError, INTERVAL + " not set: " + INIT_MIXIN),
    (lambda s: s.net.compute_weight_metrics("0.1"), TypeError, "delta: got '0.1' (str), expected ...[0, 1)"),
    (lambda s: s.net.compute_weight_metrics(1.0), ValueError, "delta: got 1.0, expected ...[0, 1)"),
    (lambda s: s.net.maybe_compute_weight_metrics("3"), TypeError, "epoch: got '3' (str), expected an integer"),
    (lambda s: s.heads([-1]), ValueError, "env.max_action_args[0]: got -1, expected an integer >= 0"),
    (lambda s: s.changed("initial_weights", BAD_START).l2_init_loss(), ValueError, "initial[0]: got ...[2, 3, 4]"),
    # TensorDict fields
    (lambda s: s.net.set_tensordict_fields({}, integers(B)), TypeError, "td: got a dict ...expected a TensorDict"),
    (lambda s: s.fields(integers(B, T, 4, 3), [7]), ValueError, "td: got batch size [7], expected [3, 4], [3] or [12]"),
    (lambda s: s.fields(integers(B, 4, 3), [B, T]), ValueError, "td: got batch size [3, 4], expected [3, 1], [3] or"),
    (lambda s: s.fields(None), TypeError, "observations: got None ...expected a tensor [B, T, ...] or [B, ...]"),
    (lambda s: s.fields(integers()), TypeError, "observations: got ...[] ...expected a tensor [B, T, ...] or [B, ...]"),
    (lambda s: s.fields(integers(4), agent=spaced(5)), ValueError, "observations: got ...[4] " + RANKS),
    (lambda s: s.fields(integers(2, 3, 4, 5), agent=spaced(5)), ValueError, "observations: got ...5] " + RANKS),
    (lambda s: s.fields(integers(2, 3), agent=spaced(3, 6, 6)), ValueError, "observations: ...expected 4 dimensions"),
    (lambda s: s.fields(integers(4), training=True), ValueError, "observations: ...[B, T, ...] for training=True"),
]

# Arguments of handle_training_mode in place of right ones
TRAINING = [
    ({"td": {}}, TypeError, "td: got a dict ...expected a TensorDict"),
    ({"td": None}, TypeError, "td: got None ...expected a TensorDict"),
    ({"action": None}, ValueError, "action: got None ...expected pairs of shape [B, T, 2]"),
    ({"action": PAIRS}, ValueError, "action: got a list ...expected pairs of shape [B, T, 2]"),
    ({"action": integers(B, T, 3)}, ValueError, "action: got ...[3, 4, 3] ...expected pairs of shape [B, T, 2]"),
    ({"action": integers(B, 2, 2)}, ValueError, "action: got ...[3, 2, 2] ...expected 12 pairs"),
    ({"action": integers(B * T - 1)}, ValueError, "action: got ...[11] ...logit indices ...12 rows"),
    ({"action": integers(B, 5)}, ValueError, "action: got ...[3, 5] ...logit indices ...12 rows"),
    ({"action": torch.zeros(B, T, 2)}, TypeError, "action...got a float32 ...expected ...integer"),
    ({"action": mask(B, T, 2)}, TypeError, "action...got a bool ...expected ...integer"),
    ({"action": meta(integers(B, T, 2))}, ValueError, "actions: on meta, ...cpu"),
    ({"action": torch.full((B * T,), 7)}, ValueError, "actions[0]: got logit index 7, expected 0 to 6"),
    ({"action": pairs_with([3, 0])}, ValueError, "actions[5]: got action type 3, expected 0 to 2"),
    ({"action": pairs_with([-1, 0])}, ValueError, "actions[5]: got action type -1, expected 0 to 2"),
    ({"logits_list": [logits()]}, ValueError, "logits_list: got a list ...expected a tensor of shape [rows, actions]"),
    ({"logits_list": torch.zeros(B, T, 7)}, ValueError, "logits_list: got ...[3, 4, 7] ...expected ...[rows, actions]"),
    ({"logits_list": logits().long()}, TypeError, "logits: got an int64 ...expected a floating-point"),
    ({"logits_list": logits(columns=5)}, ValueError, "logits_list: got ...[12, 5] ...expected 7 columns"),
    ({"logits_list": logits() / 0}, ValueError, "logits[0]: holds NaN...expected finite values"),
    ({"logits_list": meta(logits()), "value": meta(values())}, ValueError, "actions: on cpu, ...logits (meta)"),
    ({"value": None}, ValueError, "value: got None ...of shape [12, 1] or [12]"),
    ({"value": torch.zeros(B * T, 2)}, ValueError, "value: got ...[12, 2] ...of shape [12, 1] or [12]"),
    ({"value": meta(values())}, ValueError, "value: got ...on meta, expected ...on cpu"),
    ({"value": values().long()}, ValueError, "value: got an int64 ...expected floating-point numbers"),
]

# Arguments of handle_inference_mode in place of right ones
INFERENCE = [
    ({"td": {}}, TypeError, "td: got a dict ...expected a TensorDict"),
    ({"td": None}, TypeError, "td: got None ...expected a TensorDict"),
    ({"logits_list": row_of(NAN)}, ValueError, "logits[1]: holds NaN ...expected finite values"),
    ({"logits_list": row_of(INF)}, ValueError, "logits[1]: holds ...+inf, ...expected finite values"),
    ({"logits_list": row_of(-INF)}, ValueError, "logits[1]: ...is -inf throughout; expected finite values"),
    ({"logits_list": logits(B, 6)}, ValueError, "logits...got ...[3, 6] ...expected 7 columns"),
    ({"logits_list": meta(logits(B))}, ValueError, "value: got ...on cpu, expected ...on meta"),
    ({"logits_list": meta(logits(B)), "value": meta(values(B))}, ValueError, "logits: on meta, ...cpu"),
    ({"value": torch.zeros(B, 1, 1)}, ValueError, "value: got ...[3, 1, 1] ...of shape [3, 1] or [3]"),
]

HANDLERS = [
    (lambda s: s.train(td=s.td([5])), ValueError, "td: got batch size [5], expected 12 rows"),
    (lambda s: s.train(td=s.with_fields([10], 2, 5), action=integers(12)), ValueError, "td: ...2 x 5, ...12 rows"),
    (lambda s: s.train(td=s.with_fields([T, B], T, B)), ValueError, "td: got batch size [4, 3], expected [3, 4], [3]"),
    (lambda s: s.train(td=s.with_fields([12]), action=pairs_with([1, 4])), ValueError, BAD_PARAMETER),
    (lambda s: s.train(td=s.with_fields([B]), action=pairs_with([1, -1])), ValueError, BAD_PARAMETER),
    (lambda s: s.train(td=s.td([12], action_mask=logits())), ValueError, "action_mask: got ...float32 ...bool"),
    (lambda s: s.train(s.changed("temperature", torch.ones(12))), ValueError, "temperature: got ...[12] ...one such"),
    (lambda s: s.draw(td=s.td([B, T])), ValueError, "td: got batch size [3, 4], expected [3], the rows of logits_list"),
    (lambda s: s.draw(td=s.td([B], action_mask=mask(B, 6))), ValueError, "action_mask: got ...[3, 6] ...[3, 7]"),
    (lambda s: s.draw(td=s.td([B], action_mask=mask(B, 7))), ValueError, "mask[0]: got no allowed action"),
    (lambda s: s.draw(s.changed("temperature", 0)), ValueError, "temperature: got 0, expected ...> 0"),
    (lambda s: s.draw(s.changed("temperature", "low")), TypeError, "temperature: got 'low' ...a finite number > 0"),
    # Tables
    (lambda s: s.train(Net()), RuntimeError, OFFSETS + " not set. MettaAgent"),
    (lambda s: s.train(make_agent(active=False)), RuntimeError, OFFSETS + " not set. MettaAgent"),
    (lambda s: s.draw(Net()), RuntimeError, TABLE + " not set. MettaAgent"),
    (lambda s: s.draw(make_agent(active=False)), RuntimeError, TABLE + " not set. MettaAgent"),
    (lambda s: Net()._convert_action_to_logit_index(integers(2, 2)), RuntimeError, OFFSETS + " not set. MettaAgent"),
    (lambda s: Net()._convert_logit_index_to_action(integers(1)), RuntimeError, TABLE + " not set. MettaAgent"),
    (lambda s: s.train(s.changed(OFFSETS, integers(4).int())), TypeError, OFFSETS + ": got an int32 ...int64"),
    (lambda s: s.draw(s.changed(TABLE, PAIRS)), TypeError, TABLE + ": got a list ...expected ...int32 tensor"),
    (lambda s: s.draw(s.changed(TABLE, integers(2, 7))), ValueError, TABLE + ": got ...[2, 7] ...[num_actions, 2]"),
    (lambda s: s.draw(s.changed(TABLE, meta(integers(7, 2)))), ValueError, "logits: on cpu, ..." + TABLE + " (meta)"),
]

# The method, what it converts
CONVERSIONS = [
    (TO_INDEX, torch.zeros(2, 2), TypeError, "actions: got a float32 ...expected ...integer"),
    (TO_INDEX, PAIRS, TypeError, "actions: got a list ...expected an integer tensor"),
    (TO_INDEX, integers(2, 1), ValueError, "actions: got ...[2, 1] ...[..., 2]"),
    (TO_INDEX, torch.tensor([[0, 0], [0, 1]]), ValueError, "actions[1]: got parameter 1 ...type 0, expected 0 to 0"),
    (TO_PAIR, torch.zeros(2), TypeError, "action_logit_index: got a float32 ...expected ...integer"),
    (TO_PAIR, torch.tensor([0, 7]), ValueError, "action_logit_index[1]: got 7, expected 0 to 6"),
    (TO_PAIR, torch.tensor([-1]), ValueError, "action_logit_index[0]: got -1, expected 0 to 6"),
]

# Arguments of LSTMWrapper
WRAPPERS = [
    ({"policy": None}, TypeError, "policy: got None, expected the nn.Module"),
    ({"policy": "cnn"}, TypeError, "policy: got 'cnn', expected the nn.Module"),
    ({"policy": nn.Identity}, TypeError, "policy: got <class ...Identity'>, expected the nn.Module"),
    ({"hidden_size": 0}, ValueError, "hidden_size: got 0, expected a positive integer"),
    ({"hidden_size": None}, ValueError, "hidden_size: got None, expected a positive integer"),
    ({"input_size": "8"}, ValueError, "input_size: got '8', expected a positive integer"),
    ({"input_size": -1}, ValueError, "input_size: got -1, expected a positive integer"),
    ({"num_layers": True}, ValueError, "num_layers: got True, expected a positive integer"),
    ({"num_layers": 2.0}, ValueError, "num_layers: got 2.0, expected a positive integer"),
    ({"num_envs": 0}, ValueError, "num_envs: got 0, expected a positive integer"),
    ({"num_envs": np.bool_(True)}, ValueError, "num_envs: got ...True..., expected a positive integer"),
    ({"num_envs": np.array([1, 2])}, ValueError, "num_envs: got array([1, 2]), expected a positive integer"),
    ({"num_envs": np.float64(2.5)}, ValueError, "num_envs: got ...2.5..., expected a positive integer"),
]

# Rows of a step, its environment id; in a memory of six rows
ROW_IDS = [
    (3, -1, "got -1 for 3 rows, expected 0 to 3, as the memory has num_envs=6 rows"),
    (3, 4, "got 4 for 3 rows, expected 0 to 3, as the memory has num_envs=6 rows"),
    (3, torch.tensor(4), "got 4 for 3 rows, expected 0 to 3, as the memory has num_envs=6 rows"),
    (3, torch.tensor([-6]), "got -6 for 3 rows, expected 0 to 3, as the memory has num_envs=6 rows"),
    (1, [6], "got 6 for 1 rows, expected 0 to 5, as the memory has num_envs=6 rows"),
    (1, torch.tensor([10**12]), "got 1000000000000 for 1 rows, expected 0 to 5, as the memory has num_envs=6 rows"),
    (7, None, "names the first of 7 rows, expected at most num_envs=6 rows"),
    (7, torch.tensor(0), "names the first of 7 rows, expected at most num_envs=6 rows"),
    (2, 1.5, "got 1.5 (float), expected an integer"),
    (2, "2", "got '2' (str), expected an integer"),
    (2, torch.tensor(1.5), "got a float32 tensor of shape [] on cpu, expected an integer"),
    (2, torch.tensor(NAN), "got a float32 tensor of shape [] on cpu, expected an integer"),
    (2, torch.tensor(1j), "got a complex64 tensor of shape [] on cpu, expected an integer"),
    (2, torch.tensor([]), "got a float32 tensor of shape [0] on cpu, expected an integer"),
    (2, meta(torch.tensor(1)), "got an int64 tensor of shape [] on meta, expected an integer, or a tensor on cpu"),
]

# Entries of a segment
SEGMENTS = [
    ({"dones": torch.zeros(3, 5)}, "td['dones']: got ...[3, 5] ...expected 12 values"),
    ({"truncateds": torch.zeros(3, 5)}, "td['truncateds']: got ...[3, 5] ...expected 12 values"),
    ({"dones": meta(torch.zeros(3, 4))}, "td['dones']: got ...on meta, expected a tensor on cpu"),
    ({"lstm_h": state()}, "td: holds lstm_h without lstm_c, expected both or neither"),
    ({"lstm_c": state()}, "td: holds lstm_c without lstm_h, expected both or neither"),
    ({"lstm_h": meta(state()), "lstm_c": state()}, "td['lstm_h']: got ...on meta, expected a tensor on cpu"),
    ({"lstm_h": torch.zeros(3, 1, 4), "lstm_c": state()}, "td['lstm_h']: got shape [3, 1, 4], expected [3, 2, 4]"),
    ({"lstm_h": torch.zeros(3, 2, 5), "lstm_c": state()}, "td['lstm_h']: got shape [3, 2, 5], expected [3, 2, 4]"),
    ({"lstm_h": torch.zeros(3), "lstm_c": state()}, "td['lstm_h']: got shape [3], expected [3, 2, 4]"),
    ({"lstm_h": state(), "lstm_c": torch.zeros(3, 5, 2, 4)}, "td['lstm_c']: got ...[3, 5, 2, 4], expected [3, 2, 4]"),
    ({"lstm_h": state(), "lstm_c": torch.zeros(3, 4, 4, 2)}, "td['lstm_c']: got ...[3, 4, 4, 2], expected [3, 2, 4]"),
]

RECURRENT = [
    (lambda s: MyAgent(make_env()), TypeError, "policy: got None, expected the nn.Module"),
    (lambda s: s.rows.allocate_memory(0), ValueError, "num_envs: got 0, expected a positive integer"),
    (lambda s: s.rows.allocate_memory("2"), ValueError, "num_envs: got '2', expected a positive integer"),
    (lambda s: s.roll(s.lstm, 5), ValueError, "td: 5 rows for environment id 0, expected 3"),
    (lambda s: s.roll(s.lstm, 3, "first"), ValueError, KEY + "got 'first' (str), expected an integer"),
    (lambda s: s.roll(s.lstm, 3, 1.5), ValueError, KEY + "got 1.5 (float), expected an integer"),
    (lambda s: s.roll(s.lstm, 3, torch.zeros(3, 0)), ValueError, KEY + "got ...[3, 0] ...expected an integer"),
    (lambda s: s.roll(s.lstm, dones=torch.zeros(3, 2)), ValueError, "td['dones']: got ...[3, 2] ...expected 3 values"),
    (lambda s: s.lstm.reset_env_memory(integers(2)), ValueError, "env_id: got ...[2] ...expected an integer"),
    # The LSTM itself
    (lambda s: s.roll(lstm_with(batch_first=True)), ValueError, "lstm: got batch_first=True, expected nn.LSTM's"),
    (
        lambda s: s.roll(lstm_with(bidirectional=True)),
        ValueError,
        "module: got bidirectional=True, expected nn.LSTM in",
    ),
    (lambda s: s.segment(lstm_with(proj_size=2)), ValueError, "module: got proj_size=2, expected nn.LSTM in one"),
    (lambda s: s.segment(lstm_with(nn.GRU), dones=mask(B, T)), TypeError, "module: got GRU, expected nn.LSTM or a"),
]

# Arguments of set_memory, where h and c hold three rows
MEMORIES = [
    (None, TypeError, "memory: got NoneType, expected a pair of dicts"),
    ({0: H}, TypeError, "memory: got dict, expected a pair of dicts"),
    (({0: H},), TypeError, "memory: got tuple, expected a pair of dicts"),
    (({0: H}, {0: H}, {}), TypeError, "memory: got tuple, expected a pair of dicts"),
    ((H, H), TypeError, "memory: got tuple, expected a pair of dicts"),
    (({0: H}, {1: H}), ValueError, "memory: got ids [0] for h and [1] for c, expected the same ids"),
    (({0: H}, {}), ValueError, "memory: got ids [0] for h and [] for c, expected the same ids"),
    (({0: H}, {0: H[:, :2]}), ValueError, "memory: c of environment 0 is [2, 2, 4], expected a tensor [2, 3, 4]"),
    (({0: H}, {0: H[..., :3]}), ValueError, "memory: c of environment 0 is [2, 3, 3], expected a tensor [2, 3, 4]"),
    (({0: H[:1]}, {0: H[:1]}), ValueError, "memory: h of environment 0 is [1, 3, 4], expected a tensor [2, 3, 4]"),
    (({0: H[0]}, {0: H[0]}), ValueError, "memory: h of environment 0 is [3, 4], expected a tensor [2, "),
    (({0: H}, {0: None}), ValueError, "memory: c of environment 0 is NoneType, expected a tensor [2, 3, 4]"),
    (({0: H}, {0: H.numpy()}), ValueError, "memory: c of environment 0 is ndarray, expected a tensor [2, 3, 4]"),
    (({0: H.tolist()}, {0: H}), ValueError, "memory: h of environment 0 is list, expected a tensor [2, "),
]

# Rows of h and of c by id, for a preallocated memory of six rows
PREALLOCATED = [
    ({0: 5}, {0: 5}, "memory: h of environment 0 is [2, 5, 4], expected a tensor [2, 6, 4]"),
    ({0: 7}, {0: 7}, "memory: h of environment 0 is [2, 7, 4], expected a tensor [2, 6, 4]"),
    ({0: 6}, {0: 5}, "memory: c of environment 0 is [2, 5, 4], expected a tensor [2, 6, 4]"),
    ({1: 6}, {1: 6}, "memory: got ids [1], expected id 0 alone, with num_envs=6 rows"),
    ({0: 3, 3: 3}, {0: 3, 3: 3}, "memory: got ids [0, 3], expected id 0 alone, with num_envs=6 rows"),
    ({0: 6}, {}, "memory: got ids [0] for h and [] for c, expected the same ids"),
]

ACTION_SPACES = [
    # names, largest parameters
    ([], [], ValueError, "action_names: got no name, expected at least one"),
    ("move", [1], TypeError, "action_names: got 'move', expected a list of names"),
    (None, [1], TypeError, "action_names: got None, expected a list of names"),
    (3, [1], TypeError, "action_names: got 3, expected a list of names"),
    (["a", 1], [1, 1], TypeError, "action_names[1]: got 1, expected a non-empty string"),
    (["a", None], [1, 1], TypeError, "action_names[1]: got None, expected a non-empty string"),
    (["", "b"], [1, 1], TypeError, "action_names[0]: got '', expected a non-empty string"),
    (["a", "b", "a"], [1, 1, 1], ValueError, "action_names: got a more than once, expected distinct names"),
    (["a"], [], ValueError, "action_max_params: got 0 values, expected 1"),
    (["a"], [1, 2], ValueError, "action_max_params: got 2 values, expected 1"),
    (["a"], 1, TypeError, "action_max_params: got 1, expected a list of integers"),
    (["a"], None, TypeError, "action_max_params: got None, expected a list of integers"),
    (["a"], "1", TypeError, "action_max_params: got '1', expected a list of integers"),
    (["a"], b"1", TypeError, "action_max_params: got b'1', expected a list of integers"),
    (["a", "b"], [0, -1], ValueError, "action_max_params[1]: got -1, expected an integer >= 0"),
    (["a"], np.array([-1]), ValueError, "action_max_params[0]: got ...-1..., expected an integer >= 0"),
    (["a", "b"], [1, 1.0], TypeError, "action_max_params[1]: got 1.0 ...expected an integer >= 0"),
    (["a"], [True], TypeError, "action_max_params[0]: got True ...expected an integer >= 0"),
    (["a"], np.array([True]), TypeError, "action_max_params[0]: got ...True...expected an integer >= 0"),
    (["a"], ["1"], TypeError, "action_max_params[0]: got '1' ...expected an integer >= 0"),
    (["a"], [None], TypeError, "action_max_params[0]: got None ...expected an integer >= 0"),
    (["a"], [NAN], TypeError, "action_max_params[0]: got nan ...expected an integer >= 0"),
]


# Arguments of a host's initialize_to_environment in place of right ones
ENVIRONMENTS = [
    ({"features": ["wall"]}, TypeError, "features: got ['wall'], expected a dict"),
    ({"features": {"wall": {}}}, ValueError, "features['wall']: got id None, expected an integer 0 to 254"),
    ({"features": {"wall": {"id": 255}}}, ValueError, "features['wall']: got id 255, expected an integer 0 to 254"),
    ({"features": WALL | {"food": {"id": 1}}}, ValueError, "features['food']: got id 1, ...expected distinct ids"),
    ({"features": {"a": {"id": 1, "normalization": 0}}}, ValueError, "features['a']: got normalization 0, ...> 0"),
    ({"action_max_params": [-2]}, ValueError, "action_max_params[0]: got -2, expected an integer >= 0"),
    ({"action_max_params": [100]}, ValueError, "full_action_names: got 101 actions, expected at most 100"),
]

HOST = [
    (lambda s: MettaAgent(make_env(), None), TypeError, "policy: got None, expected an nn.Module"),
    (lambda s: MettaAgent(LIST_ENV, SmallPolicy()), TypeError, "env.feature_normalizations: got [1.0], ...a dict"),
    (lambda s: s.host.restore_original_feature_mapping(["a"]), TypeError, "mapping: got ['a'], expected a dict"),
    (lambda s: s.host.restore_original_feature_mapping({"a": -1}), ValueError, "mapping['a']: got id -1, ...0 to 254"),
    (lambda s: s.net.activate_actions(["a", "b"], [1, -1]), ValueError, "action_max_params[1]: got -1, expected an"),
    (lambda s: s.net.activate_actions(["a"], [1], "nowhere"), RuntimeError, "Expected one of cpu...device...nowhere"),
    (lambda s: s.fast.activate_actions(["a", "b"], [1]), ValueError, "action_max_params: got 1 values, expected 2"),
    (lambda s: s.fast.activate_actions(["a"], [100]), ValueError, "full_action_names: got 101 actions, ...at most 100"),
]

FAST_ARGUMENTS = [
    # environment, other arguments
    ({"obs_width": 10}, {}, ValueError, "env.obs_width: got 10, expected an integer 11 to 16"),
    ({"obs_width": 17}, {}, ValueError, "env.obs_width: got 17, expected an integer 11 to 16"),
    ({"obs_width": None}, {}, ValueError, "env.obs_width: got None, expected an integer 11 to 16"),
    ({"obs_height": 11.0}, {}, ValueError, "env.obs_height: got 11.0, expected an integer 11 to 16"),
    ({"obs_height": "11"}, {}, ValueError, "env.obs_height: got '11', expected an integer 11 to 16"),
    ({"feature_normalizations": {300: 1.0}}, {}, ValueError, "env.feature_normalizations[300]: got ...0 to 254"),
    ({"feature_normalizations": {-1: 1.0}}, {}, ValueError, "env.feature_normalizations[-1]: got ...0 to 254"),
    ({"feature_normalizations": {1: "a"}}, {}, ValueError, "env.feature_normalizations[1]: got 'a', ...finite number"),
    ({"feature_normalizations": {1: INF}}, {}, ValueError, "env.feature_normalizations[1]: got inf, ...finite number"),
    ({"feature_normalizations": [1.0]}, {}, TypeError, "env.feature_normalizations: got a list ...expected a dict"),
    ({}, {"max_actions": 0}, ValueError, "max_actions: got 0, expected a positive integer"),
    ({}, {"max_actions": None}, ValueError, "max_actions: got None, expected a positive integer"),
    ({}, {"policy": 3}, TypeError, "policy: got 3, expected the nn.Module"),
    ({}, {"input_size": "8"}, ValueError, "input_size: got '8', expected a positive integer"),
    ({}, {"hidden_size": -1}, ValueError, "hidden_size: got -1, expected a positive integer"),
    ({}, {"num_envs": "3"}, ValueError, "num_envs: got '3', expected a positive integer"),
]

ROWS = [
    *MIXIN,
    *HANDLERS,
    *RECURRENT,
    *HOST,
    *((lambda s, g=given: s.initialize(**g), *rest) for given, *rest in ENVIRONMENTS),
    *((lambda s, g=given: Net(**g), *rest) for given, *rest in CONFIGURATION),
    *((lambda s, g=given: Fast(make_env(), **g), *rest) for given, *rest in CONFIGURATION[:1]),
    *((lambda s, g=given: s.train(**g), *rest) for given, *rest in TRAINING),
    *((lambda s, g=given: s.draw(**g), *rest) for given, *rest in INFERENCE),
    *((lambda s, m=method, g=given: getattr(s.net, m)(g), *rest) for method, given, *rest in CONVERSIONS),
    *((lambda s, g=given: wrapper(**g), *rest) for given, *rest in WRAPPERS),
    *((lambda s, g=given: s.roll(s.rows, *g), ValueError, KEY + message) for *given, message in ROW_IDS),
    *((lambda s, g=given: s.segment(**g), ValueError, message) for given, message in SEGMENTS),
    *((lambda s, g=given: s.lstm.set_memory(g), *rest) for given, *rest in MEMORIES),
    *((lambda s, h=h, c=c: s.set_rows(h, c), ValueError, message) for h, c, message in PREALLOCATED),
    *((lambda s, n=names, m=limits: ActionSpace(n, m), *rest) for names, limits, *rest in ACTION_SPACES),
    *((lambda s, e=env, g=given: Fast(make_env(**e), **g), *rest) for env, given, *rest in FAST_ARGUMENTS),
]


def check_error(call, error, message):
    with pytest.raises(error) as raised:
        call()
    pattern = ".*".join(map(re.escape, message.split("...")))
    assert re.match(pattern, str(raised.value), re.DOTALL), f"{message!r} is not the start of {raised.value}"


@pytest.mark.parametrize(("call", "error", "message"), [pytest.param(*row, id=row[-1]) for row in ROWS])
def test_the_message_names_the_argument_and_nothing_changes(call, error, message):
    setting = Setting()
    check_error(lambda: call(setting), error, message)
    setting.assert_unchanged()


OBSERVATIONS = make_observations(B)
SEVEN = torch.full((B,), 7)


def nan_logits():
    agent = make_fast()
    nn.init.constant_(agent.policy.actor_bias, NAN)
    return agent


def many_logits():
    agent = make_fast()
    agent.policy.num_active_actions = 100
    return agent


def remapped():
    agent = make_fast()
    agent._apply_feature_remapping(torch.arange(256, dtype=torch.uint8))
    return agent


# A bad call of Fast may leave the fields `bptt` and `batch` in the TensorDict, but no result.
FAST_CALLS = [
    (lambda s: s.fast(None), TypeError, "td: got None...expected a TensorDict"),
    (lambda s: s.fast({"env_obs": integers(B, 4, 3)}), TypeError, "td: got ...dict...expected a TensorDict"),
    (lambda s: s.host(None), TypeError, "td: got None...expected a TensorDict"),
    (lambda s: s.fast(s.watch(rollout_td(B))), KeyError, "...env_obs...not found"),
    (lambda s: s.act(torch.zeros(B, 4, 3)), TypeError, "env_obs: got a float32 ...expected uint8"),
    (lambda s: s.act(integers(B, 4, 3)), TypeError, "env_obs: got an int64 ...expected uint8"),
    (lambda s: s.act(tokens(B, 4)), ValueError, "env_obs: got ...[3, 4] ...expected uint8 [B, tokens, 3]"),
    (lambda s: s.act(tokens(B, 4, 2)), ValueError, "env_obs: got ...[3, 4, 2] ...expected uint8 [B, tokens, 3]"),
    (lambda s: s.act(tokens(1, 1, B, 4, 3)), ValueError, "env_obs: got ...[1, 1, 3, 4, 3] ...expected uint8"),
    (lambda s: s.act(meta(tokens(B, 4, 3))), ValueError, "env_obs: got ...on meta, expected ...on cpu"),
    (lambda s: s.act(tokens(B, 4, 2), agent=remapped()), ValueError, "env_obs: got ...[3, 4, 2] ...expected uint8"),
    (lambda s: s.act(tokens(B, T, 4, 3)), ValueError, "action: got None, expected pairs [3, 4, 2]"),
    (lambda s: s.act(OBSERVATIONS, [B, 4]), ValueError, "td: got batch size [3, 4], expected [3"),
    (lambda s: s.act(tokens(5, 4, 3)), ValueError, "td: 5 rows for environment id 0, expected 3"),
    (lambda s: s.act(OBSERVATIONS, agent=make_fast(8), training_env_id_start=SEVEN), ValueError, KEY + "got 7 for 3"),
    (lambda s: s.act(OBSERVATIONS, agent=nan_logits()), ValueError, "logits[0]: holds NaN"),
    (lambda s: s.act(OBSERVATIONS, agent=s.changed(TABLE, integers(5, 2), s.fast)), ValueError, "logits: ...5 columns"),
    (lambda s: s.act(OBSERVATIONS, agent=s.changed(TABLE, None, s.fast)), RuntimeError, TABLE + " not set. MettaAgent"),
    (lambda s: s.learn(agent=s.changed(OFFSETS, None, s.fast)), RuntimeError, OFFSETS + " not set. MettaAgent"),
    (lambda s: s.learn(agent=many_logits()), ValueError, "logits_list: got ...[12, 100] ...expected 7 columns"),
    (lambda s: s.learn(batch_size=[]), ValueError, "td: got batch size [], expected [3, 4]"),
    (lambda s: s.learn(integers(B, 2, 2)), ValueError, "action: got ...[3, 2, 2] ...12 pairs"),
    (lambda s: s.learn(torch.zeros(B, T, 2)), TypeError, "action...got a float32 ...expected ...integer"),
    (lambda s: s.learn(PAIRS), ValueError, "action: got a list ...expected pairs"),
    (lambda s: s.learn(pairs_with([2, 2])), ValueError, "actions[5]: got parameter 2 ...type 2, expected 0 to 1"),
    (lambda s: s.learn(lstm_h=state(hidden=128)), ValueError, "td: holds lstm_h without lstm_c"),
    (lambda s: s.fast._apply_feature_remapping(tokens(3)), ValueError, "remap_tensor: got ...[3] ...expected ...[256]"),
]


@pytest.mark.parametrize(("call", "error", "message"), [pytest.param(*row, id=row[-1]) for row in FAST_CALLS])
def test_a_bad_call_of_fast_writes_no_result(call, error, message):
    setting = Setting()
    check_error(lambda: call(setting), error, message)
    setting.assert_unchanged(except_for=["bptt", "batch"])


def test_values_next_to_the_wrong_ones_are_accepted():
    s = Setting()
    s.lstm.set_memory(({0: H + 1}, {0: H}))
    s.set_rows({0: 6}, {0: 6})
    s.roll(s.rows, 3, 3)
    s.train(td=s.with_fields([B * T]), action=pairs_with([1, 3]))
    s.draw()
    s.learn()
    s.act(OBSERVATIONS)
    s.initialize(features={"wall": {"id": 254, "normalization": 0.5}})
    assert wrapper(hidden_size=1).hidden_size == 1
