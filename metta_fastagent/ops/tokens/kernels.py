"""The Triton kernel that scatters observation tokens into a grid, and its launcher."""

# pyright: reportInvalidTypeForm=false

import functools

import torch
from torch import Tensor

from metta_fastagent.ops.tokens.reference import tokens_to_grid_eager
from metta_fastagent.runtime.launch import Constants, launch_with
from metta_fastagent.runtime.triton import jit, tl

# Cells that a program zeroes at once: four 128-bit stores of float32 for each of its 32 threads.
ZERO_BLOCK = 512
# Tokens that are compared with each other and written between two barriers.
TOKEN_BLOCK = 32
# With more warps, each would repeat the work on the tokens.
WARPS = 1


@jit(varying=("num_tokens",))
def _tokens_to_grid_kernel(
    tokens,  # [N, M, 3] uint8
    scale,  # [L]
    grid,  # [N, L, W, H]
    num_tokens,
    L: tl.constexpr,
    W: tl.constexpr,
    H: tl.constexpr,
    X_LOW: tl.constexpr,
    ZERO_BLOCK: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    CELLS: tl.constexpr = L * W * H
    base = grid + row * CELLS
    # Zeros: vectors from the row's first 128-bit address to its last one; the few cells before and after singly.
    VECTOR: tl.constexpr = 128 // grid.dtype.element_ty.primitive_bitwidth
    few = tl.arange(0, VECTOR)
    # -row * CELLS modulo VECTOR; the remainder of a negative number would be negative.
    head = (row * (CELLS * (VECTOR - 1)) % VECTOR).to(tl.int32)
    whole = tl.maximum(CELLS - head, 0) // VECTOR * VECTOR
    zero = tl.zeros([VECTOR], grid.dtype.element_ty)
    tl.store(base + few, zero, mask=few < tl.minimum(head, CELLS))
    tl.store(base + head + whole + few, zero, mask=head + whole + few < CELLS)
    zeros = tl.zeros([ZERO_BLOCK], grid.dtype.element_ty)
    for start in range(0, CELLS, ZERO_BLOCK):
        cells = start + tl.arange(0, ZERO_BLOCK)
        tl.store(tl.multiple_of(base + head, 16) + cells, zeros, mask=cells < whole)
    lane = tl.arange(0, TOKEN_BLOCK)
    for start in range(0, num_tokens, TOKEN_BLOCK):
        # Orders the stores of earlier tokens before those of later ones, so the later token wins.
        tl.debug_barrier()
        live = start + lane < num_tokens
        token = tokens + (row * num_tokens + start + lane) * 3
        coordinate = tl.load(token, mask=live, other=255).to(tl.int32)
        feature = tl.load(token + 1, mask=live, other=0).to(tl.int32)
        value = tl.load(token + 2, mask=live, other=0).to(tl.float32)
        x, y = coordinate >> 4, coordinate & 15
        if X_LOW:
            x, y = y, x
        valid = (coordinate != 255) & (x < W) & (y < H) & (feature < L)
        cell = tl.where(valid, (feature * W + x) * H + y, -1)
        # Ordered by cell, then by place: a later token in the same cell has one of the next keys.
        key = (cell * TOKEN_BLOCK + lane).to(tl.uint32)
        # Unsigned: the distance to a smaller key wraps around. Along axis 0 each lane takes a column's minimum.
        distance = tl.min(key[:, None] - (key + 1)[None, :], 0)
        latest = distance >= (TOKEN_BLOCK - 1 - lane).to(tl.uint32)
        divisor = tl.load(scale + feature, mask=valid, other=1.0).to(tl.float32)
        tl.store(base + cell, tl.div_rn(value, divisor).to(grid.dtype.element_ty), mask=valid & latest)


@functools.cache
def _constants(num_features: int, width: int, height: int, x_low: bool, zero_block: int, token_block: int) -> Constants:
    sizes = {"L": num_features, "W": width, "H": height}
    return Constants({**sizes, "X_LOW": x_low, "ZERO_BLOCK": zero_block, "TOKEN_BLOCK": token_block}, WARPS)


def tokens_to_grid_cuda(
    tokens: Tensor, num_features: int, width: int, height: int, scale: Tensor, dtype: torch.dtype, x_low: bool
) -> Tensor:
    """Same as `tokens_to_grid_eager`, in one launch."""
    rows, num_tokens = tokens.shape[0], tokens.shape[1]
    if dtype == torch.float64:
        return tokens_to_grid_eager(tokens, num_features, width, height, scale, dtype, x_low)
    grid = torch.empty((rows, num_features, width, height), dtype=dtype, device=tokens.device)
    if rows > 0:
        launch_with(
            _constants(num_features, width, height, x_low, ZERO_BLOCK, TOKEN_BLOCK),
            _tokens_to_grid_kernel,
            rows,
            (tokens.contiguous(), scale.contiguous(), grid),
            (num_tokens,),
        )
    return grid
