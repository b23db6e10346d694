"""`check_agent`: six checks on the user's own agent."""

import dataclasses
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from metta_fastagent.action_space import ActionSpace
from metta_fastagent.mixin import PyTorchAgentMixin
from metta_fastagent.runtime.checks import describe, require_integer, require_number
from metta_fastagent.testing._replay import check_replay
from metta_fastagent.testing._shared import (
    LOSS_KEYS,
    ROWS,
    STATE_KEYS,
    CheckResult,
    Subject,
    T,
    describe_error,
    device_of,
    has_tables,
    inner_agent,
    seeded,
)

TRAINING_ROWS = 3

# Values that no agent has by default: if they appear again, they were passed on.
PROBE = {"clip_range": 0.375, "analyze_weights_interval": 17}
# Error of a log-probability of about 10.
LOG_PROB_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
RAISED = "the agent raised"
SAMPLE_HINT = "the checks drew random tokens: for other observations pass sample_input=, a TensorDict [N] with env_obs"
SET_FIELDS = 'call self.set_tensordict_fields(td, td["env_obs"]) at the start of forward()'
USE_INFERENCE = "end forward() with self.handle_inference_mode(td, logits, value) if action is None"
USE_TRAINING = "end forward() with self.handle_training_mode(td, action, logits, value) if action is given"
USE_FORMULA = "action_type + cum_action_max_params[action_type] + action_param"
SET_TABLES = "call activate_actions or MettaAgent.initialize_to_environment with the environment's actions"


class AgentCheckError(AssertionError):
    """At least one check of `check_agent` failed; the message is the report."""


@dataclass(frozen=True)
class AgentReport:
    """Result of `check_agent`; `str(report)` is a table, `report[name]` a single result.

    Example:
        >>> AgentReport("Fast", (CheckResult("action conversion"),)).ok
        True
    """

    agent_name: str
    checks: tuple[CheckResult, ...]
    hint: str = ""

    @property
    def ok(self) -> bool:
        """Whether all checks passed."""
        return not self.failures

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def raise_if_failed(self) -> None:
        """Raise an AgentCheckError with the report as its message unless all checks passed."""
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
        return "\n".join([*lines, *textwrap.wrap(self.hint, 118)])


def check_agent(
    agent: nn.Module, env: Any, *, updates: int = 20, seed: int = 0, sample_input: TensorDictBase | None = None
) -> AgentReport:
    """Run six checks on an agent written with PyTorchAgentMixin; report what is wrong and how to fix it.

    "configuration": clip_range and analyze_weights_interval are legal and pass through the mixin to attributes.
    "weight clipping": clip_weights() clips every Linear, Conv1d and Conv2d, nothing else, and nothing at clip_range 0.
    "TensorDict fields": inference and training write every field with the right shape, dtype and meaning.
    "action conversion": every logit index and its (type, parameter) pair convert into each other.
    "recurrent replay": the agent carries state until an episode ends, and the importance ratio is 1 if a rollout is
    replayed as segments with flags and stored state (within 1e-5; 2e-2 for float16 and 1e-1 for bfloat16 weights).
    "training stability": loss, gradients and weights stay finite over a number of optimizer steps.

    Each check works on its own deep copy of the agent. The replay's copy is in eval mode and has noise of 0.01 on its
    weights, because an all-zero head would hide the state. An exception inside the agent is a failed check; a trainable
    parameter that never gets a gradient is a warning.

    Args:
        agent: the agent, or a host or wrapper around it (its `policy` or `module` is then checked).
        env: may define `action_names` and `max_action_args`, which are not needed if the agent's action tables are set,
            and `num_tokens`, `obs_width`, `obs_height` and `feature_normalizations` for random observation tokens
            uint8 [N, num_tokens, 3]. None is allowed. The environment is neither reset nor stepped.
        updates: optimizer steps in the last check.
        seed: seed of the observations, actions and draws.
        sample_input: TensorDict of batch size [N], at least 2 rows, with the entries that the agent reads in a rollout
            step, such as "env_obs" of any dtype and shape [N, ...]. The checks draw rows from it, [B, ...] in rollout
            and [B, T, ...] in training, and add episode flags; states, environment ids and results are left out. None
            uses random tokens.

    Returns:
        A report; `report.raise_if_failed()` turns failures into an AgentCheckError.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value, no actions are known, or the environment's
            observations are not tokens and `sample_input` is missing.

    Example:
        >>> from types import SimpleNamespace
        >>> from metta_fastagent import Fast
        >>> env = SimpleNamespace(action_names=["noop", "move"], max_action_args=[0, 3], num_tokens=8)
        >>> agent = Fast(env)
        >>> agent.activate_actions(env.action_names, env.max_action_args)
        >>> report = check_agent(agent, env, updates=1)
        >>> report.ok or print(report)
        True
    """
    if not isinstance(agent, nn.Module):
        raise TypeError(f"agent: got {type(agent).__name__}, expected a torch.nn.Module")
    for name, value, least in (("updates", updates, 1), ("seed", seed, 0)):
        require_integer(name, value, f"an integer >= {least}", minimum=least)
    agent = inner_agent(agent)
    space = _action_space(agent, env)
    with seeded(seed):
        samples = _random_tokens(env) if sample_input is None else _checked_samples(sample_input)
    subject = Subject(agent, env, space, samples, updates)
    checks = tuple(_run_check(name, subject, seed) for name in CHECKS)
    raised = sample_input is None and any(RAISED in check.message for check in checks)
    return AgentReport(type(agent).__name__, checks, SAMPLE_HINT if raised else "")


def _action_space(agent: nn.Module, env: Any) -> ActionSpace:
    """The environment's actions, or else those in the agent's own tables."""
    max_params = getattr(env, "max_action_args", None)
    if max_params is None and has_tables(agent):
        max_params = torch.as_tensor(agent.cum_action_max_params, device="cpu").diff().tolist()
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
    results = (*LOSS_KEYS, "actions", "values", "full_log_probs", "bptt", "batch")
    return sample_input.exclude(*STATE_KEYS, "training_env_id_start", *results)


def _random_tokens(env: Any) -> TensorDict:
    """256 rows of tokens uint8 [M, 3] like those an environment may return, a fifth of them empty."""
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


def _run_check(name: str, subject: Subject, seed: int) -> CheckResult:
    result = CheckResult(name)
    try:
        with seeded(seed, subject.agent), torch.enable_grad():
            CHECKS[name](subject, result)
    except Exception as error:
        result.expect(False, f"{RAISED} {describe_error(error)}")
    return result


def _check_configuration(subject: Subject, result: CheckResult) -> None:
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


def _check_clipping(subject: Subject, result: CheckResult) -> None:
    """Compare every parameter with the result of the mixin's own clip_weights()."""
    for clip_range in (0, PROBE["clip_range"]):
        agent = subject.fresh_copy()
        for parameter in agent.parameters():
            if parameter.is_floating_point():
                # Widely spread, so that weights and biases both have values beyond both ends of the range.
                parameter.data.normal_()
        agent.clip_range = clip_range
        reference: Any = dataclasses.replace(subject, agent=agent).fresh_copy()
        PyTorchAgentMixin.clip_weights(reference)
        before, expected = (dict(module.named_parameters(remove_duplicate=False)) for module in (agent, reference))
        agent.clip_weights()
        for name, parameter in agent.named_parameters(remove_duplicate=False):
            problem = f"{name!r} was replaced, and the optimizer still holds the old tensor; clip in place"
            if result.expect(parameter is before[name], problem):
                found, right = (f"{float(p.detach().abs().max()):.4g}" for p in (parameter, expected[name]))
                problem = (
                    f"{name!r} reaches {found} after clip_weights() with clip_range {clip_range}, expected the values"
                )
                same = torch.allclose(parameter, expected[name], rtol=1e-6, atol=0, equal_nan=True)
                result.expect(same, f"{problem} of the mixin's clip_weights(), up to {right}; delete the override")
    result.summary = "as the mixin clips: Linear, Conv1d and Conv2d and no others, and nothing with clip_range 0"


def _check_fields(subject: Subject, result: CheckResult) -> None:
    for mode, rows, advice in (("inference", (ROWS,), USE_INFERENCE), ("training", (TRAINING_ROWS, T), USE_TRAINING)):
        found = CheckResult(mode)
        try:
            fields = _read_fields(subject, mode, rows, advice, found)
            _check_values(fields, {"bptt": T if mode == "training" else 1, "batch": rows[0]}, subject.space, found)
        except Exception as error:
            found.expect(False, f"{RAISED} {describe_error(error)}")
        result.problems += [f"{mode}: {problem}" for problem in found.problems]
        result.warnings += found.warnings
    result.summary = "inference and training write every field with the right shape, dtype and values"


def _read_fields(
    subject: Subject, mode: str, rows: tuple[int, ...], advice: str, result: CheckResult
) -> dict[str, Tensor]:
    """The entries, on the CPU, with the right shape and dtype and no NaN, and the actions; others are problems."""
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
    actions, legal = fields.get("actions"), space.action_index_tensor.tolist()
    if actions is not None and all(pair in legal for pair in actions.reshape(-1, 2).tolist()):
        kind, param = actions.long().unbind(-1)
        chosen = log_probs.gather(-1, (kind + space.cum_action_max_params[kind] + param)[..., None])[..., 0]
        expected["act_log_prob"] = ("full_log_probs at the action's logit index", chosen)
    elif actions is not None:
        found = f"td['actions'] holds a pair that {space} does not have: {actions.tolist()}"
        result.expect(False, f"{found}; {SET_TABLES}")
    for key in expected.keys() & fields.keys():
        meaning, right = expected[key]
        for at in (~torch.isclose(fields[key].double(), right, rtol=tolerance, atol=tolerance)).nonzero()[:1].tolist():
            found, value = fields[key][tuple(at)].item(), right[tuple(at)].item()
            result.expect(False, f"td[{key!r}]{at} is {found:.6g}, expected {meaning}, {value:.6g}")


def _check_conversion(subject: Subject, result: CheckResult) -> None:
    agent, space, device = subject.fresh_copy(), subject.space, device_of(subject.agent)
    for name in ("cum_action_max_params", "action_index_tensor"):
        table, expected = torch.as_tensor(getattr(agent, name), device="cpu").tolist(), getattr(space, name).tolist()
        result.expect(table == expected, f"{name} is {table}, {space} needs {expected}: {SET_TABLES}")
    if not result.passed:
        return
    pairs, index = space.action_index_tensor, torch.arange(space.num_actions, device="cpu")
    got = agent._convert_logit_index_to_action(index.to(device))
    advice = "return self.action_index_tensor[index], or delete the override"
    _compare_converted("_convert_logit_index_to_action", advice, index, got, pairs, result)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        got = agent._convert_action_to_logit_index(pairs.to(device, dtype))
        advice = f"the formula is {USE_FORMULA}; delete the override"
        if len(space.action_names) > 1 and got.tolist() == (index - pairs[:, 0]).tolist():
            advice = f"action_type is left out, as in cum_action_max_params[action_type] + action_param; {advice}"
        _compare_converted(f"_convert_action_to_logit_index of {dtype}", advice, pairs, got, index, result)
    result.summary = f"all {space.num_actions} actions of {len(space.action_names)} types convert both ways"


def _compare_converted(
    name: str, advice: str, given: Tensor, got: Tensor, expected: Tensor, result: CheckResult
) -> None:
    shapes = f"shape {list(got.shape)}, expected {list(expected.shape)}"
    if result.expect(got.shape == expected.shape, f"{name} gave {shapes}: {advice}"):
        for value, found, right in zip(given.tolist(), got.tolist(), expected.tolist(), strict=True):
            if not result.expect(found == right, f"{name}: {value} became {found}, expected {right}: {advice}"):
                return


def _check_stability(subject: Subject, result: CheckResult) -> None:
    agent = subject.fresh_copy().train()
    parameters = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    if not result.expect(bool(parameters), "the agent has no trainable parameter"):
        return
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-3)
    without_gradient = set(parameters)
    for update in range(1, subject.updates + 1):
        actions = subject.actions(TRAINING_ROWS, T)
        out = agent(subject.draw(TRAINING_ROWS, T), action=actions)
        # The loss of an actor-critic update with random advantages and returns.
        log_prob, value = out["act_log_prob"].flatten(), out["value"].flatten()
        policy_loss, value_loss = -log_prob * torch.randn_like(log_prob), (value - torch.randn_like(value)).square()
        loss = (policy_loss + 0.5 * value_loss).mean() - 0.01 * out["entropy"].mean()
        optimizer.zero_grad()
        loss.backward()
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        without_gradient -= gradients.keys()
        # Adam creates its step counter on the default device, and reads it.
        with torch.device("cpu"):
            optimizer.step()
        agent.clip_weights()
        tensors = {"the loss": loss} | {f"the gradient of {name!r}": grad for name, grad in gradients.items()}
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


CHECKS: dict[str, Callable[[Subject, CheckResult], None]] = {
    "configuration": _check_configuration,
    "weight clipping": _check_clipping,
    "TensorDict fields": _check_fields,
    "action conversion": _check_conversion,
    "recurrent replay": check_replay,
    "training stability": _check_stability,
}
