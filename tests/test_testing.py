import copy
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from metta_fastagent import _native, use_backend
from metta_fastagent import backend as current_backend
from metta_fastagent.agents.fast import Fast
from metta_fastagent.host import MettaAgent
from metta_fastagent.mixin import PyTorchAgentMixin
from metta_fastagent.recurrent import LSTMWrapper
from metta_fastagent.testing import AgentCheckError, AgentsDifferError, check_agent, compare_agents

migration = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent.parent / "examples" / "migrate_lstm_agent.py")))
MOVED = {name: f"policy.{name}" for name in ("encoder", "actor", "critic")}

CHECK_NAMES = [
    "configuration",
    "weight clipping",
    "TensorDict fields",
    "action conversion",
    "recurrent replay",
    "training stability",
]
NATIVE = pytest.param("native", marks=pytest.mark.skipif(not _native.load(), reason=f"native: {_native.reason()}"))
on_every_backend = pytest.mark.parametrize("backend", ["eager", NATIVE])
TOKENS, HIDDEN = 6, 8


def make_env(**changes):
    attributes = {
        "action_names": ["noop", "move", "turn"],
        "max_action_args": [0, 3, 1],
        "num_tokens": TOKENS,
        "obs_width": 11,
        "obs_height": 11,
        "feature_normalizations": {0: 1.0, 3: 10.0, 7: 255.0},
    }
    return SimpleNamespace(**(attributes | changes))


class TinyPolicy(nn.Module):
    def __init__(self, num_actions):
        super().__init__()
        self.encoder = nn.Linear(TOKENS * 3, HIDDEN)
        self.actor = nn.Linear(HIDDEN, num_actions)
        self.value_head = nn.Linear(HIDDEN, 1)

    def encode_observations(self, observations):
        return torch.tanh(self.encoder(observations.flatten(-2).flatten(0, -2).float() / 255))

    def decode_actions(self, hidden, rows):
        return self.actor(hidden), self.value_head(hidden)


class TinyAgent(PyTorchAgentMixin, LSTMWrapper):
    def __init__(self, env, policy=None, input_size=HIDDEN, hidden_size=HIDDEN, num_layers=1, **kwargs):
        mixin_params = self.extract_mixin_params(kwargs)
        if policy is None:
            policy = TinyPolicy(sum(limit + 1 for limit in env.max_action_args))
        super().__init__(env, policy, input_size, hidden_size, num_layers=num_layers)
        self.init_mixin(**mixin_params)

    def forward(self, td, state=None, action=None):
        observations = td["env_obs"]
        B, TT = self.set_tensordict_fields(td, observations)
        hidden = self.run_lstm(td, self.policy.encode_observations(observations), B, TT)
        logits, value = self.policy.decode_actions(hidden, B * TT)
        if action is None:
            return self.handle_inference_mode(td, logits, value)
        return self.handle_training_mode(td, action, logits, value)


def build(cls=TinyAgent, env=None, active=True, **kwargs):
    env = env or make_env()
    torch.manual_seed(1)
    agent = cls(env, **kwargs)
    if active:
        agent.activate_actions(env.action_names, env.max_action_args, "cpu")
    return agent


def inference_td(rows=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    observations = torch.randint(0, 255, (rows, TOKENS, 3), generator=generator).to(torch.uint8)
    flags = torch.zeros(rows, dtype=torch.bool)
    td = TensorDict({"env_obs": observations, "dones": flags, "truncateds": flags.clone()}, batch_size=[rows])
    return td.set_non_tensor("training_env_id_start", 0)


def training_td(rows=3, steps=5, flat=False):
    generator = torch.Generator().manual_seed(5)
    entries = {
        "env_obs": torch.randint(0, 255, (rows, steps, TOKENS, 3), generator=generator).to(torch.uint8),
        "dones": torch.rand(rows, steps, generator=generator) < 0.2,
        "truncateds": torch.zeros(rows, steps, dtype=torch.bool),
    }
    state = torch.randn(rows, 1, HIDDEN, generator=generator)
    entries |= {key: state if flat else state[:, None].expand(rows, steps, 1, HIDDEN) for key in ("lstm_h", "lstm_c")}
    return TensorDict(entries, batch_size=[rows] if flat else [rows, steps])


def snapshot(agent):
    memory = [{key: value.clone() for key, value in part.items()} for part in agent.get_memory()]
    weights = {key: value.clone() for key, value in agent.state_dict().items()}
    grads = {key: None if p.grad is None else p.grad.clone() for key, p in agent.named_parameters()}
    tables = [agent.cum_action_max_params, agent.action_index_tensor]
    plain = [agent.training, agent.clip_range, agent.analyze_weights_interval, tables]
    return memory, weights, grads, plain, torch.get_rng_state()


def assert_same_snapshot(now, before):
    torch.testing.assert_close(now, before, rtol=0, atol=0)


def methods(base=TinyAgent, **functions):
    """Class of an agent with other methods."""
    return type("Wrong", (base,), functions)


def changed(change, *modes):
    """Class of an agent whose result `change` alters, in the given modes or both."""

    def forward(self, td, state=None, action=None):
        out = TinyAgent.forward(self, td, state, action)
        mode = "inference" if action is None else "training"
        return change(out) if mode in (modes or ("inference", "training")) else out

    return methods(forward=forward)


def recording(base=TinyAgent):
    """Class of an agent that keeps what it is called with, and the list of the calls' (td, action, result)."""
    calls = []

    def forward(self, td, state=None, action=None):
        given = td.clone()
        out = base.forward(self, td, state, action)
        calls.append((given, action, out))
        return out

    return methods(base, forward=forward), calls


def entry(key, function):
    return lambda out: out.update({key: function(out[key])})


def without(key):
    return lambda out: out.exclude(key, inplace=True)


def swap_sizes(out):
    return out.update({"bptt": out["batch"].clone(), "batch": out["bptt"].clone()})


def raise_error(self, td, state=None, action=None):
    raise ZeroDivisionError("no such luck")


def clip(*parameters):
    """A clip_weights that clips the parameters whose names end so."""

    def clip_weights(self):
        for name, parameter in self.named_parameters():
            if self.clip_range > 0 and name.endswith(parameters):
                parameter.data.clamp_(-self.clip_range, self.clip_range)

    return clip_weights


def clip_and(then):
    """A clip_weights that does `then(agent)` after the mixin's."""

    def clip_weights(self):
        TinyAgent.clip_weights(self)
        then(self)

    return clip_weights


def replace_actor(agent):
    agent.policy.actor.weight = nn.Parameter(agent.policy.actor.weight.detach().clone())


def spoil_weight(agent):
    if agent.training and agent.clip_range == 0:
        agent.policy.value_head.weight.data[0, 2] = float("nan")


def drop_interval(self, kwargs):
    return TinyAgent.extract_mixin_params(self, kwargs) | {"analyze_weights_interval": 300}


def no_fields(self, td, observations):
    return observations.shape[0], observations.shape[1] if observations.dim() == 4 else 1


def wrong_formula(self, pairs):
    kind, param = pairs.long().unbind(-1)
    return self.cum_action_max_params[kind] + param


def int64_only(self, pairs):
    if pairs.dtype != torch.int64:
        raise TypeError("int64 only")
    return TinyAgent._convert_action_to_logit_index(self, pairs)


def to_index(change):
    return methods(
        _convert_action_to_logit_index=lambda self, x: change(TinyAgent._convert_action_to_logit_index(self, x))
    )


def to_pair(change):
    return methods(
        _convert_logit_index_to_action=lambda self, x: change(TinyAgent._convert_logit_index_to_action(self, x))
    )


class NanGradient(TinyAgent):
    def forward(self, td, state=None, action=None):
        out = super().forward(td, state, action)
        if action is not None:
            # Finite value, but the square root's slope at 0 is infinite, and 0 x infinity is NaN.
            out["value"] = out["value"] + torch.sqrt(self.policy.value_head.bias * 0)
        return out


class Unused(TinyAgent):
    def __init__(self, env, **kwargs):
        super().__init__(env, **kwargs)
        self.spare = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


class MoreLayers(TinyAgent):
    def __init__(self, env, **kwargs):
        super().__init__(env, **kwargs)
        layers = {"conv": nn.Conv1d(2, 3, 2), "transposed": nn.ConvTranspose2d(2, 3, 2), "norm": nn.BatchNorm1d(4)}
        self.extra = nn.ModuleDict({**layers, "embedding": nn.Embedding(7, HIDDEN)})
        self.extra["embedding"].weight = self.policy.actor.weight
        nn.utils.parametrizations.weight_norm(self.policy.encoder)
        self.init_mixin()


class Masks(TinyAgent):
    def handle_inference_mode(self, td, logits_list, value):
        return super().handle_inference_mode(td, self.masked(logits_list), value)

    def handle_training_mode(self, td, action, logits_list, value):
        return super().handle_training_mode(td, action, self.masked(logits_list), value)

    @staticmethod
    def masked(logits):
        return logits.index_fill(-1, torch.tensor([2]), float("-inf"))


@pytest.fixture(scope="module")
def right_report():
    return check_agent(build(), make_env())


class TestReport:
    def test_all_checks_pass_on_a_right_agent(self, right_report):
        assert [check.name for check in right_report.checks] == CHECK_NAMES
        assert right_report.ok, str(right_report)
        assert right_report.failures == ()
        assert all(check.message and not check.warnings for check in right_report.checks)
        right_report.raise_if_failed()

    def test_prints_as_a_table(self, right_report):
        lines = str(right_report).splitlines()
        assert lines[0] == "TinyAgent: 6 of 6 checks passed"
        assert all(any(line.startswith("  ok") and name in line for line in lines) for name in CHECK_NAMES)
        assert max(map(len, lines)) <= 120

    def test_failures_are_raised_with_the_table(self):
        report = check_agent(build(methods(_convert_action_to_logit_index=wrong_formula)), make_env())
        with pytest.raises(AgentCheckError, match="FAIL  action conversion") as caught:
            report.raise_if_failed()
        assert isinstance(caught.value, AssertionError)
        assert str(caught.value) == str(report)
        assert report["action conversion"] in report.failures

    def test_unknown_name(self, right_report):
        with pytest.raises(KeyError, match=r"'speed'.*expected one of configuration"):
            right_report["speed"]


class TestSurroundings:
    def test_nothing_of_the_agent_changes(self):
        env = make_env()
        agent = build(env=env, clip_range=0.5).eval()
        agent(inference_td())
        agent.policy.actor.weight.grad = torch.ones_like(agent.policy.actor.weight)
        before = snapshot(agent)
        environment = dict(vars(env))
        assert check_agent(agent, env, updates=2).ok
        assert_same_snapshot(snapshot(agent), before)
        assert vars(env) == environment

    def test_random_numbers_stay_as_they_were_when_a_check_fails(self):
        agent = build(methods(forward=raise_error))
        state = torch.get_rng_state()
        assert not check_agent(agent, make_env(), updates=1).ok
        assert torch.equal(torch.get_rng_state(), state)

    def test_draws_depend_on_the_seed_only(self):
        def drawn(seed):
            cls, calls = recording()
            agent = build(cls)
            torch.manual_seed(torch.seed())
            assert check_agent(agent, make_env(), updates=2, seed=seed).ok
            return [(out["actions"] if action is None else action).tolist() for _, action, out in calls]

        assert drawn(3) == drawn(3)
        assert drawn(3) != drawn(4)

    def test_tables_come_from_the_environment_where_the_agent_has_none(self):
        agent = build(active=False)
        assert check_agent(agent, make_env(), updates=1).ok
        assert agent.action_index_tensor is None

    def test_tables_of_the_agent_are_enough(self):
        report = check_agent(build(), SimpleNamespace(num_tokens=TOKENS), updates=1)
        assert report.ok, str(report)
        assert "all 7 actions of 3 types" in report["action conversion"].message

    def test_the_environment_is_neither_reset_nor_stepped(self):
        def refuse(*args):
            raise AssertionError("the environment was used")

        assert check_agent(build(), make_env(feature_normalizations=None, reset=refuse, step=refuse), updates=1).ok

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_another_default_dtype(self, dtype):
        agent, env = build(), make_env()
        old, new = twins()
        torch.set_default_dtype(dtype)
        try:
            report = check_agent(agent, env, updates=2)
            compare_agents(old, new, training_td())
        finally:
            torch.set_default_dtype(torch.float32)
        assert report.ok, str(report)

    @on_every_backend
    def test_another_default_device(self, backend):
        agent, env, td = build(Fast), make_env(), inference_td()
        before = snapshot(agent)
        torch.set_default_device("meta")
        try:
            with use_backend(backend):
                report = check_agent(agent, env, updates=2)
                compare_agents(agent, copy.deepcopy(agent), td)
        finally:
            torch.set_default_device(None)
        assert report.ok, str(report)
        assert_same_snapshot(snapshot(agent), before)

    def test_made_up_tokens_are_legal(self):
        cls, calls = recording()
        assert check_agent(build(cls), make_env(obs_width=5, obs_height=4), updates=20).ok
        tokens = torch.cat([td["env_obs"].reshape(-1, 3).long() for td, _, _ in calls])
        coordinate, feature, value = tokens.unbind(-1)
        real = coordinate != 255
        assert 0 < int((~real).sum()) < int(real.sum())
        assert (feature[~real] == 255).all()
        assert set((coordinate[real] >> 4).tolist()) == set(range(5))
        assert set((coordinate[real] & 15).tolist()) == set(range(4))
        assert set(feature[real].tolist()) == {0, 3, 7}
        assert set(value[real & (feature == 0)].tolist()) == {0, 1}
        assert value[real & (feature == 3)].max() == 10

    def test_a_host_is_checked_through_its_policy(self):
        host = MettaAgent(make_env(), build(methods(_convert_action_to_logit_index=wrong_formula)))
        report = check_agent(host, make_env(), updates=1)
        assert report.agent_name == "Wrong"
        assert not report["action conversion"].passed

    def test_all_checks_run_when_the_agent_cannot_be_copied(self):
        agent = build()
        agent.unpicklable = (i for i in range(3))
        report = check_agent(agent, make_env())
        assert [check.name for check in report.checks] == CHECK_NAMES
        assert [check.passed for check in report.checks] == [False] * 6
        assert all("cannot pickle 'generator' object" in check.message for check in report.checks)

    def test_an_environment_that_cannot_be_copied_is_shared(self):
        env = make_env(handle=(i for i in range(3)))
        agent = build(env=env)
        agent.env = env
        assert check_agent(agent, env, updates=1).ok

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (("agent", make_env()), TypeError, r"agent: got str, expected a torch.nn.Module"),
            ((build(active=False), SimpleNamespace()), ValueError, r"env: got SimpleNamespace without max_action_args"),
            ((build(active=False), None), ValueError, r"env: got NoneType without max_action_args"),
            ((build(), make_env(max_action_args=[0, -1, 1])), ValueError, r"action_max_params\[1\]: got -1"),
            (
                (build(), make_env(single_observation_space=SimpleNamespace(shape=(4,)))),
                ValueError,
                r"sample_input: got None, expected a TensorDict, for observations of shape \[4\]",
            ),
        ],
    )
    def test_wrong_agent_or_environment(self, arguments, error, message):
        with pytest.raises(error, match=message):
            check_agent(*arguments)

    @pytest.mark.parametrize(
        ("name", "value"), [("updates", 0), ("updates", 1.5), ("updates", True), ("seed", -1), ("seed", "1")]
    )
    def test_wrong_numbers(self, name, value):
        with pytest.raises((TypeError, ValueError), match=f"{name}: got {value!r}.* expected an integer"):
            check_agent(build(), make_env(), **{name: value})


NAN = float("nan")
CONFIGURATION = [
    (methods(init_mixin=lambda self, **kwargs: None), "call self.init_mixin(**mixin_params)"),
    (methods(extract_mixin_params=drop_interval), "analyze_weights_interval is 300 after extract_mixin_params and"),
]
CLIPPING = [
    (methods(clip_weights=lambda self: None), "'policy.encoder.weight' reaches"),
    (methods(clip_weights=clip("encoder.weight", "actor.weight", "head.weight")), "'policy.actor.bias' reaches"),
    (methods(clip_weights=clip("")), "'lstm.weight_ih_l0' reaches 0.375 after clip_weights() with clip_range 0.375,"),
    (methods(clip_weights=clip_and(lambda a: a.policy.actor.weight.data.mul_(0.5))), "with clip_range 0, expected"),
    (methods(clip_weights=clip_and(lambda a: a.policy.actor.weight.data.mul_(0.5))), "reaches 0.1875 after"),
    (methods(clip_weights=clip_and(replace_actor)), "'policy.actor.weight' was replaced"),
]
FIELDS = [
    (methods(set_tensordict_fields=no_fields), "inference: td['bptt'] is missing, expected torch.int64 [6]; call self"),
    (changed(entry("bptt", lambda x: x + 1), "training"), "training: td['bptt'] holds [6], expected 5 everywhere"),
    (changed(entry("batch", lambda x: x * 0), "inference"), "inference: td['batch'] holds [0], expected 6 everywhere"),
    (changed(entry("batch", lambda x: x.int())), "training: td['batch'] is torch.int32"),
    (changed(swap_sizes, "training"), "td['bptt'] holds [3], expected 5 everywhere"),
    (changed(entry("full_log_probs", lambda x: x + 0.1), "inference"), "inference: probabilities exp(td["),
    (changed(entry("full_log_probs", lambda x: x + 0.1), "training"), "do not sum to 1, 1.105"),
    (changed(entry("full_log_probs", lambda x: x[..., :-1])), "td['full_log_probs'] is torch.float32"),
    (changed(entry("act_log_prob", lambda x: x - 0.5), "inference"), "expected full_log_probs at the action's"),
    (changed(entry("act_log_prob", lambda x: x - 0.5), "training"), "expected full_log_probs at the action's"),
    (changed(entry("act_log_prob", lambda x: x * NAN)), "training: td['act_log_prob'] holds NaN"),
    (changed(without("act_log_prob")), "inference: td['act_log_prob'] is missing, expected floating point"),
    (changed(lambda out: (out, None)), "training: forward() returned tuple, expected a TensorDict"),
    (changed(entry("actions", lambda x: x.long()), "inference"), "td['actions'] is torch.int64 [6, 2], expected torch"),
    (changed(entry("actions", lambda x: x + 2), "inference"), "holds a pair that ActionSpace(noop: 0..0"),
    (changed(entry("actions", lambda x: x - 9), "inference"), "holds a pair that ActionSpace(noop: 0..0"),
    (changed(entry("values", lambda x: x[:, None]), "inference"), "td['values'] is torch.float32 [6, 1], expected"),
    (changed(entry("entropy", lambda x: -x), "training"), "td['entropy'][0, 0] is -"),
    (changed(without("entropy"), "training"), "td['entropy'] is missing"),
    (changed(entry("value", lambda x: x.expand(3, 5, 2)), "training"), "td['value'] is torch.float32 [3, 5, 2],"),
    (changed(lambda out: out.reshape(-1), "training"), "batch size [15], expected [3, 5]"),
    (methods(forward=raise_error), "training: the agent raised ZeroDivisionError: no such luck (in raise_error, line"),
]
CONVERSION = [
    (methods(_convert_action_to_logit_index=wrong_formula), "[1, 0] became 0, expected 1: action_type is left out"),
    (to_index(lambda index: (index + 1) % 7), "[0, 0] became 1, expected 0: the formula is action_type + cum_action"),
    (to_index(lambda index: index[:, None]), "gave shape [7, 1], expected [7]"),
    (methods(_convert_action_to_logit_index=int64_only), "TypeError: int64 only"),
    (to_pair(lambda pairs: pairs.flip(-1)), "_convert_logit_index_to_action: 1 became [0, 1], expected [1, 0]"),
    (to_pair(lambda pairs: pairs.flatten()), "gave shape [14], expected [7, 2]"),
]
STABILITY = [
    (changed(entry("value", lambda x: x * NAN), "training"), "update 1: the loss holds NaN or infinities (1 of 1"),
    (NanGradient, "update 1: the gradient of 'policy.value_head.bias' holds NaN"),
    (methods(clip_weights=clip_and(spoil_weight)), "after the optimizer step 'policy.value_head.weight' holds NaN"),
    (methods(clip_weights=lambda self: self.policy.actor.weight.data.mul_(1e12)), "holds NaN or infinities"),
    (changed(lambda out: out.detach(), "training"), "does not require grad"),
    (changed(without("value"), "training"), "KeyError"),
]
WRONG = dict(zip(CHECK_NAMES, (CONFIGURATION, CLIPPING, FIELDS, CONVERSION, [], STABILITY), strict=True))


@pytest.mark.parametrize(
    ("check", "cls", "message"), [(check, cls, message) for check, cases in WRONG.items() for cls, message in cases]
)
def test_wrong_agents(check, cls, message):
    result = check_agent(build(cls), make_env(), updates=8)[check]
    assert not result.passed
    assert message in result.message


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (MoreLayers, {}),
        (changed(entry("value", lambda x: x.squeeze(-1)), "training"), {}),
        (TinyAgent, {"clip_range": 0.1}),
        (TinyAgent, {"clip_mode": "init_scaled", "clip_range": 1.0}),
        (TinyAgent, {"num_envs": 2}),
        (Fast, {"clip_range": 0.1}),
        (Fast, {"clip_mode": "init_scaled", "clip_range": 1.0, "num_envs": 7}),
    ],
)
def test_right_agents(cls, kwargs):
    report = check_agent(build(cls, **kwargs), make_env(), updates=3)
    assert report.ok, str(report)


class TestDetails:
    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("clip_range", "0.1", "clip_range: got '0.1' (str), expected a number >= 0"),
            ("clip_range", NAN, "clip_range: got nan, expected a number >= 0"),
            ("analyze_weights_interval", 2.5, "analyze_weights_interval: got 2.5 (float), expected an integer >= 0"),
        ],
    )
    def test_configuration_of_a_wrong_type(self, name, value, expected):
        agent = build()
        setattr(agent, name, value)
        assert expected in check_agent(agent, make_env(), updates=1)["configuration"].message

    def test_no_mixin(self):
        message = check_agent(nn.Linear(2, 2), make_env())["configuration"].message
        assert "class Linear(PyTorchAgentMixin, LSTMWrapper)" in message

    def test_only_the_culprit_is_named(self):
        wrong = methods(clip_weights=clip("encoder.weight", "actor.weight", "head.weight"))
        message = check_agent(build(wrong), make_env(), updates=1)["weight clipping"].message
        assert "weight'" not in message
        assert "lstm" not in message

    def test_masked_logits_are_taken(self):
        report = check_agent(build(Masks), make_env(), updates=1)
        assert report["TensorDict fields"].passed
        assert report["recurrent replay"].passed

    def test_an_exception_fails_every_check_that_calls_the_agent(self):
        report = check_agent(build(methods(forward=raise_error)), make_env(), updates=1)
        failed = {check.name for check in report.failures}
        assert failed == {"TensorDict fields", "recurrent replay", "training stability"}

    def test_another_tensordict_is_a_warning(self):
        other = methods(
            forward=lambda self, td, state=None, action=None: TinyAgent.forward(self, td.clone(), state, action)
        )
        result = check_agent(build(other), make_env(), updates=1)["TensorDict fields"]
        assert result.passed
        assert "another TensorDict" in result.warnings[0]

    @pytest.mark.parametrize("name", ["cum_action_max_params", "action_index_tensor"])
    def test_tables_of_another_environment(self, name):
        result = check_agent(build(), make_env(max_action_args=[0, 2, 2]), updates=1)["action conversion"]
        assert f"{name} is [" in result.message
        assert "ActionSpace(noop: 0..0, move: 0..2, turn: 0..2; 7 actions) needs" in result.message

    def test_later_updates_are_looked_at(self):
        cls = methods(clip_weights=lambda self: self.policy.actor.weight.data.mul_(1e12))
        message = check_agent(build(cls), make_env(), updates=8)["training stability"].message
        assert int(message.removeprefix("update ").partition(":")[0]) > 1
        assert check_agent(build(cls), make_env(), updates=1)["training stability"].passed

    def test_unused_parameters_are_warnings(self):
        result = check_agent(build(Unused), make_env(), updates=7)["training stability"]
        assert "7 updates" in result.message
        assert [warning.partition(" ")[0] for warning in result.warnings] == ["'spare.bias'", "'spare.weight'"]

    def test_nothing_to_train(self):
        report = check_agent(build().requires_grad_(False), make_env())
        assert "no trainable parameter" in report["training stability"].message


class NoMemory(TinyAgent):
    def run_lstm(self, td, hidden, B, TT, training=None):
        return hidden


class DropsItsState(TinyAgent):
    def _store_lstm_state(self, lstm_h, lstm_c, env_id):
        pass


class NoGetMemory(TinyAgent):
    get_memory = None


def changed_input(change, modes, base=TinyAgent):
    """Class of an agent that changes its input in the given modes."""

    class Wrong(base):
        def forward(self, td, state=None, action=None):
            mode = "inference" if action is None else "training"
            return super().forward(change(td.copy()) if mode in modes else td, state, action)

    return Wrong


def shifted(steps):
    return lambda td: td.update({key: td[key].roll(steps, 1) for key in ("dones", "truncateds")})


def hold_back(agent, td):
    """Give each step of a rollout the flags of the step before."""
    flags = td["dones"] | td["truncateds"]
    td["dones"], td["truncateds"] = getattr(agent, "flags", torch.zeros_like(flags)), torch.zeros_like(flags)
    agent.flags = flags


class LateInRollout(TinyAgent):
    def forward(self, td, state=None, action=None):
        if action is None:
            hold_back(self, td)
        return super().forward(td, state, action)


def without_flags(td):
    return td.exclude("dones", "truncateds")


def without_state(td):
    return td.exclude("lstm_h", "lstm_c")


def zeros_without_dones(td):
    return td.exclude("lstm_h", "lstm_c", "dones")


def other_state(td):
    return td.update({"lstm_h": td["lstm_h"] * 2})


def reset_everywhere(td):
    return td.update({"dones": torch.ones_like(td["dones"])})


def no_reset_at_the_start(td):
    step = torch.arange(td["dones"].shape[1])
    return td.update({key: td[key] & (step > 0) for key in ("dones", "truncateds")})


BOTH, TRAINING = ("inference", "training"), ("training",)


class TestReplay:
    @staticmethod
    def check(cls):
        return check_agent(build(cls), make_env(), updates=1)["recurrent replay"]

    @pytest.mark.parametrize(
        ("cls", "cause"),
        [
            (NoMemory, "carries no state: the results of a step do not depend on earlier steps"),
            (DropsItsState, "the rollout drops its state"),
            (NoGetMemory, "get_memory() gives no state to store with a segment"),
            (LateInRollout, "the rollout resets one step late at dones"),
            (changed_input(without_flags, BOTH), "the rollout ignores dones"),
            (changed_input(without_flags, TRAINING), "training ignores dones and ignores truncateds:"),
            (changed_input(lambda td: td.exclude("dones"), TRAINING), "training ignores dones:"),
            (changed_input(lambda td: td.exclude("truncateds"), TRAINING), "training ignores truncateds:"),
            (changed_input(without_state, TRAINING), "training starts segments from zeros:"),
            (changed_input(zeros_without_dones, TRAINING), "training starts segments from zeros and ignores dones:"),
            (changed_input(shifted(1), TRAINING), "training resets one step late at dones and resets one step late at"),
            (changed_input(shifted(-1), TRAINING), "training resets one step early at dones and resets one step early"),
            (changed_input(reset_everywhere, TRAINING), "training drops its state between the steps of a segment:"),
            (changed_input(no_reset_at_the_start, TRAINING), "training does not reset the stored state of a segment"),
            (changed_input(other_state, TRAINING), "training differs from the rollout, and neither by its flags nor"),
        ],
    )
    def test_a_wrong_agent_is_named(self, cls, cause):
        result = self.check(cls)
        assert not result.passed
        assert result.message.startswith(cause), result.message

    @on_every_backend
    @pytest.mark.parametrize(
        ("change", "cause"),
        [
            (without_flags, "training ignores dones and ignores truncateds: the importance ratio"),
            (without_state, "training starts segments from zeros: the importance ratio"),
            (shifted(1), "training resets one step late at dones and resets one step late at truncateds: the"),
        ],
    )
    def test_fast_in_three_wrong_ways(self, backend, change, cause):
        with use_backend(backend):
            assert self.check(changed_input(change, TRAINING, Fast)).message.startswith(cause)

    @on_every_backend
    @pytest.mark.parametrize("num_envs", [None, 2, 9])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_fast_passes(self, backend, num_envs, dtype):
        with use_backend(backend):
            result = check_agent(build(Fast, num_envs=num_envs).to(dtype), make_env(), updates=1)["recurrent replay"]
        assert result.passed, result.message

    @on_every_backend
    def test_the_readme_like_agent_passes(self, backend):
        with use_backend(backend):
            report = check_agent(build(), make_env(), updates=2)
        assert report.ok, str(report)

    def test_heads_of_zeros_hide_nothing(self):
        for cls, passed in ((TinyAgent, True), (changed_input(without_state, TRAINING), False)):
            agent = build(cls)
            nn.init.zeros_(agent.policy.actor.weight)
            assert check_agent(agent, make_env(), updates=1)["recurrent replay"].passed == passed


class VectorAgent(TinyAgent):
    """Reads float vectors [N, 4] and a task number [N]; the rank of an observation comes from the environment."""

    def __init__(self, env, **kwargs):
        super().__init__(env, **kwargs)
        self.policy.encoder = nn.Linear(5, HIDDEN)

    def forward(self, td, state=None, action=None):
        observations = td["env_obs"]
        assert observations.dtype == torch.float32
        B, TT = self.set_tensordict_fields(td, observations)
        both = torch.cat([observations.reshape(B * TT, 4), td["task"].reshape(B * TT, 1).float()], dim=-1)
        hidden = self.run_lstm(td, torch.tanh(self.policy.encoder(both)), B, TT)
        logits, value = self.policy.decode_actions(hidden, B * TT)
        if action is None:
            return self.handle_inference_mode(td, logits, value)
        return self.handle_training_mode(td, action, logits, value)


class TestOtherObservations:
    env = make_env(single_observation_space=SimpleNamespace(shape=(4,)))

    @staticmethod
    def samples(rows=7):
        generator = torch.Generator().manual_seed(0)
        entries = {"env_obs": torch.randn(rows, 4, generator=generator), "task": torch.arange(rows)}
        # State and results of an earlier step.
        entries |= {
            "values": torch.zeros(rows),
            "lstm_h": torch.ones(rows, 3),
            "training_env_id_start": entries["task"],
        }
        return TensorDict(entries, batch_size=[rows])

    @on_every_backend
    def test_vectors_come_from_the_sample(self, backend):
        samples = self.samples()
        before = samples.clone()
        with use_backend(backend):
            report = check_agent(build(VectorAgent, self.env), self.env, updates=2, sample_input=samples)
        assert report.ok, str(report)
        assert set(samples.keys()) == set(before.keys())
        assert bool((samples == before).all())

    def test_rows_of_the_sample_are_drawn_whole(self):
        def rows(td):
            return torch.cat([td["env_obs"].reshape(-1, 4), td["task"].reshape(-1, 1).float()], dim=-1)

        (cls, calls), samples = recording(VectorAgent), self.samples()
        assert check_agent(build(cls, self.env), self.env, updates=2, sample_input=samples).ok
        drawn = {tuple(row) for row in torch.cat([rows(td) for td, _, _ in calls]).tolist()}
        assert drawn == {tuple(row) for row in rows(samples).tolist()}

    def test_a_wrong_agent_is_named(self):
        wrong = build(changed_input(without_state, TRAINING, VectorAgent), self.env)
        result = check_agent(wrong, self.env, updates=1, sample_input=self.samples())["recurrent replay"]
        assert result.message.startswith("training starts segments from zeros:")

    @pytest.mark.parametrize(
        ("sample", "error", "message"),
        [
            (torch.zeros(3, 4), TypeError, "sample_input: got a float32 tensor .* expected a TensorDict"),
            (TensorDict({}, batch_size=[3, 4]), ValueError, r"sample_input: got batch size \[3, 4\], expected"),
            (TensorDict({}, batch_size=[1]), ValueError, r"sample_input: got batch size \[1\], .* at least 2 rows"),
        ],
    )
    def test_wrong_samples(self, sample, error, message):
        with pytest.raises(error, match=message):
            check_agent(build(), make_env(), sample_input=sample)

    @on_every_backend
    @pytest.mark.parametrize("batch_size", [(6,), (2, 3), (2,)])
    def test_compare_agents_takes_vectors(self, backend, batch_size):
        generator = torch.Generator().manual_seed(0)
        shape = (2, 3) if batch_size == (2,) else batch_size
        entries = {"env_obs": torch.randn(*shape, 4, generator=generator), "task": torch.arange(6).reshape(shape)}
        td = TensorDict(entries, batch_size=batch_size)
        old = build(VectorAgent, self.env)
        with use_backend(backend):
            compare_agents(old, copy.deepcopy(old), td)
            new = build(changed_input(lambda td: td.update({"task": td["task"] * 2}), TRAINING, VectorAgent), self.env)
            assert difference(old, new, td).stage == "training"


def twins(cls=TinyAgent, old_cls=TinyAgent, **kwargs):
    """An agent and one of class `cls` with the same weights and tables."""
    old, new = build(old_cls, **kwargs), build(cls, **kwargs)
    new.load_state_dict(old.state_dict(), strict=False)
    return old, new


def difference(old, new, td=None, action=None, **tolerances):
    with pytest.raises(AgentsDifferError) as caught:
        compare_agents(old, new, training_td() if td is None else td, action, **tolerances)
    assert isinstance(caught.value, AssertionError)
    return caught.value


class TestComparison:
    @pytest.mark.parametrize(
        "td",
        [inference_td(), training_td(), training_td(flat=True), training_td(steps=1)],
        ids=["3d", "4d", "flat", "1"],
    )
    def test_equal_agents(self, td):
        compare_agents(*twins(clip_range=0.2), td)

    def test_hosts_can_be_compared(self):
        env = make_env()
        old, new = (
            MettaAgent(env, build(cls)) for cls in (TinyAgent, methods(_convert_action_to_logit_index=wrong_formula))
        )
        compare_agents(old, copy.deepcopy(old), training_td())
        error = difference(old, new)
        assert (error.stage, error.key) == ("training", "act_log_prob")

    @pytest.mark.parametrize("shape", [(3, 5, 2), (15, 2), None])
    def test_actions_are_the_given_ones_or_legal_and_varied(self, shape):
        cls, calls = recording()
        old, new = twins(cls)
        legal = old.action_index_tensor
        action = shape and legal[torch.arange(15) % 7].reshape(shape).long()
        compare_agents(old, new, training_td(rows=3 if shape else 20), action)
        used = [action for _, action, _ in calls if action is not None]
        assert len(used) == 1
        assert {tuple(pair) for pair in used[0].reshape(-1, 2).tolist()} == {tuple(pair) for pair in legal.tolist()}
        assert shape is None or torch.equal(used[0], action)

    def test_an_old_agent_without_a_table_gives_its_drawn_actions(self):
        class OwnTable(TinyAgent):
            """Written before the mixin: its table has another name."""

            def forward(self, td, state=None, action=None):
                self.action_index_tensor = self.own_table
                try:
                    return super().forward(td, state, action)
                finally:
                    self.action_index_tensor = None

        old, new = twins(old_cls=OwnTable)
        old.own_table, old.action_index_tensor = old.action_index_tensor, None
        compare_agents(old, new, training_td())

    def test_nothing_changes(self):
        old, new = twins(clip_range=0.1)
        old.eval()
        # A gradient that is already there must not be added to the compared ones.
        old.policy.actor.weight.grad = torch.ones_like(old.policy.actor.weight)
        old(inference_td(rows=3))
        td = training_td()
        before, td_before = [snapshot(old), snapshot(new)], td.clone()
        compare_agents(old, new, td)
        torch.testing.assert_close([snapshot(old), snapshot(new)], before, rtol=0, atol=0)
        assert set(td.keys()) == set(td_before.keys())
        assert bool((td == td_before).all())

    @pytest.mark.parametrize("make_td", [inference_td, training_td])
    def test_an_agent_that_writes_into_its_input_does_not_reach_the_original(self, make_td):
        class Scribbles(TinyAgent):
            def forward(self, td, state=None, action=None):
                td["env_obs"].fill_(7)
                if action is not None:
                    action.fill_(0)
                return super().forward(td, state, action)

        td = make_td()
        before, action = td.clone(), torch.ones(*td.batch_size, 2, dtype=torch.int64)
        compare_agents(*twins(Scribbles, old_cls=Scribbles), td, action)
        assert set(td.keys()) == set(before.keys())
        assert bool((td["env_obs"] == before["env_obs"]).all())
        assert bool((action == 1).all())

    def test_memory_of_the_agents_plays_no_part(self):
        old, new = twins()
        old(inference_td(rows=9))
        compare_agents(old, new, inference_td())

    def test_the_new_agent_may_write_more(self):
        def more(out):
            out["extra"] = torch.zeros(*out.batch_size)
            return out

        compare_agents(*twins(changed(more)), training_td())


class DrawsMore(TinyAgent):
    def handle_inference_mode(self, td, logits_list, value):
        torch.rand(1)
        return super().handle_inference_mode(td, logits_list, value)


class OtherLogits(TinyAgent):
    def handle_inference_mode(self, td, logits_list, value):
        return super().handle_inference_mode(td, logits_list * 3, value)


def in_policy(**functions):
    """Class of an agent whose policy has other methods."""

    class Wrong(TinyAgent):
        def __init__(self, env, **kwargs):
            super().__init__(env, **kwargs)
            self.policy.__class__ = type("WrongPolicy", (TinyPolicy,), functions)

    return Wrong


def encode_detached(self, observations):
    return TinyPolicy.encode_observations(self, observations).detach()


def half_the_gradient(self, hidden, rows):
    logits, value = TinyPolicy.decode_actions(self, hidden, rows)
    return logits, value / 2 + value.detach() / 2


INFERENCE, TOO_MUCH = "inference step 1", torch.tensor([0.0, 0.0, 0.5])
DIFFERENCES = [
    (Unused, "weights", "frozen.bias", "'frozen.bias' is in the new agent's state dict only"),
    (changed(entry("values", lambda x: x + TOO_MUCH), "inference"), INFERENCE, "values", "difference 0.5 at index [2]"),
    (changed(without("bptt"), "inference"), INFERENCE, "bptt", "old torch.int64 [3], new none"),
    (changed(entry("actions", lambda x: x.long()), "inference"), INFERENCE, "actions", "new torch.int64 [3, 2]"),
    (OtherLogits, INFERENCE, "full_log_probs", "largest difference"),
    (methods(forward=raise_error), INFERENCE, None, "the new agent raised ZeroDivisionError: no such luck"),
    (changed(lambda out: (out, None)), INFERENCE, None, "the new agent returned tuple"),
    (DropsItsState, "inference step 2", "full_log_probs", "largest difference"),
    (changed(entry("entropy", lambda x: x * 2), "training"), "training", "entropy", "largest difference"),
    (changed(entry("batch", lambda x: x + 1), "training"), "training", "batch", "(rtol 0, atol 0)"),
    (in_policy(encode_observations=encode_detached), "gradients", "policy.encoder.weight", "new none"),
    (in_policy(decode_actions=half_the_gradient), "gradients", "policy.encoder.weight", "largest difference"),
    (methods(clip_weights=lambda self: None), "clipping", "policy.encoder.weight", "largest difference"),
    (methods(clip_weights=None), "clipping", None, "the new agent has no clip_weights()"),
]


class TestDifferences:
    @pytest.mark.parametrize(("cls", "stage", "key", "message"), DIFFERENCES)
    def test_the_first_difference_is_named(self, cls, stage, key, message):
        old, new = twins(cls)
        before = [snapshot(old), snapshot(new)]
        error = difference(old, new, training_td() if stage != "inference step 2" else inference_td())
        assert (error.stage, error.key) == (stage, key)
        assert message in str(error)
        torch.testing.assert_close([snapshot(old), snapshot(new)], before, rtol=0, atol=0)

    def test_one_random_number_more(self):
        error = difference(*twins(DrawsMore), td=inference_td(rows=64))
        assert (error.stage, error.key) == (INFERENCE, "act_log_prob")

    def test_a_key_of_the_old_agent_alone(self):
        assert "'frozen.bias' is in the old agent's state dict only" in str(difference(*twins(old_cls=Unused)))

    def test_shape_and_dtype_of_a_weight(self):
        old, new = twins()
        new.policy.encoder = nn.Linear(TOKENS * 3, HIDDEN + 1)
        error = difference(old, new)
        assert (error.stage, error.key) == ("weights", "policy.encoder.weight")
        assert "old torch.float32 [8, 18], new torch.float32 [9, 18]" in str(error)
        new.policy.encoder = copy.deepcopy(old.policy.encoder).double()
        assert "old torch.float32 [8, 18], new torch.float64 [8, 18]" in str(difference(old, new))

    def test_value_of_a_weight(self):
        old, new = twins()
        with torch.no_grad():
            old.policy.actor.weight[2, 3], new.policy.actor.weight[2, 3] = 1.0, 1.25
            new.policy.actor.weight[1, 1] += 0.125
        error = difference(old, new)
        assert (error.stage, error.key, error.index) == ("weights", "policy.actor.weight", (2, 3))
        assert "largest difference 0.25 at index [2, 3]: old 1, new 1.25; 2 of 56 entries differ" in str(error)

    def test_weights_are_compared_exactly(self):
        old, new = twins()
        with torch.no_grad():
            new.policy.actor.bias[0] += 1e-6
        assert difference(old, new, atol=1.0).key == "policy.actor.bias"

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_value_that_is_not_finite_is_the_largest_difference(self, bad):
        old, new = twins()
        with torch.no_grad():
            new.policy.actor.bias[0] += 100
            new.policy.actor.bias[4] = bad
        error = difference(old, new)
        assert error.index == (4,)
        assert f"new {bad}" in str(error)

    def test_tolerance(self):
        old, new = twins(changed(entry("values", lambda x: x + 1e-3), "inference"))
        compare_agents(old, new, training_td(), atol=2e-3)
        assert "rtol 0, atol 0.0005" in str(difference(old, new, rtol=0, atol=5e-4))

    def test_clip_range(self):
        old, new = twins()
        new.clip_range = 0.1
        error = difference(old, new)
        assert error.stage == "clipping"
        assert "clip_range: old 0, new 0.1" in str(error)

    def test_an_exception_in_the_old_agent_is_its_own(self):
        with pytest.raises(ZeroDivisionError) as caught:
            compare_agents(*twins(old_cls=methods(forward=raise_error)), training_td())
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
            ({"action": [[0, 0]]}, TypeError, r"action: got a list .* integer tensor \[3, 5, 2\] or \[15, 2\]"),
            ({"action": torch.zeros(15, 2)}, TypeError, "action: got a float32 tensor"),
            ({"action": torch.zeros(3, 2, dtype=torch.int64)}, ValueError, r"action: got shape \[3, 2\]"),
            ({"rtol": -1}, ValueError, "rtol: got -1, expected a number >= 0"),
            ({"atol": float("nan")}, ValueError, "atol: got nan, expected a number >= 0"),
        ],
    )
    def test_wrong_arguments(self, changes, error, message):
        old, new = twins()
        arguments = {"old": old, "new": new, "td": training_td()} | changes
        with pytest.raises(error, match=message):
            compare_agents(**arguments)

    def test_a_change_in_fast_is_found(self):
        old, new = build(Fast), build(Fast)
        compare_agents(old, new, inference_td())
        new.policy.value_head.bias.data += 0.5
        assert difference(old, new, td=inference_td()).key == "policy.value_head.bias"


class TestMigration:
    @staticmethod
    def agents(cls=migration.NewAgent):
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
    def test_a_plain_agent_and_its_migration_are_the_same(self, backend, rename):
        with use_backend(backend):
            old, new, td = self.agents()
            compare_agents(old, new, td, rename=rename)
            compare_agents(old, new, td[:, 0], rename=rename)

    def test_moved_parameters_are_named_where_they_are_now(self):
        old, new, td = self.agents()
        error = difference(old, new, td)
        assert (error.stage, error.key) == ("weights", "actor.bias")
        with torch.no_grad():
            new.policy.critic.weight[0, 3] += 1
        error = difference(old, new, td, rename=MOVED)
        assert (error.stage, error.key, error.index) == ("weights", "policy.critic.weight", (0, 3))

    def test_gradients_are_compared_under_the_new_names(self):
        class Stops(migration.NewAgent):
            def handle_training_mode(self, td, action, logits_list, value):
                return super().handle_training_mode(td, action, logits_list, value.detach())

        error = difference(*self.agents(Stops), rename=MOVED)
        assert (error.stage, error.key) == ("gradients", "policy.encoder.weight")

    @pytest.mark.parametrize("backend", [NATIVE])
    def test_a_difference_on_the_current_backend_alone_is_found(self, backend):
        class OnlyEager(migration.NewAgent):
            def handle_inference_mode(self, td, logits_list, value):
                off = 0 if current_backend("cpu") == "eager" else 1
                return super().handle_inference_mode(td, logits_list, value + off)

        with use_backend(backend):
            error = difference(*self.agents(OnlyEager), rename=MOVED)
        assert (error.stage, error.key) == ("inference step 1", "values")
