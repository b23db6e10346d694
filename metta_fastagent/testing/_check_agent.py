"""`check_agent`: six checks on an agent of the user's own."""

import copy
import dataclasses
import itertools
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from metta_fastagent.action_space import ActionSpace
from metta_fastagent.mixin import PyTorchAgentMixin
from metta_fastagent.ops._checks import describe, require_integer, require_number
from metta_fastagent.testing._shared import (
    LOSS_KEYS,
    STATE_KEYS,
    describe_error,
    device_of,
    inner_agent,
    random_actions,
    seeded,
)

# Rows of a rollout step, rows of a training batch, steps of a segment.
ROWS, TRAINING_ROWS, T = 6, 3, 5
# Values that no agent has by default, so that seeing them again means that they were passed on.
PROBE = {"clip_range": 0.375, "analyze_weights_interval": 17}
# Errors of a log-probability of about 10, and of an importance ratio.
LOG_PROB_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
RATIO_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Starts of episodes (row, step) in a warm-up and two segments. None is at the first or last step of the first segment,
# so that they stay inside it if shifted by one step.
STARTS = {
    "dones": [(0, T + 1), (2, T + 3), (3, 2 * T), (1, 2 * T + 3)],
    "truncateds": [(1, T + 2), (3, T + 3), (4, 2 * T), (0, 2 * T + 2)],
}
SET_FIELDS = 'call self.set_tensordict_fields(td, td["env_obs"]) at the start of forward()'
USE_INFERENCE = "end forward() with self.handle_inference_mode(td, logits, value) if action is None"
USE_TRAINING = "end forward() with self.handle_training_mode(td, action, logits, value) if action is given"
USE_FORMULA = "action_type + cum_action_max_params[action_type] + action_param"
SET_TABLES = "call activate_actions or MettaAgent.initialize_to_environment with the environment's actions"
RUN_LSTM = "self.run_lstm(td, hidden, B, T) of LSTMWrapper handles state and resets in both modes"


class AgentCheckError(AssertionError):
    """At least one check of `check_agent` failed; the message is the report."""


@dataclass
class CheckResult:
    """Outcome of one check: problems make it fail, warnings do not; `summary` is its message if it passes."""

    name: str
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    summary: str = ""

    @property
    def passed(self) -> bool:
        """Whether there was no problem."""
        return not self.problems

    @property
    def message(self) -> str:
        """The problems with advice, one a line, or the summary."""
        return "\n".join(self.problems) or self.summary

    def expect(self, condition: bool, problem: str) -> bool:
        """Note the problem unless the condition holds; returns the condition."""
        if not condition:
            self.problems.append(problem)
        return condition


@dataclass(frozen=True)
class AgentReport:
    """Outcome of `check_agent`; `str(report)` is a table, `report[name]` one result."""

    agent_name: str
    checks: tuple[CheckResult, ...]

    @property
    def ok(self) -> bool:
        """Whether all checks passed."""
        return not self.failures

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
        raise KeyError(f"name: got {name!r}, expected one of {', '.join(CHECKS)}")

    def __str__(self) -> str:
        lines = [f"{self.agent_name}: {len(self.checks) - len(self.failures)} of {len(self.checks)} checks passed"]
        width = max(map(len, CHECKS))
        for check in self.checks:
            rows = [("ok" if check.passed else "FAIL", check.name, check.message)]
            for mark, name, message in [*rows, *(("warn", "", warning) for warning in check.warnings)]:
                head = f"  {mark:<4}  {name:<{width}}  "
                text = [line for part in message.splitlines() for line in textwrap.wrap(part, 118 - len(head))]
                lines += [(" " * len(head) if i else head) + line for i, line in enumerate(text)]
        return "\n".join(lines)


@dataclass
class _Subject:
    """The agent under test with its environment, its actions, and rows [N] of input to draw from."""

    agent: nn.Module
    env: Any
    space: ActionSpace
    samples: TensorDictBase
    updates: int

    def fresh_copy(self) -> Any:
        """A copy of the agent with empty memory and its action tables set; the environment is shared, not copied."""
        agent: Any = copy.deepcopy(self.agent, {} if self.env is None else {id(self.env): self.env})
        if callable(getattr(agent, "reset_memory", None)):
            agent.reset_memory()
        if (getattr(agent, "num_envs", None) or ROWS) < ROWS:
            agent.allocate_memory(ROWS)
        if not _has_tables(agent):
            agent.activate_actions(self.space.action_names, self.space.action_max_params, device_of(agent))
        return agent

    def draw(self, *rows: int) -> TensorDictBase:
        """Random input of batch size `rows` in which no episode starts."""
        td = self.samples[torch.randint(len(self.samples), rows, device="cpu").to(self.samples.device or "cpu")]
        td = td.to(device_of(self.agent))
        return td.update({key: torch.zeros(rows, dtype=torch.bool, device=td.device) for key in STARTS})

    def actions(self, *rows: int) -> Tensor:
        return random_actions(self.space.action_index_tensor, rows).to(device_of(self.agent))


def check_agent(
    agent: nn.Module, env: Any, *, updates: int = 20, seed: int = 0, sample_input: TensorDictBase | None = None
) -> AgentReport:
    """Run six checks on an agent written with PyTorchAgentMixin, and report what is wrong and how to fix it.

    "configuration": clip_range and analyze_weights_interval are legal and pass through the mixin to attributes.
    "weight clipping": clip_weights() clips every Linear, Conv1d and Conv2d, nothing else, and nothing at clip_range 0.
    "TensorDict fields": inference and training write every field with the right shape, dtype and meaning.
    "action conversion": every logit index and its (type, parameter) pair convert into each other.
    "recurrent replay": the agent carries state until an episode ends, and the importance ratio is 1 if a rollout is
    replayed as segments with flags and stored state (within 1e-5; 2e-2 for float16 and 1e-1 for bfloat16 weights).
    "training stability": loss, gradients and weights stay finite over a number of optimizer steps.

    Each check works on its own deep copy of the agent, the replay on one in eval mode with noise of 0.01 on its weights,
    because a head of zeros would hide the state. An exception inside the agent is a failed check. A trainable parameter
    that never gets a gradient is a warning.

    Args:
        agent: the agent, or a host or wrapper around it (its `policy` or `module` is then checked).
        env: may define `action_names` and `max_action_args`, which are not needed if the agent's action tables are set,
            and `num_tokens`, `obs_width`, `obs_height` and `feature_normalizations` for random observation tokens
            uint8 [N, num_tokens, 3]. None is allowed. The environment is neither reset nor stepped.
        updates: optimizer steps of the last check.
        seed: of the observations, actions and draws.
        sample_input: TensorDict of batch size [N], at least 2 rows, with what the agent reads in a rollout step, such as
            "env_obs" of any dtype and shape [N, ...]. The checks draw rows from it, as [B, ...] in rollout and
            [B, T, ...] in training, and add the flags of episodes. None draws random tokens.

    Returns:
        A report; `report.raise_if_failed()` turns failures into an AgentCheckError.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value, no actions are known, or the environment's
            observations are not tokens and `sample_input` is missing.
    """
    if not isinstance(agent, nn.Module):
        raise TypeError(f"agent: got {type(agent).__name__}, expected a torch.nn.Module")
    for name, value, least in (("updates", updates, 1), ("seed", seed, 0)):
        require_integer(name, value, f"an integer >= {least}", minimum=least)
    agent = inner_agent(agent)
    space = _action_space(agent, env)
    with seeded(seed):
        samples = _random_tokens(env) if sample_input is None else _checked_samples(sample_input)
    subject = _Subject(agent, env, space, samples, updates)
    return AgentReport(type(agent).__name__, tuple(_run_check(name, subject, seed) for name in CHECKS))


def _has_tables(agent: object) -> bool:
    return all(getattr(agent, name, None) is not None for name in ("cum_action_max_params", "action_index_tensor"))


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
    return ActionSpace(list(names) if names else [f"type{t}" for t in range(len(max_params))], max_params, "cpu")


def _checked_samples(sample_input: Any) -> TensorDictBase:
    expected = "a TensorDict of batch size [N] with at least 2 rows"
    if not isinstance(sample_input, TensorDictBase):
        raise TypeError(f"sample_input: got {describe(sample_input)}, expected {expected}")
    if sample_input.batch_dims != 1 or len(sample_input) < 2:
        raise ValueError(f"sample_input: got batch size {list(sample_input.batch_size)}, expected {expected}")
    return sample_input.exclude(*STATE_KEYS, *LOSS_KEYS, "actions", "values", "full_log_probs", "bptt", "batch")


def _random_tokens(env: Any) -> TensorDict:
    """256 rows of tokens uint8 [M, 3] such as the environment may give, a fifth of them empty."""
    known = getattr(getattr(env, "single_observation_space", None), "shape", None)
    if known is not None and (len(known) != 2 or known[1] != 3):
        raise ValueError(f"sample_input: got None, expected a TensorDict, for observations of shape {list(known)}")
    shape = (256, int(getattr(env, "num_tokens", known[0] if known else 64)))
    normalizations = getattr(env, "feature_normalizations", None) or dict.fromkeys(range(25), 1.0)
    width, height = int(getattr(env, "obs_width", 11)), int(getattr(env, "obs_height", 11))
    features = torch.tensor(sorted(normalizations), device="cpu")
    highest = torch.tensor([min(max(float(normalizations[int(i)]), 1), 254) for i in features], device="cpu")
    which, x, y, empty = (torch.randint(high, shape, device="cpu") for high in (len(features), width, height, 5))
    value = torch.rand(shape, device="cpu") * (highest[which] + 1)
    tokens = torch.stack([x << 4 | y, features[which], value.long()], dim=-1).to(torch.uint8)
    return TensorDict({"env_obs": tokens.masked_fill((empty == 0)[..., None], 255)}, batch_size=shape[:1])


def _run_check(name: str, subject: _Subject, seed: int) -> CheckResult:
    result = CheckResult(name)
    try:
        with seeded(seed, subject.agent), torch.enable_grad():
            CHECKS[name](subject, result)
    except Exception as error:
        result.expect(False, f"the agent raised {describe_error(error)}")
    return result


def _check_configuration(subject: _Subject, result: CheckResult) -> None:
    agent: Any = subject.agent
    if not isinstance(agent, PyTorchAgentMixin):
        name = type(agent).__name__
        result.expect(False, f"no mixin: declare class {name}(PyTorchAgentMixin, LSTMWrapper), in this order")
        return
    missing = [name for name in (*PROBE, "l2_init_scale", "clip_scale", "initial_weights") if not hasattr(agent, name)]
    advice = f"call self.init_mixin(**mixin_params) at the end of {type(agent).__name__}.__init__"
    if not result.expect(not missing, f"attributes {', '.join(missing)} are missing: {advice}"):
        return
    try:
        require_number("clip_range", agent.clip_range, "a number >= 0", minimum=0)
        require_integer("analyze_weights_interval", agent.analyze_weights_interval, "an integer >= 0", minimum=0)
    except (TypeError, ValueError) as error:
        result.expect(False, str(error))
    rebuilt = subject.fresh_copy()
    rebuilt.init_mixin(**rebuilt.extract_mixin_params(dict(PROBE)))
    for name, sent in PROBE.items():
        got = getattr(rebuilt, name, None)
        problem = f"{name} is {got!r} after extract_mixin_params and init_mixin with {name}={sent}: return what"
        result.expect(got == sent, f"{problem} the mixin's method returns, or delete the override")
    result.summary = f"clip_range {agent.clip_range}, analyze_weights_interval {agent.analyze_weights_interval}"


def _check_clipping(subject: _Subject, result: CheckResult) -> None:
    """Compare every parameter and buffer with what the mixin's own clip_weights() makes of it."""
    for clip_range in (0, PROBE["clip_range"]):
        agent = subject.fresh_copy()
        for parameter in agent.parameters():
            if parameter.is_floating_point():
                # Spread widely, so that weights and biases alike have values on both sides of the range.
                parameter.data.normal_()
        agent.clip_range = clip_range
        before, reference = agent.state_dict(keep_vars=True), dataclasses.replace(subject, agent=agent).fresh_copy()
        PyTorchAgentMixin.clip_weights(reference)
        agent.clip_weights()
        after = agent.state_dict(keep_vars=True)
        for name, expected in reference.state_dict().items():
            problem = f"{name!r} was replaced, and the optimizer still holds the old tensor; clip in place"
            if result.expect(after[name] is before[name], problem):
                found, right = (f"{float(values.abs().max()):.4g}" for values in (after[name], expected))
                problem = f"{name!r} reaches {found} after clip_weights() with clip_range {clip_range}, not {right} and"
                same = torch.allclose(after[name], expected, rtol=1e-6, atol=0, equal_nan=True)
                result.expect(same, f"{problem} the values that the mixin's clip_weights() gives; delete the override")
    result.summary = "as the mixin clips: Linear, Conv1d and Conv2d and no others, and nothing with clip_range 0"


def _check_fields(subject: _Subject, result: CheckResult) -> None:
    for mode, rows, advice in (("inference", (ROWS,), USE_INFERENCE), ("training", (TRAINING_ROWS, T), USE_TRAINING)):
        found = CheckResult(mode)
        try:
            fields = _read_fields(subject, mode, rows, advice, found)
            _check_values(fields, {"bptt": T if mode == "training" else 1, "batch": rows[0]}, subject.space, found)
        except Exception as error:
            found.expect(False, f"the agent raised {describe_error(error)}")
        result.problems += [f"{mode}: {problem}" for problem in found.problems]
        result.warnings += found.warnings
    result.summary = "inference and training write every field with the right shape, dtype and values"


def _read_fields(
    subject: _Subject, mode: str, rows: tuple[int, ...], advice: str, result: CheckResult
) -> dict[str, Tensor]:
    """The entries, on the CPU, that have the right shape and dtype and no NaN, and the actions; others are problems."""
    td, actions, agent = subject.draw(*rows), subject.actions(*rows), subject.fresh_copy()
    shapes = {"bptt": rows, "batch": rows, "full_log_probs": (*rows, subject.space.num_actions), "act_log_prob": rows}
    if mode == "training":
        out, fields = agent.train()(td, action=actions), {"actions": actions.cpu()}
        shapes |= {"entropy": rows, "value": (*rows, 1)}
    else:
        with torch.no_grad():
            out, fields = agent(td), {}
        shapes |= {"values": rows, "actions": (*rows, 2)}
    if not isinstance(out, TensorDictBase):
        result.expect(False, f"forward() returned {type(out).__name__}, expected a TensorDict; {advice}")
        return {}
    if mode == "inference" and out is not td:
        result.warnings.append("inference returns another TensorDict than it was given; callers may read the first")
    size = list(out.batch_size)
    result.expect(size == list(rows), f"batch size {size}, expected {list(rows)}; {advice}")
    dtypes = {"bptt": torch.int64, "batch": torch.int64, "actions": torch.int32}
    for key, shape in shapes.items():
        value, advised = out.get(key, None), SET_FIELDS if key in ("bptt", "batch") else advice
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else "missing"
        problem = f"td[{key!r}] is {found}, expected {dtypes.get(key, 'floating point')} {list(shape)}; {advised}"
        right = isinstance(value, Tensor) and tuple(value.shape) in (shape, rows if key == "value" else shape)
        right = right and (value.dtype == dtypes[key] if key in dtypes else value.is_floating_point())
        if result.expect(right, problem) and result.expect(not value.isnan().any(), f"td[{key!r}] holds NaN"):
            fields[key] = value.detach().cpu()
    return fields


def _check_values(
    fields: dict[str, Tensor], constants: dict[str, int], space: ActionSpace, result: CheckResult
) -> None:
    """Compare the fields that were read with constants and with each other."""
    for key, constant in constants.items():
        found = fields[key].unique().tolist() if key in fields else [constant]
        result.expect(found == [constant], f"td[{key!r}] holds {found}, expected {constant} everywhere; {SET_FIELDS}")
    if "full_log_probs" not in fields:
        return
    tolerance = LOG_PROB_TOLERANCE.get(fields["full_log_probs"].dtype, 1e-4)
    log_probs = fields["full_log_probs"].double()
    total = log_probs.exp().sum(-1).flatten()
    worst = float(total[(total - 1).abs().argmax()])
    problem = f"probabilities exp(td['full_log_probs']) of a row do not sum to 1, {worst:.6g} for one"
    result.expect(abs(worst - 1) <= tolerance, problem)
    expected = {"entropy": ("-sum(p log p)", torch.special.entr(log_probs.exp()).sum(-1))}
    actions, legal = fields.get("actions", torch.empty(0)), space.action_index_tensor.tolist()
    problem = f"td['actions'] holds a pair that {space} does not have: {actions.tolist()}; {SET_TABLES}"
    if result.expect(all(pair in legal for pair in actions.reshape(-1, 2).tolist()), problem) and actions.numel() > 0:
        kind, param = actions.long().unbind(-1)
        chosen = log_probs.gather(-1, (kind + space.cum_action_max_params[kind] + param)[..., None])[..., 0]
        expected["act_log_prob"] = ("full_log_probs at the action's logit index", chosen)
    for key in expected.keys() & fields.keys():
        meaning, right = expected[key]
        for at in (~torch.isclose(fields[key].double(), right, rtol=tolerance, atol=tolerance)).nonzero()[:1].tolist():
            found, value = fields[key][tuple(at)].item(), right[tuple(at)].item()
            result.expect(False, f"td[{key!r}]{at} is {found:.6g}, expected {meaning}, {value:.6g}")


def _check_conversion(subject: _Subject, result: CheckResult) -> None:
    agent, space = subject.fresh_copy(), subject.space
    for name in ("cum_action_max_params", "action_index_tensor"):
        table, expected = torch.as_tensor(getattr(agent, name)).tolist(), getattr(space, name).tolist()
        result.expect(table == expected, f"{name} is {table}, {space} needs {expected}: {SET_TABLES}")
    if result.problems:
        return
    device, pairs = device_of(agent), space.action_index_tensor
    index = torch.arange(space.num_actions, device="cpu")
    method, advice = "_convert_logit_index_to_action", "return self.action_index_tensor[index], or delete the override"
    _compare_converted(method, index, agent._convert_logit_index_to_action(index.to(device)), pairs, advice, result)
    without_type = index - pairs[:, 0]
    for dtype in (torch.int64, torch.int32, torch.uint8):
        got = agent._convert_action_to_logit_index(pairs.to(device, dtype))
        advice = f"the formula is {USE_FORMULA}; delete the override, the mixin provides it"
        if len(space.action_names) > 1 and got.tolist() == without_type.tolist():
            advice = f"action_type is left out, as in cum_action_max_params[action_type] + action_param; {advice}"
        _compare_converted(f"_convert_action_to_logit_index of {dtype} actions", pairs, got, index, advice, result)
    result.summary = f"all {space.num_actions} actions of {len(space.action_names)} types convert both ways"


def _compare_converted(
    method: str, given: Tensor, got: Tensor, expected: Tensor, advice: str, result: CheckResult
) -> None:
    shapes = f"shape {list(got.shape)}, expected {list(expected.shape)}"
    if result.expect(got.shape == expected.shape, f"{method} gave {shapes}: {advice}"):
        for value, found, right in zip(given.tolist(), got.tolist(), expected.tolist(), strict=True):
            if not result.expect(found == right, f"{method}: {value} became {found}, expected {right}: {advice}"):
                return


def _check_replay(subject: _Subject, result: CheckResult) -> None:
    agent = subject.fresh_copy().eval()
    for parameter in agent.parameters():
        if parameter.is_floating_point():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.01)
    tolerance = max((RATIO_TOLERANCE.get(parameter.dtype, 1e-5) for parameter in agent.parameters()), default=1e-5)
    subject = dataclasses.replace(subject, agent=agent)
    td = subject.draw(ROWS, 3 * T)
    _check_rollout(subject, td, result)
    if result.passed:
        for key, starts in STARTS.items():
            for row, step in starts:
                td[key][row, step] = True
        _check_segments(subject, td, tolerance, result)
    result.summary = f"importance ratio 1 within {tolerance:g} over ends of episodes, from stored state"


def _roll_out(agent: Any, td: TensorDictBase) -> TensorDictBase:
    """Results of rollout steps td [ROWS, steps]."""
    with torch.no_grad():
        outs = [agent(td[:, t].clone()) for t in range(td.shape[1])]
    return torch.stack([out.select("actions", "act_log_prob", "full_log_probs") for out in outs], dim=1)


def _check_rollout(subject: _Subject, td: TensorDictBase, result: CheckResult) -> None:
    """Compare two steps that follow on different observations: equal after an episode's end and different otherwise."""

    def probabilities(first: int, flag: str | None = None, training: bool = False) -> Tensor:
        steps = torch.cat([td[:, first : first + T], td[:, -2:]], dim=1)
        if flag:
            steps[flag][:, T] = True
        agent = subject.fresh_copy()
        out = agent(steps, action=subject.actions(*steps.shape)) if training else _roll_out(agent, steps)
        return out["full_log_probs"][:, -2:].detach().double().exp()

    if torch.equal(probabilities(0), probabilities(T)):
        problem = "carries no state: the results of a step do not depend on earlier observations"
        if not torch.equal(probabilities(0, training=True), probabilities(T, training=True)):
            problem = "the rollout drops its state: a step does not depend on earlier ones, though it does in a segment"
        result.expect(False, f"{problem}; {RUN_LSTM}")
        return
    for flag in STARTS:
        # Equal to the last bit: the state of both was replaced by zeros.
        at, after = ((probabilities(0, flag) != probabilities(T, flag))[:, step].any() for step in (0, 1))
        how = "ignores" if after else "resets one step late at"
        problem = f"the rollout {how} {flag}: state from before td[{flag!r}] reaches the results of that step"
        result.expect(not at, f"{problem}; {RUN_LSTM}")


def _check_segments(subject: _Subject, td: TensorDictBase, tolerance: float, result: CheckResult) -> None:
    """Replay two segments of a rollout, which follow on a warm-up, and compare the importance ratio with 1."""
    agent, parts, states = subject.fresh_copy(), [], []
    for steps in td.split(T, dim=1):
        parts.append(_roll_out(agent, steps))
        memory = agent.get_memory() if callable(getattr(agent, "get_memory", None)) else ({}, {})
        problem = "get_memory() gives no state to store with a segment; derive the agent from LSTMWrapper"
        if not result.expect(all(memory), problem):
            return
        states.append([next(iter(part.values()))[:, :ROWS].transpose(0, 1).clone() for part in memory])
    old = torch.cat(parts[1:])
    stored = {key: torch.cat([state[i] for state in states[:2]]) for i, key in enumerate(STATE_KEYS)}
    segments = TensorDict({**dict(torch.cat(td.split(T, dim=1)[1:]).items()), **stored}, batch_size=[2 * ROWS])
    out = subject.fresh_copy()(segments, action=old["actions"])
    ratio = (out["act_log_prob"].detach().double() - old["act_log_prob"].double()).exp()
    if not bool(((ratio - 1).abs() <= tolerance).all()):
        worst = float(ratio.flatten()[(ratio - 1).abs().argmax()])
        cause = _cause(subject, td, out["full_log_probs"][:ROWS].detach().double().exp(), tolerance)
        problem = f"training {cause}: the importance ratio of a replayed rollout is {worst:.6g} in the worst case,"
        result.expect(False, f"{problem} expected 1 within {tolerance:g}; {RUN_LSTM}")


def _cause(subject: _Subject, td: TensorDictBase, trained: Tensor, tolerance: float) -> str:
    """The change of the flags with which a rollout computes what training computed for the first segment."""
    variants = {}
    for key in STARTS:
        flags = td[key][:, T : 2 * T]
        late, early = f"resets one step late at {key}", f"resets one step early at {key}"
        variants[key] = {"": flags, f"ignores {key}": torch.zeros_like(flags)}
        variants[key] |= {late: flags.roll(1, 1), early: flags.roll(-1, 1)}
    variants["dones"]["drops its state between the steps of a segment"] = torch.ones_like(variants["dones"][""])
    best, cause = tolerance, "differs from the rollout in a way that no single fault of flags or start explains"
    for dones, truncateds, start in itertools.product(*variants.values(), ("", "starts segments from zeros")):
        changed = td[:, : 2 * T].clone()
        changed["dones"][:, T:] = variants["dones"][dones]
        changed["truncateds"][:, T:] = variants["truncateds"][truncateds]
        if start:
            changed["dones"][:, T] = True
        gap = float((_roll_out(subject.fresh_copy(), changed)["full_log_probs"][:, T:].exp() - trained).abs().max())
        if gap < best:
            best, cause = gap, " and ".join(filter(None, (start, dones, truncateds)))
    return cause or "does not reset the stored state of a segment whose first step starts an episode"


def _check_stability(subject: _Subject, result: CheckResult) -> None:
    agent = subject.fresh_copy().train()
    parameters = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    if not result.expect(bool(parameters), "the agent has no trainable parameter"):
        return
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-3)
    without_gradient = set(parameters)
    for update in range(1, subject.updates + 1):
        actions = subject.actions(TRAINING_ROWS, T)
        out = agent(subject.draw(TRAINING_ROWS, T), action=actions)
        missing = [key for key in LOSS_KEYS if out.get(key, None) is None]
        if not result.expect(not missing, f"no {', '.join(missing)} in the result of training; {USE_TRAINING}"):
            return
        # Of an actor-critic update with random advantages and returns.
        log_prob, value = out["act_log_prob"].flatten(), out["value"].flatten()
        policy_loss, value_loss = -log_prob * torch.randn_like(log_prob), (value - torch.randn_like(value)).square()
        loss = (policy_loss + 0.5 * value_loss).mean() - 0.01 * out["entropy"].mean()
        optimizer.zero_grad()
        loss.backward()
        tensors = {"the loss": loss}
        tensors |= {f"the gradient of {name!r}": p.grad for name, p in parameters.items() if p.grad is not None}
        without_gradient -= {name for name, p in parameters.items() if p.grad is not None}
        # Adam counts its steps in a tensor on the default device, and needs its value.
        with torch.device("cpu"):
            optimizer.step()
        agent.clip_weights()
        tensors |= {f"after the optimizer step {name!r}": p for name, p in parameters.items()}
        for name, tensor in tensors.items():
            bad = int((~tensor.detach().isfinite()).sum())
            advice = "look for log(0) and division by zero, and try a clip_range above 0 or smaller initial weights"
            problem = f"update {update}: {name} holds NaN or infinities ({bad} of {tensor.numel()} values): {advice}"
            if not result.expect(bad == 0, problem):
                return
    for name in sorted(without_gradient):
        result.warnings.append(f"{name!r} is trainable and never got a gradient: is it used in forward()?")
    result.summary = f"{subject.updates} updates, loss, gradients and weights finite"


CHECKS: dict[str, Callable[[_Subject, CheckResult], None]] = {
    "configuration": _check_configuration,
    "weight clipping": _check_clipping,
    "TensorDict fields": _check_fields,
    "action conversion": _check_conversion,
    "recurrent replay": _check_replay,
    "training stability": _check_stability,
}
