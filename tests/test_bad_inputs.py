"""One table of wrong inputs: each error names the argument, what came and what was expected, and changes nothing."""

import re
from functools import cached_property

import pytest
import torch
from agents_for_tests import (
    ACTION_NAMES,
    CUM_ACTION_MAX_PARAMS,
    MAX_PARAMS,
    PAIRS,
    MyAgent,
    Net,
    SmallPolicy,
    assert_equal,
    make_actions,
    make_agent,
    make_env,
    make_observations,
    set_tables,
)
from tensordict import TensorDict
from torch import nn

from metta_fastagent import ActionSpace, Fast, LSTMWrapper, MettaAgent

B, T = 3, 4
NAN, INF = float("nan"), float("inf")


class Setting:
    """The objects of a case; remembers every TensorDict and agent it handed out, as they were."""

    def __init__(self):
        self.watched = []
        self.agents = []

    def td(self, batch_size, **entries):
        """A TensorDict of that batch size, holding `env_obs` to match unless given."""
        observations = {} if "env_obs" in entries else {"env_obs": make_observations(*batch_size)}
        td = TensorDict({**observations, **entries}, batch_size=batch_size)
        return self.watch(td)

    def watch(self, td):
        entries = dict(td.items())
        values = {key: entry.clone() for key, entry in entries.items() if isinstance(entry, torch.Tensor)}
        self.watched.append((td, td.batch_size, entries, values))
        return td

    def with_fields(self, batch_size, rows=B, steps=T):
        td = TensorDict({"env_obs": make_observations(*batch_size)}, batch_size=batch_size)
        self.net.set_tensordict_fields(td, make_observations(rows, steps))
        return self.watch(td)

    def memorized(self, agent):
        """The agent after one step, so that it has a memory that an error could spoil."""
        agent(TensorDict({"env_obs": make_observations(B)}, batch_size=[B]))
        self.agents.append((agent, agent.get_memory()))
        return agent

    @cached_property
    def net(self):
        return set_tables(Net([nn.Linear(2, 2)]))

    @cached_property
    def agent(self):
        return self.memorized(make_agent())

    @cached_property
    def fast(self):
        torch.manual_seed(0)
        agent = Fast(make_env())
        agent.activate_actions(ACTION_NAMES, MAX_PARAMS)
        return self.memorized(agent)

    @cached_property
    def host(self):
        return MettaAgent(make_env(), self.fast)

    def with_tables(self, agent=None, **tables):
        agent = self.net if agent is None else agent
        for name, table in tables.items():
            setattr(agent, name, table)
        return agent

    def assert_unchanged(self):
        for td, batch_size, entries, values in self.watched:
            assert td.batch_size == batch_size
            assert set(td.keys()) == set(entries)
            assert all(entry is entries[key] for key, entry in td.items())
            assert_equal({key: td.get(key) for key in values}, values)
        for agent, memory in self.agents:
            assert_equal(agent.get_memory(), memory)


def logits(rows=B * T, columns=7, **kwargs):
    return torch.zeros(rows, columns, **kwargs)


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


def train(s, td, action, logits=None, value=None, agent=None):
    agent = s.net if agent is None else agent
    logits = torch.zeros(B * T, 7) if logits is None else logits
    return agent.handle_training_mode(td, action, logits, values() if value is None else value)


def draw(s, td, logits=None, value=None, agent=None):
    agent = s.net if agent is None else agent
    logits = torch.zeros(B, 7) if logits is None else logits
    return agent.handle_inference_mode(td, logits, values(B) if value is None else value)


def train_fast(s, td, action=None):
    return s.fast(td, action=make_actions(B, T) if action is None else action)


def wrapper(policy=None, **sizes):
    return LSTMWrapper(None, nn.Linear(1, 1) if policy is None else policy, **sizes)


def state(rows=B, layers=2, hidden=128):
    return torch.zeros(rows, layers, hidden)


def remember(s, h, c):
    return s.agent.set_memory((h, c))


def initialize(s, features=None, names=("noop",), max_params=(0,)):
    return s.host.initialize_to_environment({} if features is None else features, list(names), list(max_params))


# (id, what is called, error, fragments that the message must hold as regular expressions)
CASES = [
    # Configuration
    ("clip_range string", lambda s: Net(clip_range="0.5"), TypeError, ["clip_range", "'0.5'", "number >= 0"]),
    ("clip_range None", lambda s: Net(clip_range=None), TypeError, ["clip_range", "None", "number >= 0"]),
    ("clip_range bool", lambda s: Net(clip_range=True), TypeError, ["clip_range", "True", "number >= 0"]),
    ("clip_range tensor", lambda s: Net(clip_range=torch.ones(())), TypeError, ["clip_range", "tensor", "number >= 0"]),
    ("clip_range NaN", lambda s: Net(clip_range=NAN), ValueError, ["clip_range", "nan", "number >= 0"]),
    ("clip_range negative", lambda s: Net(clip_range=-0.1), ValueError, ["clip_range", "-0.1", "number >= 0"]),
    ("clip_range negative, Fast", lambda s: Fast(make_env(), clip_range=-1), ValueError, ["clip_range", "-1", ">= 0"]),
    (
        "clip_mode unknown",
        lambda s: Net(clip_mode="soft"),
        ValueError,
        ["clip_mode", "'soft'", "absolute, init_scaled"],
    ),
    ("clip_mode None", lambda s: Net(clip_mode=None), ValueError, ["clip_mode", "None", "absolute, init_scaled"]),
    (
        "interval float",
        lambda s: Net(analyze_weights_interval=2.5),
        TypeError,
        ["analyze_weights_interval", "2.5", "integer >= 0"],
    ),
    (
        "interval bool",
        lambda s: Net(analyze_weights_interval=False),
        TypeError,
        ["analyze_weights_interval", "False", "integer >= 0"],
    ),
    (
        "interval negative",
        lambda s: Net(analyze_weights_interval=-300),
        ValueError,
        ["analyze_weights_interval", "-300", "integer >= 0"],
    ),
    ("kwargs None", lambda s: s.net.extract_mixin_params(None), TypeError, ["kwargs", "None", "dict"]),
    ("extra_kwargs list", lambda s: s.net.init_mixin(extra_kwargs=["x"]), TypeError, ["extra_kwargs", "'x'", "dict"]),
    # TensorDict fields
    (
        "fields, td dict",
        lambda s: s.net.set_tensordict_fields({}, make_observations(B)),
        TypeError,
        ["td", "dict", "TensorDict"],
    ),
    (
        "fields, batch size",
        lambda s: s.net.set_tensordict_fields(s.td([7]), make_observations(B, T)),
        ValueError,
        ["td", r"\[7\]", r"\[3, 4\]"],
    ),
    (
        "fields, segments in inference",
        lambda s: s.net.set_tensordict_fields(s.td([B, T]), make_observations(B)),
        ValueError,
        ["td", r"\[3, 4\]", r"\[3\]"],
    ),
    (
        "fields, observations None",
        lambda s: s.net.set_tensordict_fields(s.td([B]), None),
        TypeError,
        ["observations", "None", r"\[B, T, ...\] or \[B, ...\]"],
    ),
    (
        "fields, observations scalar",
        lambda s: s.net.set_tensordict_fields(s.td([B]), torch.tensor(3)),
        TypeError,
        ["observations", r"int64 tensor of shape \[\]", r"\[B, T, ...\] or \[B, ...\]"],
    ),
    # Training handler
    ("training, td dict", lambda s: train(s, {}, make_actions(B, T)), TypeError, ["td", "dict", "TensorDict"]),
    (
        "training, indices out of range",
        lambda s: train(s, s.td([B, T]), torch.full((B * T,), 7)),
        ValueError,
        [r"actions\[0\]", "logit index 7", "0 to 6"],
    ),
    (
        "training, one index too few",
        lambda s: train(s, s.td([B, T]), torch.zeros(B * T - 1, dtype=torch.int64)),
        ValueError,
        ["action", r"shape \[11\]", "logit indices", "12 rows"],
    ),
    (
        "training, mask of another dtype",
        lambda s: train(s, s.td([B, T], action_mask=torch.ones(B, T, 7)), make_actions(B, T)),
        ValueError,
        ["action_mask", "float32", "bool", r"\[12, 7\]"],
    ),
    (
        "inference, mask of another width",
        lambda s: draw(s, s.td([B], action_mask=torch.ones(B, 6, dtype=torch.bool))),
        ValueError,
        ["action_mask", r"shape \[3, 6\]", r"\[3, 7\] as logits_list"],
    ),
    (
        "inference, nothing allowed",
        lambda s: draw(s, s.td([B], action_mask=torch.zeros(B, 7, dtype=torch.bool))),
        ValueError,
        [r"mask\[0\]", "no allowed action", "at least one"],
    ),
    (
        "training, NaN in logits",
        lambda s: train(s, s.td([B * T]), make_actions(B, T), logits() / 0),
        ValueError,
        [r"logits\[0\]", "finite values"],
    ),
    (
        "inference, temperature 0",
        lambda s: draw(s, s.td([B]), agent=s.with_tables(temperature=0)),
        ValueError,
        ["temperature", "got 0", "> 0"],
    ),
    (
        "inference, temperature text",
        lambda s: draw(s, s.td([B]), agent=s.with_tables(temperature="low")),
        TypeError,
        ["temperature", "'low'", "a finite number > 0"],
    ),
    (
        "training, temperature per row",
        lambda s: train(s, s.td([B, T]), make_actions(B, T), agent=s.with_tables(temperature=torch.ones(B * T))),
        ValueError,
        ["temperature", r"shape \[12\]", "one such number"],
    ),
    ("action_format", lambda s: Net(action_format="pairs"), ValueError, ["action_format", "'pairs'", "pair, index"]),
    (
        "on_nonfinite_logits",
        lambda s: Net(on_nonfinite_logits=True),
        ValueError,
        ["on_nonfinite_logits", "True", "raise, count"],
    ),
    ("training, action None", lambda s: train(s, s.td([B, T]), None), ValueError, ["action", "None", r"\[B, T, 2\]"]),
    (
        "training, action of triples",
        lambda s: train(s, s.td([B, T]), torch.zeros(B, T, 3, dtype=torch.int64)),
        ValueError,
        ["action", r"\[3, 4, 3\]", r"\[B, T, 2\]"],
    ),
    (
        "training, too few actions",
        lambda s: train(s, s.td([B, T]), make_actions(B, 2)),
        ValueError,
        ["action", r"\[3, 2, 2\]", "12 pairs"],
    ),
    (
        "training, action float",
        lambda s: train(s, s.td([B, T]), make_actions(B, T).float()),
        TypeError,
        ["action", "float32", "integer"],
    ),
    (
        "training, action bool",
        lambda s: train(s, s.td([B, T]), make_actions(B, T).bool()),
        TypeError,
        ["action", "bool", "integer"],
    ),
    (
        "training, type too large",
        lambda s: train(s, s.td([B, T]), pairs_with([3, 0])),
        ValueError,
        [r"actions\[5\]", "type 3", "0 to 2"],
    ),
    (
        "training, type negative",
        lambda s: train(s, s.td([B, T]), pairs_with([-1, 0])),
        ValueError,
        [r"actions\[5\]", "type -1", "0 to 2"],
    ),
    (
        "training, parameter of the next type's logit",
        lambda s: train(s, s.with_fields([B * T]), pairs_with([1, 4])),
        ValueError,
        [r"actions\[5\]", "parameter 4 for action type 1", "0 to 3"],
    ),
    (
        "training, parameter negative",
        lambda s: train(s, s.with_fields([B]), pairs_with([1, -1])),
        ValueError,
        [r"actions\[5\]", "parameter -1 for action type 1", "0 to 3"],
    ),
    (
        "training, action on another device",
        lambda s: train(s, s.td([B, T]), make_actions(B, T).to("meta")),
        ValueError,
        ["action", "meta", "cpu"],
    ),
    (
        "training, logits on another device",
        lambda s: train(s, s.td([B, T]), make_actions(B, T), logits(device="meta"), values().to("meta")),
        ValueError,
        ["action", "cpu", r"logits \(meta\)"],
    ),
    (
        "training, logits of three dimensions",
        lambda s: train(s, s.td([B, T]), make_actions(B, T), torch.zeros(B, T, 7)),
        ValueError,
        ["logits_list", r"\[3, 4, 7\]", r"\[rows, actions\]"],
    ),
    (
        "training, logits integer",
        lambda s: train(s, s.td([B, T]), make_actions(B, T), logits().long()),
        TypeError,
        ["logits", "int64", "floating-point"],
    ),
    (
        "training, too few logits for the action",
        lambda s: train(s, s.td([B, T]), torch.tensor([2, 1]).expand(B, T, 2), logits(columns=5)),
        ValueError,
        ["logits_list", r"shape \[12, 5\]", "7 columns", "action_index_tensor"],
    ),
    (
        "training, value None",
        lambda s: s.net.handle_training_mode(s.td([B, T]), make_actions(B, T), logits(), None),
        ValueError,
        ["value", "None", r"\[12, 1\] or \[12\]"],
    ),
    (
        "training, value of two columns",
        lambda s: train(s, s.td([B, T]), make_actions(B, T), value=torch.zeros(B * T, 2)),
        ValueError,
        ["value", r"\[12, 2\]", r"\[12, 1\] or \[12\]"],
    ),
    (
        "training, td of other rows",
        lambda s: train(s, s.td([5]), make_actions(B, T)),
        ValueError,
        ["td", r"\[5\]", "12 rows"],
    ),
    (
        "training, fields of other rows",
        lambda s: train(s, s.with_fields([10], 2, 5), make_actions(B * T)),
        ValueError,
        ["td", "2 x 5", "12 rows"],
    ),
    (
        "training, fields and batch size at odds",
        lambda s: train(s, s.with_fields([T, B], T, B), make_actions(B, T)),
        ValueError,
        ["td", r"\[4, 3\]", r"\[3, 4\]"],
    ),
    (
        "training, logits a list",
        lambda s: train(s, s.td([B, T]), make_actions(B, T), [logits()]),
        ValueError,
        ["logits_list", "list", "tensor of shape"],
    ),
    (
        "training, action a list",
        lambda s: train(s, s.td([B, T]), make_actions(B, T).tolist()),
        ValueError,
        ["action", "list", r"\[B, T, 2\]"],
    ),
    (
        "training, value on another device",
        lambda s: train(s, s.td([B, T]), make_actions(B, T), value=values().to("meta")),
        ValueError,
        ["value", "on meta", "on cpu"],
    ),
    (
        "training, value integer",
        lambda s: train(s, s.td([B, T]), make_actions(B, T), value=values().long()),
        ValueError,
        ["value", "int64", "floating-point"],
    ),
    # Inference handler
    ("inference, td dict", lambda s: draw(s, {}), TypeError, ["td", "dict", "TensorDict"]),
    ("inference, td None", lambda s: draw(s, None), TypeError, ["td", "None", "TensorDict"]),
    (
        "inference, td of other rows",
        lambda s: draw(s, s.td([B, T])),
        ValueError,
        ["td", r"\[3, 4\]", r"\[3\]"],
    ),
    ("inference, NaN logits", lambda s: draw(s, s.td([B]), row_of(NAN)), ValueError, [r"logits\[1\]", "NaN", "finite"]),
    ("inference, +inf", lambda s: draw(s, s.td([B]), row_of(INF)), ValueError, [r"logits\[1\]", r"\+inf", "finite"]),
    (
        "inference, every action masked",
        lambda s: draw(s, s.td([B]), row_of(-INF)),
        ValueError,
        [r"logits\[1\]", "-inf throughout", "finite"],
    ),
    (
        "inference, columns",
        lambda s: draw(s, s.td([B]), logits(B, 6)),
        ValueError,
        ["logits", r"\[3, 6\]", "7 columns"],
    ),
    (
        "inference, logits on another device",
        lambda s: draw(s, s.td([B]), logits(B, device="meta")),
        ValueError,
        ["logits", "meta", "cpu"],
    ),
    (
        "inference, value shape",
        lambda s: draw(s, s.td([B]), value=torch.zeros(B, 1, 1)),
        ValueError,
        ["value", r"\[3, 1, 1\]", r"\[3, 1\] or \[3\]"],
    ),
    # Tables
    (
        "table not set, training",
        lambda s: train(s, s.td([B, T]), make_actions(B, T), agent=Net()),
        RuntimeError,
        ["cum_action_max_params", "not set", "MettaAgent"],
    ),
    (
        "table not set, inference",
        lambda s: draw(s, s.td([B]), agent=make_agent(active=False)),
        RuntimeError,
        ["action_index_tensor", "not set", "MettaAgent"],
    ),
    (
        "table of another dtype",
        lambda s: train(
            s,
            s.td([B, T]),
            make_actions(B, T),
            agent=s.with_tables(cum_action_max_params=torch.tensor(CUM_ACTION_MAX_PARAMS).int()),
        ),
        TypeError,
        ["cum_action_max_params", "int32", "int64"],
    ),
    (
        "table a list",
        lambda s: draw(s, s.td([B]), agent=s.with_tables(action_index_tensor=PAIRS)),
        TypeError,
        ["action_index_tensor", "list", "int32 tensor"],
    ),
    (
        "table transposed",
        lambda s: draw(s, s.td([B]), agent=s.with_tables(action_index_tensor=torch.tensor(PAIRS).T)),
        ValueError,
        ["action_index_tensor", r"\[2, 7\]", r"\[num_actions, 2\]"],
    ),
    (
        "table on another device",
        lambda s: draw(s, s.td([B]), agent=s.with_tables(action_index_tensor=torch.tensor(PAIRS).to("meta"))),
        ValueError,
        ["action_index_tensor", "cpu", "meta"],
    ),
    # Conversions
    (
        "pairs float",
        lambda s: s.net._convert_action_to_logit_index(torch.zeros(2, 2)),
        TypeError,
        ["actions", "float32", "integer"],
    ),
    (
        "pairs a list",
        lambda s: s.net._convert_action_to_logit_index(PAIRS),
        TypeError,
        ["actions", "list", "integer tensor"],
    ),
    (
        "pairs of one",
        lambda s: s.net._convert_action_to_logit_index(torch.tensor([[1], [2]])),
        ValueError,
        ["actions", r"\[2, 1\]", r"\[\.\.\., 2\]"],
    ),
    (
        "pair out of range",
        lambda s: s.net._convert_action_to_logit_index(torch.tensor([[0, 0], [0, 1]])),
        ValueError,
        [r"actions\[1\]", "parameter 1 for action type 0", "0 to 0"],
    ),
    (
        "index float",
        lambda s: s.net._convert_logit_index_to_action(torch.zeros(2)),
        TypeError,
        ["action_logit_index", "float32", "integer"],
    ),
    (
        "index too large",
        lambda s: s.net._convert_logit_index_to_action(torch.tensor([0, 7])),
        ValueError,
        [r"action_logit_index\[1\]", "got 7", "0 to 6"],
    ),
    (
        "index negative",
        lambda s: s.net._convert_logit_index_to_action(torch.tensor([-1])),
        ValueError,
        [r"action_logit_index\[0\]", "got -1", "0 to 6"],
    ),
    # LSTMWrapper
    ("policy None", lambda s: LSTMWrapper(None, None), TypeError, ["policy", "None", r"nn\.Module"]),
    ("policy None, agent", lambda s: MyAgent(make_env()), TypeError, ["policy", "None", r"nn\.Module"]),
    ("policy a function", lambda s: wrapper(print), TypeError, ["policy", "print", r"nn\.Module"]),
    ("hidden_size 0", lambda s: wrapper(hidden_size=0), ValueError, ["hidden_size", "got 0", "positive integer"]),
    ("input_size text", lambda s: wrapper(input_size="8"), ValueError, ["input_size", "'8'", "positive integer"]),
    ("num_layers bool", lambda s: wrapper(num_layers=True), ValueError, ["num_layers", "True", "positive integer"]),
    ("memory None", lambda s: s.agent.set_memory(None), TypeError, ["memory", "NoneType", "pair of dicts"]),
    (
        "memory of other ids",
        lambda s: remember(s, {0: torch.zeros(2, 3, 6)}, {1: torch.zeros(2, 3, 6)}),
        ValueError,
        ["memory", r"\[0\].*\[1\]", "same ids"],
    ),
    (
        "memory of another width",
        lambda s: remember(s, {0: torch.zeros(2, 3, 6)}, {0: torch.zeros(2, 3, 5)}),
        ValueError,
        ["memory", r"\[2, 3, 5\]", r"\[2, 3, 6\]"],
    ),
    (
        "rows other than the memory's",
        lambda s: s.fast(s.td([5])),
        ValueError,
        ["td", "5 rows", "expected 3"],
    ),
    (
        "dones of other rows",
        lambda s: s.fast(s.td([B], dones=torch.zeros(B, 2))),
        ValueError,
        ["dones", r"\[3, 2\]", "3 values"],
    ),
    (
        "lstm_h without lstm_c",
        lambda s: train_fast(s, s.td([B], env_obs=make_observations(B, T), lstm_h=state())),
        ValueError,
        ["td", "lstm_h without lstm_c", "both"],
    ),
    (
        "lstm_c of other layers",
        lambda s: train_fast(s, s.td([B], env_obs=make_observations(B, T), lstm_h=state(), lstm_c=state(layers=3))),
        ValueError,
        ["lstm_c", r"\[3, 3, 128\]", r"\[3, 2, 128\]"],
    ),
    # ActionSpace
    ("names one string", lambda s: ActionSpace("noop", [0]), TypeError, ["action_names", "'noop'", "list of names"]),
    ("names None", lambda s: ActionSpace(None, [0]), TypeError, ["action_names", "None", "list of names"]),
    ("names empty", lambda s: ActionSpace([], []), ValueError, ["action_names", "no name", "at least one"]),
    ("name empty", lambda s: ActionSpace(["a", ""], [0, 0]), TypeError, [r"action_names\[1\]", "''", "non-empty"]),
    ("name a number", lambda s: ActionSpace([1], [0]), TypeError, [r"action_names\[0\]", "got 1", "string"]),
    ("names repeated", lambda s: ActionSpace(["a", "a"], [0, 0]), ValueError, ["action_names", "a more", "distinct"]),
    (
        "limits too few",
        lambda s: ActionSpace(["a", "b"], [0]),
        ValueError,
        ["action_max_params", "1 values", "expected 2"],
    ),
    ("limits None", lambda s: ActionSpace(["a"], None), TypeError, ["action_max_params", "None", "list of integers"]),
    (
        "limit negative",
        lambda s: ActionSpace(["a"], [-1]),
        ValueError,
        [r"action_max_params\[0\]", "-1", "integer >= 0"],
    ),
    ("limit float", lambda s: ActionSpace(["a"], [1.0]), TypeError, [r"action_max_params\[0\]", "1.0", "integer >= 0"]),
    (
        "limit bool",
        lambda s: ActionSpace(["a"], [True]),
        TypeError,
        [r"action_max_params\[0\]", "True", "integer >= 0"],
    ),
    ("limit text", lambda s: ActionSpace(["a"], ["1"]), TypeError, [r"action_max_params\[0\]", "'1'", "integer >= 0"]),
    (
        "activate_actions, limits",
        lambda s: s.fast.activate_actions(["a", "b"], [1]),
        ValueError,
        ["action_max_params", "1 values", "expected 2"],
    ),
    (
        "activate_actions, device",
        lambda s: s.net.activate_actions(["a"], [1], "nowhere"),
        RuntimeError,
        ["device", "nowhere", "Expected one of cpu"],
    ),
    # MettaAgent
    ("host, policy None", lambda s: MettaAgent(make_env(), None), TypeError, ["policy", "None", r"nn\.Module"]),
    ("host, features a list", lambda s: initialize(s, ["wall"]), TypeError, ["features", "'wall'", "dict"]),
    (
        "host, feature without id",
        lambda s: initialize(s, {"wall": {}}),
        ValueError,
        [r"features\['wall'\]", "None", "0 to 254"],
    ),
    (
        "host, feature id of the empty token",
        lambda s: initialize(s, {"wall": {"id": 255}}),
        ValueError,
        [r"features\['wall'\]", "255", "0 to 254"],
    ),
    (
        "host, feature id twice",
        lambda s: initialize(s, {"wall": {"id": 1}, "food": {"id": 1}}),
        ValueError,
        [r"features\['food'\]", "id 1", "distinct"],
    ),
    (
        "host, normalization 0",
        lambda s: initialize(s, {"wall": {"id": 1, "normalization": 0}}),
        ValueError,
        [r"features\['wall'\]", "normalization 0", "> 0"],
    ),
    (
        "host, limits",
        lambda s: initialize(s, names=["a"], max_params=[-2]),
        ValueError,
        [r"action_max_params\[0\]", "-2", "integer >= 0"],
    ),
    (
        "host, more actions than embeddings",
        lambda s: initialize(s, max_params=[100]),
        ValueError,
        ["full_action_names", "101 actions", "at most 100"],
    ),
    (
        "host, mapping a list",
        lambda s: s.host.restore_original_feature_mapping(["wall"]),
        TypeError,
        ["mapping", "'wall'", "dict"],
    ),
    (
        "host, mapping id",
        lambda s: s.host.restore_original_feature_mapping({"wall": -1}),
        ValueError,
        [r"mapping\['wall'\]", "-1", "0 to 254"],
    ),
    # Fast
    ("window too small", lambda s: Fast(make_env(obs_width=5)), ValueError, ["obs_width", "got 5", "11 to 16"]),
    ("window text", lambda s: Fast(make_env(obs_height="11")), ValueError, ["obs_height", "'11'", "11 to 16"]),
    ("max_actions 0", lambda s: Fast(make_env(), max_actions=0), ValueError, ["max_actions", "got 0", "positive"]),
    ("Fast, policy", lambda s: Fast(make_env(), policy=3), TypeError, ["policy", "got 3", r"nn\.Module"]),
    (
        "env_obs missing",
        lambda s: s.fast(s.td([B], env_obs=torch.zeros(B)).exclude("env_obs")),
        KeyError,
        ["env_obs", "not found"],
    ),
    (
        "env_obs of pairs",
        lambda s: s.fast(s.td([B], env_obs=torch.zeros(B, 4, 2, dtype=torch.uint8))),
        ValueError,
        ["env_obs", r"\[3, 4, 2\]", r"\[B, tokens, 3\]"],
    ),
    (
        "Fast, batch size in inference",
        lambda s: s.fast(s.td([B, 4], env_obs=make_observations(B))),
        ValueError,
        ["td", r"\[3, 4\]", r"\[3\]"],
    ),
    (
        "Fast, table of fewer actions",
        lambda s: s.with_tables(s.fast, action_index_tensor=torch.tensor(PAIRS[:5]))(s.td([B])),
        ValueError,
        ["action_index_tensor", "7", "5"],
    ),
    (
        "Fast, batch size in training",
        lambda s: train_fast(s, s.td([], env_obs=make_observations(B, T))),
        ValueError,
        ["td", r"\[\]", r"\[3, 4\]"],
    ),
    (
        "Fast, action of other segments",
        lambda s: train_fast(s, s.td([B, T]), make_actions(B, 2)),
        ValueError,
        ["action", r"\[3, 2, 2\]", "12 pairs"],
    ),
    (
        "Fast, action out of range",
        lambda s: train_fast(s, s.td([B, T]), pairs_with([2, 2])),
        ValueError,
        [r"actions\[5\]", "parameter 2 for action type 2", "0 to 1"],
    ),
    (
        "Fast, table not set",
        lambda s: s.with_tables(s.fast, cum_action_max_params=None)(s.td([B, T]), action=make_actions(B, T)),
        RuntimeError,
        ["cum_action_max_params", "not set", "MettaAgent"],
    ),
    ("Fast, td None", lambda s: s.fast(None), TypeError, ["td", "None", "TensorDict"]),
    ("Fast, td dict", lambda s: s.fast({"env_obs": make_observations(B)}), TypeError, ["td", "dict", "TensorDict"]),
    ("host, td None", lambda s: s.host(None), TypeError, ["td", "None", "TensorDict"]),
    (
        "env_obs float",
        lambda s: s.fast(s.td([B], env_obs=make_observations(B).float())),
        TypeError,
        ["env_obs", "float32", "uint8"],
    ),
    (
        "env_obs on another device",
        lambda s: s.fast(s.td([B], env_obs=make_observations(B).to("meta"))),
        ValueError,
        ["env_obs", "on meta", "on cpu"],
    ),
    (
        "segments without action",
        lambda s: s.fast(s.td([B, T])),
        ValueError,
        ["action", "None", r"pairs \[3, 4, 2\]"],
    ),
    (
        "lstm_h on another device",
        lambda s: train_fast(s, s.td([B], env_obs=make_observations(B, T), lstm_h=state().to("meta"), lstm_c=state())),
        ValueError,
        ["lstm_h", "on meta", "on cpu"],
    ),
    (
        "environment id text",
        lambda s: s.fast(s.watch(s.td([B]).copy().set_non_tensor("training_env_id_start", "first"))),
        ValueError,
        ["training_env_id_start", "'first'", "integer"],
    ),
    (
        "environment id empty",
        lambda s: s.fast(s.td([B], training_env_id_start=torch.zeros(B, 0))),
        ValueError,
        ["training_env_id_start", r"\[3, 0\]", "integer"],
    ),
    (
        "Fast, input_size text",
        lambda s: Fast(make_env(), input_size="8"),
        ValueError,
        ["input_size", "'8'", "positive"],
    ),
    ("Fast, hidden_size", lambda s: Fast(make_env(), hidden_size=-1), ValueError, ["hidden_size", "-1", "positive"]),
    (
        "Fast, remap table of three",
        lambda s: s.fast._apply_feature_remapping(torch.zeros(3, dtype=torch.uint8)),
        ValueError,
        ["remap_tensor", r"\[3\]", r"\[256\]"],
    ),
    (
        "env, normalization id",
        lambda s: Fast(make_env(feature_normalizations={300: 1.0})),
        ValueError,
        ["feature_normalizations", "300", "0 to 254"],
    ),
    (
        "env, normalization text",
        lambda s: Fast(make_env(feature_normalizations={1: "a"})),
        ValueError,
        [r"feature_normalizations\[1\]", "'a'", "finite number"],
    ),
    (
        "env, normalizations a list",
        lambda s: MettaAgent(make_env(feature_normalizations=[1.0]), SmallPolicy()),
        TypeError,
        ["feature_normalizations", r"\[1.0\]", "dict"],
    ),
    # Regularisation and metrics
    (
        "delta text",
        lambda s: s.net.compute_weight_metrics("0.1"),
        TypeError,
        ["delta", "'0.1'", r"\[0, 1\)"],
    ),
    ("delta 1", lambda s: s.net.compute_weight_metrics(1.0), ValueError, ["delta", "1.0", r"\[0, 1\)"]),
    (
        "epoch text",
        lambda s: s.net.maybe_compute_weight_metrics("3"),
        TypeError,
        ["epoch", "'3'", "integer"],
    ),
    (
        "action heads, negative limit",
        lambda s: s.net.create_action_heads(make_env(max_action_args=[-1])),
        ValueError,
        [r"max_action_args\[0\]", "-1", "integer >= 0"],
    ),
    (
        "initial weight of another shape",
        lambda s: Net.l2_init_loss(s.with_tables(initial_weights={"layers.0": torch.zeros(3)})),
        ValueError,
        ["initial", r"\[3\]", r"\[2, 2\]"],
    ),
]


def test_the_table_is_large_and_its_names_are_distinct():
    names = [case[0] for case in CASES]
    assert len(names) == len(set(names))
    assert len(names) >= 45
    # Each case asks for the argument and at least one thing about what came or was expected.
    assert all(len(fragments) >= 2 for *_, fragments in CASES)


@pytest.mark.parametrize(("call", "error", "fragments"), [pytest.param(*rest, id=name) for name, *rest in CASES])
def test_the_message_names_the_argument_and_nothing_changes(call, error, fragments):
    setting = Setting()
    with pytest.raises(error) as raised:
        call(setting)
    missing = [fragment for fragment in fragments if not re.search(fragment, str(raised.value))]
    assert not missing, f"{missing} not in: {raised.value}"
    setting.assert_unchanged()


def test_values_next_to_the_wrong_ones_are_accepted():
    setting = Setting()
    setting.agent.set_memory(({0: torch.zeros(2, 3, 6)}, {0: torch.zeros(2, 3, 6)}))
    assert train(setting, setting.with_fields([B * T]), pairs_with([1, 3])).batch_size == (B, T)
    assert draw(setting, setting.td([B]))["actions"].shape == (B, 2)
    assert train_fast(setting, setting.td([B, T])).batch_size == (B, T)
    assert setting.fast(setting.td([B]))["actions"].shape == (B, 2)
    initialize(setting, {"wall": {"id": 254, "normalization": 0.5}}, ["a"], [99])
    assert wrapper(SmallPolicy(), hidden_size=1).hidden_size == 1
