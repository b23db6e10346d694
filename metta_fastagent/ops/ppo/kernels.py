"""Triton kernels of PPO and their launchers."""

# pyright: reportInvalidTypeForm=false

import functools

import numpy as np
import torch
from torch import Tensor

from metta_fastagent.ops.categorical import layouts
from metta_fastagent.ops.categorical.kernels import (
    constants_of,
    gradients,
    kernel_conditions,
    load_index,
    store_gradients,
)
from metta_fastagent.ops.dtypes import compute_dtype
from metta_fastagent.ops.ppo import reference
from metta_fastagent.ops.ppo.reference import LossGradient, Rollout, Samples
from metta_fastagent.runtime import reports
from metta_fastagent.runtime.launch import Constants, launch_with
from metta_fastagent.runtime.scratch import scratch_for
from metta_fastagent.runtime.triton import cdiv, compute_type, jit, next_power_of_2, tl

# Rows times steps per program, 4 per thread of four warps, because more take over 128 registers; most steps per pass.
ADVANTAGES_ELEMENTS, ADVANTAGES_STEPS = 512, 128
# Programs whose sums the loss's last program adds at a time: 16 numbers for each lane of a single warp.
SUMS_AT_A_TIME = 64
# Triton only reads module globals that are constexpr.
_SUMS_AT_A_TIME = tl.constexpr(SUMS_AT_A_TIME)
_PAIR, _INDEX, _LOGITS = (tl.constexpr(code) for code in (reports.PPO_PAIR, reports.PPO_INDEX, reports.PPO_LOGITS))


@jit
def _number(high, rest, COMPUTE: tl.constexpr):
    """The sum of two scalar arguments, see `_parts`."""
    return tl.full((), 0.0, COMPUTE) + high + rest


@jit
def _then(decay, delta, earlier_decay, earlier_delta):
    """The step x -> delta + decay x followed by an earlier step, as one step."""
    return decay * earlier_decay, earlier_delta + earlier_decay * delta


@jit(varying=("B", "T"))
def _advantages_kernel(
    rewards,  # [B, T]
    values,  # [B, T]
    ends,  # [B, T] bool
    next_value,  # [B]
    bootstrap_values,  # [B, T]
    valid,  # [B, T] bool; unused without VALID
    ratios,  # [B, T]; unused without RATIOS
    out,  # [B, T]
    B,
    T,
    gamma,
    gamma_rest,
    decay,
    decay_rest,
    rho_clip,
    rho_rest,
    c_clip,
    c_rest,
    VALID: tl.constexpr,
    RATIOS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < B
    column = tl.arange(0, STEPS)
    following_last = tl.load(next_value + row, mask=live, other=0.0).to(COMPUTE)
    gamma = _number(gamma, gamma_rest, COMPUTE)
    decay = _number(decay, decay_rest, COMPUTE)
    running = tl.zeros([ROWS], COMPUTE)
    for done in range(0, T, STEPS):
        t = T - done - STEPS + column
        inside = live[:, None] & (t >= 0)[None, :]
        place = row[:, None] * T + t[None, :]
        ended = tl.load(ends + place, mask=inside, other=1)
        following = tl.load(values + place + 1, mask=inside & (t + 1 < T)[None, :], other=0.0).to(COMPUTE)
        following = tl.where((t + 1 < T)[None, :], following, following_last[:, None])
        bootstrap = tl.load(bootstrap_values + place, mask=inside, other=0.0).to(COMPUTE)
        reward = tl.load(rewards + place, mask=inside, other=0.0).to(COMPUTE)
        value = tl.load(values + place, mask=inside, other=0.0).to(COMPUTE)
        delta = reward + gamma * tl.where(ended, bootstrap, following) - value
        factor = tl.where(ended, 0.0, decay)
        if RATIOS:
            ratio = tl.load(ratios + place, mask=inside, other=0.0).to(COMPUTE)
            limit = _number(rho_clip, rho_rest, COMPUTE)
            # NaN stays NaN.
            delta = delta * tl.where(ratio > limit, limit, ratio)
            limit = _number(c_clip, c_rest, COMPUTE)
            factor = factor * tl.where(ratio > limit, limit, ratio)
        if VALID:
            counts = tl.load(valid + place, mask=inside, other=0)
            delta = tl.where(counts, delta, 0.0)
            factor = tl.where(counts, factor, 0.0)
        factor, delta = tl.associative_scan((factor, delta), 1, _then, reverse=True)
        found = delta + factor * running[:, None]
        tl.store(out + place, found.to(out.dtype.element_ty), mask=inside)
        running = tl.sum(tl.where((column == 0)[None, :], found, 0.0), 1)


@jit
def _kl(log_ratio, ratio):
    """r - 1 - log r, by its series near 0, where the difference would lose precision."""
    series = log_ratio * 0 + 1
    for k in tl.static_range(13):
        series = 1 + series * log_ratio * (1.0 / (15 - k))
    return tl.where(tl.abs(log_ratio) < 0.5, 0.5 * log_ratio * log_ratio * series, ratio - 1 - log_ratio)


@jit
def _value_error(value, old_value, returns, row, live, limit, COMPUTE: tl.constexpr, CLIPS_VALUE: tl.constexpr):
    """(squared error, half its derivative with respect to the value) of each row, both [ROWS]."""
    v = tl.load(value + row, mask=live, other=0.0).to(COMPUTE)
    target = tl.load(returns + row, mask=live, other=0.0).to(COMPUTE)
    difference = v - target
    error = difference * difference
    if CLIPS_VALUE:
        old = tl.load(old_value + row, mask=live, other=0.0).to(COMPUTE)
        change = v - old
        clipped = old + tl.where(change > 0, limit, -limit) - target
        worse = (tl.abs(change) > limit) & (clipped * clipped > error)
        error = tl.where(worse, clipped * clipped, error)
        difference = tl.where(worse, 0.0, difference)
    return error, difference


@jit
def _add_up(
    partials, loss, statistics, divisor, count, N, programs, vf_coef, ent_coef,
    VALID: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Store the results, given the sums of all programs."""
    which = tl.arange(0, 8)
    total = tl.zeros([8, _SUMS_AT_A_TIME], tl.float64)
    for first in range(0, programs, _SUMS_AT_A_TIME):
        program = first + tl.arange(0, _SUMS_AT_A_TIME)
        inside = (which < 6)[:, None] & (program < programs)[None, :]
        place = partials + which[:, None] * programs + program[None, :]
        total += tl.load(place, mask=inside, other=0.0, cache_modifier=".cg")
    sums = tl.sum(total, 1)
    rows = tl.zeros([8], tl.float64) + N
    if COUNTED:
        rows = tl.zeros([8], tl.float64) + tl.load(count).to(tl.float64)
    elif VALID:
        rows = tl.zeros([8], tl.float64) + tl.sum(tl.where(which == 5, sums, 0.0), 0)
    rows = tl.where(rows > 0, rows, 1.0)
    means = sums / rows
    weight = tl.where(which == 0, 1.0, tl.where(which == 1, vf_coef, tl.where(which == 2, -ent_coef, 0.0)))
    total_loss = tl.sum(tl.where(which < 3, means * weight, 0.0), 0)
    tl.store(loss, total_loss.to(loss.dtype.element_ty))
    tl.store(statistics + which, means.to(statistics.dtype.element_ty), mask=which < 5)
    tl.store(divisor + which, rows.to(divisor.dtype.element_ty), mask=which < 1)


@jit(varying=("N", "num_types", "stride_row", "stride_pair", "programs"))
def _ppo_loss_fwd_kernel(
    logits,  # [N, A]
    actions,  # [N, 2] pairs or [N] indices, any integer dtype
    table,  # [T + 1] int64; unused without PAIRS
    value,  # [N], as the next four
    old_log_prob,
    old_value,  # unused without CLIPS_VALUE
    advantages,
    returns,
    valid,  # [N] bool; unused without VALID
    count,  # [1]; unused without COUNTED
    loss,  # []
    statistics,  # [5]
    divisor,  # []
    index,  # [N] int64
    slopes,  # [2, N]
    words,  # [2] int64
    partials,  # [6, programs] float64
    counter,  # [1] int32
    mask,  # [N, A] bool; unused without MASKED
    temperatures,  # [1]; unused unless TEMPERATURE = 2
    N,
    num_types,
    stride_row,
    stride_pair,
    programs,
    temperature,
    low,
    low_rest,
    high,
    high_rest,
    clip,
    clip_rest,
    vf_clip,
    vf_clip_rest,
    vf_coef,
    vf_coef_rest,
    ent_coef,
    ent_coef_rest,
    A: tl.constexpr,
    PAIRS: tl.constexpr,
    STRICT: tl.constexpr,
    VALID: tl.constexpr,
    COUNTED: tl.constexpr,
    CLIPS_VALUE: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASKED: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    PIECE: tl.constexpr,
):
    row, live = layouts.rows_of_program(N, ROWS)
    chosen = load_index(actions, table, words, row, live, num_types, stride_row, stride_pair, A, PAIRS, _PAIR, _INDEX)
    tempered = layouts.load_temperature(temperatures, temperature, COMPUTE, TEMPERATURE)
    zs, _ = layouts.load_logits(logits, mask, tempered, N, COMPUTE, MASKED, TEMPERATURE, A, ROWS, BLOCK_A, PIECE)
    top, s, w = layouts.sums(zs)
    if STRICT:
        reports.report_logits(words, live & (s != s), row, top, MASKED, _LOGITS)
    log_s = tl.log(s)
    log_prob = layouts.pick(zs, chosen, PIECE) - top - log_s
    log_ratio = log_prob - tl.load(old_log_prob + row, mask=live, other=0.0).to(COMPUTE)
    ratio = tl.exp(log_ratio)
    advantage = tl.load(advantages + row, mask=live, other=0.0).to(COMPUTE)
    low = _number(low, low_rest, COMPUTE)
    high = _number(high, high_rest, COMPUTE)
    # min(r A, clip(r) A), but 0 for A = 0 and r = inf. NaN stays NaN.
    bounded = tl.where(advantage >= 0, tl.where(ratio > high, high, ratio), tl.where(ratio < low, low, ratio))
    surrogate = bounded * advantage
    limit = _number(vf_clip, vf_clip_rest, COMPUTE)
    error, difference = _value_error(value, old_value, returns, row, live, limit, COMPUTE, CLIPS_VALUE)
    clips = tl.abs(ratio - 1) > _number(clip, clip_rest, COMPUTE)
    counts = live
    if VALID:
        counts = live & (tl.load(valid + row, mask=live, other=0) != 0)
    learns = counts & (chosen >= 0)
    tl.store(index + row, tl.where(counts, chosen, -1), mask=live)
    tl.store(slopes + row, tl.where(learns & (bounded == ratio), -surrogate, 0.0), mask=live)
    slope = _number(vf_coef, vf_coef_rest, COMPUTE) * difference
    tl.store(slopes + N + row, tl.where(learns, slope, 0.0), mask=live)
    place = partials + tl.program_id(0)
    tl.store(place, tl.sum(tl.where(counts, -surrogate, 0.0), 0).to(tl.float64))
    tl.store(place + programs, tl.sum(tl.where(counts, 0.5 * error, 0.0), 0).to(tl.float64))
    tl.store(place + 2 * programs, tl.sum(tl.where(counts, log_s - w / s, 0.0), 0).to(tl.float64))
    tl.store(place + 3 * programs, tl.sum(tl.where(counts, _kl(log_ratio, ratio), 0.0), 0).to(tl.float64))
    tl.store(place + 4 * programs, tl.sum((counts & clips).to(tl.float64), 0))
    tl.store(place + 5 * programs, tl.sum(counts.to(tl.float64), 0))
    # The last program to arrive adds the sums in order, so the result does not depend on which program that is.
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1:
        _add_up(
            partials, loss, statistics, divisor, count, N, programs, _number(vf_coef, vf_coef_rest, tl.float64),
            _number(ent_coef, ent_coef_rest, tl.float64), VALID, COUNTED,
        )  # fmt: skip
        tl.store(counter, 0)


@jit(varying=("N",))
def _ppo_loss_bwd_kernel(
    grad,  # []
    logits,  # [N, A]
    index,  # [N] int64, -1 for a row without a gradient
    slopes,  # [2, N]
    divisor,  # []
    grad_logits,  # [N, A]
    grad_value,  # [N]
    mask,  # [N, A] bool; unused without MASKED
    temperatures,  # [1]; unused unless TEMPERATURE = 2
    N,
    temperature,
    ent_coef,
    ent_coef_rest,
    A: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASKED: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    PIECE: tl.constexpr,
):
    row, live = layouts.rows_of_program(N, ROWS)
    chosen = tl.load(index + row, mask=live, other=-1)
    scale = tl.load(grad).to(COMPUTE) / tl.load(divisor)
    from_log_prob = tl.load(slopes + row, mask=live, other=0.0) * scale
    from_value = tl.load(slopes + N + row, mask=live, other=0.0) * scale
    from_entropy = tl.zeros([ROWS], COMPUTE) - _number(ent_coef, ent_coef_rest, COMPUTE) * scale
    tempered = layouts.load_temperature(temperatures, temperature, COMPUTE, TEMPERATURE)
    zs, allowed = layouts.load_logits(logits, mask, tempered, N, COMPUTE, MASKED, TEMPERATURE, A, ROWS, BLOCK_A, PIECE)
    top, s, w = layouts.sums(zs)
    grads = gradients(
        zs, zs, chosen, from_log_prob, from_entropy, from_log_prob, top, s, w, tempered, True, False, TEMPERATURE, PIECE
    )
    store_gradients(grad_logits, grads, allowed, N, MASKED, A, ROWS, BLOCK_A, PIECE)
    tl.store(grad_value + row, from_value.to(grad_value.dtype.element_ty), mask=live)


@functools.cache
def _advantages_constants(steps: int, dtype: torch.dtype, masked: bool, clipped: bool) -> tuple[Constants, int]:
    """(constants, rows per program) for segments of up to `steps` steps, a power of two."""
    steps = min(steps, ADVANTAGES_STEPS)
    rows = ADVANTAGES_ELEMENTS // steps
    values = {"VALID": masked, "RATIOS": clipped, "COMPUTE": compute_type(dtype), "ROWS": rows, "STEPS": steps}
    return Constants(values), rows


# A run has a few sets of coefficients; some change at each update.
@functools.lru_cache(maxsize=64)
def _parts(*numbers: float) -> tuple[float, ...]:
    """Each number as a sum of two, within float64's rounding: scalar arguments of a kernel are float32."""
    parts = []
    for number in numbers:
        high = float(np.float32(number))
        parts += [high, number - high if np.isfinite(high) else 0.0]
    return tuple(parts)


def advantages_cuda(rollout: Rollout) -> Tensor:
    """Same as `advantages_eager`, in one launch."""
    values, valid, ratios = rollout.values, rollout.valid, rollout.ratios
    out = values.new_empty(values.shape)
    rows, steps = values.shape
    if rows > 0:
        constants, block = _advantages_constants(
            next_power_of_2(steps), values.dtype, valid is not None, ratios is not None
        )
        # The values stand in for absent tensors.
        tensors = [(values if each is None else each).contiguous() for each in rollout[:7]]
        numbers = _parts(rollout.gamma, rollout.gamma * rollout.lam, rollout.rho_clip, rollout.c_clip)
        launch_with(constants, _advantages_kernel, cdiv(rows, block), (*tensors, out), (rows, steps, *numbers))
    return out


def ppo_loss_forward_cuda(
    logits: Tensor, samples: Samples, strict: bool, report: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Same as `ppo_loss_forward_eager`, in one launch."""
    rows, num_actions = logits.shape
    if num_actions > layouts.MAX_ACTIONS or rows == 0:
        return reference.ppo_loss_forward_eager(logits, samples, strict)
    logits, dtype = logits.contiguous(), compute_dtype(logits.dtype)
    loss, statistics, divisor = (logits.new_empty(shape, dtype=dtype) for shape in ((), 5, ()))
    index, slopes = logits.new_empty(rows, dtype=torch.int64), logits.new_empty((2, rows), dtype=dtype)
    actions, *numbers, table, valid, count = samples[:9]
    pairs, clip, vf_clip = table is not None, samples.clip_coef, samples.vf_clip_coef
    mask, temperatures, temperature, *kind = kernel_conditions(logits, samples.conditions())
    constants, block = constants_of(
        num_actions,
        logits.dtype,
        *kind,
        PAIRS=pairs,
        STRICT=strict,
        VALID=valid is not None,
        COUNTED=count is not None,
        CLIPS_VALUE=vf_clip > 0,
    )
    programs = cdiv(rows, block)
    launch_with(
        constants,
        _ppo_loss_fwd_kernel,
        programs,
        (
            logits,
            actions,
            index if table is None else table.contiguous(),
            *(each.contiguous() for each in numbers),
            index if valid is None else valid.contiguous(),
            loss if count is None else count,
            loss,
            statistics,
            divisor,
            index,
            slopes,
            reports.words_of(report, logits.device),
            *scratch_for(6 * programs, logits.device),
            mask,
            temperatures,
        ),
        (
            *(rows, 0 if table is None else table.shape[0] - 1),
            *(actions.stride(0), actions.stride(1) if pairs else 0),
            *(programs, temperature),
            *_parts(1 - clip, 1 + clip, clip, vf_clip, samples.vf_coef, samples.ent_coef),
        ),
    )
    return loss, statistics, divisor, index, slopes


def ppo_loss_backward_cuda(given: LossGradient) -> tuple[Tensor, Tensor]:
    """Same as `ppo_loss_backward_eager`, in one launch."""
    logits, value, grad, index, slopes, divisor = given[:6]
    rows, num_actions = logits.shape
    if num_actions > layouts.MAX_ACTIONS or rows == 0:
        return reference.ppo_loss_backward_eager(given)
    logits = logits.contiguous()
    grad_logits, grad_value = torch.empty_like(logits), value.new_empty(value.shape)
    mask, temperatures, temperature, *kind = kernel_conditions(logits, given.conditions())
    constants, block = constants_of(num_actions, logits.dtype, *kind)
    launch_with(
        constants,
        _ppo_loss_bwd_kernel,
        cdiv(rows, block),
        (
            *(grad, logits, index.contiguous(), slopes.contiguous(), divisor),
            *(grad_logits, grad_value, mask, temperatures),
        ),
        (rows, temperature, *_parts(given.ent_coef)),
    )
    return grad_logits, grad_value
