"""Log-probability and entropy of given actions under categorical logits, with their gradient.

`reference` has the formulas, `kernels` the Triton kernels: one launch forward, one backward. Arithmetic is float32
(float64 for float64), and results are cast once, when stored. A masked logit (-inf) does not make the entropy or its
gradient NaN. A row with an index out of range (possible only off the CPU) has log_prob NaN and gradient 0.
"""

from typing import Any

import torch
from torch import Tensor

from metta_fastagent.ops import autograd
from metta_fastagent.ops.categorical import reference
from metta_fastagent.ops.categorical.conditions import SCHEMA, Conditions, MaskLike, checked_conditions
from metta_fastagent.ops.conversion import check_pairs
from metta_fastagent.ops.dtypes import (
    NATIVE_DTYPES,
    contiguous,
    is_integer,
    native_floats,
    native_integers,
    under_autocast,
)
from metta_fastagent.runtime.checks import describe, is_floating, require_same_device, require_tensor
from metta_fastagent.runtime.dispatch import Operator


def evaluate_actions(
    logits: Tensor,
    actions: Tensor,
    cum_action_max_params: Tensor | None = None,
    mask: MaskLike = None,
    temperature: float | Tensor = 1.0,
    *,
    strict: bool = True,
    report: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the given actions, entropy, and all log-probabilities.

    Args:
        logits: floating-point tensor [N, A].
        actions: with a table, integer pairs (action type, parameter) [N, 2]; without one, integer logit indices [N].
        cum_action_max_params: int64 tensor [action types + 1], or None.
        mask: bool tensor [N, A], False for a forbidden action, whose log-probability is -inf and whose logit gets no
            gradient; or, with a table, a pair of masks over types [N, action types] and parameters [N, P]. Both must
            allow an action; they are combined first, in a few launches.
        temperature: divides the logits; a number > 0, or a tensor with one element on the logits' device that does not
            require a gradient. Off the CPU its value is not read: if it is not positive, results are NaN.
        strict: on the CPU raise an error for a row that is not a distribution (logits that are NaN or +inf, or no
            allowed logit above -inf); elsewhere report it for `raise_if_reported`. If False, the row's results are NaN.
        report: handle of the `Report` to which a kernel writes a bad row; 0 is shared by all calls without one.

    Returns:
        (log_prob [N], entropy [N] in nats, full_log_probs [N, A]), all of the logits' dtype (float32 under CUDA
        autocast), of the masked distribution softmax(logits / temperature). All three are differentiable with respect
        to the logits, any number of times.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device; on the CPU also an action out of range, or with
            `strict` a row that is not a distribution.

    Example:
        >>> logits, mask = torch.zeros(2, 4), torch.tensor([[True, True, False, False]] * 2)
        >>> log_prob, entropy, full_log_probs = evaluate_actions(logits, torch.tensor([0, 1]), mask=mask)
        >>> log_prob.exp()
        tensor([0.5000, 0.5000])
    """
    logits = require_logits(logits)
    if cum_action_max_params is not None:
        actions, cum_action_max_params = check_pairs(actions, cum_action_max_params)
        expected = (logits.shape[0], 2)
    else:
        expected = (logits.shape[0],)
        if not isinstance(actions, Tensor) or not is_integer(actions.dtype):
            require_tensor("actions", actions, f"an integer tensor of shape {list(expected)}", is_integer)
    if actions.shape != expected:
        raise ValueError(f"actions: got {describe(actions)}, expected shape {list(expected)} for {describe(logits)}")
    require_same_device("actions", actions, "logits", logits)
    logits = float32_under_autocast(logits)
    conditions = checked_conditions(logits, mask, temperature, cum_action_max_params)
    if autograd.in_plain_pytorch():
        return reference.evaluate_actions_forward_eager(logits, actions, cum_action_max_params, conditions, strict)[:3]
    if not autograd.records_graph(logits):
        return _evaluate_actions_forward(logits, actions, cum_action_max_params, conditions, strict, report)[:3]
    return _EvaluateActions.apply(logits, actions, cum_action_max_params, strict, report, *(conditions or ()))


class _EvaluateActions(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, actions: Tensor, cum_action_max_params: Tensor | None, strict, report, *fields):
        # Autograd does not see tensors inside a tuple.
        conditions = Conditions(*fields) if fields else None
        log_prob, entropy, full_log_probs, index = _evaluate_actions_forward(
            logits, actions, cum_action_max_params, conditions, strict, report
        )
        save_for_gradient(ctx, logits, index, conditions)
        return log_prob, entropy, full_log_probs

    @staticmethod
    def backward(ctx, *grads):
        return logits_gradient(ctx, *grads), *[None] * (len(ctx.needs_input_grad) - 1)


def save_for_gradient(ctx: Any, logits: Tensor, index: Tensor, conditions: Conditions | None) -> None:
    """Save in `ctx` what `logits_gradient` needs."""
    if conditions is None:
        ctx.save_for_backward(logits, index)
    else:
        ctx.save_for_backward(logits, index, *conditions[:2])
        ctx.temperature = conditions.temperature
    ctx.set_materialize_grads(False)
    ctx.backend = autograd.chosen_backend()


def logits_gradient(ctx: Any, *grads: Tensor | None) -> Tensor:
    """Gradient of the saved logits [N, A] for upstream gradients of log_prob, entropy and full_log_probs."""
    logits, index, *given = ctx.saved_tensors
    conditions = Conditions(given[0], given[1], ctx.temperature) if given else None
    if not autograd.needs_graph():
        return autograd.run_backward(ctx.backend, evaluate_actions_backward, logits, index, *grads, conditions)
    return autograd.gradients_with_graph(lambda x: reference.evaluate_index(x, index, conditions), (logits,), grads)[0]


def _forward_native(
    logits: Tensor,
    actions: Tensor,
    cum_action_max_params: Tensor | None,
    conditions: Conditions | None,
    strict: bool,
    report: int,
) -> tuple[Tensor, ...]:
    # The operator stops at a bad action before any arithmetic; the eager twin raises the error.
    *outputs, index, bad_row, bad_logits = torch.ops.metta_fastagent_native.evaluate_actions_forward.default(
        native_floats(logits),
        native_integers(actions),
        contiguous(cum_action_max_params),
        *(() if conditions is None else conditions.native()),
    )
    if bad_row >= 0:
        return reference.evaluate_actions_forward_eager(logits, actions, cum_action_max_params)
    if strict and bad_logits >= 0:
        reference.refuse_rows_without_distribution(outputs[1], logits, conditions)
    return *(outputs if outputs[0].dtype == logits.dtype else [each.to(logits.dtype) for each in outputs]), index


def _backward_native(
    logits: Tensor,
    index: Tensor,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_full_log_probs: Tensor | None,
    conditions: Conditions | None,
) -> Tensor:
    grads = grad_log_prob, grad_entropy, contiguous(grad_full_log_probs)
    if logits.dtype not in NATIVE_DTYPES:
        grads = tuple(None if grad is None else grad.float() for grad in grads)
    grad_logits = torch.ops.metta_fastagent_native.evaluate_actions_backward.default(
        native_floats(logits), index.contiguous(), *grads, *(() if conditions is None else conditions.native())
    )
    return grad_logits if grad_logits.dtype == logits.dtype else grad_logits.to(logits.dtype)


def _forward_fake(logits: Tensor, actions: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    index = actions.new_empty(rows, dtype=torch.int64)
    return logits.new_empty(rows), logits.new_empty(rows), logits.new_empty(logits.shape), index


_evaluate_actions_forward = Operator(
    f"evaluate_actions_forward(Tensor logits, Tensor actions, Tensor? cum_action_max_params, {SCHEMA}, bool strict,"
    " int report) -> (Tensor log_prob, Tensor entropy, Tensor full_log_probs, Tensor index)",
    reference.evaluate_actions_forward_eager,
    _forward_fake,
    f"{__package__}.kernels:evaluate_actions_forward_cuda",
    _forward_native,
    packed=(3, Conditions),
)
evaluate_actions_backward = Operator(
    "evaluate_actions_backward(Tensor logits, Tensor index, Tensor? grad_log_prob, Tensor? grad_entropy,"
    f" Tensor? grad_full_log_probs, {SCHEMA}) -> Tensor",
    reference.evaluate_actions_backward_eager,
    lambda logits, *_: logits.new_empty(logits.shape),
    f"{__package__}.kernels:evaluate_actions_backward_cuda",
    _backward_native,
    packed=(5, Conditions),
)


def require_logits(logits: object) -> Tensor:
    """Return `logits` if it is a floating-point tensor [N, A] with at least one action."""
    expected = "a floating-point tensor of shape [N, A] with A >= 1"
    return require_tensor("logits", logits, expected, is_floating, lambda t: t.dim() == 2 and t.shape[1] > 0)


def float32_under_autocast(logits: Tensor) -> Tensor:
    """Logits in float32 under CUDA autocast, which runs log_softmax in float32; otherwise unchanged."""
    return logits.float() if logits.is_cuda and under_autocast(logits.device) else logits
