"""Row-wise softmax statistics shared by the kernels of `evaluate_actions` and `sample_actions`.

Two layouts. Few actions: a tuple of A columns, one row in each thread, without shuffles; what is stored for all actions
goes through shared memory, so that neighbouring lanes store neighbours: 22 machine instructions a row at A = 21. Many
actions: a tile [ROWS, BLOCK_A], reduced along its rows. Sums are those of the shifted exponentials e_j = exp(x_j -
max): s = sum e_j and w = sum e_j (x_j - max), a term with e_j = 0 counting 0, so that

    log_prob_j = x_j - max - log s          entropy = log s - w / s

With a mask or a temperature, x_j is z_j of `_masking`.
"""

# pyright: reportInvalidTypeForm=false

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metta_fastagent._triton import cdiv, jit, launch_with, next_power_of_2, tl

# The compiler takes about a second for a kernel at this many, several at twice as many.
MAX_COLUMNS = 32
# Above this a row no longer fits one program; the eager twin takes over.
MAX_ACTIONS = 4096
# Triton reads a global of the module only if it is a constexpr.
_LEVELS = tl.constexpr(MAX_ACTIONS.bit_length() - 1)
# One row per thread, four warps or two of AMD's: enough programs at small batches, enough rows in flight at large ones.
ROWS_PER_PROGRAM = 128
LANES = 32 if torch.version.hip is None else 64
# Elements of a tile in each warp, 16 a thread. No reduction crosses warps in rows up to this long.
WARP_ELEMENTS = 512


def block_shape(num_actions: int, lanes: int = LANES) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program for this number of actions."""
    columns = next_power_of_2(num_actions)
    if num_actions <= MAX_COLUMNS:
        return ROWS_PER_PROGRAM, columns, ROWS_PER_PROGRAM // lanes
    return max(1, WARP_ELEMENTS // columns), columns, max(1, columns // WARP_ELEMENTS)


def launch_rows(
    columns_kernel: Any,
    tile_kernel: Any,
    rows: int,
    num_actions: int,
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    **constants: Any,
) -> None:
    """Launch the kernel of the layout for logits [rows, num_actions]; its own constants follow the given ones."""
    kernel = columns_kernel if num_actions <= MAX_COLUMNS else tile_kernel
    block_rows, block_columns, warps = block_shape(num_actions)
    constants |= {"ROWS": block_rows, "BLOCK_A": block_columns}
    launch_with(constants, kernel, cdiv(rows, block_rows), tensors, numbers, warps)


@jit
def load_columns(logits, row, live, A: tl.constexpr, COMPUTE: tl.constexpr):
    """Tuple of A columns [ROWS] of logits [N, A]; rows that are not live read 0."""
    xs = ()
    for j in tl.static_range(A):
        # Triton's compiler knows tuple addition, not unpacking.
        xs = xs + (tl.load(logits + row * A + j, mask=live, other=0.0).to(COMPUTE),)  # noqa: RUF005
    return xs


@jit
def load_temperature(at, number, TEMPERATURE: tl.constexpr, COMPUTE: tl.constexpr):
    """The temperature: a number, or with TEMPERATURE = 2 the value in memory, NaN if it is not positive."""
    temperature = number
    if TEMPERATURE == 2:
        temperature = tl.load(at).to(COMPUTE)
        temperature = tl.where(temperature > 0, temperature, float("nan"))
    return temperature


@jit
def condition_columns(
    xs, mask, temperature, row, live, A: tl.constexpr, MASKED: tl.constexpr, TEMPERATURE: tl.constexpr
):
    """The columns z_j: divided by the temperature, -inf if the mask [N, A] is False."""
    zs = ()
    for j in tl.static_range(A):
        z = xs[j]
        if TEMPERATURE > 0:
            z = z / temperature
        if MASKED:
            z = tl.where(tl.load(mask + row * A + j, mask=live, other=1), z, float("-inf"))
        zs = zs + (z,)  # noqa: RUF005
    return zs


@jit
def condition_tile(
    x, mask, temperature, row, column, live, A: tl.constexpr, MASKED: tl.constexpr, TEMPERATURE: tl.constexpr
):
    """As `condition_columns`, of a tile [ROWS, BLOCK_A]."""
    if TEMPERATURE > 0:
        x = x / temperature
    if MASKED:
        inside = live[:, None] & (column < A)[None, :]
        x = tl.where(tl.load(mask + row[:, None] * A + column[None, :], mask=inside, other=1), x, float("-inf"))
    return x


@jit
def store_columns(out, xs, N, A: tl.constexpr, ROWS: tl.constexpr, BLOCK_A: tl.constexpr):
    """Store A columns [ROWS] in the program's rows of out [N, A], through shared memory: lanes store neighbours."""
    for _ in tl.static_range(BLOCK_A - A):
        xs = xs + (xs[A - 1],)  # noqa: RUF005
    # Joined are columns half of all apart, then a quarter, and so on: the last join brings neighbours together.
    for level in tl.static_range(_LEVELS):
        if (2 << level) <= BLOCK_A:
            pairs = ()
            for j in tl.static_range(BLOCK_A >> (level + 1)):
                pairs = pairs + (tl.join(xs[j], xs[j + (BLOCK_A >> (level + 1))]),)  # noqa: RUF005
            xs = pairs
    block = xs[0].reshape(ROWS, BLOCK_A).to(out.dtype.element_ty)  # pyright: ignore[reportGeneralTypeIssues]
    first = tl.program_id(0).to(tl.int64) * ROWS
    # Offsets within the program are 32-bit.
    local = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_A)[None, :]
    inside = (local < tl.minimum(N - first, ROWS).to(tl.int32)) & (column < A)
    tl.store(out + first * A + (local * A + column), block, mask=inside)


@jit
def columns_sums(xs, A: tl.constexpr):
    """(max, s, w) of a tuple of columns, each [ROWS]."""
    top = xs[0]
    for j in tl.static_range(1, A):
        top = tl.maximum(top, xs[j])
    s = tl.zeros_like(top)
    w = tl.zeros_like(top)
    for j in tl.static_range(A):
        shifted = xs[j] - top
        e = tl.exp(shifted)
        s += e
        w += tl.where(e == 0, 0.0, e * shifted)
    return top, s, w


@jit
def load_tile(logits, row, column, live, A: tl.constexpr, COMPUTE: tl.constexpr):
    """Tile [ROWS, BLOCK_A] of logits [N, A]; what lies outside reads -inf."""
    inside = live[:, None] & (column < A)[None, :]
    return tl.load(logits + row[:, None] * A + column[None, :], mask=inside, other=float("-inf")).to(COMPUTE)


@jit
def tile_sums(x):
    """(max, s, w) of the rows of a tile, each [ROWS], and the tile of shifted exponentials."""
    top = tl.max(x, 1)
    shifted = x - top[:, None]
    e = tl.exp(shifted)
    w = tl.sum(tl.where(e == 0, 0.0, e * shifted), 1)
    return top, tl.sum(e, 1), w, e
