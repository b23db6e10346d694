"""check_agent and compare_agents: tables of good and wrong agents, and what they leave as it was."""

import copy
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from agents_for_tests import ACTION_NAMES, HIDDEN, TOKENS, MyAgent, SmallPolicy, make_observations
from agents_for_tests import make_env as plain_env
from tensordict import TensorDict
from torch import nn

from metta_fastagent import Fast, MettaAgent, use_backend
from metta_fastagent import backend as current_backend
from metta_fastagent.runtime import native
from metta_fastagent.testing import AgentCheckError, AgentsDifferError, check_agent, compare_agents
from metta_fastagent.testing._check_agent import RAISED

migration = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent.parent / "examples" / "migrate_lstm_agent.py")))
MOVED = {name: f"policy.{name}" for name in ("encoder", "actor", "critic")}

CONFIGURATION, CLIPPING, FIELDS = "configuration", "weight clipping", "TensorDict fields"
CONVERSION, REPLAY, STABILITY = "action conversion", "recurrent replay", "training stability"
CHECK_NAMES = [CONFIGURATION, CLIPPING, FIELDS, CONVERSION, REPLAY, STABILITY]
TO_INDEX, TO_PAIR = "_convert_action_to_logit_index", "_convert_logit_index_to_action"
INFERENCE, TRAINING, NAN = "inference", "training", float("nan")
NATIVE = pytest.param("native", marks=pytest.mark.skipif(not native.load(), reason=f"native: {native.reason()}"))
on_every_backend = pytest.mark.parametrize("backend", ["eager", NATIVE])


class GoodAgent(MyAgent):
    """The guide's agent, with the LSTM run so that episodes may end inside a segment."""

    def __init__(self, env, **kwargs):
        super().__init__(env, SmallPolicy(), HIDDEN, HIDDEN, num_layers=1, **kwargs)

    def encode(self, td):
        return self.policy.encode_observations(td["env_obs"])

    def forward(self, td, state=None, action=None):
        B, TT = self.set_tensordict_fields(td, td["env_obs"])
        hidden = self.run_lstm(td, self.encode(td), B, TT)
        logits, value = self.policy.decode_actions(hidden, B * TT)
        if action is None:
            return self.handle_inference_mode(td, logits, value)
        return self.handle_training_mode(td, action, logits, value)


class VectorAgent(GoodAgent):
    """Reads float vectors [N, 4] and a task number [N]; the rank of an observation comes from the environment."""

    def __init__(self, env, **kwargs):
        super().__init__(env, **kwargs)
        self.policy.encoder = nn.Linear(5, HIDDEN)

    def encode(self, td):
        assert td["env_obs"].dtype == torch.float32
        return torch.tanh(self.policy.encoder(vector_rows(td)))


def vector_rows(td):
    return torch.cat([td["env_obs"].reshape(-1, 4), td["task"].reshape(-1, 1).float()], dim=-1)


def make_env(**changes):
    known = {"action_names": ACTION_NAMES, "num_tokens": TOKENS, "obs_width": 11, "obs_height": 11}
    return plain_env(**(known | changes))


VECTOR_ENV = make_env(single_observation_space=SimpleNamespace(shape=(4,)))


def build(cls=GoodAgent, env=None, active=True, **kwargs):
    env = env or make_env()
    torch.manual_seed(1)
    agent = cls(env, **kwargs)
    if active:
        agent.activate_actions(env.action_names, env.max_action_args, "cpu")
    return agent


# Classes of agents with one fault


def methods(base=GoodAgent, **functions):
    """An agent with other methods."""
    return type("Wrong", (base,), functions)


def in_policy(**functions):
    """An agent whose policy has other methods."""
    return built(lambda agent: setattr(agent.policy, "__class__", type("WrongPolicy", (SmallPolicy,), functions)))


def built(change):
    """An agent that `change` alters at the end of its constructor."""

    def __init__(self, env, **kwargs):
        GoodAgent.__init__(self, env, **kwargs)
        change(self)

    return methods(__init__=__init__)


def gives(change, *modes):
    """An agent whose result `change` alters, in the given modes or both."""

    def forward(self, td, state=None, action=None):
        out = GoodAgent.forward(self, td, state, action)
        return change(out) if mode_of(action) in (modes or (INFERENCE, TRAINING)) else out

    return methods(forward=forward)


def takes(change, *modes, base=GoodAgent):
    """An agent whose input `change` alters, in the given modes or both."""

    def forward(self, td, state=None, action=None):
        altered = mode_of(action) in (modes or (INFERENCE, TRAINING))
        return base.forward(self, change(td.copy()) if altered else td, state, action)

    return methods(base, forward=forward)


def recording(base=GoodAgent):
    """An agent that keeps what it is called with, and the list of the calls' (td, action, result)."""
    calls = []

    def forward(self, td, state=None, action=None):
        given = td.clone()
        out = base.forward(self, td, state, action)
        calls.append((given, action, out))
        return out

    return methods(base, forward=forward), calls


def mode_of(action):
    return INFERENCE if action is None else TRAINING


def entry(key, function):
    return lambda out: out.update({key: function(out[key])})


def without(*keys):
    return lambda td: td.exclude(*keys, inplace=True)


def shifted(steps):
    return lambda td: td.update({key: td[key].roll(steps, 1) for key in ("dones", "truncateds")})


def no_reset_at_the_start(td):
    later = torch.arange(td["dones"].shape[1]) > 0
    return td.update({key: td[key] & later for key in ("dones", "truncateds")})


def raise_error(self, td, state=None, action=None):
    raise ZeroDivisionError("no such luck")


def late_in_rollout(self, td, state=None, action=None):
    """Give each step of a rollout the flags of the step before."""
    if action is None:
        flags = td["dones"] | td["truncateds"]
        td["dones"], td["truncateds"] = getattr(self, "flags", torch.zeros_like(flags)), torch.zeros_like(flags)
        self.flags = flags
    return GoodAgent.forward(self, td, state, action)


def clips(*parameters):
    """An agent that clips the parameters whose names end so."""

    def clip_weights(self):
        for name, parameter in self.named_parameters():
            if self.clip_range > 0 and name.endswith(parameters):
                parameter.data.clamp_(-self.clip_range, self.clip_range)

    return methods(clip_weights=clip_weights)


def clips_and(then):
    """An agent that does `then(agent)` after clipping."""
    return methods(clip_weights=lambda self: (GoodAgent.clip_weights(self), then(self)))


def replace_actor(agent):
    agent.policy.actor.weight = nn.Parameter(agent.policy.actor.weight.detach().clone())


def spoil_weight(agent):
    if agent.training and agent.clip_range == 0:
        agent.policy.value_head.weight.data[0, 2] = NAN


def drop_interval(self, kwargs):
    return GoodAgent.extract_mixin_params(self, kwargs) | {"analyze_weights_interval": 300}


def wrong_formula(self, pairs):
    kind, param = pairs.long().unbind(-1)
    return self.cum_action_max_params[kind] + param


def int64_only(self, pairs):
    if pairs.dtype != torch.int64:
        raise TypeError("int64 only")
    return GoodAgent._convert_action_to_logit_index(self, pairs)


def converts(method, change):
    """An agent with a conversion whose result `change` alters."""
    return methods(**{method: lambda self, given: change(getattr(GoodAgent, method)(self, given))})


def add_unused(agent):
    agent.spare = nn.Linear(2, 2)
    agent.frozen = nn.Linear(2, 2).requires_grad_(False)


def add_layers(agent):
    layers = {"conv": nn.Conv1d(2, 3, 2), "transposed": nn.ConvTranspose2d(2, 3, 2), "norm": nn.BatchNorm1d(4)}
    agent.extra = nn.ModuleDict({**layers, "embedding": nn.Embedding(7, HIDDEN)})
    agent.extra["embedding"].weight = agent.policy.actor.weight
    nn.utils.parametrizations.weight_norm(agent.policy.encoder)
    agent.init_mixin()


def decode_masked(self, hidden, rows):
    logits, value = SmallPolicy.decode_actions(self, hidden, rows)
    return logits.index_fill(-1, torch.tensor([2]), float("-inf")), value


def decode_half_the_gradient(self, hidden, rows):
    logits, value = SmallPolicy.decode_actions(self, hidden, rows)
    return logits, value / 2 + value.detach() / 2


def encode_detached(self, observations):
    return SmallPolicy.encode_observations(self, observations).detach()


def handle_other_logits(self, td, logits, value):
    return GoodAgent.handle_inference_mode(self, td, logits * 3, value)


def draw_more(self, td, logits, value):
    torch.rand(1)
    return GoodAgent.handle_inference_mode(self, td, logits, value)


Unused = built(add_unused)
WrongFormula = methods(_convert_action_to_logit_index=wrong_formula)
RaisesError = methods(forward=raise_error)
DropsItsState = methods(_store_lstm_state=lambda self, *state_and_ids: None)


# Inputs


def inference_td(rows=40):
    flags = torch.zeros(rows, dtype=torch.bool)
    entries = {"env_obs": make_observations(rows), "dones": flags, "truncateds": flags.clone()}
    return TensorDict(entries, batch_size=[rows]).set_non_tensor("training_env_id_start", 0)


def training_td(rows=40, steps=5, flat=False):
    generator = torch.Generator().manual_seed(5)
    dones = torch.rand(rows, steps, generator=generator) < 0.2
    entries = {"env_obs": make_observations(rows, steps), "dones": dones, "truncateds": torch.zeros_like(dones)}
    state = torch.randn(rows, 1, HIDDEN, generator=generator)
    entries |= {key: state if flat else state[:, None].expand(rows, steps, 1, HIDDEN) for key in ("lstm_h", "lstm_c")}
    return TensorDict(entries, batch_size=[rows] if flat else [rows, steps])


def vector_samples(rows=7):
    """Input of a VectorAgent, with the state and results of an earlier step."""
    observations = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))
    task, state = torch.arange(rows), torch.ones(rows, 3)
    entries = {"env_obs": observations, "task": task, "training_env_id_start": task, "lstm_h": state}
    return TensorDict(entries | {"values": torch.zeros(rows)}, batch_size=[rows])


def snapshot(agent):
    memory = [{key: value.clone() for key, value in part.items()} for part in agent.get_memory()]
    weights = {key: value.clone() for key, value in agent.state_dict().items()}
    grads = {key: None if p.grad is None else p.grad.clone() for key, p in agent.named_parameters()}
    tables = [agent.cum_action_max_params, agent.action_index_tensor]
    plain = [agent.training, agent.clip_range, agent.analyze_weights_interval, tables]
    return memory, weights, grads, plain, torch.get_rng_state()


def assert_same(now, before):
    torch.testing.assert_close(now, before, rtol=0, atol=0)


def assert_same_td(now, before):
    assert set(now.keys()) == set(before.keys())
    assert bool((now == before).all())


# check_agent: tables of agents


WRONG_AGENTS = {
    CONFIGURATION: [
        (methods(init_mixin=lambda self, **kwargs: None), "call self.init_mixin(**mixin_params)"),
        (methods(extract_mixin_params=drop_interval), "analyze_weights_interval is 300 after extract_mixin_params and"),
        (built(lambda a: setattr(a, "clip_range", "0.1")), "clip_range: got '0.1' (str), expected a number >= 0"),
        (built(lambda a: setattr(a, "clip_range", NAN)), "clip_range: got nan, expected a number >= 0"),
        (built(lambda a: setattr(a, "analyze_weights_interval", 2.5)), "got 2.5 (float), expected an integer >= 0"),
    ],
    CLIPPING: [
        (methods(clip_weights=lambda self: None), "'policy.encoder.weight' reaches"),
        (clips("encoder.weight", "actor.weight", "head.weight"), "'policy.actor.bias' reaches"),
        (clips(""), "'lstm.weight_ih_l0' reaches 0.375 after clip_weights() with clip_range 0.375,"),
        (clips_and(lambda agent: agent.policy.actor.weight.data.mul_(0.5)), "with clip_range 0, expected"),
        (clips_and(replace_actor), "'policy.actor.weight' was replaced"),
    ],
    FIELDS: [
        (gives(without("bptt"), INFERENCE), "inference: td['bptt'] is missing, expected torch.int64 [6]; call"),
        (gives(entry("bptt", lambda x: x + 1), TRAINING), "training: td['bptt'] holds [6], expected 5 everywhere"),
        (gives(entry("batch", lambda x: x * 0), INFERENCE), "inference: td['batch'] holds [0], expected 6 everywhere"),
        (gives(entry("batch", lambda x: x.int())), "training: td['batch'] is torch.int32"),
        (gives(entry("full_log_probs", lambda x: x + 0.1), INFERENCE), "inference: probabilities exp(td["),
        (gives(entry("full_log_probs", lambda x: x + 0.1), TRAINING), "do not sum to 1, 1.105"),
        (gives(entry("full_log_probs", lambda x: x[..., :-1])), "td['full_log_probs'] is torch.float32"),
        (gives(entry("act_log_prob", lambda x: x - 0.5), INFERENCE), "expected full_log_probs at the action's"),
        (gives(entry("act_log_prob", lambda x: x - 0.5), TRAINING), "expected full_log_probs at the action's"),
        (gives(entry("act_log_prob", lambda x: x * NAN)), "training: td['act_log_prob'] holds NaN"),
        (gives(lambda out: (out, None)), "training: forward() returned tuple, expected a TensorDict"),
        (gives(entry("actions", lambda x: x.long()), INFERENCE), "td['actions'] is torch.int64 [6, 2], expected torch"),
        (gives(entry("actions", lambda x: x + 2), INFERENCE), "holds a pair that ActionSpace(noop: 0..0"),
        (gives(entry("values", lambda x: x[:, None]), INFERENCE), "td['values'] is torch.float32 [6, 1], expected"),
        (gives(entry("entropy", lambda x: -x), TRAINING), "td['entropy'][0, 0] is -"),
        (gives(without("entropy"), TRAINING), "td['entropy'] is missing"),
        (gives(entry("value", lambda x: x.expand(3, 5, 2)), TRAINING), "td['value'] is torch.float32 [3, 5, 2],"),
        (gives(lambda out: out.reshape(-1), TRAINING), "batch size [15], expected [3, 5]"),
        (RaisesError, f"training: the agent raised ZeroDivisionError: no such luck ({__file__}:"),
    ],
    CONVERSION: [
        (WrongFormula, "[1, 0] became 0, expected 1: action_type is left out"),
        (converts(TO_INDEX, lambda x: (x + 1) % 7), "[0, 0] became 1, expected 0: the formula is action_type + cum_ac"),
        (converts(TO_INDEX, lambda x: x[:, None]), "gave shape [7, 1], expected [7]"),
        (methods(_convert_action_to_logit_index=int64_only), "TypeError: int64 only"),
        (converts(TO_PAIR, lambda x: x.flip(-1)), "_convert_logit_index_to_action: 1 became [0, 1], expected [1, 0]"),
        (converts(TO_PAIR, lambda x: x.flatten()), "gave shape [14], expected [7, 2]"),
    ],
    REPLAY: [
        (methods(run_lstm=lambda self, td, hidden, *sizes: hidden), "carries no state: the results of a step do not"),
        (DropsItsState, "the rollout drops its state"),
        (methods(get_memory=None), "get_memory() gives no state to store with a segment"),
        (methods(forward=late_in_rollout), "the rollout resets one step late at dones"),
        (takes(without("dones", "truncateds")), "the rollout ignores dones"),
        (takes(without("dones", "truncateds"), TRAINING), "training ignores dones and ignores truncateds:"),
        (takes(without("dones"), TRAINING), "training ignores dones:"),
        (takes(without("truncateds"), TRAINING), "training ignores truncateds:"),
        (takes(without("lstm_h", "lstm_c"), TRAINING), "training starts segments from zeros:"),
        (
            takes(without("lstm_h", "lstm_c", "dones"), TRAINING),
            "training starts segments from zeros and ignores dones:",
        ),
        (takes(shifted(1), TRAINING), "training resets one step late at dones and resets one step late at truncateds:"),
        (takes(shifted(-1), TRAINING), "training resets one step early at dones and resets one step early at"),
        (takes(entry("dones", torch.ones_like), TRAINING), "training drops its state between the steps of a segment:"),
        (takes(no_reset_at_the_start, TRAINING), "training does not reset the stored state of a segment"),
        (takes(entry("lstm_h", lambda x: x * 2), TRAINING), "training differs from the rollout, and neither by its"),
    ],
    STABILITY: [
        (gives(entry("value", lambda x: x * NAN), TRAINING), "update 1: the loss holds NaN or infinities (1 of 1"),
        # A finite value whose gradient is NaN: the square root's slope at 0 is infinite, and 0 x infinity is NaN.
        (gives(entry("value", lambda x: x + torch.sqrt(x * 0)), TRAINING), "update 1: the gradient of 'policy.encoder"),
        (clips_and(spoil_weight), "after the optimizer step 'policy.value_head.weight' holds NaN"),
        (methods(clip_weights=lambda self: self.policy.actor.weight.data.mul_(1e12)), "holds NaN or infinities"),
        (gives(lambda out: out.detach(), TRAINING), "does not require grad"),
        (gives(without("value"), TRAINING), "KeyError"),
        (built(lambda agent: agent.requires_grad_(False)), "the agent has no trainable parameter"),
    ],
}


@pytest.mark.parametrize(
    ("check", "cls", "message"), [(check, *row) for check, rows in WRONG_AGENTS.items() for row in rows]
)
def test_wrong_agents_fail_their_check(check, cls, message):
    result = check_agent(build(cls), make_env(), updates=8)[check]
    assert not result.passed
    assert message in result.message


GOOD_AGENTS = [
    (GoodAgent, {}, torch.float32),
    (GoodAgent, {"clip_range": 0.1}, torch.float32),
    (GoodAgent, {"clip_mode": "init_scaled", "clip_range": 1.0}, torch.float32),
    (GoodAgent, {"num_envs": 2}, torch.float32),
    (built(add_layers), {}, torch.float32),
    (built(lambda agent: nn.init.zeros_(agent.policy.actor.weight)), {}, torch.float32),
    (gives(entry("value", lambda x: x.squeeze(-1)), TRAINING), {}, torch.float32),
    (Fast, {"clip_range": 0.1}, torch.float32),
    (Fast, {"clip_mode": "init_scaled", "clip_range": 1.0, "num_envs": 2}, torch.float64),
    (Fast, {"num_envs": 9}, torch.bfloat16),
]


@on_every_backend
@pytest.mark.parametrize(("cls", "kwargs", "dtype"), GOOD_AGENTS)
def test_good_agents_pass_every_check(backend, cls, kwargs, dtype):
    with use_backend(backend):
        report = check_agent(build(cls, **kwargs).to(dtype), make_env(), updates=3)
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("cls", "check", "warnings"),
    [
        (takes(lambda td: td), FIELDS, ["inference returns another TensorDict"]),
        (Unused, STABILITY, ["'spare.bias' is trainable", "'spare.weight' is trainable"]),
    ],
)
def test_what_may_be_intended_is_a_warning(cls, check, warnings):
    result = check_agent(build(cls), make_env(), updates=7)[check]
    assert result.passed
    assert [text[: len(start)] for text, start in zip(result.warnings, warnings, strict=True)] == warnings


@on_every_backend
def test_replay_of_a_wrong_fast_agent(backend):
    with use_backend(backend):
        result = check_agent(build(takes(shifted(1), TRAINING, base=Fast)), make_env(), updates=1)[REPLAY]
    assert result.message.startswith("training resets one step late at dones and resets one step late at truncateds:")


def test_masked_logits_are_taken():
    report = check_agent(build(in_policy(decode_actions=decode_masked)), make_env(), updates=1)
    assert report[FIELDS].passed and report[REPLAY].passed


def test_heads_of_zeros_do_not_hide_a_wrong_state():
    agent = build(takes(without("lstm_h", "lstm_c"), TRAINING))
    nn.init.zeros_(agent.policy.actor.weight)
    assert not check_agent(agent, make_env(), updates=1)[REPLAY].passed


def test_an_agent_without_the_mixin():
    message = check_agent(nn.Linear(2, 2), make_env())[CONFIGURATION].message
    assert "class Linear(PyTorchAgentMixin, LSTMWrapper)" in message


def test_clipping_names_only_the_wrong_parameters():
    message = check_agent(build(clips("encoder.weight", "actor.weight", "head.weight")), make_env())[CLIPPING].message
    assert "weight'" not in message
    assert "lstm" not in message


def test_an_exception_fails_every_check_that_calls_the_agent():
    report = check_agent(build(RaisesError), make_env(), updates=1)
    assert [check.name for check in report.failures] == [FIELDS, REPLAY, STABILITY]


def test_later_updates_are_looked_at():
    agent = build(methods(clip_weights=lambda self: self.policy.actor.weight.data.mul_(1e12)))
    message = check_agent(agent, make_env(), updates=8)[STABILITY].message
    assert int(message.removeprefix("update ").partition(":")[0]) > 1
    assert check_agent(agent, make_env(), updates=1)[STABILITY].message.startswith("1 updates, ")


# check_agent: the report, its arguments and surroundings


def test_report_of_a_good_agent():
    report = check_agent(build(), make_env())
    assert [check.name for check in report.checks] == CHECK_NAMES
    assert report.ok
    assert report.failures == ()
    assert all(check.message and not check.warnings for check in report.checks)
    report.raise_if_failed()
    lines = str(report).splitlines()
    assert lines[0] == "GoodAgent: 6 of 6 checks passed"
    assert all(any(line.startswith("  ok") and name in line for line in lines) for name in CHECK_NAMES)
    assert max(map(len, lines)) <= 120
    with pytest.raises(KeyError, match=r"'speed'.*expected one of configuration"):
        report["speed"]


def test_failures_are_raised_with_the_report():
    report = check_agent(build(WrongFormula), make_env())
    with pytest.raises(AgentCheckError, match="FAIL  action conversion") as caught:
        report.raise_if_failed()
    assert isinstance(caught.value, AssertionError)
    assert str(caught.value) == str(report)
    assert report[CONVERSION] in report.failures


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"agent": "agent"}, TypeError, r"agent: got str, expected a torch.nn.Module"),
        (
            {"agent": build(active=False), "env": SimpleNamespace()},
            ValueError,
            r"env: got SimpleNamespace without max_action_args",
        ),
        ({"agent": build(active=False), "env": None}, ValueError, r"env: got NoneType without max_action_args"),
        ({"env": make_env(max_action_args=[0, -1, 1])}, ValueError, r"action_max_params\[1\]: got -1"),
        ({"env": VECTOR_ENV}, ValueError, r"sample_input: got None, .* for observations of shape \[4\]"),
        ({"updates": 0}, ValueError, "updates: got 0.* expected an integer"),
        ({"updates": 1.5}, TypeError, "updates: got 1.5.* expected an integer"),
        ({"updates": True}, TypeError, "updates: got True.* expected an integer"),
        ({"seed": -1}, ValueError, "seed: got -1.* expected an integer"),
        ({"seed": "1"}, TypeError, "seed: got '1'.* expected an integer"),
        ({"sample_input": torch.zeros(3, 4)}, TypeError, "sample_input: got a float32 tensor .* expected a TensorDict"),
        ({"sample_input": TensorDict({}, [3, 4])}, ValueError, r"sample_input: got batch size \[3, 4\], expected"),
        ({"sample_input": TensorDict({}, [1])}, ValueError, r"sample_input: got batch size \[1\], .* at least 2 rows"),
    ],
)
def test_bad_arguments_of_check_agent(changes, error, message):
    arguments = {"agent": build(), "env": make_env()} | changes
    with pytest.raises(error, match=message):
        check_agent(**arguments)


def test_check_agent_leaves_everything_as_it_was():
    def refuse(*args):
        raise AssertionError("the environment was used")

    env = make_env(feature_normalizations=None, reset=refuse, step=refuse)
    agent = build(env=env, clip_range=0.5).eval()
    agent(inference_td())
    agent.policy.actor.weight.grad = torch.ones_like(agent.policy.actor.weight)
    before, environment = snapshot(agent), dict(vars(env))
    assert check_agent(agent, env, updates=2).ok
    assert_same(snapshot(agent), before)
    assert vars(env) == environment


def test_random_numbers_stay_as_they_were_when_a_check_fails():
    agent, state = build(RaisesError), torch.get_rng_state()
    assert not check_agent(agent, make_env(), updates=1).ok
    assert torch.equal(torch.get_rng_state(), state)


@on_every_backend
@pytest.mark.parametrize(
    ("set_default", "other", "usual"),
    [
        (torch.set_default_dtype, torch.float64, torch.float32),
        (torch.set_default_dtype, torch.bfloat16, torch.float32),
        (torch.set_default_device, "meta", None),
    ],
)
def test_other_defaults_of_torch_play_no_part(backend, set_default, other, usual):
    agent, env, td = build(Fast), make_env(), inference_td()
    before = snapshot(agent)
    set_default(other)
    try:
        with use_backend(backend):
            report = check_agent(agent, env, updates=2)
            compare_agents(agent, copy.deepcopy(agent), td)
    finally:
        set_default(usual)
    assert report.ok, str(report)
    assert_same(snapshot(agent), before)


def test_draws_depend_on_the_seed_only():
    def drawn(seed):
        cls, calls = recording()
        agent = build(cls)
        torch.manual_seed(torch.seed())
        assert check_agent(agent, make_env(), updates=2, seed=seed).ok
        return [(out["actions"] if action is None else action).tolist() for _, action, out in calls]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_tables_come_from_the_environment_where_the_agent_has_none():
    agent = build(active=False)
    assert check_agent(agent, make_env(), updates=1).ok
    assert agent.action_index_tensor is None


def test_tables_of_the_agent_are_enough():
    report = check_agent(build(), SimpleNamespace(num_tokens=TOKENS), updates=1)
    assert report.ok, str(report)
    assert "all 7 actions of 3 types" in report[CONVERSION].message


@pytest.mark.parametrize("name", ["cum_action_max_params", "action_index_tensor"])
def test_tables_of_another_environment(name):
    result = check_agent(build(), make_env(max_action_args=[0, 2, 2]), updates=1)[CONVERSION]
    assert f"{name} is [" in result.message
    assert "ActionSpace(noop: 0..0, move: 0..2, turn: 0..2; 7 actions) needs" in result.message


def test_made_up_tokens_are_legal():
    cls, calls = recording()
    assert check_agent(build(cls), make_env(obs_width=5, obs_height=4), updates=20).ok
    coordinate, feature, value = torch.cat([td["env_obs"].reshape(-1, 3).long() for td, _, _ in calls]).unbind(-1)
    real = coordinate != 255
    assert 0 < int((~real).sum()) < int(real.sum())
    assert (feature[~real] == 255).all()
    assert set((coordinate[real] >> 4).tolist()) == set(range(5))
    assert set((coordinate[real] & 15).tolist()) == set(range(4))
    assert set(feature[real].tolist()) == {0, 2, 5}
    assert set(value[real & (feature == 0)].tolist()) == {0, 1}
    assert value[real & (feature == 2)].max() == 10


def test_a_host_is_checked_through_its_policy():
    report = check_agent(MettaAgent(make_env(), build(WrongFormula)), make_env(), updates=1)
    assert report.agent_name == "Wrong"
    assert not report[CONVERSION].passed


def test_all_checks_run_when_the_agent_cannot_be_copied():
    agent = build()
    agent.unpicklable = (i for i in range(3))
    report = check_agent(agent, make_env())
    assert [check.name for check in report.failures] == CHECK_NAMES
    assert all("cannot pickle 'generator' object" in check.message for check in report.checks)


def test_an_environment_that_cannot_be_copied_is_shared():
    env = make_env(handle=(i for i in range(3)))
    agent = build(env=env)
    agent.env = env
    assert check_agent(agent, env, updates=1).ok


@on_every_backend
def test_rows_of_sample_input_are_drawn_whole(backend):
    (cls, calls), samples = recording(VectorAgent), vector_samples()
    before = samples.clone()
    with use_backend(backend):
        report = check_agent(build(cls, VECTOR_ENV), VECTOR_ENV, updates=2, sample_input=samples)
    assert report.ok, str(report)
    assert_same_td(samples, before)
    drawn = {tuple(row) for row in torch.cat([vector_rows(td) for td, _, _ in calls]).tolist()}
    assert drawn == {tuple(row) for row in vector_rows(samples).tolist()}


# compare_agents: equal agents


def twins(cls=GoodAgent, old_cls=GoodAgent, **kwargs):
    """An agent and one of class `cls` with the same weights and tables."""
    old, new = build(old_cls, **kwargs), build(cls, **kwargs)
    new.load_state_dict(old.state_dict(), strict=False)
    return old, new


def difference(old, new, td=None, action=None, **options):
    with pytest.raises(AgentsDifferError) as caught:
        compare_agents(old, new, training_td() if td is None else td, action, **options)
    assert isinstance(caught.value, AssertionError)
    return caught.value


@pytest.mark.parametrize(
    "td", [inference_td(), training_td(), training_td(flat=True), training_td(steps=1)], ids=["3d", "4d", "flat", "1"]
)
def test_equal_agents(td):
    compare_agents(*twins(clip_range=0.2), td)


@on_every_backend
@pytest.mark.parametrize(("batch_size", "shape"), [((6,), (6,)), ((2, 3), (2, 3)), ((2,), (2, 3))])
def test_agents_that_read_vectors(backend, batch_size, shape):
    observations = torch.randn(*shape, 4, generator=torch.Generator().manual_seed(0))
    td = TensorDict({"env_obs": observations, "task": torch.arange(6).reshape(shape)}, batch_size=batch_size)
    old = build(VectorAgent, VECTOR_ENV)
    new = build(takes(entry("task", lambda x: x * 2), TRAINING, base=VectorAgent), VECTOR_ENV)
    with use_backend(backend):
        compare_agents(old, copy.deepcopy(old), td)
        assert difference(old, new, td).stage == "training"


def test_hosts_are_compared_through_their_policies():
    old, new = (MettaAgent(make_env(), build(cls)) for cls in (GoodAgent, WrongFormula))
    compare_agents(old, copy.deepcopy(old), training_td())
    error = difference(old, new)
    assert (error.stage, error.key) == ("training", "act_log_prob")


@pytest.mark.parametrize("shape", [(40, 5, 2), (200, 2), None])
def test_actions_are_the_given_ones_or_legal_and_varied(shape):
    cls, calls = recording()
    old, new = twins(cls)
    legal = old.action_index_tensor
    action = shape and legal[torch.arange(200) % 7].reshape(shape).long()
    compare_agents(old, new, training_td(), action)
    (used,) = [action for _, action, _ in calls if action is not None]
    assert {tuple(pair) for pair in used.reshape(-1, 2).tolist()} == {tuple(pair) for pair in legal.tolist()}
    assert shape is None or torch.equal(used, action)


def test_an_old_agent_without_a_table_gives_its_drawn_actions():
    def forward(self, td, state=None, action=None):
        """As an agent written before the mixin does, whose table has another name."""
        self.action_index_tensor = self.own_table
        try:
            return GoodAgent.forward(self, td, state, action)
        finally:
            self.action_index_tensor = None

    old, new = twins(old_cls=methods(forward=forward))
    old.own_table, old.action_index_tensor = old.action_index_tensor, None
    compare_agents(old, new, training_td())


def test_compare_agents_leaves_everything_as_it_was():
    old, new = twins(clip_range=0.1)
    old.eval()
    # A gradient that is already there must not be added to the compared ones.
    old.policy.actor.weight.grad = torch.ones_like(old.policy.actor.weight)
    old(inference_td())
    td = training_td()
    before, td_before = [snapshot(old), snapshot(new)], td.clone()
    compare_agents(old, new, td)
    compare_agents(old, new, inference_td())
    assert_same([snapshot(old), snapshot(new)], before)
    assert_same_td(td, td_before)


@pytest.mark.parametrize("make_td", [inference_td, training_td])
def test_an_agent_that_writes_into_its_input_does_not_reach_the_original(make_td):
    def forward(self, td, state=None, action=None):
        td["env_obs"].fill_(7)
        if action is not None:
            action.fill_(0)
        return GoodAgent.forward(self, td, state, action)

    cls, td = methods(forward=forward), make_td()
    before, action = td.clone(), torch.ones(*td.batch_size, 2, dtype=torch.int64)
    compare_agents(*twins(cls, cls), td, action)
    assert set(td.keys()) == set(before.keys())
    assert bool((td["env_obs"] == before["env_obs"]).all())
    assert bool((action == 1).all())


def test_the_new_agent_may_write_more():
    compare_agents(*twins(gives(lambda out: out.set("extra", torch.zeros(out.batch_size)))), training_td())


# compare_agents: differences


STEP_1, STEP_2 = "inference step 1", "inference step 2"
TOO_MUCH = 0.5 * (torch.arange(40) == 2)
DIFFERENCES = [
    (Unused, "weights", "frozen.bias", "'frozen.bias' is in the new agent's state dict only"),
    (gives(entry("values", lambda x: x + TOO_MUCH), INFERENCE), STEP_1, "values", "difference 0.5 at index [2]"),
    (gives(without("bptt"), INFERENCE), STEP_1, "bptt", "old torch.int64 [40], new none"),
    (gives(entry("actions", lambda x: x.long()), INFERENCE), STEP_1, "actions", "new torch.int64 [40, 2]"),
    (methods(handle_inference_mode=handle_other_logits), STEP_1, "full_log_probs", "largest difference"),
    (methods(handle_inference_mode=draw_more), STEP_1, "act_log_prob", "largest difference"),
    (RaisesError, STEP_1, None, "the new agent raised ZeroDivisionError: no such luck"),
    (gives(lambda out: (out, None)), STEP_1, None, "the new agent returned tuple"),
    (DropsItsState, STEP_2, "full_log_probs", "largest difference"),
    (gives(entry("entropy", lambda x: x * 2), TRAINING), "training", "entropy", "largest difference"),
    (gives(entry("batch", lambda x: x + 1), TRAINING), "training", "batch", "(rtol 0, atol 0)"),
    (in_policy(encode_observations=encode_detached), "gradients", "policy.encoder.weight", "new none"),
    (in_policy(decode_actions=decode_half_the_gradient), "gradients", "policy.encoder.weight", "largest difference"),
    (methods(clip_weights=lambda self: None), "clipping", "policy.encoder.weight", "largest difference"),
    (methods(clip_weights=None), "clipping", None, "the new agent has no clip_weights()"),
    (built(lambda agent: setattr(agent, "clip_range", 0.1)), "clipping", None, "clip_range: old 0, new 0.1"),
]


@pytest.mark.parametrize(("cls", "stage", "key", "message"), DIFFERENCES)
def test_the_first_difference_is_named(cls, stage, key, message):
    old, new = twins(cls)
    before = [snapshot(old), snapshot(new)]
    error = difference(old, new)
    assert (error.stage, error.key) == (stage, key)
    assert message in str(error)
    assert_same([snapshot(old), snapshot(new)], before)


def test_a_key_of_the_old_agent_alone():
    assert "'frozen.bias' is in the old agent's state dict only" in str(difference(*twins(old_cls=Unused)))


@pytest.mark.parametrize(
    ("encoder", "found"),
    [
        (nn.Linear(TOKENS * 3, HIDDEN + 1), "old torch.float32 [6, 12], new torch.float32 [7, 12]"),
        (nn.Linear(TOKENS * 3, HIDDEN).double(), "old torch.float32 [6, 12], new torch.float64 [6, 12]"),
    ],
)
def test_shape_and_dtype_of_a_weight(encoder, found):
    old, new = twins()
    new.policy.encoder = encoder
    error = difference(old, new)
    assert (error.stage, error.key) == ("weights", "policy.encoder.weight")
    assert found in str(error)


def test_value_of_a_weight():
    old, new = twins()
    with torch.no_grad():
        old.policy.actor.weight[2, 3], new.policy.actor.weight[2, 3] = 1.0, 1.25
        new.policy.actor.weight[1, 1] += 0.125
    error = difference(old, new)
    assert (error.stage, error.key, error.index) == ("weights", "policy.actor.weight", (2, 3))
    assert "largest difference 0.25 at index [2, 3]: old 1, new 1.25; 2 of 42 entries differ" in str(error)


def test_weights_are_compared_exactly():
    old, new = twins()
    new.policy.actor.bias.data[0] += 1e-6
    assert difference(old, new, atol=1.0).key == "policy.actor.bias"


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_a_value_that_is_not_finite_is_the_largest_difference(bad):
    old, new = twins()
    new.policy.actor.bias.data[0] += 100
    new.policy.actor.bias.data[4] = bad
    error = difference(old, new)
    assert error.index == (4,)
    assert f"new {bad}" in str(error)


def test_tolerance():
    old, new = twins(gives(entry("values", lambda x: x + 1e-3), INFERENCE))
    compare_agents(old, new, training_td(), atol=2e-3)
    assert "rtol 0, atol 0.0005" in str(difference(old, new, rtol=0, atol=5e-4))


def test_an_exception_in_the_old_agent_is_its_own():
    with pytest.raises(ZeroDivisionError) as caught:
        compare_agents(*twins(old_cls=RaisesError), training_td())
    assert "raised by the old agent in inference step 1" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"old": None}, TypeError, "old: got NoneType, expected a torch.nn.Module"),
        ({"new": "agent"}, TypeError, "new: got str, expected a torch.nn.Module"),
        ({"td": {}}, TypeError, "td: got dict, expected a TensorDict"),
        ({"td": TensorDict({}, batch_size=[3])}, ValueError, r"td\['env_obs'\]: got None"),
        ({"td": TensorDict({"env_obs": torch.zeros(3)}, batch_size=[])}, ValueError, r"td: got batch size \[\]"),
        ({"rename": "actor"}, TypeError, r"rename: got 'actor' \(str\), expected a dict of prefixes"),
        ({"rename": {"actr": "actor"}}, ValueError, r"rename: got \['actr'\], expected prefixes of the old"),
        ({"rename": lambda key: "same"}, ValueError, "expected a different new name for each key"),
        ({"action": [[0, 0]]}, TypeError, r"action: got a list .* integer tensor \[40, 5, 2\] or \[200, 2\]"),
        ({"action": torch.zeros(200, 2)}, TypeError, "action: got a float32 tensor"),
        ({"action": torch.zeros(3, 2, dtype=torch.int64)}, ValueError, r"action: got shape \[3, 2\]"),
        ({"rtol": -1}, ValueError, "rtol: got -1, expected a number >= 0"),
        ({"atol": NAN}, ValueError, "atol: got nan, expected a number >= 0"),
    ],
)
def test_bad_arguments_of_compare_agents(changes, error, message):
    old, new = twins()
    arguments = {"old": old, "new": new, "td": training_td()} | changes
    with pytest.raises(error, match=message):
        compare_agents(**arguments)


# compare_agents: the example's migration


def migrated(cls=migration.NewAgent):
    torch.manual_seed(0)
    old, new = migration.OldAgent(clip_range=0.1), cls(clip_range=0.1)
    new.load_state_dict({k if k.startswith("lstm.") else f"policy.{k}": v for k, v in old.state_dict().items()})
    new.activate_actions(["noop", "move", "press"], [0, 3, 3])
    old.action_index_tensor, old.cum_action_max_params = new.action_index_tensor, new.cum_action_max_params
    observations = torch.randint(256, (4, 6, migration.TOKENS, 3), dtype=torch.uint8)
    return old, new, TensorDict({"env_obs": observations}, batch_size=[4, 6])


@on_every_backend
@pytest.mark.parametrize(
    "rename",
    [
        MOVED,
        {f"{old}.": f"{new}." for old, new in MOVED.items()},
        {"": "policy", "lstm": "lstm"},
        lambda key: key if key.startswith("lstm.") else f"policy.{key}",
    ],
    ids=["names", "dots", "longest", "function"],
)
def test_a_plain_agent_and_its_migration_are_the_same(backend, rename):
    with use_backend(backend):
        old, new, td = migrated()
        compare_agents(old, new, td, rename=rename)
        compare_agents(old, new, td[:, 0], rename=rename)


def test_moved_parameters_are_named_where_they_are_now():
    old, new, td = migrated()
    error = difference(old, new, td)
    assert (error.stage, error.key) == ("weights", "actor.bias")
    new.policy.critic.weight.data[0, 3] += 1
    error = difference(old, new, td, rename=MOVED)
    assert (error.stage, error.key, error.index) == ("weights", "policy.critic.weight", (0, 3))


def test_gradients_are_compared_under_the_new_names():
    class Stops(migration.NewAgent):
        def handle_training_mode(self, td, action, logits_list, value):
            return super().handle_training_mode(td, action, logits_list, value.detach())

    error = difference(*migrated(Stops), rename=MOVED)
    assert (error.stage, error.key) == ("gradients", "policy.encoder.weight")


@pytest.mark.parametrize("backend", [NATIVE])
def test_a_difference_on_the_current_backend_alone_is_found(backend):
    class OnlyEager(migration.NewAgent):
        def handle_inference_mode(self, td, logits_list, value):
            off = 0 if current_backend("cpu") == "eager" else 1
            return super().handle_inference_mode(td, logits_list, value + off)

    with use_backend(backend):
        error = difference(*migrated(OnlyEager), rename=MOVED)
    assert (error.stage, error.key) == ("inference step 1", "values")


@pytest.mark.parametrize("given", [False, True], ids=["tokens", "own samples"])
def test_an_error_on_random_tokens_mentions_sample_input(given):
    sample = TensorDict({"env_obs": make_observations(2, 8)[:, 0]}, batch_size=[2]) if given else None
    report = check_agent(build(methods(forward=raise_error)), make_env(), updates=1, sample_input=sample)
    assert RAISED in str(report)
    assert ("pass sample_input=" in str(report)) is not given
