"""PPO in plain PyTorch: the reference, and the path for devices without a kernel."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metta_fastagent.ops.categorical.conditions import SCHEMA as CONDITIONS_SCHEMA
from metta_fastagent.ops.categorical.conditions import Conditions
from metta_fastagent.ops.categorical.reference import (
    evaluate_actions_backward_eager,
    evaluate_actions_forward_eager,
    evaluate_index,
)
from metta_fastagent.ops.dtypes import compute_dtype


def conditions_of(*fields: Any) -> Conditions | None:
    """The Conditions with these fields; None if they change nothing."""
    mask, in_memory, temperature = fields
    return None if mask is None and in_memory is None and temperature == 1 else Conditions(*fields)


class Samples(NamedTuple):
    """The arguments of `ppo_loss` besides the logits [N, A]; numbers per row may have any shape with N elements."""

    actions: Tensor  # [N, 2] pairs or, without a table, [N] indices
    value: Tensor
    old_log_prob: Tensor
    old_value: Tensor
    advantages: Tensor
    returns: Tensor
    cum_action_max_params: Tensor | None
    valid: Tensor | None
    count: Tensor | None
    mask: Tensor | None
    temperature_tensor: Tensor | None
    temperature: float
    clip_coef: float
    vf_clip_coef: float
    vf_coef: float
    ent_coef: float

    def conditions(self) -> Conditions | None:
        """Mask and temperature; None if they change nothing."""
        return conditions_of(self.mask, self.temperature_tensor, self.temperature)


# The fields as written in an operator's schema.
SCHEMA = (
    "Tensor actions, Tensor value, Tensor old_log_prob, Tensor old_value, Tensor advantages, Tensor returns,"
    f" Tensor? cum_action_max_params, Tensor? valid, Tensor? count, {CONDITIONS_SCHEMA}, float clip_coef,"
    " float vf_clip_coef, float vf_coef, float ent_coef"
)


class Rollout(NamedTuple):
    """The arguments of `advantages`."""

    rewards: Tensor
    values: Tensor
    ends: Tensor
    next_value: Tensor
    bootstrap_values: Tensor
    valid: Tensor | None
    ratios: Tensor | None
    gamma: float
    lam: float
    rho_clip: float
    c_clip: float

    def tensors(self, dtype: torch.dtype) -> Sequence[Any]:
        """The first seven fields, floating-point ones in this dtype."""
        return [each if each is None or each.dtype == torch.bool else each.to(dtype) for each in self[:7]]


def advantages_eager(rollout: Rollout) -> Tensor:
    """`advantages`, differentiable any number of times."""
    dtype = rollout.values.dtype
    rewards, values, ends, next_value, bootstrap_values, valid, ratios = rollout.tensors(compute_dtype(dtype))
    following = torch.cat([values[:, 1:], next_value.unsqueeze(1)], dim=1)
    deltas = rewards + rollout.gamma * torch.where(ends, bootstrap_values, following) - values
    decay = rollout.gamma * rollout.lam * (~ends).to(values.dtype)
    if ratios is not None:
        deltas, decay = deltas * ratios.clamp(max=rollout.rho_clip), decay * ratios.clamp(max=rollout.c_clip)
    if valid is not None:
        deltas, decay = torch.where(valid, deltas, 0.0), torch.where(valid, decay, 0.0)
    found = [deltas[:, -1]]
    for delta, factor in zip(reversed(deltas[:, :-1].unbind(1)), reversed(decay[:, :-1].unbind(1)), strict=True):
        found.append(torch.addcmul(delta, factor, found[-1]))
    return torch.stack(found[::-1], dim=1).to(dtype)


def ppo_loss_forward_eager(
    logits: Tensor, samples: Samples, strict: bool = True, report: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], statistics [5], divisor [], index int64 [N], slopes [2, N]).

    `divisor` is the number of rows in the means, at least 1. `index` is -1 for a row without a gradient. `slopes` are
    the derivatives of divisor times loss with respect to log-probability and value, 0 in such rows.
    """
    x = logits.to(compute_dtype(logits.dtype))
    log_prob, entropy, _, index = evaluate_actions_forward_eager(
        x, samples.actions, samples.cum_action_max_params, samples.conditions(), strict
    )
    counts, divisor = _counted(samples, x)
    loss, statistics, slopes = _loss(log_prob, entropy, samples, counts, divisor)
    if counts is not None:
        index = torch.where(counts, index, -1)
    if counts is not None or index.device.type != "cpu":
        slopes = torch.where(index >= 0, slopes, 0.0)
    return loss, statistics.detach(), divisor, index, slopes


def ppo_loss_of_log_prob_eager(log_prob: Tensor, entropy: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    """(loss [], statistics [5]) from log-probabilities and entropies [N], differentiable any number of times."""
    dtype = compute_dtype(log_prob.dtype)
    log_prob, entropy = log_prob.reshape(-1).to(dtype), entropy.reshape(-1).to(dtype)
    loss, statistics, _ = _loss(log_prob, entropy, samples, *_counted(samples, log_prob))
    return loss, statistics.detach()


def _counted(samples: Samples, rows: Tensor) -> tuple[Tensor | None, Tensor]:
    """(rows in the sums, bool [N] or None for all; their divisor, in the dtype of `rows` [N, ...])."""
    counts = None if samples.valid is None else samples.valid.reshape(-1)
    if samples.count is not None:
        divisor = samples.count.reshape(()).to(rows.dtype)
    elif counts is not None:
        divisor = counts.sum().to(rows.dtype)
    else:
        divisor = torch.full((), rows.shape[0], dtype=rows.dtype, device=rows.device)
    return counts, torch.where(divisor > 0, divisor, 1.0)


def _loss(
    log_prob: Tensor, entropy: Tensor, samples: Samples, counts: Tensor | None, divisor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, statistics, slopes of all rows); `counts`, bool [N] or None, says which rows are in the sums."""
    value, old_log_prob, old_value, advantages, returns = (each.reshape(-1).to(log_prob.dtype) for each in samples[1:6])
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    # min(r A, clip(r) A), but 0 for A = 0 and r = inf.
    low, high = ratio.clamp(min=1 - samples.clip_coef), ratio.clamp(max=1 + samples.clip_coef)
    bounded = torch.where(advantages >= 0, high, low)
    surrogate = bounded * advantages
    difference = value - returns
    error = difference.square()
    if samples.vf_clip_coef > 0:
        change = value - old_value
        clipped = old_value + change.clamp(-samples.vf_clip_coef, samples.vf_clip_coef) - returns
        # Within the range both errors are equal up to rounding.
        worse = (change.abs() > samples.vf_clip_coef) & (clipped.square() > error)
        error = torch.where(worse, clipped.square(), error)
        difference = torch.where(worse, 0.0, difference)
    clip = ((ratio - 1).abs() > samples.clip_coef).to(ratio.dtype)
    parts = torch.stack([-surrogate, 0.5 * error, entropy, torch.expm1(log_ratio) - log_ratio, clip])
    if counts is not None:
        parts = torch.where(counts, parts, 0.0)
    statistics = parts.sum(1) / divisor
    policy_loss, value_loss, mean_entropy = statistics[:3].unbind()
    loss = policy_loss.add(value_loss, alpha=samples.vf_coef).sub(mean_entropy, alpha=samples.ent_coef)
    slopes = torch.stack([torch.where(bounded == ratio, -surrogate, 0.0), samples.vf_coef * difference])
    return loss, statistics, slopes


def ppo_loss_of_index(logits: Tensor, samples: Samples, divisor: Tensor) -> Tensor:
    """The loss, differentiable any number of times; actions are the indices of `ppo_loss_forward_eager`."""
    x, index = logits.to(compute_dtype(logits.dtype)), samples.actions
    log_prob, entropy, _ = evaluate_index(x, index.clamp(min=0), samples.conditions())
    return _loss(log_prob, entropy, samples, index >= 0, divisor)[0]


class LossGradient(NamedTuple):
    """The arguments of `ppo_loss`'s backward: the gradient of the loss, and results of `ppo_loss_forward_eager`."""

    logits: Tensor
    value: Tensor
    grad: Tensor
    index: Tensor
    slopes: Tensor
    divisor: Tensor
    mask: Tensor | None
    temperature_tensor: Tensor | None
    temperature: float
    ent_coef: float

    def conditions(self) -> Conditions | None:
        """Mask and temperature; None if they change nothing."""
        return conditions_of(self.mask, self.temperature_tensor, self.temperature)


def ppo_loss_backward_eager(given: LossGradient) -> tuple[Tensor, Tensor]:
    """Gradients of logits and value."""
    logits, value, grad, index, slopes, divisor = given[:6]
    scale = grad.to(slopes.dtype) / divisor
    grad_log_prob, grad_value = (slopes * scale).unbind()
    grad_entropy = (scale * -given.ent_coef).expand(index.shape)
    grads = grad_log_prob, grad_entropy, None
    grad_logits = evaluate_actions_backward_eager(logits, index, *grads, given.conditions())
    grad_logits = torch.where((index >= 0).unsqueeze(1), grad_logits, 0.0)
    return grad_logits, grad_value.to(value.dtype, copy=True).view(value.shape)
