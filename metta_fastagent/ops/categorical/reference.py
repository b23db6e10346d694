"""The categorical distribution in plain PyTorch: the reference, and the path for devices without a kernel.

    full_log_probs = log_softmax(z)                                   p = exp(full_log_probs)
    log_prob       = full_log_probs[row, index]
    entropy        = -sum_j p_j full_log_probs_j                      a term with p_j = 0 counts as 0

where z are the logits x under a mask and a temperature (see `conditions`).
"""

import torch
from torch import Tensor

from metta_fastagent.ops.autograd import checks_values
from metta_fastagent.ops.categorical.conditions import Conditions
from metta_fastagent.ops.conversion import action_to_logit_index_eager, logit_index_to_action_eager
from metta_fastagent.ops.dtypes import compute_dtype
from metta_fastagent.runtime.checks import BadRowError
from metta_fastagent.runtime.reports import NO_ACTION, NO_DISTRIBUTION

# Its exp is 0 in every dtype.
LOWEST_LOG_PROB = -1000.0


def condition(logits: Tensor, conditions: Conditions | None) -> Tensor:
    """z [N, A] in the dtype of the arithmetic; a temperature that is not positive makes it NaN."""
    z = logits.to(compute_dtype(logits.dtype))
    if conditions is None:
        return z
    z = _divided(z, conditions)
    return z if conditions.mask is None else z.masked_fill(~conditions.mask, -torch.inf)


def _divided(x: Tensor, conditions: Conditions) -> Tensor:
    divisor = conditions.divisor()
    if isinstance(divisor, Tensor):
        return x / divisor.to(x.dtype)
    return x if divisor == 1 else x / divisor


def gradient_through_conditions(grad: Tensor, conditions: Conditions | None) -> Tensor:
    """The gradient of the logits x, given the gradient of z."""
    if conditions is None:
        return grad
    return _divided(grad if conditions.mask is None else torch.where(conditions.mask, grad, 0.0), conditions)


def refuse_rows_without_distribution(entropy: Tensor, logits: Tensor, conditions: Conditions | None) -> None:
    """Raise a BadRowError for the first row whose entropy is NaN: its logits z hold NaN or +inf, or only -inf."""
    bad = entropy.isnan()
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        mask = None if conditions is None else conditions.mask
        if mask is not None and not bool((mask[row] & (logits[row] != -torch.inf)).any()):
            raise BadRowError(f"mask[{row}]: {NO_ACTION}")
        raise BadRowError(f"logits[{row}]: {NO_DISTRIBUTION}")


def select_log_prob(full_log_probs: Tensor, index: Tensor) -> Tensor:
    """Entry `index` of each row; NaN for an index out of range, which the CPU rejects earlier."""
    if checks_values(index):
        return full_log_probs.gather(1, index.unsqueeze(1)).squeeze(1)
    known = index.clamp(0, full_log_probs.shape[1] - 1)
    return torch.where(known == index, full_log_probs.gather(1, known.unsqueeze(1)).squeeze(1), torch.nan)


def entropy_of(full_log_probs: Tensor) -> Tensor:
    """-sum p log p over the last dimension; a term with p = 0 counts as 0."""
    return -(full_log_probs.exp() * _without_infinity(full_log_probs)).sum(-1)


def _without_infinity(full_log_probs: Tensor) -> Tensor:
    """Replace -inf by a finite number: its product with p = 0 is 0, in derivatives too. NaN stays NaN."""
    return full_log_probs.clamp(min=LOWEST_LOG_PROB)


def evaluate_actions_forward_eager(
    logits: Tensor,
    actions: Tensor,
    cum_action_max_params: Tensor | None,
    conditions: Conditions | None = None,
    strict: bool = True,
    report: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log_prob [N], entropy [N], full_log_probs [N, A], index int64 [N]) for pairs or, without a table, indices."""
    if cum_action_max_params is not None:
        actions = action_to_logit_index_eager(actions, cum_action_max_params)
    index = _checked_index(actions, logits.shape[1])
    log_prob, entropy, full_log_probs = evaluate_index(logits, index, conditions)
    if strict and checks_values(logits):
        refuse_rows_without_distribution(entropy, logits, conditions)
    return log_prob, entropy, full_log_probs, index


def evaluate_index(
    logits: Tensor, index: Tensor, conditions: Conditions | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(log_prob, entropy, full_log_probs) for logit indices, differentiable any number of times."""
    full_log_probs = torch.log_softmax(condition(logits, conditions), dim=-1)
    outputs = select_log_prob(full_log_probs, index), entropy_of(full_log_probs), full_log_probs
    log_prob, entropy, full_log_probs = (output.to(logits.dtype) for output in outputs)
    return log_prob, entropy, full_log_probs


def _checked_index(index: Tensor, num_actions: int) -> Tensor:
    # A copy, because an operator must not return its input.
    index = index.to(torch.int64, copy=True)
    legal = (index >= 0) & (index < num_actions)
    if checks_values(index) and not bool(legal.all()):
        row = int((~legal).nonzero()[0])
        raise BadRowError(f"actions[{row}]: got logit index {int(index[row])}, expected 0 to {num_actions - 1}")
    return index


def evaluate_actions_backward_eager(
    logits: Tensor,
    index: Tensor,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_full_log_probs: Tensor | None,
    conditions: Conditions | None = None,
) -> Tensor:
    """Gradient [N, A] of the logits; an upstream gradient of None counts as 0.

    For upstream gradients g (log_prob), h (entropy) and f (full_log_probs),

        d z_j = g (1[j = index] - p_j) - h p_j (full_log_probs_j + entropy) + f_j - p_j sum_k f_k
    """
    dtype = compute_dtype(logits.dtype)
    full_log_probs = torch.log_softmax(condition(logits, conditions), dim=-1)
    probs = full_log_probs.exp()
    if grad_entropy is None:
        grad = torch.zeros_like(probs)
    else:
        information = _without_infinity(full_log_probs)
        entropy = -(probs * information).sum(-1, keepdim=True)
        grad = information.add_(entropy).mul_(probs).mul_(-grad_entropy.to(dtype).unsqueeze(1))
    # Factor of every p_j: the sum of the upstream gradients of the row's log-probabilities.
    total = torch.zeros_like(probs[:, :1])
    if grad_log_prob is not None:
        upstream = grad_log_prob.to(dtype).unsqueeze(1)
        grad.scatter_add_(1, index.clamp(0, logits.shape[1] - 1).unsqueeze(1), upstream)
        total += upstream
    if grad_full_log_probs is not None:
        upstream = grad_full_log_probs.to(dtype)
        grad += upstream
        total += upstream.sum(-1, keepdim=True)
    grad.addcmul_(probs, total, value=-1)
    if index.device.type != "cpu":
        legal = (index >= 0) & (index < logits.shape[1])
        grad = torch.where(legal.unsqueeze(1), grad, 0.0)
    return gradient_through_conditions(grad, conditions).to(logits.dtype)


def sample_actions_eager(
    logits: Tensor,
    action_index_tensor: Tensor | None,
    conditions: Conditions | None = None,
    strict: bool = True,
    greedy: bool = False,
    report: int = 0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(index [N], log_prob [N], entropy [N], full_log_probs [N, A], pair int32 [N, 2]) of one draw per row.

    Without a table the pair is an empty tensor [0, 2].
    """
    z = condition(logits, conditions)
    full_log_probs = torch.log_softmax(z, dim=-1)
    entropy = entropy_of(full_log_probs)
    checked = strict and checks_values(logits)
    if checked:
        refuse_rows_without_distribution(entropy, logits, conditions)
    if greedy:
        index = z.argmax(-1)
    else:
        probs = full_log_probs.exp()
        # multinomial stops the whole device on a NaN; the log-probability of such a row is NaN already.
        probs = probs if checked else torch.where(full_log_probs.isnan(), 1.0, probs)
        index = torch.multinomial(probs, num_samples=1, generator=generator).view(-1)
    if not checked:
        index = torch.where(entropy.isnan(), 0, index)
    if action_index_tensor is None:
        pair = torch.empty(0, 2, dtype=torch.int32, device=logits.device)
    else:
        pair = logit_index_to_action_eager(index, action_index_tensor).to(torch.int32)
    log_prob = select_log_prob(full_log_probs, index)
    return index, log_prob.to(logits.dtype), entropy.to(logits.dtype), full_log_probs.to(logits.dtype), pair
