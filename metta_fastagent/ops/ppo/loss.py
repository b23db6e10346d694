"""The loss of proximal policy optimization, directly from logits and values, with its gradients.

`ppo_loss` has the formula, `evaluate_actions` defines log-probability and entropy. Schulman et al. 2017
(https://arxiv.org/abs/1707.06347) for the loss, PPO2
(https://github.com/openai/baselines/blob/master/baselines/ppo2/model.py) for the value clip,
http://joschu.net/blog/kl-approx.html for the estimate r - 1 - log r of the KL divergence, which is never negative.

One launch forward and one backward. A row with an action out of range (possible only off the CPU) makes the loss NaN
and gets no gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metta_fastagent.ops import autograd
from metta_fastagent.ops.categorical.conditions import SCHEMA as CONDITIONS_SCHEMA
from metta_fastagent.ops.categorical.conditions import Conditions, MaskLike, checked_conditions
from metta_fastagent.ops.categorical.evaluate import require_logits
from metta_fastagent.ops.conversion import check_pairs
from metta_fastagent.ops.dtypes import compute_dtype, contiguous, is_integer, native_floats, native_integers
from metta_fastagent.ops.ppo import reference
from metta_fastagent.ops.ppo.reference import SCHEMA, LossGradient, Samples
from metta_fastagent.runtime.checks import describe, is_floating, require_number, require_same_device, require_tensor
from metta_fastagent.runtime.dispatch import Operator


def ppo_loss(
    logits: Tensor,
    actions: Tensor,
    value: Tensor,
    old_log_prob: Tensor,
    old_value: Tensor,
    advantages: Tensor,
    returns: Tensor,
    cum_action_max_params: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    count: Tensor | None = None,
    mask: MaskLike = None,
    temperature: float | Tensor = 1.0,
    clip_coef: float,
    vf_clip_coef: float,
    vf_coef: float,
    ent_coef: float,
    strict: bool = True,
    report: int = 0,
) -> tuple[Tensor, Tensor]:
    """The PPO loss: clipped surrogate, value error and entropy bonus, each a mean over rows.

        loss = -mean(min(r A, clip(r, 1 - c, 1 + c) A)) + vf_coef mean(E) / 2 - ent_coef mean(H)
        r    = exp(log_prob - old_log_prob)      A the advantages      H the entropy      E = (value - returns)^2

    With vf_clip_coef = v > 0, E is the larger of that and (old_value + clip(value - old_value, -v, v) - returns)^2.
    Arguments with a value per row have N elements in row order, in any shape: [N], [N, 1], [B, T].

    Args:
        logits: floating-point tensor [N, A].
        actions: with a table, integer pairs (action type, parameter), [N, 2]; without one, an integer logit index per
            row.
        value: floating-point number per row, like the next four.
        old_log_prob, old_value: of the rollout.
        advantages: used as they are, so normalize them first.
        returns: targets of the value function.
        cum_action_max_params: int64 tensor [action types + 1], or None.
        valid: bool per row, False for a row that is left out of the means and gets no gradient. Its action and logits
            are still checked.
        count: one-element floating-point tensor on the logits' device that replaces the number of rows in the means, so
            that the losses of micro-batches add up to the loss of the whole batch.
        mask, temperature: as in `evaluate_actions`. An action that the mask forbids has log-probability -inf and ratio
            0, and makes the estimate of the KL divergence infinite.
        clip_coef: c, a number >= 0.
        vf_clip_coef: v, a number >= 0; 0 does not clip.
        vf_coef, ent_coef: weights, numbers.
        strict, report: as in `evaluate_actions`.

    Returns:
        (loss [], statistics [5]) in float32 (float64 for float64 logits). The loss is differentiable with respect to
        logits and value, once by a kernel and any number of times in plain PyTorch; everything else is treated as
        constant. The statistics are the means policy_loss, value_loss (E / 2), entropy, approx_kl and clip_fraction
        (the share of |r - 1| > c), without a gradient. If no row counts, all are 0.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or number; on the CPU also an action out of range, or
            with `strict` logits that do not form a distribution.

    Example:
        >>> logits, actions, value = torch.randn(8, 3), torch.randint(3, (8,)), torch.randn(8)
        >>> samples = value, torch.randn(8), value, torch.randn(8), torch.randn(8)
        >>> coefficients = {"clip_coef": 0.2, "vf_clip_coef": 0.0, "vf_coef": 0.5, "ent_coef": 0.01}
        >>> loss, statistics = ppo_loss(logits, actions, *samples, **coefficients)
        >>> loss.shape, statistics.shape
        (torch.Size([]), torch.Size([5]))
    """
    logits = require_logits(logits)
    rows = logits.shape[0]
    numbers = value, old_log_prob, old_value, advantages, returns
    _check_numbers(NUMBERS, numbers, rows, "logits", logits)
    actions, cum_action_max_params = _checked_actions(actions, cum_action_max_params, logits)
    _check_counted(valid, count, rows, "logits", logits)
    conditions = checked_conditions(logits, mask, temperature, cum_action_max_params) or Conditions()
    coefficients = _checked_coefficients(clip_coef, vf_clip_coef, vf_coef, ent_coef)
    samples = Samples(actions, *numbers, cum_action_max_params, valid, count, *conditions, *coefficients)
    if autograd.in_plain_pytorch():
        return reference.ppo_loss_forward_eager(logits, samples, strict)[:2]
    if not autograd.records_graph(logits, value):
        return _ppo_loss_forward(logits, samples, strict, report)[:2]
    return _PpoLoss.apply(logits, value, samples, strict, report)


def ppo_loss_of_log_prob(
    log_prob: Tensor,
    entropy: Tensor,
    value: Tensor,
    old_log_prob: Tensor,
    old_value: Tensor,
    advantages: Tensor,
    returns: Tensor,
    *,
    valid: Tensor | None = None,
    count: Tensor | None = None,
    clip_coef: float,
    vf_clip_coef: float,
    vf_coef: float,
    ent_coef: float,
) -> tuple[Tensor, Tensor]:
    """`ppo_loss` for an agent that evaluates its actions itself, in plain PyTorch.

    Args:
        log_prob, entropy: floating-point tensors with N elements.
        value, old_log_prob, old_value, advantages, returns, valid, count: as in `ppo_loss`.
        clip_coef, vf_clip_coef, vf_coef, ent_coef: as in `ppo_loss`.

    Returns:
        (loss [], statistics [5]) as in `ppo_loss`; the loss is differentiable with respect to the first three.

    Raises:
        TypeError, ValueError: wrong type, dtype, number of elements, device or number.

    Example:
        >>> log_prob, entropy, value, old_log_prob, old_value, advantages, returns = torch.rand(7, 4, 16)
        >>> old = old_log_prob, old_value, advantages, returns
        >>> coefficients = {"clip_coef": 0.2, "vf_clip_coef": 0.0, "vf_coef": 0.5, "ent_coef": 0.01}
        >>> loss, statistics = ppo_loss_of_log_prob(log_prob, entropy, value, *old, **coefficients)
        >>> loss.shape, statistics.shape
        (torch.Size([]), torch.Size([5]))
    """
    log_prob = require_tensor("log_prob", log_prob, "a floating-point tensor", is_floating)
    numbers = value, old_log_prob, old_value, advantages, returns
    _check_numbers(("entropy", *NUMBERS), (entropy, *numbers), log_prob.numel(), "log_prob", log_prob)
    _check_counted(valid, count, log_prob.numel(), "log_prob", log_prob)
    coefficients = _checked_coefficients(clip_coef, vf_clip_coef, vf_coef, ent_coef)
    samples = Samples(log_prob, *numbers, None, valid, count, *Conditions(), *coefficients)
    return reference.ppo_loss_of_log_prob_eager(log_prob, entropy, samples)


def _check_numbers(names: Sequence[str], tensors: Sequence[Any], rows: int, like_name: str, like: Tensor) -> None:
    """Each must be a floating-point tensor with one element per row, on the device of `like`."""
    for name, tensor in zip(names, tensors, strict=True):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.numel() != rows:
            _refuse_rows(name, tensor, "floating-point", is_floating, rows, like_name)
        if tensor.device != like.device:
            require_same_device(name, tensor, like_name, like)


def _check_counted(valid: Tensor | None, count: Tensor | None, rows: int, like_name: str, like: Tensor) -> None:
    if valid is not None:
        if not isinstance(valid, Tensor) or valid.dtype != torch.bool or valid.numel() != rows:
            _refuse_rows("valid", valid, "bool", lambda dtype: dtype == torch.bool, rows, like_name)
        require_same_device("valid", valid, like_name, like)
    if count is not None:
        expected = "a floating-point tensor with one element"
        count = require_tensor("count", count, expected, is_floating, lambda found: found.numel() == 1)
        require_same_device("count", count, like_name, like)


def _checked_coefficients(clip_coef: float, vf_clip_coef: float, vf_coef: float, ent_coef: float) -> tuple[float, ...]:
    return (
        require_number("clip_coef", clip_coef, "a number >= 0", 0.0),
        require_number("vf_clip_coef", vf_clip_coef, "a number >= 0", 0.0),
        require_number("vf_coef", vf_coef, "a number"),
        require_number("ent_coef", ent_coef, "a number"),
    )


def _refuse_rows(name: str, tensor: object, kind: str, holds: Any, rows: int, like_name: str) -> None:
    each = f"one for each row of {like_name}" if like_name == "logits" else f"as {like_name}"
    expected = f"a {kind} tensor with {rows} elements, {each}"
    require_tensor(name, tensor, expected, holds, lambda found: found.numel() == rows)


def _checked_actions(actions: object, table: Tensor | None, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """(pairs [N, 2] or indices [N], table)."""
    rows = logits.shape[0]
    if table is not None:
        actions, table = check_pairs(actions, table)
        expected, shape = f"a pair for each of {rows} rows of logits", (rows, 2)
    else:
        expected, shape = f"an integer for each of {rows} rows of logits", (rows,)
        actions = require_tensor("actions", actions, expected, is_integer)
    if actions.shape != shape:
        if actions.numel() != rows * len(shape):
            raise ValueError(f"actions: got {describe(actions)}, expected {expected}")
        actions = actions.reshape(shape)
    require_same_device("actions", actions, "logits", logits)
    return actions, table


# Fields of Samples: the numbers per row, and the position of the first field that is not a tensor.
NUMBERS, TENSORS = Samples._fields[1:6], Samples._fields.index("temperature")


class _PpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, value, samples, strict, report):
        # Autograd does not see tensors inside a tuple, so the tensors in `samples` are constants.
        loss, statistics, divisor, index, slopes = _ppo_loss_forward(logits, samples, strict, report)
        ctx.save_for_backward(
            logits, divisor, index, slopes, value, *samples[2:6], samples.mask, samples.temperature_tensor
        )
        ctx.numbers = samples[TENSORS:]
        ctx.backend = autograd.chosen_backend()
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return loss, statistics

    @staticmethod
    def backward(ctx, *grads):
        logits, divisor, index, slopes, value, *others = ctx.saved_tensors
        temperature, *coefficients = ctx.numbers
        conditions, others = (*others[4:], temperature), others[:4]
        if grads[0] is None:
            grad_logits = grad_value = None
        elif autograd.needs_graph():
            samples = Samples._make([index, value, *others, None, None, None, *conditions, *coefficients])
            grad_logits, grad_value = _gradients_with_graph(ctx, logits, samples, divisor, grads[:1])
        else:
            saved = logits, value, grads[0], index, slopes, divisor
            given = LossGradient._make([*saved, *conditions, coefficients[-1]])
            grad_logits, grad_value = autograd.run_backward(ctx.backend, _ppo_loss_backward, given)
        return grad_logits, grad_value, None, None, None


def _gradients_with_graph(
    ctx: Any, logits: Tensor, samples: Samples, divisor: Tensor, grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of logits and value, as far as they are needed; `samples.actions` are the forward's indices."""
    wanted = ctx.needs_input_grad[:2]
    inputs = [each for each, needed in zip((logits, samples.value), wanted, strict=True) if needed]
    function = lambda *_: (reference.ppo_loss_of_index(logits, samples, divisor),)  # noqa: E731
    found = iter(autograd.gradients_with_graph(function, inputs, grads))
    return [next(found) if needed else None for needed in wanted]


def _forward_native(logits: Tensor, samples: Samples, strict: bool, report: int) -> tuple[Tensor, ...]:
    x = native_floats(logits)
    *outputs, bad_row, bad_logits = torch.ops.metta_fastagent_native.ppo_loss_forward.default(
        x,
        native_integers(samples.actions),
        *[_native_like(each, x) for each in samples[1:6]],
        contiguous(samples.cum_action_max_params),
        contiguous(samples.valid),
        None if samples.count is None else _native_like(samples.count, x),
        *_native_conditions(samples.conditions()),
        *samples[-4:],
    )
    if bad_row >= 0 or (strict and bad_logits >= 0):
        # The eager twin raises the error.
        return reference.ppo_loss_forward_eager(logits, samples, strict)
    return tuple(outputs)


def _backward_native(given: LossGradient) -> tuple[Tensor, Tensor]:
    logits, value, grad, index, slopes, divisor = given[:6]
    grad_logits, grad_value = torch.ops.metta_fastagent_native.ppo_loss_backward.default(
        _native_like(grad, slopes), native_floats(logits), index.contiguous(), slopes.contiguous(), divisor,
        *_native_conditions(given.conditions()), given.ent_coef,
    )  # fmt: skip
    return _like(grad_logits, logits), _like(grad_value, value)


def _native_like(tensor: Tensor, other: Tensor) -> Tensor:
    """In contiguous memory and of the other's dtype."""
    return (tensor if tensor.dtype == other.dtype else tensor.to(other.dtype)).contiguous()


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """Of the other's dtype and shape."""
    tensor = tensor if tensor.dtype == other.dtype else tensor.to(other.dtype)
    return tensor if tensor.shape == other.shape else tensor.view(other.shape)


def _native_conditions(conditions: Conditions | None) -> tuple[Tensor | None, float]:
    return (None, 1.0) if conditions is None else conditions.native()


def _forward_fake(logits: Tensor, samples: Samples, *_: Any) -> tuple[Tensor, ...]:
    rows, dtype = logits.shape[0], compute_dtype(logits.dtype)
    index = logits.new_empty(rows, dtype=torch.int64)
    shapes = (), (5,), (), (2, rows)
    loss, statistics, divisor, slopes = (logits.new_empty(shape, dtype=dtype) for shape in shapes)
    return loss, statistics, divisor, index, slopes


_ppo_loss_forward = Operator(
    f"ppo_loss_forward(Tensor logits, {SCHEMA}, bool strict, int report)"
    " -> (Tensor loss, Tensor statistics, Tensor divisor, Tensor index, Tensor slopes)",
    reference.ppo_loss_forward_eager,
    _forward_fake,
    f"{__package__}.kernels:ppo_loss_forward_cuda",
    _forward_native,
    packed=(1, Samples),
)
_ppo_loss_backward = Operator(
    "ppo_loss_backward(Tensor logits, Tensor value, Tensor grad, Tensor index, Tensor slopes, Tensor divisor,"
    f" {CONDITIONS_SCHEMA}, float ent_coef) -> (Tensor grad_logits, Tensor grad_value)",
    reference.ppo_loss_backward_eager,
    lambda given: (given.logits.new_empty(given.logits.shape), given.value.new_empty(given.value.shape)),
    f"{__package__}.kernels:ppo_loss_backward_cuda",
    _backward_native,
    packed=(0, LossGradient),
)
