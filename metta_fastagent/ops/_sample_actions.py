"""Draw one action per row from categorical logits, with its log-probability and the entropy.

    full_log_probs = log_softmax(logits)         index ~ Categorical(exp(full_log_probs))

The eager twin draws as `log_softmax -> exp -> torch.multinomial` does, from PyTorch's generators, so
`torch.manual_seed` reproduces it and the draws equal those of that formula. The gradient is that of `evaluate_actions`
at the drawn index.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metta_fastagent._dispatch import register
from metta_fastagent.ops._action_index import check_action_index_tensor, logit_index_to_action_eager
from metta_fastagent.ops._checks import compute_dtype, describe, require_logits, require_same_device
from metta_fastagent.ops._evaluate_actions import (
    entropy_of,
    evaluate_actions_backward,
    float32_under_autocast,
    select_log_prob,
)


def sample_actions_eager(
    logits: Tensor, action_index_tensor: Tensor | None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(index [N], log_prob [N], entropy [N], full_log_probs [N, A], pair [N, 2]) in plain PyTorch.

    Without a table the pair is an empty tensor [0, 2].
    """
    full_log_probs = torch.log_softmax(logits.to(compute_dtype(logits.dtype)), dim=-1)
    probs = full_log_probs.exp()
    if logits.device.type == "cpu":
        _refuse_rows_without_distribution(full_log_probs)
    else:
        # multinomial stops the whole device on a NaN; such a row's log-probability is NaN already.
        probs = torch.where(full_log_probs.isnan(), 1.0, probs)
    index = torch.multinomial(probs, num_samples=1, generator=generator).view(-1)
    if action_index_tensor is None:
        pair = torch.empty(0, 2, dtype=torch.int32, device=logits.device)
    else:
        pair = logit_index_to_action_eager(index, action_index_tensor).to(torch.int32)
    log_prob, entropy = select_log_prob(full_log_probs, index), entropy_of(full_log_probs)
    return index, log_prob.to(logits.dtype), entropy.to(logits.dtype), full_log_probs.to(logits.dtype), pair


def _refuse_rows_without_distribution(full_log_probs: Tensor) -> None:
    bad = full_log_probs.isnan().any(dim=-1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"logits[{row}]: holds NaN or +inf, or is -inf throughout; expected finite values or some -inf"
        )


def _fake(logits: Tensor, action_index_tensor: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows),
        logits.new_empty(rows),
        logits.new_empty(logits.shape),
        logits.new_empty((0 if action_index_tensor is None else rows, 2), dtype=torch.int32),
    )


_sample_actions = register(
    "sample_actions(Tensor logits, Tensor? action_index_tensor)"
    " -> (Tensor index, Tensor log_prob, Tensor entropy, Tensor full_log_probs, Tensor pair)",
    sample_actions_eager,
    _fake,
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)


class _SampleActions(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, action_index_tensor: Tensor | None, generator: torch.Generator | None):
        if generator is None:
            outputs = _sample_actions(logits, action_index_tensor)
        else:
            outputs = sample_actions_eager(logits, action_index_tensor, generator)
        index, _, _, _, pair = outputs
        ctx.save_for_backward(logits, index)
        ctx.mark_non_differentiable(index, pair)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, _grad_index, grad_log_prob, grad_entropy, grad_full_log_probs, _grad_pair):
        logits, index = ctx.saved_tensors
        return evaluate_actions_backward(logits, index, grad_log_prob, grad_entropy, grad_full_log_probs), None, None


def sample_actions(
    logits: Tensor, action_index_tensor: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, ...]:
    """Draw an action per row.

    Args:
        logits: floating-point tensor [N, A]; -inf masks an action, which is then never drawn.
        action_index_tensor: int32 tensor [A, 2], row i the (type, parameter) pair of logit i, or None.
        generator: the generator to draw from; None means the device's default one.

    Returns:
        (index int64 [N], log_prob [N], entropy [N] in nats, full_log_probs [N, A]) and, with a table, pair int32
        [N, 2]. The floating-point ones have the logits' dtype and are differentiable, once, with respect to the logits.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device; on the CPU also a row that is no distribution.
    """
    logits = require_logits(logits)
    if action_index_tensor is not None:
        table = check_action_index_tensor(action_index_tensor)
        if table.shape[0] != logits.shape[1]:
            raise ValueError(
                f"logits: got {describe(logits)}, expected {table.shape[0]} columns, "
                "one for each row of action_index_tensor"
            )
        require_same_device("logits", logits, "action_index_tensor", table)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: got {describe(generator)}, expected a torch.Generator or None")
    outputs = _SampleActions.apply(float32_under_autocast(logits), action_index_tensor, generator)
    return outputs if action_index_tensor is not None else outputs[:4]
