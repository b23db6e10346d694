"""Rows of logits [N, A] in the registers of a Triton program.

A program loads and stores its rows as a tile [ROWS, BLOCK_A] whose lanes access adjacent elements. In between, it works
on a tuple of pieces [ROWS, PIECE] of PIECE columns each. A thread reduces over the pieces by itself: with PIECE = 1,
for few actions, it holds a whole row, and no reduction crosses lanes. Tile and pieces convert into each other through
shared memory. Sums are over the shifted exponentials e_j = exp(z_j - max): s = sum e_j and w = sum e_j (z_j - max),
where a term with e_j = 0 counts as 0, so that

    log_prob_j = z_j - max - log s          entropy = log s - w / s
"""

# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import torch

from metta_fastagent.runtime.triton import jit, next_power_of_2, tl

# Up to this many actions a piece is one column. More would take several seconds to compile and over 128 registers.
MAX_COLUMNS = 24
# Rows per program of four warps whose rows are PIECES pieces of several columns, by columns of the tile.
PIECES, ROWS_IN_PIECES = 16, {32: 64, 64: 64, 128: 16}
# Above this a row no longer fits in one program; the eager twin takes over.
MAX_ACTIONS = 4096
# One row per thread, four warps (two on AMD): enough programs for small batches, enough rows in flight for large ones.
ROWS_PER_PROGRAM = 128
LANES = 32 if torch.version.hip is None else 64
# Tile elements per warp, 16 per thread, if the tile is one piece. In rows up to this length no reduction crosses warps.
WARP_ELEMENTS = 512
# Triton only reads module globals that are constexpr.
_LEVELS = tl.constexpr(MAX_ACTIONS.bit_length() - 1)


def block_shape(num_actions: int) -> tuple[int, int, int, int]:
    """(rows, columns, columns per piece, warps) of a program for this number of actions."""
    columns = next_power_of_2(num_actions)
    if num_actions <= MAX_COLUMNS:
        return ROWS_PER_PROGRAM, columns, 1, ROWS_PER_PROGRAM // LANES
    if columns in ROWS_IN_PIECES:
        return ROWS_IN_PIECES[columns], columns, columns // PIECES, ROWS_PER_PROGRAM // LANES
    return max(1, WARP_ELEMENTS // columns), columns, columns, max(1, columns // WARP_ELEMENTS)


@jit
def rows_of_program(N, ROWS: tl.constexpr):
    """(row int64 [ROWS], whether the row exists [ROWS])."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, row < N


@jit
def columns_of(k: tl.constexpr, PIECE: tl.constexpr):
    """Columns of piece k, [1, PIECE]."""
    return (k * PIECE + tl.arange(0, PIECE))[None, :]


@jit
def _place(N, A: tl.constexpr, ROWS: tl.constexpr, BLOCK_A: tl.constexpr):
    """(start of the program in [N, A], its rows, row and column [ROWS, 1] and [1, BLOCK_A] of a tile)."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    # Offsets within the program are 32-bit.
    rows = tl.minimum(N - first, ROWS).to(tl.int32)
    return first * A, rows, tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_A)[None, :]


@jit
def load_tile(source, N, OTHER: tl.constexpr, A: tl.constexpr, ROWS: tl.constexpr, BLOCK_A: tl.constexpr):
    """The program's rows of source [N, A]; OTHER out of bounds."""
    start, rows, row, column = _place(N, A, ROWS, BLOCK_A)
    place = source + start + (row * A + column)
    if rows == ROWS:
        # Needs no condition per row.
        tile = tl.load(place, mask=(row >= 0) & (column < A), other=OTHER)
    else:
        # Otherwise the terms of the store's condition would stay in registers from here on.
        inside = ROWS - 1 - row >= tl.where(column < A, ROWS - rows, ROWS)
        tile = tl.load(place, mask=inside, other=OTHER)
    return tile


@jit
def pieces_of(tile, A: tl.constexpr, ROWS: tl.constexpr, BLOCK_A: tl.constexpr, PIECE: tl.constexpr):
    """The pieces of a tile that hold some of the A columns."""
    pieces = (tile,)
    if PIECE < BLOCK_A:
        # Rows come last: Triton maps them to the lanes, so the pieces split within a thread.
        pieces = (tl.permute(tile.reshape(ROWS, BLOCK_A // PIECE, PIECE), (1, 0, 2)),)
        for level in tl.static_range(_LEVELS):
            if (PIECE << level) < BLOCK_A:
                halves = ()
                for j in tl.static_range(1 << level):
                    both = pieces[j].reshape(2, BLOCK_A // PIECE >> (level + 1), ROWS, PIECE)
                    halves = halves + tl.split(tl.permute(both, (1, 2, 3, 0)))
                pieces = halves
        rows = ()
        for j in tl.static_range((A + PIECE - 1) // PIECE):
            # Triton's compiler supports tuple addition, not unpacking.
            rows = rows + (pieces[j].reshape(ROWS, PIECE),)  # noqa: RUF005
        pieces = rows
    return pieces


@jit
def tile_of(pieces, A: tl.constexpr, ROWS: tl.constexpr, BLOCK_A: tl.constexpr, PIECE: tl.constexpr):
    """The tile made of pieces; its values from column A on are undefined."""
    if PIECE < BLOCK_A:
        parts = ()
        for j in tl.static_range(BLOCK_A // PIECE):
            piece = pieces[j if j < len(pieces) else 0]
            parts = parts + (piece.reshape(1, ROWS, PIECE),)  # noqa: RUF005
        for level in tl.static_range(_LEVELS):
            if (PIECE << level) < BLOCK_A:
                pairs = ()
                for j in tl.static_range(BLOCK_A // PIECE >> (level + 1)):
                    pair = tl.permute(tl.join(parts[2 * j], parts[2 * j + 1]), (3, 0, 1, 2))
                    pairs = pairs + (pair.reshape(2 << level, ROWS, PIECE),)  # noqa: RUF005
                parts = pairs
        tile = tl.permute(parts[0], (1, 0, 2)).reshape(ROWS, BLOCK_A)
    else:
        tile = pieces[0]
    return tile


@jit
def store_tile(out, tile, N, A: tl.constexpr, ROWS: tl.constexpr, BLOCK_A: tl.constexpr):
    """Store a tile into the program's rows of out [N, A]."""
    start, rows, row, column = _place(N, A, ROWS, BLOCK_A)
    inside = (row < rows) & (column < A)
    tl.store(out + start + (row * A + column), tile.to(out.dtype.element_ty), mask=inside)


@jit
def load_temperature(temperatures, temperature, COMPUTE: tl.constexpr, TEMPERATURE: tl.constexpr):
    """The temperature: a number, or with TEMPERATURE = 2 the value in memory, or NaN if that is not positive."""
    if TEMPERATURE == 2:
        temperature = tl.load(temperatures).to(COMPUTE)
        temperature = tl.where(temperature > 0, temperature, float("nan"))
    return temperature


@jit
def quotient(x, divisor):
    """x / divisor, rounded as on the CPU: the fast division may change x / 1 and need not preserve x > y."""
    if x.dtype == tl.float32:
        x = tl.div_rn(x, divisor)
    else:
        x = x / divisor
    return x


@jit
def load_logits(
    logits, mask, temperature, N, COMPUTE: tl.constexpr, MASKED: tl.constexpr, TEMPERATURE: tl.constexpr,
    A: tl.constexpr, ROWS: tl.constexpr, BLOCK_A: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """(pieces of the logits z: x divided by the temperature, -inf if the mask [N, A] is False; the mask's tile)."""
    tile = load_tile(logits, N, float("-inf"), A, ROWS, BLOCK_A).to(COMPUTE)
    allowed = 0
    if TEMPERATURE > 0:
        tile = quotient(tile, temperature)
    if MASKED:
        allowed = load_tile(mask, N, 0, A, ROWS, BLOCK_A)
        tile = tl.where(allowed, tile, float("-inf"))
    return pieces_of(tile, A, ROWS, BLOCK_A, PIECE), allowed


@jit
def row_sums(xs):
    """Sum of each row [ROWS]."""
    total = xs[0]
    for k in tl.static_range(1, len(xs)):
        total += xs[k]
    return tl.sum(total, 1)


@jit
def sums(zs):
    """(max, s, w) of each row, each [ROWS]."""
    top = zs[0]
    for k in tl.static_range(1, len(zs)):
        top = tl.maximum(top, zs[k])
    top = tl.max(top, 1)
    es = ()
    terms = ()
    for k in tl.static_range(len(zs)):
        shifted = zs[k] - top[:, None]
        e = tl.exp(shifted)
        es = es + (e,)  # noqa: RUF005
        terms = terms + (tl.where(e == 0, 0.0, e * shifted),)  # noqa: RUF005
    return top, row_sums(es), row_sums(terms)


@jit
def log_probs(zs, top, log_s):
    """Log-probability of every action, in pieces."""
    values = ()
    for k in tl.static_range(len(zs)):
        values = values + (zs[k] - top[:, None] - log_s[:, None],)  # noqa: RUF005
    return values


@jit
def pick(values, chosen, PIECE: tl.constexpr):
    """Value [ROWS] of each row's chosen action; NaN if `chosen` is negative."""
    picked = tl.zeros_like(values[0])
    for k in tl.static_range(len(values)):
        picked = tl.where(chosen[:, None] == columns_of(k, PIECE), values[k], picked)
    return tl.where(chosen < 0, float("nan"), tl.sum(picked, 1))
