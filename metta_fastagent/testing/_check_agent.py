"""`check_agent`: the guide's five checks on an agent of the user's own."""

import copy
import inspect
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from metta_fastagent.action_space import ActionSpace
from metta_fastagent.ops._checks import is_number, is_whole, require_integer
from metta_fastagent.testing._shared import (
    LOSS_KEYS,
    clipped_parameters,
    describe_error,
    device_of,
    random_actions,
    seeded,
)

# Rows of the synthetic batches; all different, so that a mix-up of two of them shows.
INFERENCE_ROWS = 5
TRAINING_ROWS, TRAINING_STEPS = 3, 4
# Values that no agent has by default, so that seeing them again means that they were passed on.
PROBE_CLIP_RANGE, PROBE_INTERVAL = 0.375, 17
LEARNING_RATE = 1e-3
# Absolute error of a log-probability: a few roundings of a number of about 10.
LOG_PROB_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Assumed of an environment that does not define them.
DEFAULT_TOKENS, DEFAULT_FEATURES, DEFAULT_WIDTH = 64, 25, 11
SET_FIELDS = 'call self.set_tensordict_fields(td, td["env_obs"]) at the start of forward()'
USE_INFERENCE = "end forward() with self.handle_inference_mode(td, logits, value) if action is None"
USE_TRAINING = "end forward() with self.handle_training_mode(td, action, logits, value) if action is given"
USE_FORMULA = "action_type + cum_action_max_params[action_type] + action_param"
SET_TABLES = "call activate_actions or MettaAgent.initialize_to_environment with the environment's actions"


class AgentCheckError(AssertionError):
    """At least one check of `check_agent` failed; the message is the report."""


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check: its name, whether it passed, what was found (and how to mend it), and warnings."""

    name: str
    passed: bool
    message: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class AgentReport:
    """Outcome of `check_agent`; `str(report)` is a table, `report[name]` one result."""

    agent_name: str
    checks: tuple[CheckResult, ...]

    @property
    def ok(self) -> bool:
        """Whether all checks passed."""
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def raise_if_failed(self) -> None:
        """Raise AgentCheckError with the report as its message unless all checks passed."""
        if not self.ok:
            raise AgentCheckError(str(self))

    def __getitem__(self, name: str) -> CheckResult:
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"name: got {name!r}, expected one of {', '.join(check.name for check in self.checks)}")

    def __str__(self) -> str:
        passed = len(self.checks) - len(self.failures)
        lines = [f"{self.agent_name}: {passed} of {len(self.checks)} checks passed"]
        width = max((len(check.name) for check in self.checks), default=0)
        for check in self.checks:
            lines += _table_rows("ok" if check.passed else "FAIL", check.name.ljust(width), check.message)
            for warning in check.warnings:
                lines += _table_rows("warn", " " * width, warning)
        return "\n".join(lines)


def _table_rows(mark: str, name: str, message: str) -> list[str]:
    head = f"  {mark:<4}  {name}  "
    wrapped = [line for part in message.splitlines() for line in textwrap.wrap(part, max(40, 118 - len(head)))]
    return [(head if i == 0 else " " * len(head)) + line for i, line in enumerate(wrapped or [""])]


@dataclass
class _Findings:
    """Results of a check: problems make it fail, warnings do not; `summary` is its message if it passes."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    summary: str = ""

    def expect(self, condition: bool, problem: str) -> bool:
        if not condition:
            self.problems.append(problem)
        return condition


class _Observations:
    """Source of observation tokens uint8 [..., M, 3] for an environment, drawn from a generator of its own."""

    def __init__(self, env: object, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._normalizations: dict[int, float] = getattr(env, "feature_normalizations", None) or {}
        self._num_tokens = int(getattr(env, "num_tokens", DEFAULT_TOKENS))
        self._width = int(getattr(env, "obs_width", DEFAULT_WIDTH))
        self._height = int(getattr(env, "obs_height", DEFAULT_WIDTH))
        self._real = None
        if not self._normalizations:
            self._normalizations = dict.fromkeys(range(DEFAULT_FEATURES), 1.0)
            self._real = _first_observations(env)

    def _integers(self, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(high, shape, generator=self._generator)

    def sample(self, *rows: int) -> Tensor:
        """Tokens uint8 [*rows, M, 3] on the CPU."""
        if self._real is not None:
            return self._real[self._integers(self._real.shape[0], rows)]
        shape = (*rows, self._num_tokens)
        features = torch.tensor(sorted(self._normalizations))
        largest = torch.tensor([float(self._normalizations[int(i)]) for i in features]).clamp(1, 254)
        which = self._integers(len(features), shape)
        coordinate = self._integers(self._width, shape) << 4 | self._integers(self._height, shape)
        value = torch.rand(shape, generator=self._generator) * (largest[which] + 1)
        tokens = torch.stack([coordinate, features[which], value.long()], dim=-1).to(torch.uint8)
        # About a fifth of the tokens stay empty, as in a real observation.
        return tokens.masked_fill((self._integers(5, shape) == 0)[..., None], 255)


def _first_observations(env: object) -> Tensor | None:
    """Observations of env.reset() as [N, M, 3], or None without a reset."""
    reset = getattr(env, "reset", None)
    if not callable(reset):
        return None
    result = reset()
    observations = torch.as_tensor(result[0] if isinstance(result, tuple) else result).cpu()
    if observations.dim() != 3 or observations.shape[-1] != 3 or observations.shape[0] < 1:
        raise ValueError(f"env: reset() gave observations {list(observations.shape)}, expected tokens [N, M, 3]")
    return observations.to(torch.uint8)


@dataclass
class _Subject:
    """The agent under test with what all checks need: its environment, actions, and a source of observations."""

    agent: nn.Module
    env: Any
    space: ActionSpace
    observations: _Observations
    updates: int
    seed: int

    @property
    def name(self) -> str:
        return type(self.agent).__name__

    def fresh_copy(self) -> Any:
        """A copy of the agent with empty memory and its action tables set; the environment is shared, not copied."""
        memo = {} if self.env is None else {id(self.env): self.env}
        agent: Any = copy.deepcopy(self.agent, memo)
        if callable(getattr(agent, "reset_memory", None)):
            agent.reset_memory()
        if (getattr(agent, "num_envs", None) or INFERENCE_ROWS) < INFERENCE_ROWS:
            agent.allocate_memory(INFERENCE_ROWS)
        if not _has_tables(agent):
            _activate(agent, self.space)
        return agent

    def inference_input(self) -> TensorDict:
        return _as_input(self.observations.sample(INFERENCE_ROWS), device_of(self.agent))

    def training_input(self) -> tuple[TensorDict, Tensor]:
        """A segment batch [B, T] and legal actions int64 [B, T, 2] for it."""
        td = _as_input(self.observations.sample(TRAINING_ROWS, TRAINING_STEPS), device_of(self.agent))
        return td, random_actions(self.space.action_index_tensor, td.batch_size).to(device_of(self.agent))


def _as_input(observations: Tensor, device: torch.device) -> TensorDict:
    """The agent's input for tokens [..., M, 3]: no episode starts anywhere."""
    rows = observations.shape[:-2]
    entries = {"env_obs": observations, "dones": torch.zeros(rows, dtype=torch.bool)}
    return TensorDict(entries | {"truncateds": entries["dones"].clone()}, batch_size=rows).to(device)


def _has_tables(agent: object) -> bool:
    return all(getattr(agent, name, None) is not None for name in ("cum_action_max_params", "action_index_tensor"))


def _activate(agent: Any, space: ActionSpace) -> None:
    device = device_of(agent)
    if callable(getattr(agent, "activate_actions", None)):
        agent.activate_actions(space.action_names, space.action_max_params, device)
        return
    agent.cum_action_max_params = space.cum_action_max_params.to(device)
    agent.action_index_tensor = space.action_index_tensor.to(device)
    if callable(getattr(agent, "initialize_to_environment", None)):
        agent.initialize_to_environment(space.full_action_names, device)


def check_agent(agent: nn.Module, env: Any, *, updates: int = 20, seed: int = 0) -> AgentReport:
    """Run five checks on an agent written with PyTorchAgentMixin, and report what is wrong and how to fix it.

    "configuration": clip_range and analyze_weights_interval come from keyword arguments to attributes.
    "weight clipping": clip_weights() clips every Linear, Conv1d and Conv2d, nothing else, and nothing at clip_range 0.
    "TensorDict fields": inference and training write every field with the right shape, dtype and meaning.
    "action conversion": every logit index and its (type, parameter) pair convert into each other.
    "training stability": loss, gradients and weights stay finite over a number of optimizer steps.

    Each check works on its own deep copy of the agent. All of them run, and an exception inside the agent is a failed
    check. A trainable parameter that never gets a gradient is a warning.

    Args:
        agent: the agent, or a host or wrapper around it (its `policy` or `module` is then checked).
        env: may define `action_names` and `max_action_args` (not needed when the agent's action tables are
            set), `num_tokens`, `obs_width`, `obs_height`, and `feature_normalizations`, from which random observation
            tokens are made. Without the last, observations come from `env.reset()`, which then resets the environment;
            without that too, they are random. None is allowed.
        updates: optimizer steps of the last check.
        seed: of the observations, actions and draws.

    Returns:
        A report; `report.raise_if_failed()` turns failures into an AgentCheckError.

    Raises:
        TypeError, ValueError: `agent` is not a module, `updates` or `seed` is not a suitable integer, or no actions
            are known.
    """
    if not isinstance(agent, nn.Module):
        raise TypeError(f"agent: got {type(agent).__name__}, expected a torch.nn.Module")
    for name, value, least in (("updates", updates, 1), ("seed", seed, 0)):
        require_integer(name, value, f"an integer >= {least}", minimum=least)
    agent = _inner_agent(agent)
    space = _action_space(agent, env)
    subject = _Subject(agent, env, space, _Observations(env, seed), updates, seed)
    return AgentReport(subject.name, tuple(_run_check(name, check, subject) for name, check in CHECKS.items()))


def _inner_agent(agent: nn.Module) -> nn.Module:
    """The mixin agent inside hosts and wrappers, else the agent itself."""
    inner: Any = agent
    while not hasattr(inner, "init_mixin"):
        inner = getattr(inner, "module", None) or getattr(inner, "policy", None)
        if not isinstance(inner, nn.Module):
            return agent
    return inner


def _action_space(agent: nn.Module, env: Any) -> ActionSpace:
    """The actions that the environment names, else those of the agent's own tables."""
    max_params = getattr(env, "max_action_args", None)
    if max_params is None and _has_tables(agent):
        max_params = torch.as_tensor(agent.cum_action_max_params).diff().tolist()
    if max_params is None:
        raise ValueError(
            f"env: got {type(env).__name__} without max_action_args, and the agent's action tables are not set; "
            "expected an environment with action_names and max_action_args, or an agent after activate_actions"
        )
    max_params = [int(value) for value in max_params]
    names = getattr(env, "action_names", None)
    return ActionSpace(list(names) if names else [f"type{t}" for t in range(len(max_params))], max_params)


def _run_check(name: str, check: Callable[[_Subject, _Findings], None], subject: _Subject) -> CheckResult:
    findings = _Findings()
    try:
        with seeded(subject.seed, subject.agent), torch.enable_grad():
            check(subject, findings)
    except Exception as error:
        findings.problems.append(f"the agent raised {describe_error(error)}")
    message = "\n".join(findings.problems) or findings.summary
    return CheckResult(name, not findings.problems, message, tuple(findings.warnings))


def _check_configuration(subject: _Subject, findings: _Findings) -> None:
    agent: Any = subject.agent
    if not hasattr(agent, "init_mixin") or not hasattr(agent, "extract_mixin_params"):
        findings.expect(False, f"no mixin: declare class {subject.name}(PyTorchAgentMixin, LSTMWrapper), in this order")
        return
    names = ("clip_range", "analyze_weights_interval", "l2_init_scale", "clip_scale", "initial_weights")
    missing = [name for name in names if not hasattr(agent, name)]
    if missing:
        advice = f"call self.init_mixin(**mixin_params) at the end of {subject.name}.__init__"
        findings.expect(False, f"attributes {', '.join(missing)} are missing: {advice}")
        return
    _check_configuration_types(agent, findings)
    rebuilt = subject.fresh_copy()
    rebuilt.init_mixin(**rebuilt.extract_mixin_params(_probe_arguments()))
    _check_arrival(rebuilt, "extract_mixin_params, then init_mixin,", findings)
    _check_constructor(subject, findings)
    interval = agent.analyze_weights_interval
    findings.summary = f"clip_range {agent.clip_range} and analyze_weights_interval {interval}, passed on from kwargs"


def _probe_arguments() -> dict[str, Any]:
    return {"clip_range": PROBE_CLIP_RANGE, "analyze_weights_interval": PROBE_INTERVAL}


def _check_configuration_types(agent: Any, findings: _Findings) -> None:
    clip_range, interval = agent.clip_range, agent.analyze_weights_interval
    legal = is_number(clip_range) and float(clip_range) >= 0
    findings.expect(legal, f"clip_range is {clip_range!r} ({type(clip_range).__name__}), expected a number >= 0")
    legal = is_whole(interval) and int(interval) >= 0
    kind = type(interval).__name__
    findings.expect(legal, f"analyze_weights_interval is {interval!r} ({kind}), expected an integer >= 0")
    weights = agent.initial_weights
    findings.expect(isinstance(weights, dict), f"initial_weights is a {type(weights).__name__}, expected a dict")


def _check_arrival(agent: Any, how: str, findings: _Findings) -> None:
    for name, sent in _probe_arguments().items():
        got = getattr(agent, name, None)
        advice = "take **kwargs, hand them to extract_mixin_params, and its result to init_mixin"
        findings.expect(got == sent, f"{how} was given {name}={sent} and the agent has {name} {got!r}: {advice}")


def _check_constructor(subject: _Subject, findings: _Findings) -> None:
    """Build a second agent with probe values, if its constructor's other arguments are known."""
    arguments, reason = _constructor_arguments(subject)
    if arguments is None:
        findings.warnings.append(f"__init__ was not checked, because a second agent could not be built: {reason}")
        return
    call = f"{subject.name}(env, clip_range={PROBE_CLIP_RANGE}, analyze_weights_interval={PROBE_INTERVAL})"
    try:
        built = type(subject.agent)(**arguments, **_probe_arguments())
    except Exception as error:
        advice = "take **kwargs and hand them to extract_mixin_params"
        findings.expect(False, f"{call} raised {describe_error(error)}: {advice}")
        return
    _check_arrival(built, call, findings)


def _constructor_arguments(subject: _Subject) -> tuple[dict[str, Any] | None, str]:
    """Arguments with which the agent's class can be built, or None and the reason."""
    known = {"env": subject.env}
    for name in ("input_size", "hidden_size", "num_layers"):
        if isinstance(getattr(subject.agent, name, None), int):
            known[name] = getattr(subject.agent, name)
    parameters = list(inspect.signature(type(subject.agent).__init__).parameters.values())[1:]
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    arguments = {name: value for name, value in known.items() if name in named}
    attempts = [arguments]
    if "policy" in named and isinstance(getattr(subject.agent, "policy", None), nn.Module):
        attempts.append(arguments | {"policy": copy.deepcopy(subject.agent.policy)})
    reason = ""
    for attempt in attempts:
        try:
            type(subject.agent)(**attempt)
            return attempt, ""
        except Exception as error:
            reason = f"{subject.name}({', '.join(attempt)}) raised {type(error).__name__}: {error}"
    return None, reason


def _check_clipping(subject: _Subject, findings: _Findings) -> None:
    agent = subject.fresh_copy()
    with torch.no_grad():
        # Spread widely, so that weights and biases alike have values on both sides of the range.
        for parameter in agent.parameters():
            if parameter.is_floating_point():
                parameter.data.normal_()
    clipped = clipped_parameters(agent)
    if not clipped:
        findings.warnings.append("the agent has no Linear, Conv1d or Conv2d, so there is nothing to clip")
    _check_one_clip(agent, 0, {}, findings)
    mode = getattr(agent, "clip_mode", "absolute")
    bounds = _init_scaled_bounds(agent) if mode == "init_scaled" else dict.fromkeys(clipped, PROBE_CLIP_RANGE)
    _check_one_clip(agent, PROBE_CLIP_RANGE, bounds, findings)
    findings.summary = f"{len(bounds)} tensors are clipped (mode {mode}) and no others, none with clip_range 0"


def _init_scaled_bounds(agent: Any) -> dict[str, float]:
    """Bounds of the clip mode "init_scaled": clip_range x largest initial weight x clip_scale, weights only."""
    bounds = {}
    for name in clipped_parameters(agent):
        layer, _, kind = name.rpartition(".")
        largest = agent.initial_weight_magnitudes.get(layer or "root")
        if kind == "weight" and largest is not None:
            bounds[name] = PROBE_CLIP_RANGE * largest * agent.clip_scale
    return bounds


def _check_one_clip(agent: Any, clip_range: float, bounds: dict[str, float], findings: _Findings) -> None:
    """Clip once with `clip_range`, and look at every parameter and buffer; those in `bounds` are to be clipped."""
    before = dict(_named_tensors(agent))
    values = {name: tensor.detach().clone() for name, tensor in before.items()}
    # By identity, so that a weight tied to a layer of another kind may be clipped under its other name.
    bound_of = {id(before[name]): bound for name, bound in bounds.items()}
    agent.clip_range = clip_range
    agent.clip_weights()
    for name, tensor in _named_tensors(agent):
        bound = bound_of.get(id(before[name]), math.inf)
        expected = values[name].clamp(-bound, bound) if bound < math.inf else values[name]
        _check_clipped_tensor(name, tensor.detach(), expected, bound, clip_range, findings)
        problem = f"{name!r} was replaced, and the optimizer still holds the old tensor: clip_weights() clips in place"
        findings.expect(tensor is before[name], problem)


def _named_tensors(agent: nn.Module) -> list[tuple[str, Tensor]]:
    return [*agent.named_parameters(remove_duplicate=False), *agent.named_buffers(remove_duplicate=False)]


def _check_clipped_tensor(
    name: str, tensor: Tensor, expected: Tensor, bound: float, clip_range: float, findings: _Findings
) -> None:
    if torch.allclose(tensor, expected, rtol=1e-6, atol=0, equal_nan=True):
        return
    if clip_range == 0:
        problem = "was changed with clip_range 0: clip_weights() must do nothing then"
    elif math.isinf(bound):
        problem = "was changed: only weight and bias of Linear, Conv1d and Conv2d are clipped"
    elif float(tensor.abs().max()) > bound * (1 + 1e-6):
        largest = float(tensor.abs().max())
        problem = f"reaches {largest:.4g} after clip_weights(), outside [-{bound:.4g}, {bound:.4g}]: it is not clipped"
    else:
        problem = f"has other values than before clamped to [-{bound:.4g}, {bound:.4g}]"
    findings.expect(False, f"{name!r} {problem}; delete an override of clip_weights(), the mixin provides it")


def _check_fields(subject: _Subject, findings: _Findings) -> None:
    for mode in (_check_inference_fields, _check_training_fields):
        try:
            mode(subject, findings)
        except Exception as error:
            label = mode.__name__.split("_")[2]
            findings.expect(False, f"{label}: the agent raised {describe_error(error)}")
    findings.summary = "inference and training write every field with the right shape, dtype and values"


@dataclass
class _Fields:
    """Reads the fields of an agent's result and notes what is wrong with them."""

    label: str
    td: TensorDictBase
    findings: _Findings

    def get(self, key: str, shape: tuple[int, ...], dtype: torch.dtype | None, advice: str) -> Tensor | None:
        """The entry, on the CPU, if it has this shape and dtype (None: floating point, without NaN)."""
        value = self.td.get(key, None)
        kind = "floating point" if dtype is None else str(dtype)
        expected = f"expected {kind} {list(shape)}; {advice}"
        if not isinstance(value, Tensor):
            self.findings.expect(False, f"{self.label}: td[{key!r}] is missing, {expected}")
            return None
        right_dtype = value.is_floating_point() if dtype is None else value.dtype == dtype
        if not right_dtype or tuple(value.shape) != shape:
            found = f"{value.dtype} {list(value.shape)}"
            self.findings.expect(False, f"{self.label}: td[{key!r}] is {found}, {expected}")
            return None
        if dtype is None and bool(value.isnan().any()):
            self.findings.expect(False, f"{self.label}: td[{key!r}] holds NaN")
            return None
        return value.detach().cpu()

    def constant(self, key: str, shape: tuple[int, ...], constant: int) -> None:
        value = self.get(key, shape, torch.int64, SET_FIELDS)
        if value is not None:
            found = sorted(set(value.flatten().tolist()))
            problem = f"{self.label}: td[{key!r}] holds {found}, expected {constant} everywhere; {SET_FIELDS}"
            self.findings.expect(found == [constant], problem)

    def close(self, key: str, value: Tensor, expected: Tensor, meaning: str) -> None:
        tolerance = LOG_PROB_TOLERANCE.get(value.dtype, 1e-4)
        off = ~torch.isclose(value.double(), expected.double(), rtol=tolerance, atol=tolerance)
        if bool(off.any()):
            at = tuple(off.nonzero()[0].tolist())
            found = f"td[{key!r}]{list(at)} is {value[at].item():.6g}"
            self.findings.expect(False, f"{self.label}: {found}, expected {meaning} {expected[at].item():.6g}")

    def log_probs(self, shape: tuple[int, ...], advice: str) -> Tensor | None:
        """full_log_probs, with its rows' probabilities checked to sum to 1."""
        value = self.get("full_log_probs", shape, None, advice)
        if value is not None:
            total = value.double().logsumexp(-1).exp().to(value.dtype)
            tolerance = LOG_PROB_TOLERANCE.get(value.dtype, 1e-4)
            wrong = (total - 1).abs() > tolerance
            example = f", {total[wrong][0].item():.6g} for one" if bool(wrong.any()) else ""
            problem = f"probabilities exp(td['full_log_probs']) of a row do not sum to 1{example}; {advice}"
            self.findings.expect(not example, f"{self.label}: {problem}")
        return value


def _logit_index(actions: Tensor, space: ActionSpace) -> Tensor:
    """Logit index of legal pairs [..., 2], written out independently of the agent."""
    kind, param = actions.cpu().long().unbind(-1)
    return kind + space.cum_action_max_params[kind] + param


def _is_legal(actions: Tensor, space: ActionSpace) -> bool:
    limits = torch.tensor(space.action_max_params)
    kind, param = actions.cpu().long().unbind(-1)
    if not bool(((kind >= 0) & (kind < len(limits))).all()):
        return False
    return bool(((param >= 0) & (param <= limits[kind])).all())


def _check_inference_fields(subject: _Subject, findings: _Findings) -> None:
    td = subject.inference_input()
    with torch.no_grad():
        out = subject.fresh_copy()(td)
    if not findings.expect(isinstance(out, TensorDictBase), _no_tensordict("inference", out, USE_INFERENCE)):
        return
    if out is not td:
        findings.warnings.append("inference returns another TensorDict than it was given; callers may read the first")
    fields, rows = _Fields("inference", out, findings), INFERENCE_ROWS
    fields.constant("bptt", (rows,), 1)
    fields.constant("batch", (rows,), rows)
    fields.get("values", (rows,), None, USE_INFERENCE)
    log_probs = fields.log_probs((rows, subject.space.num_actions), USE_INFERENCE)
    act_log_prob = fields.get("act_log_prob", (rows,), None, USE_INFERENCE)
    actions = fields.get("actions", (rows, 2), torch.int32, USE_INFERENCE)
    if actions is None or not findings.expect(
        _is_legal(actions, subject.space),
        f"inference: td['actions'] holds a pair that {subject.space} does not have: {actions.tolist()}; {SET_TABLES}",
    ):
        return
    if log_probs is not None and act_log_prob is not None:
        chosen = log_probs.gather(-1, _logit_index(actions, subject.space)[..., None])[..., 0]
        fields.close("act_log_prob", act_log_prob, chosen, "full_log_probs at the action's logit index,")


def _check_training_fields(subject: _Subject, findings: _Findings) -> None:
    td, actions = subject.training_input()
    out = subject.fresh_copy().train()(td, action=actions)
    if not findings.expect(isinstance(out, TensorDictBase), _no_tensordict("training", out, USE_TRAINING)):
        return
    rows = (TRAINING_ROWS, TRAINING_STEPS)
    size = list(out.batch_size)
    findings.expect(size == list(rows), f"training: batch size {size}, expected [B, T] = {list(rows)}; {USE_TRAINING}")
    fields = _Fields("training", out, findings)
    fields.constant("bptt", rows, TRAINING_STEPS)
    fields.constant("batch", rows, TRAINING_ROWS)
    value = out.get("value", None)
    fields.get("value", rows if isinstance(value, Tensor) and value.dim() == 2 else (*rows, 1), None, USE_TRAINING)
    log_probs = fields.log_probs((*rows, subject.space.num_actions), USE_TRAINING)
    act_log_prob = fields.get("act_log_prob", rows, None, USE_TRAINING)
    entropy = fields.get("entropy", rows, None, USE_TRAINING)
    if log_probs is not None and act_log_prob is not None:
        chosen = log_probs.gather(-1, _logit_index(actions, subject.space)[..., None])[..., 0]
        fields.close("act_log_prob", act_log_prob, chosen, "full_log_probs at the given action's logit index,")
    if log_probs is not None and entropy is not None:
        fields.close("entropy", entropy, torch.special.entr(log_probs.double().exp()).sum(-1), "-sum(p log p) =")


def _no_tensordict(label: str, out: object, advice: str) -> str:
    return f"{label}: forward() returned {type(out).__name__}, expected a TensorDict; {advice}"


def _check_conversion(subject: _Subject, findings: _Findings) -> None:
    agent, space = subject.fresh_copy(), subject.space
    for name in ("cum_action_max_params", "action_index_tensor"):
        table, expected = torch.as_tensor(getattr(agent, name)).cpu(), getattr(space, name)
        right = table.shape == expected.shape and bool((table == expected).all())
        findings.expect(right, f"{name} is {table.tolist()}, {space} needs {expected.tolist()}: {SET_TABLES}")
    if findings.problems:
        return
    index = torch.arange(space.num_actions, device=device_of(agent))
    _check_pairs(agent._convert_logit_index_to_action(index).cpu(), space, findings)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        pairs = space.action_index_tensor.to(index.device, dtype)
        _check_indices(agent._convert_action_to_logit_index(pairs).cpu(), space, dtype, findings)
    findings.summary = f"all {space.num_actions} actions of {len(space.action_names)} types convert both ways"


def _check_pairs(pairs: Tensor, space: ActionSpace, findings: _Findings) -> None:
    advice = "return self.action_index_tensor[index], or delete the override of _convert_logit_index_to_action"
    expected = space.action_index_tensor
    if pairs.shape != expected.shape:
        problem = f"_convert_logit_index_to_action gave {list(pairs.shape)} for {len(expected)} indices"
        findings.expect(False, f"{problem}, expected {list(expected.shape)}: {advice}")
        return
    for row in (pairs != expected).any(-1).nonzero()[:1].flatten().tolist():
        got, right = tuple(pairs[row].tolist()), tuple(expected[row].tolist())
        name = space.full_action_names[row]
        findings.expect(False, f"logit index {row} ({name}) became the pair {got}, expected {right}: {advice}")


def _check_indices(got: Tensor, space: ActionSpace, dtype: torch.dtype, findings: _Findings) -> None:
    method = f"_convert_action_to_logit_index of {dtype} actions"
    kind, param = space.action_index_tensor.long().unbind(-1)
    first = space.cum_action_max_params[kind]
    expected = kind + first + param
    if got.shape != expected.shape:
        findings.expect(False, f"{method} gave shape {list(got.shape)}, expected {list(expected.shape)}")
        return
    advice = f"the formula is {USE_FORMULA}; delete the override, the mixin provides it"
    if bool((got == first + param).all()) and not torch.equal(first + param, expected):
        advice = f"action_type is left out, as in cum_action_max_params[action_type] + action_param; {advice}"
    for row in (got != expected).nonzero()[:1].flatten().tolist():
        terms = f"{kind[row]} + {first[row]} + {param[row]}"
        pair = f"type {kind[row]}, parameter {param[row]} ({space.full_action_names[row]})"
        problem = f"{method}: {pair} became index {got[row]}, expected {terms} = {expected[row]}"
        findings.expect(False, f"{problem}: {advice}")


def _check_stability(subject: _Subject, findings: _Findings) -> None:
    agent = subject.fresh_copy().train()
    parameters = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    if not findings.expect(bool(parameters), "the agent has no trainable parameter"):
        return
    optimizer = torch.optim.Adam(parameters.values(), lr=LEARNING_RATE)
    without_gradient = set(parameters)
    for update in range(1, subject.updates + 1):
        loss = _policy_gradient_loss(agent, subject)
        optimizer.zero_grad()
        loss.backward()
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        without_gradient -= gradients.keys()
        _expect_finite(f"update {update}: the loss", {"": loss}, findings)
        _expect_finite(f"update {update}: the gradient of ", gradients, findings)
        optimizer.step()
        agent.clip_weights()
        _expect_finite(f"update {update}: after the optimizer step ", parameters, findings)
        if findings.problems:
            return
    for name in sorted(without_gradient):
        findings.warnings.append(f"{name!r} is trainable and never got a gradient: is it used in forward()?")
    findings.summary = f"{subject.updates} updates, loss, gradients and weights finite"


def _policy_gradient_loss(agent: Any, subject: _Subject) -> Tensor:
    """Loss of an actor-critic update on random observations, actions, advantages and returns."""
    td, actions = subject.training_input()
    out = agent(td, action=actions)
    missing = [key for key in LOSS_KEYS if out.get(key, None) is None]
    if missing:
        raise KeyError(f"no {', '.join(missing)} in the result of training; {USE_TRAINING}")
    log_prob = out["act_log_prob"].flatten()
    advantages, returns = (torch.randn(log_prob.numel()).to(log_prob.device) for _ in range(2))
    policy_loss = -(log_prob * advantages).mean()
    value_loss = (out["value"].flatten() - returns).square().mean()
    return policy_loss + 0.5 * value_loss - 0.01 * out["entropy"].mean()


def _expect_finite(where: str, tensors: dict[str, Any], findings: _Findings) -> None:
    """Note the first tensor that is not finite; `where` ends with the words before its name."""
    for name, tensor in tensors.items():
        bad = int((~tensor.detach().isfinite()).sum())
        if bad:
            what = f"{where}{name!r}" if name else where
            findings.expect(
                False,
                f"{what} holds NaN or infinities ({bad} of {tensor.numel()} values): look for logs and divisions "
                "of zero in the agent, and try a clip_range above 0 or smaller initial weights",
            )
            return


CHECKS: dict[str, Callable[[_Subject, _Findings], None]] = {
    "configuration": _check_configuration,
    "weight clipping": _check_clipping,
    "TensorDict fields": _check_fields,
    "action conversion": _check_conversion,
    "training stability": _check_stability,
}
