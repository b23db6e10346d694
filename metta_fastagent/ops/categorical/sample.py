"""Draw one action per row from categorical logits, with its log-probability and the entropy.

    full_log_probs = log_softmax(logits)         index ~ Categorical(exp(full_log_probs))

The kernel and the C++ operator invert the cumulative distribution at one uniform random number u per row: they take the
first column with e_j > 0 whose running sum of shifted exponentials exceeds u times their total, so neither rounding nor
a u close to 1 can choose a masked action. The eager twin draws by `log_softmax -> exp -> torch.multinomial`, from the
same distribution. Each backend uses PyTorch's generators, so `torch.manual_seed` reproduces its draws; for one seed the
draws differ between backends. The gradient is that of `evaluate_actions` at the drawn index.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metta_fastagent.ops.autograd import in_plain_pytorch, records_graph
from metta_fastagent.ops.categorical import evaluate, reference
from metta_fastagent.ops.categorical.conditions import SCHEMA, Conditions, MaskLike, checked_conditions
from metta_fastagent.ops.conversion import check_action_index_tensor
from metta_fastagent.ops.dtypes import compute_dtype, native_floats, native_integers
from metta_fastagent.runtime.checks import describe, require_same_device
from metta_fastagent.runtime.dispatch import Operator


def sample_actions(
    logits: Tensor,
    action_index_tensor: Tensor | None = None,
    generator: torch.Generator | None = None,
    mask: MaskLike = None,
    temperature: float | Tensor = 1.0,
    greedy: bool = False,
    *,
    strict: bool = True,
    report: int = 0,
) -> tuple[Tensor, ...]:
    """Draw one action per row.

    Args:
        logits: floating-point tensor [N, A]; -inf masks an action, which is then never drawn.
        action_index_tensor: int32 tensor [A, 2], row i the (type, parameter) pair of logit i, or None.
        generator: the generator to draw from; None means the device's default one.
        mask, temperature: as in `evaluate_actions`; a pair of masks needs `action_index_tensor`.
        greedy: take the most likely action (the first on a tie) instead of drawing; no random number is used.
        strict: on the CPU raise an error for a row that is not a distribution, elsewhere report it for
            `raise_if_reported`. Such a row has action 0 and log-probability NaN.
        report: handle of the `Report` to which a kernel writes a bad row; 0 is shared by all calls without one.

    Returns:
        (index int64 [N], log_prob [N], entropy [N] in nats, full_log_probs [N, A]) and, with a table, pair int32
        [N, 2]. The floating-point results have the logits' dtype, belong to the masked distribution
        softmax(logits / temperature), and are differentiable with respect to the logits, any number of times.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device; on the CPU also a row that is not a distribution.

    Example:
        >>> allowed = torch.tensor([[False, True, False]])
        >>> action, log_prob, entropy, full_log_probs = sample_actions(torch.zeros(1, 3), mask=allowed)
        >>> action, log_prob
        (tensor([1]), tensor([0.]))
    """
    logits = evaluate.require_logits(logits)
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
    logits = evaluate.float32_under_autocast(logits)
    conditions = checked_conditions(logits, mask, temperature, None, action_index_tensor)
    options = strict, greedy, report
    if in_plain_pytorch():
        outputs = reference.sample_actions_eager(logits, action_index_tensor, conditions, *options, generator)
    elif records_graph(logits):
        outputs = _SampleActions.apply(logits, action_index_tensor, generator, *options, *(conditions or ()))
    else:
        outputs = _drawing(logits, generator)(logits, action_index_tensor, conditions, *options)
    return outputs if action_index_tensor is not None else outputs[:4]


def _drawing(logits: Tensor, generator: torch.Generator | None) -> Callable[..., tuple[Tensor, ...]]:
    """The operator, or with a generator, which a traced graph cannot hold, the implementation itself."""
    if generator is None:
        return _sample_actions
    return partial(_sample_actions.implementation(logits.device), generator=generator)


class _SampleActions(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, action_index_tensor: Tensor | None, generator, strict, greedy, report, *fields):
        # Autograd does not see tensors inside a tuple.
        conditions = Conditions(*fields) if fields else None
        outputs = _drawing(logits, generator)(logits, action_index_tensor, conditions, strict, greedy, report)
        index, _, _, _, pair = outputs
        evaluate.save_for_gradient(ctx, logits, index, conditions)
        ctx.mark_non_differentiable(index, pair)
        return outputs

    @staticmethod
    def backward(ctx, _grad_index, grad_log_prob, grad_entropy, grad_full_log_probs, _grad_pair):
        grad = evaluate.logits_gradient(ctx, grad_log_prob, grad_entropy, grad_full_log_probs)
        return grad, *[None] * (len(ctx.needs_input_grad) - 1)


def _sample_actions_native(
    logits: Tensor, action_index_tensor: Tensor | None, conditions: Conditions | None, strict: bool, greedy: bool,
    report: int, generator: torch.Generator | None = None, uniform: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Same as `sample_actions_eager`; `uniform` [N] replaces the random numbers."""
    table = None if action_index_tensor is None else native_integers(action_index_tensor)
    generator = torch.default_generator if generator is None else generator
    state = generator.get_state() if strict and not greedy else None
    if uniform is None and not greedy:
        uniform = torch.rand(logits.shape[0], dtype=compute_dtype(logits.dtype), generator=generator)
    try:
        index, *outputs, pair, bad_row = torch.ops.metta_fastagent_native.sample_actions.default(
            native_floats(logits), uniform, table, *(() if conditions is None else conditions.native())
        )
        if strict and bad_row >= 0:
            reference.refuse_rows_without_distribution(outputs[1], logits, conditions)
    except ValueError:
        # Rejected logits leave the generator unchanged.
        if state is not None:
            generator.set_state(state)
        raise
    if outputs[0].dtype != logits.dtype:
        outputs = [each.to(logits.dtype) for each in outputs]
    return index, *outputs, pair


def _fake(logits: Tensor, action_index_tensor: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows),
        logits.new_empty(rows),
        logits.new_empty(logits.shape),
        logits.new_empty((0 if action_index_tensor is None else rows, 2), dtype=torch.int32),
    )


_sample_actions = Operator(
    f"sample_actions(Tensor logits, Tensor? action_index_tensor, {SCHEMA}, bool strict, bool greedy, int report)"
    " -> (Tensor index, Tensor log_prob, Tensor entropy, Tensor full_log_probs, Tensor pair)",
    reference.sample_actions_eager,
    _fake,
    f"{__package__}.kernels:sample_actions_cuda",
    _sample_actions_native,
    packed=(2, Conditions),
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)
