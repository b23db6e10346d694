"""Triton kernels that score and draw actions, and their launchers; `layouts` handles the rows of logits.

A row with an index out of range has log_prob NaN and gradient 0.
"""

# pyright: reportInvalidTypeForm=false

import functools

import torch
from torch import Tensor

from metta_fastagent.ops.categorical import layouts, reference
from metta_fastagent.ops.categorical.conditions import Conditions
from metta_fastagent.ops.conversion import pair_to_index
from metta_fastagent.ops.dtypes import compute_dtype
from metta_fastagent.runtime import reports
from metta_fastagent.runtime.launch import Constants, launch_with
from metta_fastagent.runtime.triton import cdiv, compute_type, jit, tl

# Triton only reads module globals that are constexpr.
_EVALUATE_PAIR, _EVALUATE_INDEX = tl.constexpr(reports.EVALUATE_PAIR), tl.constexpr(reports.EVALUATE_INDEX)
_EVALUATE_LOGITS, _SAMPLE_LOGITS = tl.constexpr(reports.EVALUATE_LOGITS), tl.constexpr(reports.SAMPLE_LOGITS)


@jit
def load_index(
    actions, table, words, row, live, num_types, stride_row, stride_pair,
    A: tl.constexpr, PAIRS: tl.constexpr, PAIR_OPERATION: tl.constexpr, INDEX_OPERATION: tl.constexpr,
):  # fmt: skip
    """Logit index [ROWS] of each row's action; an index out of range gives -1 and a report."""
    if PAIRS:
        index, kind, param, legal = pair_to_index(actions, table, row, live, num_types, stride_row, stride_pair)
        legal = legal & (index < A)
        reports.report_pair(words, live & (legal == 0), row, kind, param, PAIR_OPERATION)
    else:
        index = tl.load(actions + row * stride_row, mask=live, other=0).to(tl.int64)
        legal = (index >= 0) & (index < A)
        reports.report_index(words, live & (legal == 0), row, index, INDEX_OPERATION)
    return tl.where(legal, index, -1)


@jit(varying=("N", "num_types", "stride_row", "stride_pair"))
def _evaluate_actions_fwd_kernel(
    logits,  # [N, A]
    actions,  # [N, 2] pairs or [N] indices, any integer dtype
    table,  # [T + 1] int64; unused without PAIRS
    log_prob,  # [N]
    entropy,  # [N]
    full_log_probs,  # [N, A]
    index,  # [N] int64
    words,  # [2] int64
    mask,  # [N, A] bool; unused without MASKED
    temperatures,  # [1]; unused unless TEMPERATURE = 2
    N,
    num_types,
    stride_row,
    stride_pair,
    temperature,
    A: tl.constexpr,
    PAIRS: tl.constexpr,
    STRICT: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASKED: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    PIECE: tl.constexpr,
):
    row, live = layouts.rows_of_program(N, ROWS)
    chosen = load_index(
        actions, table, words, row, live, num_types, stride_row, stride_pair, A, PAIRS, _EVALUATE_PAIR, _EVALUATE_INDEX
    )
    divisor = layouts.load_temperature(temperatures, temperature, COMPUTE, TEMPERATURE)
    zs, _ = layouts.load_logits(logits, mask, divisor, N, COMPUTE, MASKED, TEMPERATURE, A, ROWS, BLOCK_A, PIECE)
    top, s, w = layouts.sums(zs)
    if STRICT:
        reports.report_logits(words, live & (s != s), row, top, MASKED, _EVALUATE_LOGITS)
    log_s = tl.log(s)
    values = layouts.log_probs(zs, top, log_s)
    picked = layouts.pick(values, chosen, PIECE)
    layouts.store_tile(full_log_probs, layouts.tile_of(values, A, ROWS, BLOCK_A, PIECE), N, A, ROWS, BLOCK_A)
    tl.store(log_prob + row, picked, mask=live)
    tl.store(entropy + row, log_s - w / s, mask=live)
    tl.store(index + row, chosen, mask=live)


@jit
def gradients(
    zs, fs, chosen, from_log_prob, from_entropy, total, top, s, w, temperature,
    HAS_ENTROPY: tl.constexpr, HAS_FULL: tl.constexpr, TEMPERATURE: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits x in pieces, as if all actions were allowed: 0 in a row without an action."""
    inverse = 1.0 / s
    information = w * inverse
    grads = ()
    for k in tl.static_range(len(zs)):
        shifted = zs[k] - top[:, None]
        p = tl.exp(shifted) * inverse[:, None]
        here = chosen[:, None] == layouts.columns_of(k, PIECE)
        grad = tl.where(here, from_log_prob[:, None], 0.0) - p * total[:, None]
        if HAS_ENTROPY:
            grad -= from_entropy[:, None] * tl.where(p == 0, 0.0, p * (shifted - information[:, None]))
        if HAS_FULL:
            grad += fs[k]
        if TEMPERATURE > 0:
            grad = grad / temperature
        grads = grads + (tl.where((chosen < 0)[:, None], 0.0, grad),)  # noqa: RUF005
    return grads


@jit
def store_gradients(
    grad_logits, grads, allowed, N, MASKED: tl.constexpr,
    A: tl.constexpr, ROWS: tl.constexpr, BLOCK_A: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Store gradients in pieces, 0 for a forbidden action."""
    tile = layouts.tile_of(grads, A, ROWS, BLOCK_A, PIECE)
    if MASKED:
        tile = tl.where(allowed, tile, 0.0)
    layouts.store_tile(grad_logits, tile, N, A, ROWS, BLOCK_A)


@jit(varying=("N", "stride_log_prob", "stride_entropy"))
def _evaluate_actions_bwd_kernel(
    logits,  # [N, A]
    index,  # [N] int64, -1 if out of range
    grad_log_prob,  # [N], of any stride: a mean's gradient is one number
    grad_entropy,  # [N], of any stride
    grad_full,  # [N, A]
    grad_logits,  # [N, A]
    mask,  # [N, A] bool; unused without MASKED
    temperatures,  # [1]; unused unless TEMPERATURE = 2
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
    PIECE: tl.constexpr,
):
    row, live = layouts.rows_of_program(N, ROWS)
    chosen = tl.load(index + row, mask=live, other=-1)
    divisor = layouts.load_temperature(temperatures, temperature, COMPUTE, TEMPERATURE)
    zs, allowed = layouts.load_logits(logits, mask, divisor, N, COMPUTE, MASKED, TEMPERATURE, A, ROWS, BLOCK_A, PIECE)
    top, s, w = layouts.sums(zs)
    from_log_prob = tl.zeros([ROWS], COMPUTE)
    if HAS_LOG_PROB:
        from_log_prob = tl.load(grad_log_prob + row * stride_log_prob, mask=live, other=0.0).to(COMPUTE)
    from_entropy = tl.zeros([ROWS], COMPUTE)
    if HAS_ENTROPY:
        from_entropy = tl.load(grad_entropy + row * stride_entropy, mask=live, other=0.0).to(COMPUTE)
    fs = zs
    total = from_log_prob
    if HAS_FULL:
        tile = layouts.load_tile(grad_full, N, 0.0, A, ROWS, BLOCK_A).to(COMPUTE)
        fs = layouts.pieces_of(tile, A, ROWS, BLOCK_A, PIECE)
        total += layouts.row_sums(fs)
    grads = gradients(
        zs, fs, chosen, from_log_prob, from_entropy, total, top, s, w, divisor,
        HAS_ENTROPY, HAS_FULL, TEMPERATURE, PIECE,
    )  # fmt: skip
    store_gradients(grad_logits, grads, allowed, N, MASKED, A, ROWS, BLOCK_A, PIECE)


@jit
def _running_sums(zs, top, s, PIECE: tl.constexpr):
    """(sums of the exponentials up to each column that can be drawn, in pieces; the largest [ROWS])."""
    runnings = ()
    before = tl.zeros_like(top)
    largest = zs[0]
    for k in tl.static_range(len(zs)):
        running = tl.exp(zs[k] - top[:, None])
        if PIECE == 1:
            running += before[:, None]
            before = tl.sum(running, 1)
        else:
            e = running
            running = tl.cumsum(e, 1) + before[:, None]
            before += tl.sum(e, 1)
            # A tree scan is not monotone: the largest sum at a column that can be drawn is the total.
            running = tl.where(e > 0, running, 0.0)
            largest = running if k == 0 else tl.maximum(largest, running)
        runnings = runnings + (running,)  # noqa: RUF005
    return runnings, s if PIECE == 1 else tl.max(largest, 1)


@jit
def _draw(zs, uniform, row, live, top, s, COMPUTE: tl.constexpr, GREEDY: tl.constexpr, PIECE: tl.constexpr):
    """Index drawn from each row, or with GREEDY that of its most likely action; -1 if there is none."""
    runnings = zs
    if not GREEDY:
        runnings, total = _running_sums(zs, top, s, PIECE)
        threshold = tl.load(uniform + row, mask=live, other=0.0).to(COMPUTE) * total
    none: tl.constexpr = len(zs) * PIECE
    chosen = tl.full(zs[0].shape, none, tl.int32)
    for k in tl.static_range(len(zs)):
        if GREEDY:
            # NaN in s leaves the row without a candidate.
            candidate = (zs[k] == top[:, None]) & (s == s)[:, None]
        else:
            candidate = runnings[k] > threshold[:, None]
        chosen = tl.minimum(chosen, tl.where(candidate, layouts.columns_of(k, PIECE), none))
    chosen = tl.min(chosen, 1)
    # No candidate: the row holds NaN or +inf, or only -inf.
    return tl.where(chosen == none, -1, chosen)


@jit(varying=("N",))
def _sample_actions_kernel(
    logits,  # [N, A]
    uniform,  # [N] in [0, 1); unused with GREEDY
    table,  # [A, 2]; unused without PAIRS
    index,  # [N] int64
    log_prob,  # [N]
    entropy,  # [N]
    full_log_probs,  # [N, A]
    pair,  # [N, 2] int32; unused without PAIRS
    words,  # [2] int64; unused without STRICT
    mask,  # [N, A] bool; unused without MASKED
    temperatures,  # [1]; unused unless TEMPERATURE = 2
    N,
    temperature,
    A: tl.constexpr,
    PAIRS: tl.constexpr,
    STRICT: tl.constexpr,
    GREEDY: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASKED: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    PIECE: tl.constexpr,
):
    row, live = layouts.rows_of_program(N, ROWS)
    divisor = layouts.load_temperature(temperatures, temperature, COMPUTE, TEMPERATURE)
    zs, _ = layouts.load_logits(logits, mask, divisor, N, COMPUTE, MASKED, TEMPERATURE, A, ROWS, BLOCK_A, PIECE)
    top, s, w = layouts.sums(zs)
    if STRICT:
        reports.report_logits(words, live & (s != s), row, top, MASKED, _SAMPLE_LOGITS)
    log_s = tl.log(s)
    values = layouts.log_probs(zs, top, log_s)
    chosen = _draw(zs, uniform, row, live, top, s, COMPUTE, GREEDY, PIECE)
    picked = layouts.pick(values, chosen, PIECE)
    chosen = tl.maximum(chosen, 0)
    tl.store(index + row, chosen.to(tl.int64), mask=live)
    tl.store(log_prob + row, picked, mask=live)
    tl.store(entropy + row, log_s - w / s, mask=live)
    if PAIRS:
        for part in tl.static_range(2):
            entry = tl.load(table + chosen * 2 + part)
            tl.store(pair + row * 2 + part, entry.to(tl.int32), mask=live)
    layouts.store_tile(full_log_probs, layouts.tile_of(values, A, ROWS, BLOCK_A, PIECE), N, A, ROWS, BLOCK_A)


@functools.cache
def constants_of(
    num_actions: int, dtype: torch.dtype, masked: bool, tempered: int, **own: bool
) -> tuple[Constants, int]:
    """(constants, rows per program); a kernel's own constants follow the number of actions."""
    rows, columns, piece, warps = layouts.block_shape(num_actions)
    values = {
        "A": num_actions,
        **own,
        "COMPUTE": compute_type(dtype),
        "MASKED": masked,
        "TEMPERATURE": tempered,
        "ROWS": rows,
        "BLOCK_A": columns,
        "PIECE": piece,
    }
    return Constants(values, warps), rows


def kernel_conditions(logits: Tensor, conditions: Conditions | None) -> tuple[Tensor, Tensor, float, bool, int]:
    """(mask, temperature in memory, temperature, MASKED, TEMPERATURE); the logits stand in for absent tensors."""
    if conditions is None:
        return logits, logits, 1.0, False, 0
    mask, in_memory, temperature = conditions
    if temperature != 1 and logits.dtype == torch.float64:
        # Scalar arguments of a kernel are float32.
        in_memory, temperature = torch.full((), temperature, dtype=torch.float64, device=logits.device), 1.0
    tempered = 2 if in_memory is not None else int(temperature != 1)
    masked = mask is not None
    return (
        mask.contiguous() if masked else logits,
        logits if in_memory is None else in_memory,
        temperature,
        masked,
        tempered,
    )


def evaluate_actions_forward_cuda(
    logits: Tensor,
    actions: Tensor,
    cum_action_max_params: Tensor | None,
    conditions: Conditions | None,
    strict: bool,
    report: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same as `evaluate_actions_forward_eager`, in one launch."""
    rows, num_actions = logits.shape
    if num_actions > layouts.MAX_ACTIONS:
        return reference.evaluate_actions_forward_eager(logits, actions, cum_action_max_params, conditions, strict)
    logits = logits.contiguous()
    log_prob, entropy = logits.new_empty(rows), logits.new_empty(rows)
    full_log_probs = torch.empty_like(logits)
    index = logits.new_empty(rows, dtype=torch.int64)
    if rows > 0:
        pairs = cum_action_max_params is not None
        table = index if cum_action_max_params is None else cum_action_max_params.contiguous()
        words = reports.words_of(report, logits.device)
        mask, temperatures, temperature, *kind = kernel_conditions(logits, conditions)
        constants, block = constants_of(num_actions, logits.dtype, *kind, PAIRS=pairs, STRICT=strict)
        launch_with(
            constants,
            _evaluate_actions_fwd_kernel,
            cdiv(rows, block),
            (logits, actions, table, log_prob, entropy, full_log_probs, index, words, mask, temperatures),
            (rows, table.shape[0] - 1, actions.stride(0), actions.stride(1) if pairs else 0, temperature),
        )
    return log_prob, entropy, full_log_probs, index


def evaluate_actions_backward_cuda(
    logits: Tensor,
    index: Tensor,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_full_log_probs: Tensor | None,
    conditions: Conditions | None,
) -> Tensor:
    """Same as `evaluate_actions_backward_eager`, in one launch."""
    rows, num_actions = logits.shape
    if num_actions > layouts.MAX_ACTIONS:
        upstream = grad_log_prob, grad_entropy, grad_full_log_probs
        return reference.evaluate_actions_backward_eager(logits, index, *upstream, conditions)
    logits = logits.contiguous()
    grad_logits = torch.empty_like(logits)
    if rows > 0:
        mask, temperatures, temperature, *kind = kernel_conditions(logits, conditions)
        constants, block = constants_of(
            num_actions,
            logits.dtype,
            *kind,
            HAS_LOG_PROB=grad_log_prob is not None,
            HAS_ENTROPY=grad_entropy is not None,
            HAS_FULL=grad_full_log_probs is not None,
        )
        log_prob_stride, entropy_stride = 0, 0
        if grad_log_prob is None:
            grad_log_prob = logits
        else:
            log_prob_stride = grad_log_prob.stride(0)
        if grad_entropy is None:
            grad_entropy = logits
        else:
            entropy_stride = grad_entropy.stride(0)
        grad_full = logits if grad_full_log_probs is None else grad_full_log_probs.contiguous()
        launch_with(
            constants,
            _evaluate_actions_bwd_kernel,
            cdiv(rows, block),
            (logits, index, grad_log_prob, grad_entropy, grad_full, grad_logits, mask, temperatures),
            (rows, log_prob_stride, entropy_stride, temperature),
        )
    return grad_logits


def sample_actions_cuda(
    logits: Tensor, action_index_tensor: Tensor | None, conditions: Conditions | None, strict: bool, greedy: bool,
    report: int, generator: torch.Generator | None = None, uniform: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Same as `sample_actions_eager`, in one launch plus one for the random numbers, which `uniform` [N] replaces."""
    rows, num_actions = logits.shape
    if num_actions > layouts.MAX_ACTIONS:
        return reference.sample_actions_eager(
            logits, action_index_tensor, conditions, strict, greedy, report, generator
        )
    logits = logits.contiguous()
    pairs = action_index_tensor is not None
    index = logits.new_empty(rows, dtype=torch.int64)
    log_prob, entropy = logits.new_empty(rows), logits.new_empty(rows)
    full_log_probs = torch.empty_like(logits)
    pair = logits.new_empty((rows if pairs else 0, 2), dtype=torch.int32)
    if uniform is None and not greedy:
        dtype = compute_dtype(logits.dtype)
        uniform = torch.rand(rows, dtype=dtype, device=logits.device, generator=generator)
    if rows > 0:
        table = index if action_index_tensor is None else action_index_tensor.contiguous()
        words = reports.words_of(report, logits.device) if strict else index
        mask, temperatures, temperature, *kind = kernel_conditions(logits, conditions)
        constants, block = constants_of(num_actions, logits.dtype, *kind, PAIRS=pairs, STRICT=strict, GREEDY=greedy)
        uniform = logits if uniform is None else uniform
        launch_with(
            constants,
            _sample_actions_kernel,
            cdiv(rows, block),
            (
                logits,
                uniform,
                table,
                index,
                log_prob,
                entropy,
                full_log_probs,
                pair,
                words,
                mask,
                temperatures,
            ),
            (rows, temperature),
        )
    return index, log_prob, entropy, full_log_probs, pair
