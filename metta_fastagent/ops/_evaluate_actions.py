"""Log-probability and entropy of given actions under categorical logits, with their gradient.

    full_log_probs = log_softmax(logits)                              p = exp(full_log_probs)
    log_prob       = full_log_probs[row, index]
    entropy        = -sum_j p_j full_log_probs_j                      a term with p_j = 0 counts 0

and, for upstream gradients g (log_prob), h (entropy) and f (full_log_probs),

    d logits_j = g (1[j = index] - p_j) - h p_j (full_log_probs_j + entropy) + f_j - p_j sum_k f_k

so a masked logit (-inf) does not make the entropy or its gradient NaN. Arithmetic is float32 (float64 for float64), and
results are cast once, at the store. A row with an index out of range (off the CPU only) has log_prob NaN, gradient 0.
With a mask or a temperature all of it is that of the logits z of `_masking`, and

    d logits_j = d z_j / temperature if the mask allows j, else 0
"""

# pyright: reportInvalidTypeForm=false

from typing import Any

import torch
from torch import Tensor

from metta_fastagent._dispatch import register
from metta_fastagent._triton import compute_type, jit, tl
from metta_fastagent.ops import _bad_action
from metta_fastagent.ops._action_index import action_to_logit_index_eager, check_pairs, pair_to_index
from metta_fastagent.ops._autograd import (
    checks_values,
    chosen_backend,
    gradients_with_graph,
    in_plain_pytorch,
    needs_graph,
    records_graph,
    run_backward,
)
from metta_fastagent.ops._bad_action import (
    EVALUATE_INDEX,
    EVALUATE_LOGITS,
    EVALUATE_PAIR,
    report_index,
    report_logits,
    report_pair,
)
from metta_fastagent.ops._categorical import (
    MAX_ACTIONS,
    columns_sums,
    condition_columns,
    condition_tile,
    launch_rows,
    load_columns,
    load_temperature,
    load_tile,
    store_columns,
    tile_sums,
)
from metta_fastagent.ops._checks import (
    NATIVE_DTYPES,
    BadRowError,
    compute_dtype,
    contiguous,
    describe,
    is_integer,
    native_integers,
    native_logits,
    require_logits,
    require_same_device,
    under_autocast,
)
from metta_fastagent.ops._masking import (
    ARGUMENTS,
    MaskLike,
    checked_conditions,
    condition,
    gradient_of_logits,
    kernel_arguments,
    native_arguments,
    refuse_rows_without_distribution,
)

# exp of this is 0 in every dtype.
LOWEST_LOG_PROB = -1000.0
# Triton reads a global of the module only if it is a constexpr.
_EVALUATE_PAIR, _EVALUATE_INDEX = tl.constexpr(EVALUATE_PAIR), tl.constexpr(EVALUATE_INDEX)
_EVALUATE_LOGITS = tl.constexpr(EVALUATE_LOGITS)


@jit
def _load_index(
    actions, table, word, row, live, num_types, stride_row, stride_pair, A: tl.constexpr, PAIRS: tl.constexpr
):
    """Logit index [ROWS] of each row's action; -1, and a report, if it is out of range."""
    if PAIRS:
        index, kind, param, legal = pair_to_index(actions, table, row, live, num_types, stride_row, stride_pair)
        legal = legal & (index < A)
        report_pair(word, live & (legal == 0), row, kind, param, _EVALUATE_PAIR)
    else:
        index = tl.load(actions + row * stride_row, mask=live, other=0).to(tl.int64)
        legal = (index >= 0) & (index < A)
        report_index(word, live & (legal == 0), row, index, _EVALUATE_INDEX)
    return tl.where(legal, index, -1)


@jit(varying=("N", "num_types", "stride_row", "stride_pair"))
def _evaluate_actions_fwd_columns_kernel(
    logits,  # [N, A]
    actions,  # [N, 2] pairs or [N] indices, any integer dtype
    table,  # [T + 1] int64; unused without PAIRS
    log_prob,  # [N]
    entropy,  # [N]
    full_log_probs,  # [N, A]
    index,  # [N] int64
    word,  # [2] int64
    mask,  # [N, A] bool; unused without MASKED
    temperature_tensor,  # [1]; unused unless TEMPERATURE = 2
    N,
    num_types,
    stride_row,
    stride_pair,
    temperature,
    A: tl.constexpr,
    PAIRS: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASKED: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    STRICT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < N
    chosen = _load_index(actions, table, word, row, live, num_types, stride_row, stride_pair, A, PAIRS)
    t = load_temperature(temperature_tensor, temperature, TEMPERATURE, COMPUTE)
    xs = load_columns(logits, row, live, A, COMPUTE)
    xs = condition_columns(xs, mask, t, row, live, A, MASKED, TEMPERATURE)
    top, s, w = columns_sums(xs, A)
    if STRICT:
        report_logits(word, live & (s != s), row, top, MASKED, _EVALUATE_LOGITS)
    log_s = tl.log(s)
    selected = tl.full([ROWS], float("nan"), COMPUTE)
    values = ()
    for j in tl.static_range(A):
        values = values + (xs[j] - top - log_s,)  # noqa: RUF005
        selected = tl.where(chosen == j, values[j], selected)
    store_columns(full_log_probs, values, N, A, ROWS, BLOCK_A)
    tl.store(log_prob + row, selected, mask=live)
    tl.store(entropy + row, log_s - w / s, mask=live)
    tl.store(index + row, chosen, mask=live)


@jit(varying=("N", "num_types", "stride_row", "stride_pair"))
def _evaluate_actions_fwd_tile_kernel(
    logits,  # [N, A]
    actions,  # [N, 2] pairs or [N] indices, any integer dtype
    table,  # [T + 1] int64; unused without PAIRS
    log_prob,  # [N]
    entropy,  # [N]
    full_log_probs,  # [N, A]
    index,  # [N] int64
    word,  # [2] int64
    mask,  # [N, A] bool; unused without MASKED
    temperature_tensor,  # [1]; unused unless TEMPERATURE = 2
    N,
    num_types,
    stride_row,
    stride_pair,
    temperature,
    A: tl.constexpr,
    PAIRS: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASKED: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    STRICT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_A)
    live = row < N
    chosen = _load_index(actions, table, word, row, live, num_types, stride_row, stride_pair, A, PAIRS)
    t = load_temperature(temperature_tensor, temperature, TEMPERATURE, COMPUTE)
    x = load_tile(logits, row, column, live, A, COMPUTE)
    x = condition_tile(x, mask, t, row, column, live, A, MASKED, TEMPERATURE)
    top, s, w, _ = tile_sums(x)
    if STRICT:
        report_logits(word, live & (s != s), row, top, MASKED, _EVALUATE_LOGITS)
    log_s = tl.log(s)
    values = x - top[:, None] - log_s[:, None]
    selected = tl.sum(tl.where(chosen[:, None] == column[None, :], values, 0.0), 1)
    selected = tl.where(chosen < 0, float("nan"), selected)
    inside = live[:, None] & (column < A)[None, :]
    tl.store(full_log_probs + row[:, None] * A + column[None, :], values, mask=inside)
    tl.store(log_prob + row, selected, mask=live)
    tl.store(entropy + row, log_s - w / s, mask=live)
    tl.store(index + row, chosen, mask=live)


@jit(varying=("N", "stride_log_prob", "stride_entropy"))
def _evaluate_actions_bwd_columns_kernel(
    logits,  # [N, A]
    index,  # [N] int64, -1 if out of range
    grad_log_prob,  # [N], of any stride: a mean's gradient is one number
    grad_entropy,  # [N], of any stride
    grad_full,  # [N, A]
    grad_logits,  # [N, A]
    mask,  # [N, A] bool; unused without MASKED
    temperature_tensor,  # [1]; unused unless TEMPERATURE = 2
    N,
    stride_log_prob,
    stride_entropy,
    temperature,
    A: tl.constexpr,
    HAS_LOG_PROB: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_FULL: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASKED: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < N
    chosen = tl.load(index + row, mask=live, other=-1)
    t = load_temperature(temperature_tensor, temperature, TEMPERATURE, COMPUTE)
    xs = load_columns(logits, row, live, A, COMPUTE)
    xs = condition_columns(xs, mask, t, row, live, A, MASKED, TEMPERATURE)
    top, s, w = columns_sums(xs, A)
    from_log_prob = tl.zeros([ROWS], COMPUTE)
    if HAS_LOG_PROB:
        from_log_prob = tl.load(grad_log_prob + row * stride_log_prob, mask=live, other=0.0).to(COMPUTE)
    from_entropy = tl.zeros([ROWS], COMPUTE)
    if HAS_ENTROPY:
        from_entropy = tl.load(grad_entropy + row * stride_entropy, mask=live, other=0.0).to(COMPUTE)
    total = from_log_prob
    fs = ()
    if HAS_FULL:
        fs = load_columns(grad_full, row, live, A, COMPUTE)
        for j in tl.static_range(A):
            total += fs[j]
    inverse = 1.0 / s
    information = w * inverse
    grads = ()
    for j in tl.static_range(A):
        shifted = xs[j] - top
        p = tl.exp(shifted) * inverse
        grad = tl.where(chosen == j, from_log_prob, 0.0) - p * total
        if HAS_ENTROPY:
            grad -= from_entropy * tl.where(p == 0, 0.0, p * (shifted - information))
        if HAS_FULL:
            grad += fs[j]
        if TEMPERATURE > 0:
            grad = grad / t
        if MASKED:
            grad = tl.where(tl.load(mask + row * A + j, mask=live, other=0), grad, 0.0)
        grads = grads + (tl.where(chosen < 0, 0.0, grad),)  # noqa: RUF005
    store_columns(grad_logits, grads, N, A, ROWS, BLOCK_A)


@jit(varying=("N", "stride_log_prob", "stride_entropy"))
def _evaluate_actions_bwd_tile_kernel(
    logits,  # [N, A]
    index,  # [N] int64, -1 if out of range
    grad_log_prob,  # [N], of any stride: a mean's gradient is one number
    grad_entropy,  # [N], of any stride
    grad_full,  # [N, A]
    grad_logits,  # [N, A]
    mask,  # [N, A] bool; unused without MASKED
    temperature_tensor,  # [1]; unused unless TEMPERATURE = 2
    N,
    stride_log_prob,
    stride_entropy,
    temperature,
    A: tl.constexpr,
    HAS_LOG_PROB: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_FULL: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASKED: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_A)
    live = row < N
    inside = live[:, None] & (column < A)[None, :]
    chosen = tl.load(index + row, mask=live, other=-1)
    t = load_temperature(temperature_tensor, temperature, TEMPERATURE, COMPUTE)
    x = load_tile(logits, row, column, live, A, COMPUTE)
    x = condition_tile(x, mask, t, row, column, live, A, MASKED, TEMPERATURE)
    top, s, w, e = tile_sums(x)
    p = e / s[:, None]
    grad = tl.zeros([ROWS, BLOCK_A], COMPUTE)
    if HAS_LOG_PROB:
        from_log_prob = tl.load(grad_log_prob + row * stride_log_prob, mask=live, other=0.0).to(COMPUTE)[:, None]
        grad += tl.where(chosen[:, None] == column[None, :], from_log_prob, 0.0) - p * from_log_prob
    if HAS_ENTROPY:
        from_entropy = tl.load(grad_entropy + row * stride_entropy, mask=live, other=0.0).to(COMPUTE)[:, None]
        grad -= from_entropy * tl.where(p == 0, 0.0, p * (x - top[:, None] - (w / s)[:, None]))
    if HAS_FULL:
        f = tl.load(grad_full + row[:, None] * A + column[None, :], mask=inside, other=0.0).to(COMPUTE)
        grad += f - p * tl.sum(f, 1)[:, None]
    if TEMPERATURE > 0:
        grad = grad / t
    if MASKED:
        grad = tl.where(tl.load(mask + row[:, None] * A + column[None, :], mask=inside, other=0), grad, 0.0)
    grad = tl.where((chosen < 0)[:, None], 0.0, grad)
    tl.store(grad_logits + row[:, None] * A + column[None, :], grad, mask=inside)


def _evaluate_actions_forward_cuda(
    logits: Tensor,
    actions: Tensor,
    cum_action_max_params: Tensor | None,
    strict: bool = False,
    mask: Tensor | None = None,
    temperature_tensor: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, num_actions = logits.shape
    if num_actions > MAX_ACTIONS:
        return evaluate_actions_forward_eager(
            logits, actions, cum_action_max_params, strict, mask, temperature_tensor, temperature
        )
    logits = logits.contiguous()
    tensors, constants = kernel_arguments(logits, mask, temperature_tensor, temperature)
    log_prob, entropy = logits.new_empty(rows), logits.new_empty(rows)
    full_log_probs = torch.empty_like(logits)
    index = logits.new_empty(rows, dtype=torch.int64)
    pairs = cum_action_max_params is not None
    if rows > 0:
        launch_rows(
            _evaluate_actions_fwd_columns_kernel,
            _evaluate_actions_fwd_tile_kernel,
            rows,
            num_actions,
            (
                logits,
                actions,
                index if cum_action_max_params is None else cum_action_max_params.contiguous(),
                log_prob,
                entropy,
                full_log_probs,
                index,
                _bad_action.word(logits.device),
                *tensors,
            ),
            (
                rows,
                0 if cum_action_max_params is None else cum_action_max_params.numel() - 1,
                actions.stride(0),
                actions.stride(1) if pairs else 0,
                temperature,
            ),
            A=num_actions,
            PAIRS=pairs,
            COMPUTE=compute_type(logits.dtype),
            **constants,
            STRICT=strict,
        )
    return log_prob, entropy, full_log_probs, index


def _evaluate_actions_backward_cuda(
    logits: Tensor,
    index: Tensor,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_full_log_probs: Tensor | None,
    mask: Tensor | None = None,
    temperature_tensor: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    rows, num_actions = logits.shape
    if num_actions > MAX_ACTIONS:
        return evaluate_actions_backward_eager(
            logits, index, grad_log_prob, grad_entropy, grad_full_log_probs, mask, temperature_tensor, temperature
        )
    logits = logits.contiguous()
    tensors, constants = kernel_arguments(logits, mask, temperature_tensor, temperature)
    grad_logits = torch.empty_like(logits)
    if rows > 0:
        launch_rows(
            _evaluate_actions_bwd_columns_kernel,
            _evaluate_actions_bwd_tile_kernel,
            rows,
            num_actions,
            (
                logits,
                index,
                logits if grad_log_prob is None else grad_log_prob,
                logits if grad_entropy is None else grad_entropy,
                logits if grad_full_log_probs is None else grad_full_log_probs.contiguous(),
                grad_logits,
                *tensors,
            ),
            (
                rows,
                0 if grad_log_prob is None else grad_log_prob.stride(0),
                0 if grad_entropy is None else grad_entropy.stride(0),
                temperature,
            ),
            A=num_actions,
            HAS_LOG_PROB=grad_log_prob is not None,
            HAS_ENTROPY=grad_entropy is not None,
            HAS_FULL=grad_full_log_probs is not None,
            COMPUTE=compute_type(logits.dtype),
            **constants,
        )
    return grad_logits


def _evaluate_actions_forward_native(
    logits: Tensor,
    actions: Tensor,
    cum_action_max_params: Tensor | None,
    strict: bool = False,
    mask: Tensor | None = None,
    temperature_tensor: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = logits.dtype
    # The eager twin's message for a bad action; the operator has stopped before any arithmetic.
    *outputs, bad_row, bad_logits = torch.ops.metta_fastagent_native.evaluate_actions_forward.default(
        native_logits(logits),
        native_integers(actions),
        contiguous(cum_action_max_params),
        *native_arguments(mask, temperature_tensor, temperature),
    )
    if bad_row >= 0:
        return evaluate_actions_forward_eager(logits, actions, cum_action_max_params)
    log_prob, entropy, full_log_probs, index = outputs
    if strict and bad_logits >= 0:
        refuse_rows_without_distribution(entropy, logits, mask)
    if log_prob.dtype == dtype:
        return log_prob, entropy, full_log_probs, index
    return log_prob.to(dtype), entropy.to(dtype), full_log_probs.to(dtype), index


def _evaluate_actions_backward_native(
    logits: Tensor,
    index: Tensor,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_full_log_probs: Tensor | None,
    mask: Tensor | None = None,
    temperature_tensor: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    grads = (grad_log_prob, grad_entropy, grad_full_log_probs)
    if logits.dtype not in NATIVE_DTYPES:
        grads = [None if grad is None else grad.float() for grad in grads]
    grad_logits = torch.ops.metta_fastagent_native.evaluate_actions_backward.default(
        native_logits(logits),
        index.contiguous(),
        grads[0],
        grads[1],
        contiguous(grads[2]),
        *native_arguments(mask, temperature_tensor, temperature),
    )
    return grad_logits if grad_logits.dtype == logits.dtype else grad_logits.to(logits.dtype)


def _checked_index(index: Tensor, num_actions: int) -> Tensor:
    # A copy: an operator's output may not be its input.
    index = index.to(torch.int64, copy=True)
    legal = (index >= 0) & (index < num_actions)
    if checks_values(index) and not bool(legal.all()):
        row = int((~legal).nonzero()[0])
        raise BadRowError(f"actions[{row}]: got logit index {int(index[row])}, expected 0 to {num_actions - 1}")
    return index


def evaluate_actions_forward_eager(
    logits: Tensor,
    actions: Tensor,
    cum_action_max_params: Tensor | None,
    strict: bool = False,
    mask: Tensor | None = None,
    temperature_tensor: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log_prob [N], entropy [N], full_log_probs [N, A], index [N]) in plain PyTorch."""
    if cum_action_max_params is not None:
        actions = action_to_logit_index_eager(actions, cum_action_max_params)
    index = _checked_index(actions, logits.shape[1])
    full_log_probs = torch.log_softmax(condition(logits, mask, temperature_tensor, temperature), dim=-1)
    log_prob = select_log_prob(full_log_probs, index)
    entropy = entropy_of(full_log_probs)
    if strict and checks_values(logits):
        refuse_rows_without_distribution(entropy, logits, mask)
    return log_prob.to(logits.dtype), entropy.to(logits.dtype), full_log_probs.to(logits.dtype), index


def select_log_prob(full_log_probs: Tensor, index: Tensor) -> Tensor:
    """Entry `index` of each row; NaN for an index out of range, which the CPU refuses earlier."""
    if checks_values(index):
        return full_log_probs.gather(1, index.unsqueeze(1)).squeeze(1)
    known = index.clamp(0, full_log_probs.shape[1] - 1)
    return torch.where(known == index, full_log_probs.gather(1, known.unsqueeze(1)).squeeze(1), torch.nan)


def entropy_of(full_log_probs: Tensor) -> Tensor:
    """-sum p log p over the last dimension, a term with p = 0 counting 0."""
    return -(full_log_probs.exp() * _without_infinity(full_log_probs)).sum(-1)


def _without_infinity(full_log_probs: Tensor) -> Tensor:
    """A finite number in place of -inf: p = 0 times it is 0, in derivatives too. NaN stays NaN."""
    return full_log_probs.clamp(min=LOWEST_LOG_PROB)


def evaluate_actions_backward_eager(
    logits: Tensor,
    index: Tensor,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_full_log_probs: Tensor | None,
    mask: Tensor | None = None,
    temperature_tensor: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Gradient [N, A] of the logits in plain PyTorch; an upstream gradient that is None counts 0."""
    dtype = compute_dtype(logits.dtype)
    full_log_probs = torch.log_softmax(condition(logits, mask, temperature_tensor, temperature), dim=-1)
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
    return gradient_of_logits(grad, mask, temperature_tensor, temperature).to(logits.dtype)


def _forward_fake(
    logits: Tensor,
    actions: Tensor,
    cum_action_max_params: Tensor | None,
    strict: bool = False,
    mask: Tensor | None = None,
    temperature_tensor: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty(rows),
        logits.new_empty(rows),
        logits.new_empty(logits.shape),
        actions.new_empty(rows, dtype=torch.int64),
    )


_evaluate_actions_forward = register(
    "evaluate_actions_forward(Tensor logits, Tensor actions, Tensor? cum_action_max_params, bool strict=False,"
    f" {ARGUMENTS})"
    " -> (Tensor log_prob, Tensor entropy, Tensor full_log_probs, Tensor index)",
    evaluate_actions_forward_eager,
    _forward_fake,
    _evaluate_actions_forward_cuda,
    _evaluate_actions_forward_native,
)
evaluate_actions_backward = register(
    "evaluate_actions_backward(Tensor logits, Tensor index, Tensor? grad_log_prob, Tensor? grad_entropy,"
    f" Tensor? grad_full_log_probs, {ARGUMENTS}) -> Tensor",
    evaluate_actions_backward_eager,
    lambda logits, *_: logits.new_empty(logits.shape),
    _evaluate_actions_backward_cuda,
    _evaluate_actions_backward_native,
)


class _EvaluateActions(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, actions: Tensor, cum_action_max_params: Tensor | None, strict: bool, *conditions):
        log_prob, entropy, full_log_probs, index = _evaluate_actions_forward(
            logits, actions, cum_action_max_params, strict, *conditions
        )
        save_for_gradient(ctx, logits, index, *conditions)
        return log_prob, entropy, full_log_probs

    @staticmethod
    def backward(ctx, *grads):
        return logits_gradient(ctx, *grads), *[None] * (len(ctx.needs_input_grad) - 1)


def save_for_gradient(
    ctx,
    logits: Tensor,
    index: Tensor,
    mask: Tensor | None = None,
    temperature_tensor: Tensor | None = None,
    temperature: float = 1.0,
) -> None:
    """Keep in `ctx` what `logits_gradient` needs."""
    tensors = () if mask is None and temperature_tensor is None else (mask, temperature_tensor)
    ctx.save_for_backward(logits, index, *tensors)
    ctx.temperature = temperature
    ctx.set_materialize_grads(False)
    ctx.backend = chosen_backend()


def logits_gradient(ctx, *grads: Tensor | None) -> Tensor:
    """Gradient of the saved logits [N, A] for upstream gradients of log_prob, entropy and full_log_probs."""
    logits, index, *tensors = ctx.saved_tensors
    conditions: tuple[Any, ...] = ()
    if tensors or ctx.temperature != 1:
        conditions = *(tensors or (None, None)), ctx.temperature
    if not needs_graph():
        return run_backward(ctx.backend, evaluate_actions_backward, logits, index, *grads, *conditions)
    return gradients_with_graph(lambda x: _formula(x, index, *conditions), (logits,), grads)[0]


def _formula(
    logits: Tensor,
    index: Tensor,
    mask: Tensor | None = None,
    temperature_tensor: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log_prob, entropy, full_log_probs) of logit indices, differentiable any number of times."""
    full_log_probs = torch.log_softmax(condition(logits, mask, temperature_tensor, temperature), dim=-1)
    legal = (index >= 0) & (index < logits.shape[1])
    known = index.clamp(0, logits.shape[1] - 1).unsqueeze(1)
    log_prob = torch.where(legal, full_log_probs.gather(1, known).squeeze(1), torch.nan)
    entropy = entropy_of(full_log_probs)
    return log_prob.to(logits.dtype), entropy.to(logits.dtype), full_log_probs.to(logits.dtype)


def float32_under_autocast(logits: Tensor) -> Tensor:
    """Logits in float32 under CUDA autocast, which runs log_softmax in float32; else unchanged."""
    if logits.is_cuda and under_autocast(logits.device):
        return logits.float()
    return logits


def evaluate_actions(
    logits: Tensor,
    actions: Tensor,
    cum_action_max_params: Tensor | None = None,
    mask: MaskLike = None,
    temperature: float | Tensor = 1.0,
    *,
    strict: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the given actions, entropy, and all log-probabilities.

    Args:
        logits: floating-point tensor [N, A].
        actions: with a table, integer pairs (action type, parameter) [N, 2]; without, integer logit indices [N].
        cum_action_max_params: int64 tensor [action types + 1], or None.
        mask: bool tensor [N, A], False for a forbidden action, whose log-probability is -inf and whose logit gets no
            gradient; or with a table a pair of masks over types [N, action types] and parameters [N, P], both of which
            must allow an action: they are combined first, in a few launches.
        temperature: divides the logits; a number > 0, or a tensor with one element on the logits' device that does not
            require a gradient. Off the CPU its value is not read: if it is not positive, results are NaN.
        strict: on the CPU raise an error for a row that is no distribution: logits that are NaN or +inf, or no allowed
            logit above -inf; elsewhere report it for `raise_if_reported`. Without, its results are NaN.

    Returns:
        (log_prob [N], entropy [N] in nats, full_log_probs [N, A]), all of the logits' dtype (float32 under CUDA
        autocast), of the masked distribution softmax(logits / temperature). All three are differentiable with respect
        to the logits, any number of times.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device; on the CPU also an action out of range.
    """
    logits = require_logits(logits)
    if cum_action_max_params is not None:
        actions, cum_action_max_params = check_pairs(actions, cum_action_max_params)
        expected_shape = (logits.shape[0], 2)
    else:
        expected_shape = (logits.shape[0],)
        if not isinstance(actions, Tensor) or not is_integer(actions.dtype):
            raise TypeError(
                f"actions: got {describe(actions)}, expected an integer tensor of shape {list(expected_shape)}"
            )
    if actions.shape != expected_shape:
        raise ValueError(
            f"actions: got {describe(actions)}, expected shape {list(expected_shape)} for {describe(logits)}"
        )
    require_same_device("actions", actions, "logits", logits)
    logits = float32_under_autocast(logits)
    conditions = checked_conditions(logits, mask, temperature, cum_action_max_params)
    if in_plain_pytorch():
        return evaluate_actions_forward_eager(logits, actions, cum_action_max_params, strict, *conditions)[:3]
    if not records_graph(logits):
        return _evaluate_actions_forward(logits, actions, cum_action_max_params, strict, *conditions)[:3]
    return _EvaluateActions.apply(logits, actions, cum_action_max_params, strict, *conditions)
