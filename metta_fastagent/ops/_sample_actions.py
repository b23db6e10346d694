"""Draw one action per row from categorical logits, with its log-probability and the entropy.

    full_log_probs = log_softmax(logits)         index ~ Categorical(exp(full_log_probs))

The kernels and the C++ operator draw by the inverse of the cumulative distribution from one uniform u of each row: the
first column with e_j > 0 whose running sum of shifted exponentials exceeds u times their sum, so neither rounding nor a
u close to 1 can choose a masked action. The eager twin draws by `log_softmax -> exp -> torch.multinomial`, with equal
results. Each backend draws from PyTorch's generators, so `torch.manual_seed` reproduces it; for one seed the draws
differ between backends. The gradient is that of `evaluate_actions` at the drawn index.
"""

# pyright: reportInvalidTypeForm=false

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metta_fastagent._dispatch import backend, register
from metta_fastagent._triton import compute_type, jit, tl
from metta_fastagent.ops import _bad_action
from metta_fastagent.ops._action_index import check_action_index_tensor, logit_index_to_action_eager
from metta_fastagent.ops._autograd import checks_values, in_plain_pytorch, records_graph
from metta_fastagent.ops._bad_action import SAMPLE_LOGITS, report_logits
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
    compute_dtype,
    describe,
    native_integers,
    native_logits,
    require_logits,
    require_same_device,
)
from metta_fastagent.ops._evaluate_actions import (
    entropy_of,
    float32_under_autocast,
    logits_gradient,
    save_for_gradient,
    select_log_prob,
)
from metta_fastagent.ops._masking import (
    ARGUMENTS,
    MaskLike,
    checked_conditions,
    condition,
    kernel_arguments,
    native_arguments,
    refuse_rows_without_distribution,
)

_SAMPLE_LOGITS = tl.constexpr(SAMPLE_LOGITS)


@jit
def _store_draw(
    index_out, log_prob_out, entropy_out, pair_out, table, row, live, chosen, log_prob, entropy, PAIRS: tl.constexpr
):
    tl.store(index_out + row, chosen.to(tl.int64), mask=live)
    tl.store(log_prob_out + row, log_prob, mask=live)
    tl.store(entropy_out + row, entropy, mask=live)
    if PAIRS:
        for column in tl.static_range(2):
            entry = tl.load(table + chosen * 2 + column)
            tl.store(pair_out + row * 2 + column, entry.to(tl.int32), mask=live)


@jit(varying=("N",))
def _sample_actions_columns_kernel(
    logits,  # [N, A]
    uniform,  # [N] in [0, 1); unused with GREEDY
    table,  # [A, 2]; unused without PAIRS
    index,  # [N] int64
    log_prob,  # [N]
    entropy,  # [N]
    full_log_probs,  # [N, A]
    pair,  # [N, 2] int32; unused without PAIRS
    word,  # [2] int64; unused without STRICT
    mask,  # [N, A] bool; unused without MASKED
    temperature_tensor,  # [1]; unused unless TEMPERATURE = 2
    N,
    temperature,
    A: tl.constexpr,
    PAIRS: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASKED: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    STRICT: tl.constexpr,
    GREEDY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < N
    t = load_temperature(temperature_tensor, temperature, TEMPERATURE, COMPUTE)
    xs = load_columns(logits, row, live, A, COMPUTE)
    xs = condition_columns(xs, mask, t, row, live, A, MASKED, TEMPERATURE)
    top, s, w = columns_sums(xs, A)
    if STRICT:
        report_logits(word, live & (s != s), row, top, MASKED, _SAMPLE_LOGITS)
    log_s = tl.log(s)
    threshold = tl.zeros([ROWS], COMPUTE)
    if not GREEDY:
        threshold = tl.load(uniform + row, mask=live, other=0.0).to(COMPUTE) * s
    running = tl.zeros([ROWS], COMPUTE)
    chosen = tl.full([ROWS], A, tl.int32)
    selected = tl.full([ROWS], float("nan"), COMPUTE)
    values = ()
    for j in tl.static_range(A):
        shifted = xs[j] - top
        if GREEDY:
            # NaN in s leaves the row without a choice.
            here = (chosen == A) & (xs[j] == top) & (s == s)
        else:
            running += tl.exp(shifted)
            here = (chosen == A) & (running > threshold)
        chosen = tl.where(here, j, chosen)
        values = values + (shifted - log_s,)  # noqa: RUF005
        selected = tl.where(here, values[j], selected)
    chosen = tl.where(chosen == A, 0, chosen)
    _store_draw(index, log_prob, entropy, pair, table, row, live, chosen, selected, log_s - w / s, PAIRS)
    store_columns(full_log_probs, values, N, A, ROWS, BLOCK_A)


@jit(varying=("N",))
def _sample_actions_tile_kernel(
    logits,  # [N, A]
    uniform,  # [N] in [0, 1); unused with GREEDY
    table,  # [A, 2]; unused without PAIRS
    index,  # [N] int64
    log_prob,  # [N]
    entropy,  # [N]
    full_log_probs,  # [N, A]
    pair,  # [N, 2] int32; unused without PAIRS
    word,  # [2] int64; unused without STRICT
    mask,  # [N, A] bool; unused without MASKED
    temperature_tensor,  # [1]; unused unless TEMPERATURE = 2
    N,
    temperature,
    A: tl.constexpr,
    PAIRS: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASKED: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    STRICT: tl.constexpr,
    GREEDY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_A)
    live = row < N
    t = load_temperature(temperature_tensor, temperature, TEMPERATURE, COMPUTE)
    x = load_tile(logits, row, column, live, A, COMPUTE)
    x = condition_tile(x, mask, t, row, column, live, A, MASKED, TEMPERATURE)
    top, s, w, e = tile_sums(x)
    if STRICT:
        report_logits(word, live & (s != s), row, top, MASKED, _SAMPLE_LOGITS)
    log_s = tl.log(s)
    values = x - top[:, None] - log_s[:, None]
    if GREEDY:
        candidate = (x == top[:, None]) & (s == s)[:, None]
    else:
        running = tl.cumsum(e, 1)
        # A scan by a tree is not monotone: the largest running sum at a column that can be drawn stands for the whole.
        total = tl.max(tl.where(e > 0, running, 0.0), 1)
        threshold = tl.load(uniform + row, mask=live, other=0.0).to(COMPUTE) * total
        candidate = (running > threshold[:, None]) & (e > 0)
    chosen = tl.min(tl.where(candidate, column[None, :], BLOCK_A), 1)
    # No candidate: the row holds NaN or +inf, or nothing but -inf.
    bad = chosen == BLOCK_A
    chosen = tl.where(bad, 0, chosen)
    selected = tl.sum(tl.where(chosen[:, None] == column[None, :], values, 0.0), 1)
    selected = tl.where(bad, float("nan"), selected)
    inside = live[:, None] & (column < A)[None, :]
    tl.store(full_log_probs + row[:, None] * A + column[None, :], values, mask=inside)
    _store_draw(index, log_prob, entropy, pair, table, row, live, chosen, selected, log_s - w / s, PAIRS)


def _sample_actions_cuda(
    logits: Tensor,
    action_index_tensor: Tensor | None,
    strict: bool = True,
    greedy: bool = False,
    mask: Tensor | None = None,
    temperature_tensor: Tensor | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    conditions = strict, greedy, mask, temperature_tensor, temperature
    if logits.shape[1] > MAX_ACTIONS:
        return sample_actions_eager(logits, action_index_tensor, *conditions, generator=generator)
    uniform = None if greedy else _uniform(logits, generator)
    return _draw_cuda(logits, action_index_tensor, uniform, *conditions)


def _uniform(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(logits.shape[0], dtype=compute_dtype(logits.dtype), device=logits.device, generator=generator)


def _draw_cuda(
    logits: Tensor,
    action_index_tensor: Tensor | None,
    uniform: Tensor | None,
    strict: bool = True,
    greedy: bool = False,
    mask: Tensor | None = None,
    temperature_tensor: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The draw that belongs to the given uniforms [N]."""
    rows, num_actions = logits.shape
    logits = logits.contiguous()
    tensors, constants = kernel_arguments(logits, mask, temperature_tensor, temperature)
    pairs = action_index_tensor is not None
    index = logits.new_empty(rows, dtype=torch.int64)
    log_prob, entropy = logits.new_empty(rows), logits.new_empty(rows)
    full_log_probs = torch.empty_like(logits)
    pair = logits.new_empty((rows if pairs else 0, 2), dtype=torch.int32)
    if rows == 0:
        return index, log_prob, entropy, full_log_probs, pair
    launch_rows(
        _sample_actions_columns_kernel,
        _sample_actions_tile_kernel,
        rows,
        num_actions,
        (
            logits,
            logits if uniform is None else uniform,
            action_index_tensor.contiguous() if pairs else index,
            index,
            log_prob,
            entropy,
            full_log_probs,
            pair,
            _bad_action.word(logits.device) if strict else index,
            *tensors,
        ),
        (rows, temperature),
        A=num_actions,
        PAIRS=pairs,
        COMPUTE=compute_type(logits.dtype),
        **constants,
        STRICT=strict,
        GREEDY=greedy,
    )
    return index, log_prob, entropy, full_log_probs, pair


def _sample_actions_native(
    logits: Tensor,
    action_index_tensor: Tensor | None,
    strict: bool = True,
    greedy: bool = False,
    mask: Tensor | None = None,
    temperature_tensor: Tensor | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    conditions = strict, greedy, mask, temperature_tensor, temperature
    if greedy:
        return _draw_native(logits, action_index_tensor, None, *conditions)
    generator = torch.default_generator if generator is None else generator
    state = generator.get_state() if strict else None
    try:
        return _draw_native(logits, action_index_tensor, _uniform(logits, generator), *conditions)
    except ValueError:
        # Refused logits change nothing.
        if state is not None:
            generator.set_state(state)
        raise


def _draw_native(
    logits: Tensor,
    action_index_tensor: Tensor | None,
    uniform: Tensor | None,
    strict: bool = True,
    greedy: bool = False,
    mask: Tensor | None = None,
    temperature_tensor: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The draw that belongs to the given uniforms [N], without them the likeliest action."""
    dtype = logits.dtype
    table = None if action_index_tensor is None else native_integers(action_index_tensor)
    *outputs, bad_row = torch.ops.metta_fastagent_native.sample_actions.default(
        native_logits(logits), uniform, table, *native_arguments(mask, temperature_tensor, temperature)
    )
    index, log_prob, entropy, full_log_probs, pair = outputs
    if strict and bad_row >= 0:
        refuse_rows_without_distribution(entropy, logits, mask)
    if log_prob.dtype == dtype:
        return index, log_prob, entropy, full_log_probs, pair
    return index, log_prob.to(dtype), entropy.to(dtype), full_log_probs.to(dtype), pair


def sample_actions_eager(
    logits: Tensor,
    action_index_tensor: Tensor | None,
    strict: bool = True,
    greedy: bool = False,
    mask: Tensor | None = None,
    temperature_tensor: Tensor | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(index [N], log_prob [N], entropy [N], full_log_probs [N, A], pair [N, 2]) in plain PyTorch.

    Without a table the pair is an empty tensor [0, 2].
    """
    z = condition(logits, mask, temperature_tensor, temperature)
    full_log_probs = torch.log_softmax(z, dim=-1)
    entropy = entropy_of(full_log_probs)
    checked = strict and checks_values(logits)
    if checked:
        refuse_rows_without_distribution(entropy, logits, mask)
    if greedy:
        index = z.argmax(-1)
    else:
        probs = full_log_probs.exp()
        # multinomial stops the whole device on a NaN; such a row's log-probability is NaN already.
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


def _fake(logits: Tensor, action_index_tensor: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows),
        logits.new_empty(rows),
        logits.new_empty(logits.shape),
        logits.new_empty((0 if action_index_tensor is None else rows, 2), dtype=torch.int32),
    )


_sample_actions = register(
    "sample_actions(Tensor logits, Tensor? action_index_tensor, bool strict=True, bool greedy=False,"
    f" {ARGUMENTS})"
    " -> (Tensor index, Tensor log_prob, Tensor entropy, Tensor full_log_probs, Tensor pair)",
    sample_actions_eager,
    _fake,
    _sample_actions_cuda,
    _sample_actions_native,
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)

_DRAWS: dict[str, Callable] = {
    "triton": _sample_actions_cuda,
    "native": _sample_actions_native,
    "eager": sample_actions_eager,
}


def _draw(
    logits: Tensor, action_index_tensor: Tensor | None, generator: torch.Generator | None, *conditions: Any
) -> tuple[Tensor, ...]:
    if generator is None:
        return _sample_actions(logits, action_index_tensor, *conditions)
    # A traced graph cannot hold a generator, so this call bypasses the operator.
    return _DRAWS[backend(logits.device)](logits, action_index_tensor, *conditions, generator=generator)


class _SampleActions(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, *arguments: Any):
        outputs = _draw(logits, *arguments)
        index, _, _, _, pair = outputs
        conditions = arguments[4:]
        save_for_gradient(ctx, logits, index, *conditions)
        ctx.mark_non_differentiable(index, pair)
        return outputs

    @staticmethod
    def backward(ctx, _grad_index, grad_log_prob, grad_entropy, grad_full_log_probs, _grad_pair):
        grad = logits_gradient(ctx, grad_log_prob, grad_entropy, grad_full_log_probs)
        return grad, *[None] * (len(ctx.needs_input_grad) - 1)


def sample_actions(
    logits: Tensor,
    action_index_tensor: Tensor | None = None,
    generator: torch.Generator | None = None,
    mask: MaskLike = None,
    temperature: float | Tensor = 1.0,
    greedy: bool = False,
    *,
    strict: bool = True,
) -> tuple[Tensor, ...]:
    """Draw an action per row.

    Args:
        logits: floating-point tensor [N, A]; -inf masks an action, which is then never drawn.
        action_index_tensor: int32 tensor [A, 2], row i the (type, parameter) pair of logit i, or None.
        generator: the generator to draw from; None means the device's default one.
        mask, temperature: as of `evaluate_actions`; a pair of masks needs `action_index_tensor`.
        greedy: take the likeliest action, the first of several, instead of a draw; no random number is used.
        strict: on the CPU raise an error for a row that is no distribution, elsewhere report it for
            `raise_if_reported`. Such a row has action 0 and log-probability NaN.

    Returns:
        (index int64 [N], log_prob [N], entropy [N] in nats, full_log_probs [N, A]) and, with a table, pair int32
        [N, 2]. The floating-point ones have the logits' dtype, are those of the masked distribution
        softmax(logits / temperature), and are differentiable with respect to the logits, any number of times.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device; on the CPU also a row that is not a distribution.
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
    logits = float32_under_autocast(logits)
    conditions = checked_conditions(logits, mask, temperature, None, action_index_tensor)
    if in_plain_pytorch():
        outputs = sample_actions_eager(logits, action_index_tensor, strict, greedy, *conditions, generator=generator)
    elif not records_graph(logits):
        outputs = _draw(logits, action_index_tensor, generator, strict, greedy, *conditions)
    else:
        outputs = _SampleActions.apply(logits, action_index_tensor, generator, strict, greedy, *conditions)
    return outputs if action_index_tensor is not None else outputs[:4]
