"""Observation tokens to a normalised feature grid.

A token is three bytes: coordinate (x in the high four bits, y in the low four), feature id, value. It sets

    grid[n, feature, x, y] = value / scale[feature]

Empty tokens (coordinate 255), tokens outside the window and tokens of an unknown feature are dropped without touching
any cell; of two tokens for one cell the later wins, on every device. Cells without a token are 0.
"""

# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from metta_fastagent._dispatch import register
from metta_fastagent._triton import jit, launch, tl
from metta_fastagent.ops._autograd import in_plain_pytorch
from metta_fastagent.ops._checks import compute_dtype, describe, require_same_device, require_tensor

EMPTY_COORDINATE = 255


# Cells that a program zeroes at once: 8 floats for each of 128 threads.
ZERO_BLOCK = 1024
# Tokens that are compared with each other and written between two barriers.
TOKEN_BLOCK = 32


@jit(varying=("num_tokens",))
def _tokens_to_grid_kernel(
    tokens,  # [N, M, 3] uint8
    scale,  # [L]
    grid,  # [N, L, W, H]
    num_tokens,
    L: tl.constexpr,
    W: tl.constexpr,
    H: tl.constexpr,
    ZERO_BLOCK: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    CELLS: tl.constexpr = L * W * H
    base = grid + row * CELLS
    zeros = tl.zeros([ZERO_BLOCK], grid.dtype.element_ty)
    for start in range(0, CELLS, ZERO_BLOCK):
        cells = start + tl.arange(0, ZERO_BLOCK)
        tl.store(base + cells, zeros, mask=cells < CELLS)
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
        valid = (coordinate != 255) & (x < W) & (y < H) & (feature < L)
        cell = tl.where(valid, (feature * W + x) * H + y, -1)
        later_same = (cell[:, None] == cell[None, :]) & (lane[:, None] < lane[None, :])
        latest = tl.max(later_same.to(tl.int32), 1) == 0
        divisor = tl.load(scale + feature, mask=valid, other=1.0).to(tl.float32)
        tl.store(base + cell, tl.div_rn(value, divisor).to(grid.dtype.element_ty), mask=valid & latest)


def _tokens_to_grid_cuda(
    tokens: Tensor, num_features: int, width: int, height: int, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    rows, num_tokens = tokens.shape[0], tokens.shape[1]
    if dtype == torch.float64:
        return tokens_to_grid_eager(tokens, num_features, width, height, scale, dtype)
    grid = torch.empty((rows, num_features, width, height), dtype=dtype, device=tokens.device)
    if rows > 0:
        launch(
            _tokens_to_grid_kernel,
            rows,
            (tokens.contiguous(), scale.contiguous(), grid),
            (num_tokens,),
            L=num_features,
            W=width,
            H=height,
            ZERO_BLOCK=ZERO_BLOCK,
            TOKEN_BLOCK=TOKEN_BLOCK,
        )
    return grid


def _tokens_to_grid_native(
    tokens: Tensor, num_features: int, width: int, height: int, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    grid = torch.ops.metta_fastagent_native.tokens_to_grid.default(
        tokens.contiguous(), num_features, width, height, scale.to(compute_dtype(scale.dtype)).contiguous()
    )
    return grid.to(dtype)


def tokens_to_grid_eager(
    tokens: Tensor, num_features: int, width: int, height: int, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """`tokens_to_grid` in plain PyTorch: the reference, and the path for devices without a kernel."""
    rows, cells = tokens.shape[0], num_features * width * height
    grid_shape = (rows, num_features, width, height)
    coordinate, feature, value = tokens.unbind(-1)
    x, y, feature = (coordinate >> 4).int(), (coordinate & 15).int(), feature.int()
    valid = (coordinate != EMPTY_COORDINATE) & (x < width) & (y < height) & (feature < num_features)
    cell = torch.where(valid, (feature * width + x) * height + y, cells).long()
    if tokens.device.type == "cpu":
        return _scatter_in_order(cell, feature, value, scale, rows, cells).view(grid_shape).to(dtype)
    # Position in the high bits, value in the low ones: the maximum of a cell is its latest token, in any order.
    # One extra cell takes the dropped tokens.
    position = torch.arange(1, tokens.shape[1] + 1, dtype=torch.int32, device=tokens.device)
    latest = torch.zeros(rows, cells + 1, dtype=torch.int32, device=tokens.device)
    grid = latest.scatter_reduce_(1, cell, position * 256 + value.int(), "amax")[:, :cells] & 255
    return (grid.view(grid_shape) / scale.view(1, -1, 1, 1)).to(dtype)


def _scatter_in_order(cell: Tensor, feature: Tensor, value: Tensor, scale: Tensor, rows: int, cells: int) -> Tensor:
    """Grid [rows * cells]; the CPU's one-dimensional scatter goes in order, so the later token wins."""
    scaled = value.float() / scale[feature.clamp(max=scale.numel() - 1)]
    first = torch.arange(rows).unsqueeze(1) * cells
    # One extra element takes the dropped tokens.
    place = torch.where(cell == cells, rows * cells, first + cell)
    grid = torch.zeros(rows * cells + 1, dtype=scaled.dtype)
    return grid.scatter_(0, place.reshape(-1), scaled.reshape(-1))[:-1]


_tokens_to_grid = register(
    "tokens_to_grid(Tensor tokens, int num_features, int width, int height, Tensor scale, ScalarType dtype) -> Tensor",
    tokens_to_grid_eager,
    lambda tokens, num_features, width, height, scale, dtype: tokens.new_empty(
        (tokens.shape[0], num_features, width, height), dtype=dtype
    ),
    _tokens_to_grid_cuda,
    _tokens_to_grid_native,
)


def tokens_to_grid(
    tokens: Tensor,
    num_features: int,
    width: int,
    height: int,
    scale: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Scatter observation tokens into a grid and normalise each feature.

    Args:
        tokens: uint8 tensor [N, M, 3] of (coordinate byte, feature id, value).
        num_features: L, the number of feature planes, 1 to 256.
        width, height: size of the window, 1 to 16, as a coordinate has four bits.
        scale: floating-point tensor [L] that divides the values of each feature, on the tokens' device.
        dtype: floating-point dtype of the result.

    Returns:
        Tensor [N, L, width, height], indexed by x, then y.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device.
    """
    tokens = require_tokens(tokens)
    for name, size, largest in (("num_features", num_features, 256), ("width", width, 16), ("height", height, 16)):
        require_size(name, size, 1, largest)
    require_scale(scale, num_features, tokens)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: got {dtype!r}, expected a floating-point dtype")
    run = tokens_to_grid_eager if in_plain_pytorch() else _tokens_to_grid
    return run(tokens, num_features, width, height, scale, dtype)


def require_tokens(tokens: object) -> Tensor:
    """`tokens` if it is a uint8 tensor [N, M, 3]."""
    expected = "a uint8 tensor of shape [N, M, 3]"
    tensor = require_tensor("tokens", tokens, expected)
    if tensor.dtype != torch.uint8:
        raise TypeError(f"tokens: got {describe(tensor)}, expected {expected}")
    if tensor.dim() != 3 or tensor.shape[2] != 3:
        raise ValueError(f"tokens: got {describe(tensor)}, expected {expected}")
    return tensor


def require_size(name: str, size: object, smallest: int, largest: int) -> None:
    """`size` must be an integer from `smallest` to `largest`; a symbolic one is."""
    if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {describe(size)}, expected an integer {smallest} to {largest}")
    if not smallest <= size <= largest:
        raise ValueError(f"{name}: got {size}, expected {smallest} to {largest}")


def require_scale(scale: object, num_features: int, tokens: Tensor) -> None:
    """`scale` must be a floating-point tensor [num_features] on the device of `tokens`."""
    expected = f"a floating-point tensor of shape [{num_features}]"
    tensor = require_tensor("scale", scale, expected)
    if not tensor.is_floating_point() or tensor.shape != (num_features,):
        raise ValueError(f"scale: got {describe(tensor)}, expected {expected}")
    require_same_device("scale", tensor, "tokens", tokens)
