"""Triton kernels of one LSTM layer over a segment with resets, and their launchers.

All steps of a row run in one program, which reads weight_hh from L2 at each step and waits for no other program.
"""

# pyright: reportInvalidTypeForm=false

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metta_fastagent.ops.dtypes import contiguous
from metta_fastagent.ops.lstm import products
from metta_fastagent.ops.lstm.reference import (
    BackwardInputs,
    LayerInputs,
    lstm_layer_backward_eager,
    lstm_layer_forward_eager,
    lstm_step_eager_,
)
from metta_fastagent.runtime.launch import Constants, launch_with
from metta_fastagent.runtime.triton import INTERPRETED, cdiv, jit, tl, triton

# Rows per program, the fewest that the matrix units of every target take, so that small batches have many programs.
BLOCK_B = 16
# If that gives more programs than multiprocessors, twice the rows read weight_hh half as often; 64 rows would spill
# registers, and so would 32 in the float32 backward kernel.
MANY_ROWS_BLOCK_B = 32
# Hidden columns at a time; the forward kernel takes all four gates of each.
BLOCK_N = 64
# Triton keeps one block of weights fewer in shared memory than there are stages; Triton 3.8 keeps as many as stages for
# a tf32x3 product. The smaller GPUs have room for 99 KB.
_TF32_STAGES = 2 if triton is not None and triton.__version__.startswith("3.8.") else 3
# Depth of a product, warps and stages, by bytes per element, or for float32 in parts. With these no kernel spills
# registers on any target of benchmarks/kernel_report.py if H is a multiple of 32; AMD's shared memory holds two stages.
# In float32, twice the warps or half the depth would take fewer registers but more instructions. For 32 rows a program
# has twice the warps.
FORWARD_SHAPES = {
    "cuda": {"parts": (32, 8, 3), 4: (32, 8, _TF32_STAGES), 2: (64, 8, 3)},
    "hip": {4: (32, 4, 2), 2: (32, 4, 2)},
}
BACKWARD_SHAPES = {
    "cuda": {"parts": (64, 8, 4), 4: (32, 8, 5), 2: (128, 8, 3)},
    "hip": {4: (32, 4, 2), 2: (128, 4, 2)},
}
# Three products of tf32 parts: over 64 steps of 128 columns, emulated on a CPU, the hidden state is off by 2e-7, or by
# 1.2e-6 if the tensor cores truncate their sums; with plain tf32 by 8e-5, so that importance ratios are not 1 within
# 1e-5. "ieee" would leave NVIDIA's tensor cores idle; AMD's matrix units multiply float32 directly.
PRECISIONS = {"cuda": "tf32x3", "hip": "ieee"}
PLATFORM = "cuda" if torch.version.hip is None else "hip"
# From this many steps on, the weights are split once, for products of 16-bit parts: forward three products of two
# float16 parts; backward six of three bfloat16 parts, because gradients exceed float16's range. By instruction count,
# the split pays for itself after three steps forward, and after one backward.
PARTS_STEPS = 3
# Offsets into the parts of weight_hh are 32-bit.
MAX_HIDDEN = 13377


@jit(varying=("T", "B", "width"))
def _lstm_layer_fwd_kernel(
    projected,  # [T, B, 4H]
    weight_hh,  # [4H, H]
    h,  # [B, H]
    c,  # [B, H]
    resets,  # [T, B] bool; unused without HAS_RESETS
    more_resets,  # [T, B] bool, which reset rows too; unused without HAS_MORE_RESETS
    bias,  # [4H], added to what is projected; unused without HAS_BIAS
    output,  # [T, B, H]
    cells,  # [T, B, H]; for a single step it may be `c`
    next_h,  # [B, H], a copy of the last output; may be `h`; unused without KEEP_STATE
    gates,  # [T, B, 4H]; unused without KEEP_GATES
    parts,  # float16, to work in: of weight_hh [4H, 2, H], of two steps' state [2, B, 2, H]; unused without IN_PARTS
    T,
    B,
    width,  # H again, as a loop bound: unrolled loops would spill registers
    H: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    HAS_MORE_RESETS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_STATE: tl.constexpr,
    KEEP_GATES: tl.constexpr,
    IN_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    top = tl.program_id(0).to(tl.int64) * BLOCK_B
    local = tl.arange(0, BLOCK_B)
    live = local < B - top
    # The program's first row in this step, numbered across all steps.
    row = top
    before = parts + 8 * H * H + top * (2 * H)
    after = before + tl.cast(B, tl.int64) * (2 * H)
    if IN_PARTS:
        # All programs write the same parts of weight_hh, so none waits for another.
        weight_scale, of_weight = products.scale_into_float16(weight_hh, 4 * width * width, 4096)
        products.split_into_parts(weight_hh, weight_scale, parts, 4 * width * width, H, 2, 64 * BLOCK_B, 4)
        size = tl.minimum(B - top, BLOCK_B).to(tl.int32) * H
        state_scale, of_first_state = products.scale_into_float16(h + top * H, size, 1024)
        products.split_into_parts(h + top * H, state_scale, before, size, H, 2, 64 * BLOCK_B, 1)
        tl.debug_barrier()
    kept = products.kept_rows(resets + row, live, HAS_RESETS, BLOCK_B)
    kept = products.kept_rows(more_resets + row, kept, HAS_MORE_RESETS, BLOCK_B)
    for t in range(T):
        # Loaded one step ahead: Triton lays out a product's factors by the narrowest load that their masks depend on
        # within an iteration, and for a byte load it would not use ldmatrix. No row follows the last step.
        following = products.kept_rows(resets + row + B, live & (t + local < T - 1 + local), HAS_RESETS, BLOCK_B)
        following = products.kept_rows(more_resets + row + B, following, HAS_MORE_RESETS, BLOCK_B)
        last_h = tl.where(row == top, h + top * H, output + (row - B) * H)
        last_c = tl.where(row == top, c + top * H, cells + (row - B) * H)
        for first in range(0, H, BLOCK_N):
            column = first + tl.arange(0, BLOCK_N)
            inside = live[:, None] & (column < H)[None, :]
            state = local[:, None] * H + column[None, :]
            place = local[:, None] * (4 * H) + column[None, :]
            # These loads are in flight together during the product.
            cell = tl.load(last_c + state, mask=inside & kept[:, None], other=0.0).to(tl.float32)
            gate_i, gate_f, gate_g, gate_o = products.load_gates(projected + row * (4 * H) + place, inside, H)
            if HAS_BIAS:
                used = (column < H)[None, :]
                bias_i, bias_f, bias_g, bias_o = products.load_gates(bias + column[None, :], used, H)
                gate_i += bias_i
                gate_f += bias_f
                gate_g += bias_g
                gate_o += bias_o
            factors = (before, parts) if IN_PARTS else (last_h, weight_hh)
            product = products.gate_product(
                factors[0], factors[1], kept, first, width, H, IN_PARTS, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K
            )
            if IN_PARTS:
                # Applied one after the other: the product of both may be out of range.
                product *= tl.where(row == top, of_first_state, 1.0 / products.STATE_SCALE)
                product *= of_weight
            even, odd = product.reshape(BLOCK_B, BLOCK_N, 2, 2).split()
            product_i, product_g = even.split()
            product_f, product_o = odd.split()
            gate_i += product_i
            gate_f += product_f
            gate_g += product_g
            gate_o += product_o
            gate_i, gate_f, gate_g, gate_o = (
                products.sigmoid(gate_i),
                products.sigmoid(gate_f),
                products.tanh(gate_g),
                products.sigmoid(gate_o),
            )
            cell = gate_f * cell + gate_i * gate_g
            hidden = gate_o * products.tanh(cell)
            if KEEP_GATES:
                products.store_gates(gates + row * (4 * H) + place, gate_i, gate_f, gate_g, gate_o, inside, H)
            tl.store(cells + row * H + state, cell.to(cells.dtype.element_ty), mask=inside)
            tl.store(output + row * H + state, hidden.to(output.dtype.element_ty), mask=inside)
            if IN_PARTS:
                products.store_parts(
                    after + local[:, None] * (2 * H) + column[None, :], hidden * products.STATE_SCALE, inside, H
                )
        row += B
        before, after = after, before
        kept = following
        # Every warp of the next step reads the stores of all warps of this one.
        tl.debug_barrier()
    if KEEP_STATE:
        for first in range(0, H, BLOCK_N):
            column = first + tl.arange(0, BLOCK_N)
            inside = live[:, None] & (column < H)[None, :]
            state = local[:, None] * H + column[None, :]
            last = tl.load(output + (row - B) * H + state, mask=inside, other=0.0)
            tl.store(next_h + top * H + state, last, mask=inside)


@jit(varying=("T", "B", "width"))
def _lstm_layer_bwd_kernel(
    weight_hh,  # [4H, H]
    c,  # [B, H]
    resets,  # [T, B] bool; unused without HAS_RESETS
    cells,  # [T, B, H]
    gates,  # [T, B, 4H]
    grad_output,  # [T, B, H]; unused without HAS_OUTPUT
    grad_last_h,  # [B, H]; unused without HAS_LAST_H
    grad_last_c,  # [B, H]; unused without HAS_LAST_C
    grad_projected,  # [T, B, 4H]
    grad_h,  # [B, H]
    grad_c,  # [B, H] float32; between steps, the gradient of the cell before the step
    parts,  # bfloat16, to work in: of weight_hh [4H, 3, H], of two steps' gates [2, B, 3, 4H]; unused without IN_PARTS
    T,
    B,
    width,  # H again, as a loop bound: unrolled loops would spill registers
    H: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_LAST_H: tl.constexpr,
    HAS_LAST_C: tl.constexpr,
    IN_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    local = tl.arange(0, BLOCK_B)
    top = tl.program_id(0).to(tl.int64) * BLOCK_B
    live = local < B - top
    # The program's first row in this step, numbered across all steps.
    bottom = top + (tl.cast(T, tl.int64) - 1) * B
    row = bottom
    here = parts + 12 * H * H + top * (12 * H)
    there = here + tl.cast(B, tl.int64) * (12 * H)
    if IN_PARTS:
        # All programs write the same parts of weight_hh, so none waits for another.
        products.split_into_parts(weight_hh, 1.0, parts, 4 * width * width, H, 3, 64 * BLOCK_B, 4)
        tl.debug_barrier()
    # Rows from whose state the next step continued; none after the last step.
    followed = local < 0
    for _ in range(T):
        kept = products.kept_rows(resets + row, live, HAS_RESETS, BLOCK_B)
        last_c = tl.where(row == top, c + top * H, cells + (row - B) * H)
        after = grad_projected + (row + B) * (4 * H)
        # A block, because Triton 3.9's interpreter rejects a scalar comparison in a mask.
        is_last = (row + local == bottom + local)[:, None]
        for first in range(0, width, BLOCK_N):
            column = first + tl.arange(0, BLOCK_N)
            inside = live[:, None] & (column < H)[None, :]
            state = local[:, None] * H + column[None, :]
            place = local[:, None] * (4 * H) + column[None, :]
            # These loads are in flight together during the product.
            d_h = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
            if HAS_OUTPUT:
                d_h = tl.load(grad_output + row * H + state, mask=inside, other=0.0).to(tl.float32)
            if HAS_LAST_H:
                d_h += tl.load(grad_last_h + top * H + state, mask=inside & is_last, other=0.0).to(tl.float32)
            gate_i, gate_f, gate_g, gate_o = products.load_gates(gates + row * (4 * H) + place, inside, H)
            cell = tl.load(cells + row * H + state, mask=inside, other=0.0).to(tl.float32)
            carried = inside & kept[:, None]
            previous = tl.load(last_c + state, mask=carried, other=0.0).to(tl.float32)
            factors = (there, parts) if IN_PARTS else (after, weight_hh)
            through = products.state_gradient(
                factors[0], factors[1], followed, column, width, H, IN_PARTS, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K
            )
            d_c = tl.load(grad_c + top * H + state, mask=inside & (is_last == 0), other=0.0)
            if HAS_LAST_C:
                d_c += tl.load(grad_last_c + top * H + state, mask=inside & is_last, other=0.0).to(tl.float32)
            # Joined with a load, the product takes the layout of the loads; otherwise the loads would be converted to
            # the product's layout, one after the other between barriers.
            through, d_c = tl.join(through, d_c).split()
            d_h += through
            squashed = products.tanh(cell)
            d_c += d_h * gate_o * (1.0 - squashed * squashed)
            grad_i = d_c * gate_g * gate_i * (1.0 - gate_i)
            grad_f = d_c * previous * gate_f * (1.0 - gate_f)
            grad_g = d_c * gate_i * (1.0 - gate_g * gate_g)
            grad_o = d_h * squashed * gate_o * (1.0 - gate_o)
            products.store_gates(grad_projected + row * (4 * H) + place, grad_i, grad_f, grad_g, grad_o, inside, H)
            if IN_PARTS:
                split = here + local[:, None] * (12 * H) + column[None, :]
                products.store_parts(split, grad_i, inside, 4 * H)
                products.store_parts(split + H, grad_f, inside, 4 * H)
                products.store_parts(split + 2 * H, grad_g, inside, 4 * H)
                products.store_parts(split + 3 * H, grad_o, inside, 4 * H)
            tl.store(grad_c + top * H + state, tl.where(carried, d_c * gate_f, 0.0), mask=inside)
        followed = kept
        row -= B
        here, there = there, here
        # Every warp of the next step reads the stores of all warps of this one.
        tl.debug_barrier()
    after = grad_projected + top * (4 * H)
    for first in range(0, width, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        inside = live[:, None] & (column < H)[None, :]
        factors = (there, parts) if IN_PARTS else (after, weight_hh)
        d_h = products.state_gradient(
            factors[0], factors[1], followed, column, width, H, IN_PARTS, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K
        )
        state = local[:, None] * H + column[None, :]
        tl.store(grad_h + top * H + state, d_h.to(grad_h.dtype.element_ty), mask=inside)


def _fits_kernel(weight_hh: Tensor) -> bool:
    # Triton 3.7 cannot compile a transposed float64 operand; float64 is for checks, not for speed.
    return weight_hh.dtype != torch.float64 and weight_hh.shape[1] <= MAX_HIDDEN


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else 1


def _has_many_rows(rows: int, device: int) -> bool:
    """Whether there would be more blocks of `BLOCK_B` rows than multiprocessors."""
    return rows > BLOCK_B * _multiprocessors(device)


def _in_parts(dtype: torch.dtype, steps: int, many_rows: bool = False) -> bool:
    """Whether products use 16-bit parts."""
    return PLATFORM == "cuda" and dtype == torch.float32 and (steps >= PARTS_STEPS or many_rows)


def _layout(
    shapes: Mapping[Any, tuple[int, int, int]], dtype: torch.dtype, in_parts: bool, block_b: int
) -> tuple[bool, str, int, int, int, int, int]:
    """(IN_PARTS, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K, warps, stages) of a launch."""
    block_k, warps, stages = shapes["parts" if in_parts else dtype.itemsize]
    return in_parts, PRECISIONS[PLATFORM], block_b, BLOCK_N, block_k, warps * block_b // BLOCK_B, stages


@functools.cache
def _constants(
    in_parts: bool, precision: str, block_b: int, block_n: int, block_k: int, warps: int, stages: int, **own: Any
) -> Constants:
    blocks = {"BLOCK_B": block_b, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return Constants({**own, "IN_PARTS": in_parts, "PRECISION": precision, **blocks}, warps, stages)


def lstm_layer_forward_cuda(inputs: LayerInputs, keep_gates: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Same as `lstm_layer_forward_eager`, in one launch."""
    if not _fits_kernel(inputs.weight_hh):
        return lstm_layer_forward_eager(inputs, keep_gates)
    projected, h = inputs.projected, inputs.h
    cells = projected.new_empty(len(projected), *h.shape)
    gates = projected.new_empty(projected.shape if keep_gates else 0)
    return _launch_forward(inputs, cells, gates if keep_gates else None), cells, gates


def lstm_step_cuda_(
    inputs: LayerInputs, more_resets: Tensor | None, bias: Tensor | None, next_h: Tensor, next_c: Tensor
) -> Tensor:
    """Same as `lstm_step_eager_`, in one launch."""
    if not _fits_kernel(inputs.weight_hh):
        return lstm_step_eager_(inputs, more_resets, bias, next_h, next_c)
    return _launch_forward(inputs, next_c, None, more_resets, bias, next_h)


def _launch_forward(
    inputs: LayerInputs,
    cells: Tensor,
    gates: Tensor | None,
    more_resets: Tensor | None = None,
    bias: Tensor | None = None,
    next_h: Tensor | None = None,
) -> Tensor:
    projected, weight_hh, h, c = map(Tensor.contiguous, inputs[:4])
    output = projected.new_empty(len(projected), *h.shape)
    resets, more_resets, bias = contiguous(inputs.resets), contiguous(more_resets), contiguous(bias)
    steps, (rows, size) = len(projected), h.shape
    if rows == 0:
        return output
    many_rows = _has_many_rows(rows, projected.get_device())
    in_parts = _in_parts(projected.dtype, steps, many_rows)
    parts = projected.new_empty(8 * size * size + 4 * rows * size, dtype=torch.float16) if in_parts else None
    block_b = MANY_ROWS_BLOCK_B if many_rows else BLOCK_B
    layout = _layout(FORWARD_SHAPES[PLATFORM], projected.dtype, in_parts, block_b)
    constants = _constants(
        *layout,
        H=size,
        HAS_RESETS=resets is not None,
        HAS_MORE_RESETS=more_resets is not None,
        HAS_BIAS=bias is not None,
        KEEP_STATE=next_h is not None,
        KEEP_GATES=gates is not None,
    )
    tensors = (projected, weight_hh, h, c, resets, more_resets, bias, output, cells, next_h, gates, parts)
    launch_with(
        constants,
        _lstm_layer_fwd_kernel,
        cdiv(rows, block_b),
        # The input stands in for what there is not.
        [projected if tensor is None else tensor for tensor in tensors],
        (steps, rows, size),
    )
    return output


def lstm_layer_backward_cuda(inputs: BackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Same as `lstm_layer_backward_eager`, in one launch."""
    if not _fits_kernel(inputs.weight_hh):
        return lstm_layer_backward_eager(inputs)
    weight_hh, c, resets, cells, gates, *upstream = map(contiguous, inputs)
    steps, (rows, size) = len(gates), c.shape
    grad_projected, grad_h = torch.empty_like(gates), c.new_empty(rows, size)
    grad_c = c.new_empty(rows, size, dtype=torch.float32)
    if rows > 0:
        many_rows = c.dtype != torch.float32 and _has_many_rows(rows, c.get_device())
        block_b = MANY_ROWS_BLOCK_B if many_rows else BLOCK_B
        # Triton's interpreter multiplies the bits of bfloat16 numbers as integers.
        in_parts = _in_parts(gates.dtype, steps) and not INTERPRETED
        parts = c.new_empty(12 * size * size + 24 * rows * size if in_parts else 0, dtype=torch.bfloat16)
        given = dict(zip(("HAS_OUTPUT", "HAS_LAST_H", "HAS_LAST_C"), (g is not None for g in upstream), strict=True))
        tensors = (weight_hh, c, resets, cells, gates, *upstream, grad_projected, grad_h, grad_c, parts)
        layout = _layout(BACKWARD_SHAPES[PLATFORM], gates.dtype, in_parts, block_b)
        launch_with(
            _constants(*layout, H=size, HAS_RESETS=resets is not None, **given),
            _lstm_layer_bwd_kernel,
            cdiv(rows, block_b),
            # The gates stand in for absent tensors.
            [gates if tensor is None else tensor for tensor in tensors],
            (steps, rows, size),
        )
    return grad_projected, grad_h, grad_c.to(c.dtype)
