import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from metta_fastagent import _native, use_backend
from metta_fastagent.agents.fast import Fast
from metta_fastagent.host import MettaAgent
from metta_fastagent.mixin import PyTorchAgentMixin
from metta_fastagent.recurrent import LSTMWrapper
from metta_fastagent.testing import AgentCheckError, AgentsDifferError, check_agent, compare_agents

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

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
        report = check_agent(build(WrongFormula), make_env())
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
        agent = build(RaisesInForward)
        state = torch.get_rng_state()
        assert not check_agent(agent, make_env(), updates=1).ok
        assert torch.equal(torch.get_rng_state(), state)

    def test_seed_decides_everything(self):
        agent, env = build(NanLoss), make_env()
        assert str(check_agent(agent, env, seed=3)) == str(check_agent(agent, env, seed=3))

    def test_draws_depend_on_the_seed_only(self):
        def drawn(seed):
            actions = []

            class Looks(TinyAgent):
                def forward(self, td, state=None, action=None):
                    out = super().forward(td, state, action)
                    actions.extend((out["actions"] if action is None else action).flatten().tolist())
                    return out

            agent = build(Looks)
            torch.manual_seed(torch.seed())
            assert check_agent(agent, make_env(), updates=2, seed=seed).ok
            return actions

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
        tokens = []

        class Looks(TinyAgent):
            def forward(self, td, state=None, action=None):
                tokens.append(td["env_obs"].reshape(-1, 3).long())
                return super().forward(td, state, action)

        assert check_agent(build(Looks), make_env(obs_width=5, obs_height=4), updates=20).ok
        coordinate, feature, value = torch.cat(tokens).unbind(-1)
        real = coordinate != 255
        assert 0 < int((~real).sum()) < int(real.sum())
        assert (feature[~real] == 255).all()
        assert set((coordinate[real] >> 4).tolist()) == set(range(5))
        assert set((coordinate[real] & 15).tolist()) == set(range(4))
        assert set(feature[real].tolist()) == {0, 3, 7}
        assert set(value[real & (feature == 0)].tolist()) == {0, 1}
        assert value[real & (feature == 3)].max() == 10

    def test_a_host_is_checked_through_its_policy(self):
        host = MettaAgent(make_env(), build(WrongFormula))
        report = check_agent(host, make_env(), updates=1)
        assert report.agent_name == "WrongFormula"
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

    @pytest.mark.parametrize("name", ["updates", "seed"])
    @pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
    def test_wrong_numbers(self, name, value, error):
        with pytest.raises(error, match=f"{name}: got {value!r}.* expected an integer"):
            check_agent(build(), make_env(), **{name: value})

    def test_no_updates(self):
        with pytest.raises(ValueError, match="updates: got 0"):
            check_agent(build(), make_env(), updates=0)


class ForgetsInit(TinyAgent):
    def init_mixin(self, **kwargs):
        pass


class DropsInterval(TinyAgent):
    def extract_mixin_params(self, kwargs):
        return super().extract_mixin_params(kwargs) | {"analyze_weights_interval": 300}


class TestConfiguration:
    @staticmethod
    def check(agent):
        return check_agent(agent, make_env(), updates=1)["configuration"]

    def test_init_mixin_not_called(self):
        result = self.check(build(ForgetsInit))
        assert not result.passed
        assert "clip_range" in result.message
        assert "call self.init_mixin(**mixin_params)" in result.message

    def test_one_argument_lost_in_extract_mixin_params(self):
        result = self.check(build(DropsInterval))
        assert not result.passed
        assert result.message.startswith("analyze_weights_interval is 300 after extract_mixin_params and init_mixin with")
        assert "clip_range" not in result.message

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("clip_range", "0.1", "clip_range: got '0.1' (str), expected a number >= 0"),
            ("clip_range", -1.0, "clip_range: got -1.0, expected a number >= 0"),
            ("clip_range", float("nan"), "clip_range: got nan, expected a number >= 0"),
            ("analyze_weights_interval", 2.5, "analyze_weights_interval: got 2.5 (float), expected an integer >= 0"),
        ],
    )
    def test_wrong_type(self, name, value, expected):
        agent = build()
        setattr(agent, name, value)
        result = self.check(agent)
        assert not result.passed
        assert expected in result.message

    def test_no_mixin(self):
        agent = nn.Linear(2, 2)
        result = self.check(agent)
        assert not result.passed
        assert "class Linear(PyTorchAgentMixin, LSTMWrapper)" in result.message


class ClipsNothing(TinyAgent):
    def clip_weights(self):
        pass


class ClipsWeightsOnly(TinyAgent):
    def clip_weights(self):
        if self.clip_range > 0:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    module.weight.data.clamp_(-self.clip_range, self.clip_range)


class ClipsEverything(TinyAgent):
    def clip_weights(self):
        if self.clip_range > 0:
            for parameter in self.parameters():
                parameter.data.clamp_(-self.clip_range, self.clip_range)


class ClipsAtZero(TinyAgent):
    def clip_weights(self):
        if self.clip_range == 0:
            self.policy.actor.weight.data.clamp_(-0.01, 0.01)
        super().clip_weights()


class ClipsTooFar(TinyAgent):
    def clip_weights(self):
        super().clip_weights()
        self.policy.actor.weight.data.mul_(0.5 if self.clip_range > 0 else 1)


class ReplacesParameters(TinyAgent):
    def clip_weights(self):
        super().clip_weights()
        self.policy.actor.weight = nn.Parameter(self.policy.actor.weight.detach().clone())


class MoreLayers(TinyAgent):
    def __init__(self, env, **kwargs):
        super().__init__(env, **kwargs)
        self.extra = nn.ModuleDict(
            {
                "conv1": nn.Conv1d(2, 3, 2),
                "conv2": nn.Conv2d(2, 3, 2, bias=False),
                "transposed": nn.ConvTranspose2d(2, 3, 2),
                "norm": nn.BatchNorm1d(4),
                "embedding": nn.Embedding(7, HIDDEN),
            }
        )
        self.extra["embedding"].weight = self.policy.actor.weight
        nn.utils.parametrizations.weight_norm(self.policy.encoder)
        self.init_mixin()


class TestClipping:
    @staticmethod
    def check(agent):
        return check_agent(agent, make_env(), updates=1)["weight clipping"]

    @pytest.mark.parametrize(
        ("cls", "culprit", "problem"),
        [
            (ClipsNothing, "'policy.encoder.weight'", "with clip_range 0.375, expected the values of the mixin's"),
            (ClipsWeightsOnly, "'policy.actor.bias'", "up to 0.375"),
            (ClipsEverything, "'lstm.weight_ih_l0'", "reaches 0.375 after clip_weights()"),
            (ClipsAtZero, "'policy.actor.weight'", "with clip_range 0,"),
            (ClipsTooFar, "'policy.actor.weight'", "reaches 0.1875 after"),
            (ReplacesParameters, "'policy.actor.weight'", "was replaced"),
        ],
    )
    def test_wrong_clip_weights(self, cls, culprit, problem):
        result = self.check(build(cls))
        assert not result.passed
        assert any(culprit in line and problem in line for line in result.message.splitlines()), result.message

    def test_only_the_culprit_is_named(self):
        message = self.check(build(ClipsWeightsOnly)).message
        assert "bias" in message
        assert "weight'" not in message
        assert "lstm" not in message

    def test_other_layers_tied_and_parametrized_weights(self):
        result = self.check(build(MoreLayers))
        assert result.passed, result.message

    def test_the_other_clip_mode(self):
        result = self.check(build(clip_mode="init_scaled"))
        assert result.passed, result.message


class ForgetsFields(TinyAgent):
    def set_tensordict_fields(self, td, observations):
        return observations.shape[0], observations.shape[1] if observations.dim() == 4 else 1


class Changed(TinyAgent):
    """Puts something else into its results: `change(agent, result)`, in one of the two modes or both."""

    modes = ("inference", "training")

    def change(self, out):
        raise NotImplementedError

    def forward(self, td, state=None, action=None):
        out = super().forward(td, state, action)
        mode = "inference" if action is None else "training"
        return self.change(out) if mode in self.modes else out


def changed(change, *modes):
    """Class of a TinyAgent whose result `change` alters."""
    return type("Wrong", (Changed,), {"change": staticmethod(change), "modes": modes or Changed.modes})


def entry(key, function):
    def change(out):
        out[key] = function(out[key])
        return out

    return change


def without(key):
    return lambda out: out.exclude(key, inplace=True)


class RaisesInForward(TinyAgent):
    def forward(self, td, state=None, action=None):
        raise ZeroDivisionError("no such luck")


class OtherTensorDict(TinyAgent):
    def forward(self, td, state=None, action=None):
        return super().forward(td.clone(), state, action)


class TestFields:
    @staticmethod
    def check(cls):
        return check_agent(build(cls), make_env(), updates=1)["TensorDict fields"]

    def test_fields_forgotten(self):
        result = self.check(ForgetsFields)
        assert not result.passed
        for mode in ("inference", "training"):
            for key in ("bptt", "batch"):
                assert f"{mode}: td['{key}'] is missing" in result.message
        assert "call self.set_tensordict_fields(td," in result.message

    @pytest.mark.parametrize("mode", ["inference", "training"])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (entry("bptt", lambda x: x + 1), "td['bptt'] holds"),
            (entry("batch", lambda x: x * 0), "td['batch'] holds [0], expected"),
            (entry("batch", lambda x: x.int()), "td['batch'] is torch.int32"),
            (entry("full_log_probs", lambda x: x + 0.1), "do not sum to 1, 1.105"),
            (entry("full_log_probs", lambda x: x[..., :-1]), "td['full_log_probs'] is torch.float32"),
            (entry("act_log_prob", lambda x: x - 0.5), "expected full_log_probs at the action's"),
            (entry("act_log_prob", lambda x: x * float("nan")), "td['act_log_prob'] holds NaN"),
            (without("act_log_prob"), "td['act_log_prob'] is missing, expected floating point"),
            (lambda out: (out, None), "forward() returned tuple, expected a TensorDict"),
        ],
    )
    def test_wrong_in_either_mode(self, change, message, mode):
        result = self.check(changed(change, mode))
        assert not result.passed
        assert all(line.startswith(mode) for line in result.message.splitlines()), result.message
        assert message in result.message

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (entry("actions", lambda x: x.long()), "td['actions'] is torch.int64 [6, 2], expected torch.int32 [6, 2]"),
            (entry("actions", lambda x: x + 2), "td['actions'] holds a pair that ActionSpace(noop: 0..0"),
            (entry("actions", lambda x: x - 9), "td['actions'] holds a pair that ActionSpace(noop: 0..0"),
            (entry("values", lambda x: x[:, None]), "td['values'] is torch.float32 [6, 1], expected"),
            (without("values"), "td['values'] is missing"),
        ],
    )
    def test_wrong_in_inference(self, change, message):
        result = self.check(changed(change, "inference"))
        assert not result.passed
        assert message in result.message

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (entry("entropy", lambda x: -x), "td['entropy'][0, 0] is -"),
            (without("entropy"), "td['entropy'] is missing"),
            (entry("value", lambda x: x.expand(3, 5, 2)), "td['value'] is torch.float32 [3, 5, 2], expected"),
            (lambda out: out.reshape(-1), "batch size [15], expected [3, 5]"),
        ],
    )
    def test_wrong_in_training(self, change, message):
        result = self.check(changed(change, "training"))
        assert not result.passed
        assert message in result.message

    def test_swapped_sizes(self):
        def swap(out):
            out["bptt"], out["batch"] = out["batch"].clone(), out["bptt"].clone()
            return out

        message = self.check(changed(swap, "training")).message
        assert "td['bptt'] holds [3], expected 5 everywhere" in message
        assert "td['batch'] holds [5], expected 3 everywhere" in message

    def test_a_value_of_two_dimensions_is_taken(self):
        result = self.check(changed(entry("value", lambda x: x.squeeze(-1)), "training"))
        assert result.passed, result.message

    def test_masked_logits_are_taken(self):
        class Masks(TinyAgent):
            def handle_inference_mode(self, td, logits_list, value):
                return super().handle_inference_mode(td, self.masked(logits_list), value)

            def handle_training_mode(self, td, action, logits_list, value):
                return super().handle_training_mode(td, action, self.masked(logits_list), value)

            @staticmethod
            def masked(logits):
                return logits.index_fill(-1, torch.tensor([2]), float("-inf"))

        result = self.check(Masks)
        assert result.passed, result.message

    def test_an_exception_is_a_failure_in_both_modes(self):
        report = check_agent(build(RaisesInForward), make_env(), updates=1)
        failed = {check.name: check.message for check in report.failures}
        assert failed.keys() == {"TensorDict fields", "recurrent replay", "training stability"}
        for label in ("inference", "training"):
            assert (
                f"{label}: the agent raised ZeroDivisionError: no such luck (in forward," in failed["TensorDict fields"]
            )

    def test_another_tensordict_is_a_warning(self):
        result = self.check(OtherTensorDict)
        assert result.passed
        assert "another TensorDict" in result.warnings[0]


class WrongFormula(TinyAgent):
    def _convert_action_to_logit_index(self, flattened_action):
        kind, param = flattened_action.long().unbind(-1)
        return self.cum_action_max_params[kind] + param


class OffByOne(TinyAgent):
    def _convert_action_to_logit_index(self, flattened_action):
        return (super()._convert_action_to_logit_index(flattened_action) + 1) % 7


class WrongShape(TinyAgent):
    def _convert_action_to_logit_index(self, flattened_action):
        return super()._convert_action_to_logit_index(flattened_action)[:, None]


class NeedsInt64(TinyAgent):
    def _convert_action_to_logit_index(self, flattened_action):
        if flattened_action.dtype != torch.int64:
            raise TypeError("int64 only")
        return super()._convert_action_to_logit_index(flattened_action)


class SwapsPairs(TinyAgent):
    def _convert_logit_index_to_action(self, action_logit_index):
        return super()._convert_logit_index_to_action(action_logit_index).flip(-1)


class FlattensPairs(TinyAgent):
    def _convert_logit_index_to_action(self, action_logit_index):
        return super()._convert_logit_index_to_action(action_logit_index).flatten()


class TestConversion:
    @staticmethod
    def check(agent, env=None):
        return check_agent(agent, env or make_env(), updates=1)["action conversion"]

    def test_the_formula_without_the_type_is_named(self):
        result = self.check(build(WrongFormula))
        assert not result.passed
        assert "[1, 0] became 0, expected 1" in result.message
        assert "action_type is left out" in result.message
        assert "action_type + cum_action_max_params[action_type] + action_param" in result.message

    def test_another_wrong_formula(self):
        result = self.check(build(OffByOne))
        assert not result.passed
        assert "[0, 0] became 1, expected 0" in result.message
        assert "left out" not in result.message
        assert "the formula is action_type + cum_action_max_params[action_type] + action_param" in result.message

    def test_wrong_shape(self):
        assert "gave shape [7, 1], expected [7]" in self.check(build(WrongShape)).message

    def test_every_integer_dtype_is_tried(self):
        result = self.check(build(NeedsInt64))
        assert not result.passed
        assert "TypeError: int64 only" in result.message

    def test_swapped_pairs(self):
        result = self.check(build(SwapsPairs))
        assert not result.passed
        assert "_convert_logit_index_to_action: 1 became [0, 1], expected [1, 0]" in result.message
        assert "self.action_index_tensor[index]" in result.message

    def test_pairs_of_a_wrong_shape(self):
        assert "gave shape [14], expected [7, 2]" in self.check(build(FlattensPairs)).message

    def test_tables_of_another_environment(self):
        agent = build()
        result = self.check(agent, make_env(max_action_args=[0, 2, 2]))
        assert not result.passed
        assert "cum_action_max_params is [0, 0, 3, 4]" in result.message
        assert "needs [0, 0, 2, 4]" in result.message
        assert "initialize_to_environment" in result.message

    def test_a_wrong_table(self):
        agent = build()
        agent.action_index_tensor = agent.action_index_tensor.flip(0)
        result = self.check(agent)
        assert not result.passed
        assert result.message.startswith("action_index_tensor is [[2, 1]")


class NanLoss(TinyAgent):
    def forward(self, td, state=None, action=None):
        out = super().forward(td, state, action)
        if action is not None:
            out["value"] = out["value"] + torch.log(-out["value"].abs() - 1)
        return out


class NanGradient(TinyAgent):
    def forward(self, td, state=None, action=None):
        out = super().forward(td, state, action)
        if action is not None:
            # Finite value, but the square root's slope at 0 is infinite, and 0 x infinity is NaN.
            out["value"] = out["value"] + torch.sqrt(self.policy.value_head.bias * 0)
        return out


class NanWeights(TinyAgent):
    def clip_weights(self):
        super().clip_weights()
        if self.training and self.clip_range == 0:
            self.policy.value_head.weight.data[0, 2] = float("nan")


class BlowsUp(TinyAgent):
    def clip_weights(self):
        self.policy.actor.weight.data.mul_(1e12)


class Unused(TinyAgent):
    def __init__(self, env, **kwargs):
        super().__init__(env, **kwargs)
        self.spare = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


class Detached(TinyAgent):
    def forward(self, td, state=None, action=None):
        return super().forward(td, state, action).detach()


class TestStability:
    @staticmethod
    def check(cls, updates=4):
        return check_agent(build(cls), make_env(), updates=updates)["training stability"]

    def test_loss(self):
        result = self.check(NanLoss)
        assert not result.passed
        assert result.message.startswith("update 1: the loss holds NaN or infinities (1 of 1 values)")

    def test_gradient(self):
        result = self.check(NanGradient)
        assert not result.passed
        assert result.message.startswith("update 1: the gradient of 'policy.value_head.bias' holds NaN")

    def test_weights(self):
        result = self.check(NanWeights)
        assert not result.passed
        assert "update 1: after the optimizer step 'policy.value_head.weight' holds NaN" in result.message
        assert "(1 of 8 values)" in result.message

    def test_later_updates_are_looked_at(self):
        assert self.check(BlowsUp, updates=1).passed
        result = self.check(BlowsUp, updates=8)
        assert not result.passed
        assert int(result.message.removeprefix("update ").partition(":")[0]) > 1

    def test_unused_parameters_are_warnings(self):
        result = self.check(Unused)
        assert result.passed
        assert [warning.partition(" ")[0] for warning in result.warnings] == ["'spare.bias'", "'spare.weight'"]

    def test_no_graph(self):
        result = self.check(Detached)
        assert not result.passed
        assert "does not require grad" in result.message

    def test_missing_output(self):
        result = self.check(changed(without("value"), "training"))
        assert not result.passed
        assert "value" in result.message

    def test_nothing_to_train(self):
        report = check_agent(build().requires_grad_(False), make_env())
        assert "no trainable parameter" in report["training stability"].message

    def test_the_number_of_updates_is_taken(self):
        assert "7 updates" in self.check(TinyAgent, updates=7).message


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
        old, new = (MettaAgent(env, build(cls)) for cls in (TinyAgent, WrongFormula))
        compare_agents(old, copy.deepcopy(old), training_td())
        error = difference(old, new)
        assert (error.stage, error.key) == ("training", "act_log_prob")

    def test_an_agent_is_equal_to_its_copy(self):
        agent = build()
        compare_agents(agent, copy.deepcopy(agent), inference_td())

    @pytest.mark.parametrize("shape", [(3, 5, 2), (15, 2)])
    def test_actions_may_be_given(self, shape):
        seen = []

        class Looks(TinyAgent):
            def forward(self, td, state=None, action=None):
                seen.append(action)
                return super().forward(td, state, action)

        old, new = twins(Looks)
        action = old.action_index_tensor[torch.arange(15) % 7].reshape(shape).long()
        compare_agents(old, new, training_td(), action)
        given = [one for one in seen if one is not None]
        assert given
        assert all(torch.equal(one, action) for one in given)

    def test_made_up_actions_are_legal_and_varied(self):
        seen = []

        class Looks(TinyAgent):
            def forward(self, td, state=None, action=None):
                seen.append(action)
                return super().forward(td, state, action)

        old, new = twins(Looks)
        compare_agents(old, new, training_td(rows=20))
        legal = {tuple(pair) for pair in old.action_index_tensor.tolist()}
        assert {tuple(pair) for pair in seen[-1].flatten(0, 1).tolist()} == legal

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

    def test_nothing_changes_when_they_differ(self):
        old, new = twins(changed(entry("values", lambda x: x + 1), "inference"))
        before = [snapshot(old), snapshot(new)]
        difference(old, new)
        torch.testing.assert_close([snapshot(old), snapshot(new)], before, rtol=0, atol=0)

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


class TestDifferences:
    def test_key_missing(self):
        old, new = twins(old_cls=Unused)
        error = difference(old, new)
        assert (error.stage, error.key) == ("weights", "frozen.bias")
        assert "'frozen.bias' is in the old agent's state dict only" in str(error)

    def test_key_added(self):
        error = difference(*twins(Unused))
        assert "'frozen.bias' is in the new agent's state dict only" in str(error)

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

    def test_inference_output(self):
        old, new = twins(changed(entry("values", lambda x: x + torch.tensor([0.0, 0.0, 0.5])), "inference"))
        error = difference(old, new)
        assert (error.stage, error.key, error.index) == ("inference step 1", "values", (2,))
        assert "largest difference 0.5" in str(error)

    def test_inference_field_missing(self):
        error = difference(*twins(changed(without("bptt"), "inference")))
        assert (error.stage, error.key) == ("inference step 1", "bptt")
        assert "old torch.int64 [3], new none" in str(error)

    def test_inference_dtype(self):
        error = difference(*twins(changed(entry("actions", lambda x: x.long()), "inference")))
        assert (error.stage, error.key) == ("inference step 1", "actions")
        assert "old torch.int32 [3, 2], new torch.int64 [3, 2]" in str(error)

    def test_logits_are_named_before_what_follows_from_them(self):
        class OtherLogits(TinyAgent):
            def handle_inference_mode(self, td, logits_list, value):
                return super().handle_inference_mode(td, logits_list * 3, value)

        assert difference(*twins(OtherLogits)).key == "full_log_probs"

    def test_memory_that_is_not_stored(self):
        class Forgets(TinyAgent):
            def _store_lstm_state(self, lstm_h, lstm_c, env_id):
                pass

        error = difference(*twins(Forgets), td=inference_td())
        assert error.stage == "inference step 2"

    def test_one_random_number_more(self):
        class DrawsMore(TinyAgent):
            def handle_inference_mode(self, td, logits_list, value):
                torch.rand(1)
                return super().handle_inference_mode(td, logits_list, value)

        error = difference(*twins(DrawsMore), td=inference_td(rows=64))
        assert (error.stage, error.key) == ("inference step 1", "act_log_prob")

    def test_training_output(self):
        error = difference(*twins(changed(entry("entropy", lambda x: x * 2), "training")))
        assert (error.stage, error.key) == ("training", "entropy")
        assert len(error.index) == 2

    def test_tolerance(self):
        old, new = twins(changed(entry("values", lambda x: x + 1e-3), "inference"))
        compare_agents(old, new, training_td(), atol=2e-3)
        assert "rtol 0, atol 0.0005" in str(difference(old, new, rtol=0, atol=5e-4))

    def test_a_gap_within_the_tolerance_is_not_the_largest_difference(self):
        old_values, new_values = torch.tensor([1000.0, 0.0, 0.0]), torch.tensor([1000.005, 0.0, 0.001])
        old = changed(entry("values", lambda x: old_values), "inference")
        new = changed(entry("values", lambda x: new_values), "inference")
        error = difference(*twins(new, old_cls=old))
        assert error.index == (2,)
        assert "1 of 3 entries differ" in str(error)

    def test_integers_know_no_tolerance(self):
        error = difference(*twins(changed(entry("batch", lambda x: x + 1), "training")), rtol=1.0, atol=9.0)
        assert (error.stage, error.key) == ("training", "batch")

    def test_gradient_missing(self):
        class Stops(TinyPolicy):
            def encode_observations(self, observations):
                return super().encode_observations(observations).detach()

        old, new = twins()
        new.policy.__class__ = Stops
        error = difference(old, new)
        assert (error.stage, error.key) == ("gradients", "policy.encoder.weight")
        assert "old torch.float32 [8, 18], new none" in str(error)

    def test_gradient_scaled(self):
        class Scales(TinyPolicy):
            def decode_actions(self, hidden, rows):
                logits, value = super().decode_actions(hidden, rows)
                # The same value with half the gradient.
                return logits, value / 2 + value.detach() / 2

        old, new = twins()
        new.policy.__class__ = Scales
        error = difference(old, new)
        assert error.stage == "gradients"
        assert "largest difference" in str(error)

    @pytest.mark.parametrize("kwargs", [{}, {"clip_range": 0.1}])
    def test_clipping(self, kwargs):
        error = difference(*twins(ClipsNothing, **kwargs))
        assert error.stage == "clipping"
        assert error.key == "policy.encoder.weight"

    def test_biases_that_are_not_clipped(self):
        old, new = twins(ClipsWeightsOnly)
        with torch.no_grad():
            old.policy.value_head.bias.fill_(3.0), new.policy.value_head.bias.fill_(3.0)
        error = difference(old, new)
        assert (error.stage, error.key) == ("clipping", "policy.value_head.bias")
        assert "old 1.5, new 3" in str(error)

    def test_clip_range(self):
        old, new = twins()
        new.clip_range = 0.1
        error = difference(old, new)
        assert error.stage == "clipping"
        assert "clip_range: old 0, new 0.1" in str(error)

    def test_no_clip_weights(self):
        old, new = twins()
        new.clip_weights = None
        assert "the new agent has no clip_weights()" in str(difference(old, new))

    def test_an_exception_in_the_new_agent(self):
        error = difference(*twins(RaisesInForward))
        assert error.stage == "inference step 1"
        assert "the new agent raised ZeroDivisionError: no such luck" in str(error)
        assert isinstance(error.__cause__, ZeroDivisionError)

    def test_an_exception_in_the_old_agent_is_its_own(self):
        with pytest.raises(ZeroDivisionError) as caught:
            compare_agents(*twins(old_cls=RaisesInForward), training_td())
        assert "raised by the old agent in inference step 1" in caught.value.__notes__[0]

    def test_no_tensordict(self):
        assert "the new agent returned tuple" in str(difference(*twins(changed(lambda out: (out, None)))))

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"old": None}, TypeError, "old: got NoneType, expected a torch.nn.Module"),
            ({"new": "agent"}, TypeError, "new: got str, expected a torch.nn.Module"),
            ({"td": {}}, TypeError, "td: got dict, expected a TensorDict"),
            ({"td": TensorDict({}, batch_size=[3])}, ValueError, r"td\['env_obs'\]: got None"),
            ({"td": TensorDict({"env_obs": torch.zeros(3)}, batch_size=[])}, ValueError, r"td: got batch size \[\]"),
            ({"rename": "actor"}, TypeError, "rename: got 'actor' \\(str\\), expected a dict of prefixes or a function"),
            ({"rename": {"actr": "actor"}}, ValueError, r"rename: got \['actr'\], expected prefixes of the old"),
            ({"rename": lambda key: "same"}, ValueError, "expected a different new name for each key"),
            ({"action": [[0, 0]]}, TypeError, r"action: got a list of length 1, expected an integer tensor \[3, 5, 2\] or \[15, 2\]"),
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


class TestFast:
    @pytest.mark.parametrize("kwargs", [{}, {"clip_range": 0.1}, {"clip_range": 1.0, "clip_mode": "init_scaled"}])
    def test_passes_all_checks(self, kwargs):
        report = check_agent(build(Fast, **kwargs), make_env(), updates=3)
        assert report.ok, str(report)

    def test_a_change_in_fast_is_found(self):
        old, new = build(Fast), build(Fast)
        compare_agents(old, new, inference_td())
        new.policy.value_head.bias.data += 0.5
        assert difference(old, new, td=inference_td()).key == "policy.value_head.bias"
