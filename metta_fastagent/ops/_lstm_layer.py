"""One LSTM layer over a segment whose rows may be reset at any step, with its gradient.

    h', c'     = h_{t-1}, c_{t-1}                 0 in a row that is reset before step t
    i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of the four parts of projected_t + h' W_hh^T
    c_t        = f c' + i g
    h_t        = o tanh(c_t)

with projected_t = x_t W_ih^T + b_ih + b_hh, which the caller makes for all steps in one product. Backwards in time, for
upstream gradients of every h_t and of the last h and c, dh and dc being the total gradients of h_t and c_t:

    dc        += dh o (1 - tanh(c_t)^2)
    d gates    = dc g i (1 - i), dc c' f (1 - f), dc i (1 - g^2), dh tanh(c_t) o (1 - o)         d projected_t too
    dc', dh'   = dc f, d gates W_hh               0 in a row that is reset before step t
    d W_hh     = sum_t d gates_t^T h'_t           one product over all steps

Source: Hochreiter and Schmidhuber, "Long Short-Term Memory" (1997), with the forget gate of Gers, Schmidhuber and
Cummins, "Learning to Forget" (2000); gates in nn.LSTM's order. Arithmetic is float32 (float64 for float64). The
state is rounded to the tensors' dtype after each step, as between the calls of a rollout, so a segment reproduces it.
"""

# pyright: reportInvalidTypeForm=false

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from metta_fastagent._dispatch import register
from metta_fastagent._triton import INTERPRETED, cdiv, jit, launch, tl, triton
from metta_fastagent.ops._autograd import (
    chosen_backend,
    in_plain_pytorch,
    needs_graph,
    records_graph,
    refuse_second_derivative,
    run_backward,
)
from metta_fastagent.ops._checks import (
    NATIVE_DTYPES,
    compute_dtype,
    contiguous,
    describe,
    require_same_device,
    require_tensor,
    under_autocast,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Rows of a program, the fewest that the matrix units of every target take, so that small batches have many programs.
# All steps of a row run in one program, which reads weight_hh from L2 at each step and waits for no other program.
BLOCK_B = 16
# If that makes more programs than multiprocessors, twice the rows read weight_hh half as often; 64 spill registers, and
# so do 32 in the float32 backward kernel.
MANY_ROWS_BLOCK_B = 32
# Hidden columns at a time, of all four gates in the forward kernel.
BLOCK_N = 64
# Triton 3.8 keeps as many blocks of weights in shared memory as there are stages, earlier versions one fewer; the
# smaller GPUs have room for 99 KB.
_OLDER_TRITON = triton is None or tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
# Depth of a product, warps and stages, by bytes of an element, or for float32 in parts. With these no kernel spills
# registers on any target of benchmarks/kernel_report.py if H is a multiple of 32; AMD's shared memory holds two stages.
# In float32, twice the warps or half the depth would take fewer registers, but more instructions. For 32 rows a program
# has twice the warps.
FORWARD_SHAPES = {
    "cuda": {"parts": (32, 8, 3 if _OLDER_TRITON else 2), 4: (32, 8, 3 if _OLDER_TRITON else 2), 2: (32, 8, 5)},
    "hip": {4: (32, 4, 2), 2: (32, 4, 2)},
}
BACKWARD_SHAPES = {
    "cuda": {"parts": (64, 8, 4 if _OLDER_TRITON else 3), 4: (32, 8, 5), 2: (64, 8, 5)},
    "hip": {4: (32, 4, 2), 2: (128, 4, 2)},
}
# Three products of tf32 parts are as exact as one of float32: over 64 steps of 128 columns, emulated on a CPU, both are
# off by 2e-7 in the hidden state, plain tf32 by 8e-5, with which importance ratios are not 1 within 1e-5. "ieee" would
# leave NVIDIA's matrix units idle; AMD's multiply float32 as it is.
PRECISIONS = {"cuda": "tf32x3", "hip": "ieee"}
PLATFORM = "cuda" if torch.version.hip is None else "hip"
# From this many steps on, the weights are split once, for products as exact of 16-bit parts: three of two float16 parts
# forward; six of three bfloat16 parts backward, as gradients exceed float16's range. Splitting takes about as long as
# two steps save.
PARTS_STEPS = 4
# Powers of two before the split: weights up to 4095, and states up to 1023, are then exact to 2^-22 of themselves or to
# 2^-29 and 2^-31; larger ones give NaN. Triton reads globals of this type only.
STATE_SCALE, WEIGHT_SCALE = tl.constexpr(64.0), tl.constexpr(16.0)
# Offsets into the parts of weight_hh are 32-bit.
MAX_HIDDEN = 13377
# Gradient of x from that of y and y itself: autograd's own, each one pass over memory.
_SIGMOID_BACKWARD, _TANH_BACKWARD = torch.ops.aten.sigmoid_backward.default, torch.ops.aten.tanh_backward.default


@jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))


@jit
def _tanh(x):
    # Its error is some 2^-22 of 1, not of a small result. Triton's interpreter lacks libdevice's tanh.
    return 2.0 / (1.0 + tl.exp2(-2.8853900817779268 * x)) - 1.0


@jit
def _kept_rows(resets, live, HAS_RESETS: tl.constexpr, BLOCK_B: tl.constexpr):
    """Live rows [BLOCK_B] that keep their state before a step; `resets` points at the step's first one of them."""
    if HAS_RESETS:
        live = live & (tl.load(resets + tl.arange(0, BLOCK_B), mask=live, other=1) == 0)
    return live


@jit
def _load_gates(gates, mask, H: tl.constexpr):
    """The four gates [BLOCK_B, BLOCK_N] in float32; `gates` points at the input gate's."""
    gate_i = tl.load(gates, mask=mask, other=0.0).to(tl.float32)
    gate_f = tl.load(gates + H, mask=mask, other=0.0).to(tl.float32)
    gate_g = tl.load(gates + 2 * H, mask=mask, other=0.0).to(tl.float32)
    gate_o = tl.load(gates + 3 * H, mask=mask, other=0.0).to(tl.float32)
    return gate_i, gate_f, gate_g, gate_o


@jit
def _store_gates(gates, gate_i, gate_f, gate_g, gate_o, mask, H: tl.constexpr):
    dtype = gates.dtype.element_ty
    tl.store(gates, gate_i.to(dtype), mask=mask)
    tl.store(gates + H, gate_f.to(dtype), mask=mask)
    tl.store(gates + 2 * H, gate_g.to(dtype), mask=mask)
    tl.store(gates + 3 * H, gate_o.to(dtype), mask=mask)


@jit
def _gate_product(
    hidden,  # [B, H], from the program's first row on; with IN_PARTS [B, 2, H] float16, scaled
    weight_hh,  # [4H, H]; with IN_PARTS [4H, 2, H] float16, scaled
    rows,
    first,
    width,
    H: tl.constexpr,
    IN_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """hidden W_hh^T [BLOCK_B, 4 BLOCK_N] from column `first` on, the four gates of a hidden column side by side."""
    stride: tl.constexpr = 2 * H if IN_PARTS else H
    part = tl.arange(0, 4 * BLOCK_N)
    column = first + part // 4
    local = tl.arange(0, BLOCK_B)
    product = tl.zeros([BLOCK_B, 4 * BLOCK_N], tl.float32)
    for k in range(0, width, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        known = rows[:, None] & (depth < H)[None, :]
        states = hidden + local[:, None] * stride + depth[None, :]
        used = (depth < H)[:, None] & (column < H)[None, :]
        weights = weight_hh + ((part % 4) * H + column)[None, :] * stride + depth[:, None]
        state = tl.load(states, mask=known, other=0.0)
        # In this order, in which the loads of an operand follow each other, sm_80 needs the fewest registers.
        if IN_PARTS:
            state_low = tl.load(states + H, mask=known, other=0.0)
        weight = tl.load(weights, mask=used, other=0.0)
        if IN_PARTS:
            weight_low = tl.load(weights + H, mask=used, other=0.0)
            # The product of both low parts would be below rounding.
            product = tl.dot(state_low, weight, product)
            product = tl.dot(state, weight_low, product)
        product = tl.dot(state, weight, product, input_precision=PRECISION)
    return product


@jit
def _store_parts(parts, x, mask, distance: tl.constexpr):
    """Write float32 x as two float16 parts or three of bfloat16, by the type of `parts`, `distance` apart."""
    dtype = parts.dtype.element_ty
    high = x.to(dtype)
    rest = x - high.to(tl.float32)
    middle = rest.to(dtype)
    tl.store(parts, high, mask=mask)
    tl.store(parts + distance, middle, mask=mask)
    if dtype == tl.bfloat16:
        tl.store(parts + 2 * distance, (rest - middle.to(tl.float32)).to(dtype), mask=mask)


@jit
def _split(source, scale, parts, size, H: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Write the parts of `size` scaled elements: of each row of H, the COUNT parts one after the other."""
    for start in range(0, size, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        inside = offset < size
        x = tl.load(source + offset, mask=inside, other=0.0) * scale
        _store_parts(parts + (offset // H) * ((COUNT - 1) * H) + offset, x, inside, H)


@jit(varying=("T", "B", "width"))
def _lstm_layer_fwd_kernel(
    projected,  # [T, B, 4H]
    weight_hh,  # [4H, H]
    h,  # [B, H]
    c,  # [B, H]
    resets,  # [T, B] bool; unused without HAS_RESETS
    output,  # [T, B, H]
    cells,  # [T, B, H]
    gates,  # [T, B, 4H]; unused without KEEP_GATES
    parts,  # float16, to work in: of weight_hh [4H, 2, H], of two steps' state [2, B, 2, H]; unused without IN_PARTS
    T,
    B,
    width,  # H once more, as the bound of loops: unrolled, they would spill registers
    H: tl.constexpr,
    HAS_RESETS: tl.constexpr,
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
    # The program's first row of the step, counted through all steps.
    row = top
    before = parts + 8 * H * H + top * (2 * H)
    after = before + tl.cast(B, tl.int64) * (2 * H)
    if IN_PARTS:
        # All programs write the same parts of weight_hh, so that none waits for another.
        _split(weight_hh, WEIGHT_SCALE, parts, 4 * width * width, H, 2, 4096)
        _split(h + top * H, STATE_SCALE, before, tl.minimum(B - top, BLOCK_B).to(tl.int32) * width, H, 2, 1024)
        tl.debug_barrier()
    kept = _kept_rows(resets + row, live, HAS_RESETS, BLOCK_B)
    for t in range(T):
        # A step ahead: Triton lays out a product's factors by the narrowest load that their masks depend on within an
        # iteration, and for one of bytes it would leave out ldmatrix. No row follows the last step.
        following = _kept_rows(resets + row + B, live & (t + local < T - 1 + local), HAS_RESETS, BLOCK_B)
        last_h = tl.where(row == top, h + top * H, output + (row - B) * H)
        last_c = tl.where(row == top, c + top * H, cells + (row - B) * H)
        for first in range(0, H, BLOCK_N):
            column = first + tl.arange(0, BLOCK_N)
            inside = live[:, None] & (column < H)[None, :]
            state = local[:, None] * H + column[None, :]
            place = local[:, None] * (4 * H) + column[None, :]
            # These loads are under way together during the product.
            cell = tl.load(last_c + state, mask=inside & kept[:, None], other=0.0).to(tl.float32)
            gate_i, gate_f, gate_g, gate_o = _load_gates(projected + row * (4 * H) + place, inside, H)
            if IN_PARTS:
                product = _gate_product(
                    before, parts, kept, first, width, H, IN_PARTS, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K
                )
                product *= 1.0 / (STATE_SCALE * WEIGHT_SCALE)
            else:
                product = _gate_product(
                    last_h, weight_hh, kept, first, width, H, IN_PARTS, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K
                )
            even, odd = product.reshape(BLOCK_B, BLOCK_N, 2, 2).split()
            product_i, product_g = even.split()
            product_f, product_o = odd.split()
            gate_i += product_i
            gate_f += product_f
            gate_g += product_g
            gate_o += product_o
            gate_i, gate_f, gate_g, gate_o = _sigmoid(gate_i), _sigmoid(gate_f), _tanh(gate_g), _sigmoid(gate_o)
            cell = gate_f * cell + gate_i * gate_g
            hidden = gate_o * _tanh(cell)
            if KEEP_GATES:
                _store_gates(gates + row * (4 * H) + place, gate_i, gate_f, gate_g, gate_o, inside, H)
            tl.store(cells + row * H + state, cell.to(cells.dtype.element_ty), mask=inside)
            tl.store(output + row * H + state, hidden.to(output.dtype.element_ty), mask=inside)
            if IN_PARTS:
                _store_parts(after + local[:, None] * (2 * H) + column[None, :], hidden * STATE_SCALE, inside, H)
        row += B
        before, after = after, before
        kept = following
        # Every warp of the next step reads the stores of all warps of this one.
        tl.debug_barrier()


@jit
def _state_gradient(
    grad_gates,  # [B, 4H] of the step after, from the program's first row on; with IN_PARTS [B, 3, 4H] bfloat16
    weight_hh,  # [4H, H]; with IN_PARTS [4H, 3, H] bfloat16
    rows,
    column,
    width,
    H: tl.constexpr,
    IN_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradient of h [BLOCK_B, BLOCK_N] through the gates of the next step; 0 outside of `rows`."""
    count: tl.constexpr = 3 if IN_PARTS else 1
    grad = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for k in range(0, 4 * width, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        known = rows[:, None] & (depth < 4 * H)[None, :]
        upstream = grad_gates + tl.arange(0, BLOCK_B)[:, None] * (count * 4 * H) + depth[None, :]
        used = (depth < 4 * H)[:, None] & (column < H)[None, :]
        weights = weight_hh + depth[:, None] * (count * H) + column[None, :]
        high = tl.load(upstream, mask=known, other=0.0)
        # The order is that of `_gate_product`.
        if IN_PARTS:
            middle = tl.load(upstream + 4 * H, mask=known, other=0.0)
            low = tl.load(upstream + 8 * H, mask=known, other=0.0)
        weight = tl.load(weights, mask=used, other=0.0)
        if IN_PARTS:
            weight_middle = tl.load(weights + H, mask=used, other=0.0)
            weight_low = tl.load(weights + 2 * H, mask=used, other=0.0)
            # The products left out would be below rounding.
            grad = tl.dot(low, weight, grad)
            grad = tl.dot(middle, weight_middle, grad)
            grad = tl.dot(high, weight_low, grad)
            grad = tl.dot(middle, weight, grad)
            grad = tl.dot(high, weight_middle, grad)
        grad = tl.dot(high, weight, grad, input_precision=PRECISION)
    return grad


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
    width,  # H once more, as the bound of loops: unrolled, they would spill registers
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
    top = tl.program_id(0).to(tl.int64) * BLOCK_B
    local = tl.arange(0, BLOCK_B)
    live = local < B - top
    # The program's first row of the step, counted through all steps.
    bottom = top + (tl.cast(T, tl.int64) - 1) * B
    row = bottom
    here = parts + 12 * H * H + top * (12 * H)
    there = here + tl.cast(B, tl.int64) * (12 * H)
    if IN_PARTS:
        # All programs write the same parts of weight_hh, so that none waits for another.
        _split(weight_hh, 1.0, parts, 4 * width * width, H, 3, 4096)
        tl.debug_barrier()
    # Rows whose state the next step continued from; none after the last step.
    followed = local < 0
    for _ in range(T):
        kept = _kept_rows(resets + row, live, HAS_RESETS, BLOCK_B)
        last_c = tl.where(row == top, c + top * H, cells + (row - B) * H)
        after = grad_projected + (row + B) * (4 * H)
        # A block: Triton 3.9's interpreter refuses a scalar comparison in a mask.
        is_last = (row + local == bottom + local)[:, None]
        for first in range(0, width, BLOCK_N):
            column = first + tl.arange(0, BLOCK_N)
            inside = live[:, None] & (column < H)[None, :]
            state = local[:, None] * H + column[None, :]
            place = local[:, None] * (4 * H) + column[None, :]
            # These loads are under way together during the product.
            d_h = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
            if HAS_OUTPUT:
                d_h = tl.load(grad_output + row * H + state, mask=inside, other=0.0).to(tl.float32)
            if HAS_LAST_H:
                d_h += tl.load(grad_last_h + top * H + state, mask=inside & is_last, other=0.0).to(tl.float32)
            gate_i, gate_f, gate_g, gate_o = _load_gates(gates + row * (4 * H) + place, inside, H)
            cell = tl.load(cells + row * H + state, mask=inside, other=0.0).to(tl.float32)
            carried = inside & kept[:, None]
            previous = tl.load(last_c + state, mask=carried, other=0.0).to(tl.float32)
            if IN_PARTS:
                through = _state_gradient(
                    there, parts, followed, column, width, H, IN_PARTS, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K
                )
            else:
                through = _state_gradient(
                    after, weight_hh, followed, column, width, H, IN_PARTS, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K
                )
            d_c = tl.load(grad_c + top * H + state, mask=inside & (is_last == 0), other=0.0)
            if HAS_LAST_C:
                d_c += tl.load(grad_last_c + top * H + state, mask=inside & is_last, other=0.0).to(tl.float32)
            # Joined with a load, the product takes the layout of the loads; otherwise they would take the product's,
            # one after the other between barriers.
            through, d_c = tl.join(through, d_c).split()
            d_h += through
            squashed = _tanh(cell)
            d_c += d_h * gate_o * (1.0 - squashed * squashed)
            grad_i = d_c * gate_g * gate_i * (1.0 - gate_i)
            grad_f = d_c * previous * gate_f * (1.0 - gate_f)
            grad_g = d_c * gate_i * (1.0 - gate_g * gate_g)
            grad_o = d_h * squashed * gate_o * (1.0 - gate_o)
            _store_gates(grad_projected + row * (4 * H) + place, grad_i, grad_f, grad_g, grad_o, inside, H)
            if IN_PARTS:
                split = here + local[:, None] * (12 * H) + column[None, :]
                _store_parts(split, grad_i, inside, 4 * H)
                _store_parts(split + H, grad_f, inside, 4 * H)
                _store_parts(split + 2 * H, grad_g, inside, 4 * H)
                _store_parts(split + 3 * H, grad_o, inside, 4 * H)
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
        if IN_PARTS:
            d_h = _state_gradient(
                there, parts, followed, column, width, H, IN_PARTS, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K
            )
        else:
            d_h = _state_gradient(
                after, weight_hh, followed, column, width, H, IN_PARTS, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K
            )
        state = local[:, None] * H + column[None, :]
        tl.store(grad_h + top * H + state, d_h.to(grad_h.dtype.element_ty), mask=inside)


def _fits_kernel(weight_hh: Tensor) -> bool:
    # Triton 3.7 does not compile a transposed float64 operand; that dtype is for checks, not for speed.
    return weight_hh.dtype != torch.float64 and weight_hh.shape[1] <= MAX_HIDDEN


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else 1


def _has_many_rows(rows: int, device: int) -> bool:
    """Whether blocks of `BLOCK_B` rows would be more than multiprocessors."""
    return rows > BLOCK_B * _multiprocessors(device)


def _in_parts(dtype: torch.dtype, steps: int, many_rows: bool = False, platform: str = PLATFORM) -> bool:
    """Whether products are of 16-bit parts."""
    return platform == "cuda" and dtype == torch.float32 and (steps >= PARTS_STEPS or many_rows)


def _layout(
    shapes: Mapping[str, Mapping[Any, tuple[int, int, int]]],
    dtype: torch.dtype,
    in_parts: bool,
    block_b: int = BLOCK_B,
    platform: str = PLATFORM,
) -> dict[str, Any]:
    """Blocks, precision, warps and stages of a launch."""
    block_k, warps, stages = shapes[platform]["parts" if in_parts else dtype.itemsize]
    blocks = {"BLOCK_B": block_b, "BLOCK_N": BLOCK_N, "BLOCK_K": block_k}
    options = {"num_warps": warps * block_b // BLOCK_B, "num_stages": stages}
    return {"IN_PARTS": in_parts, "PRECISION": PRECISIONS[platform], **blocks, **options}


def _lstm_layer_forward_cuda(
    projected: Tensor, weight_hh: Tensor, h: Tensor, c: Tensor, resets: Tensor | None, keep_gates: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    if not _fits_kernel(weight_hh):
        return lstm_layer_forward_eager(projected, weight_hh, h, c, resets, keep_gates)
    projected = projected.contiguous()
    steps, (rows, size) = projected.shape[0], h.shape
    output, cells = projected.new_empty(steps, rows, size), projected.new_empty(steps, rows, size)
    gates = projected.new_empty(projected.shape if keep_gates else 0)
    _launch_forward(projected, weight_hh, h, c, resets, output, cells, gates)
    return output, cells, gates


def _lstm_step_cuda_(
    projected: Tensor, weight_hh: Tensor, h: Tensor, c: Tensor, resets: Tensor | None, next_h: Tensor, next_c: Tensor
) -> None:
    if not _fits_kernel(weight_hh):
        lstm_step_eager_(projected, weight_hh, h, c, resets, next_h, next_c)
        return
    _launch_forward(projected.contiguous(), weight_hh, h, c, resets, next_h, next_c, projected.new_empty(0))


def _launch_forward(
    projected: Tensor,
    weight_hh: Tensor,
    h: Tensor,
    c: Tensor,
    resets: Tensor | None,
    output: Tensor,
    cells: Tensor,
    gates: Tensor,
) -> None:
    steps, (rows, size) = projected.shape[0], h.shape
    if rows == 0:
        return
    many_rows = _has_many_rows(rows, projected.get_device())
    in_parts = _in_parts(projected.dtype, steps, many_rows)
    parts_size = 8 * size * size + 4 * rows * size if in_parts else 0
    block_b = MANY_ROWS_BLOCK_B if many_rows else BLOCK_B
    launch(
        _lstm_layer_fwd_kernel,
        cdiv(rows, block_b),
        (
            projected,
            weight_hh.contiguous(),
            h.contiguous(),
            c.contiguous(),
            projected if resets is None else resets.contiguous(),
            output,
            cells,
            gates,
            projected.new_empty(parts_size, dtype=torch.float16),
        ),
        (steps, rows, size),
        H=size,
        HAS_RESETS=resets is not None,
        KEEP_GATES=gates.numel() > 0,
        **_layout(FORWARD_SHAPES, projected.dtype, in_parts, block_b),
    )


def _lstm_layer_backward_cuda(
    weight_hh: Tensor,
    c: Tensor,
    resets: Tensor | None,
    cells: Tensor,
    gates: Tensor,
    grad_output: Tensor | None,
    grad_last_h: Tensor | None,
    grad_last_c: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if not _fits_kernel(weight_hh):
        return lstm_layer_backward_eager(weight_hh, c, resets, cells, gates, grad_output, grad_last_h, grad_last_c)
    gates = gates.contiguous()
    steps, (rows, size) = gates.shape[0], c.shape
    grad_projected, grad_h = torch.empty_like(gates), c.new_empty(rows, size)
    grad_c = c.new_empty(rows, size, dtype=torch.float32)
    if rows > 0:
        many_rows = c.dtype != torch.float32 and _has_many_rows(rows, c.get_device())
        block_b = MANY_ROWS_BLOCK_B if many_rows else BLOCK_B
        # Triton's interpreter multiplies the bits of bfloat16 numbers as integers.
        in_parts = _in_parts(gates.dtype, steps) and not INTERPRETED
        parts_size = 12 * size * size + 24 * rows * size if in_parts else 0
        launch(
            _lstm_layer_bwd_kernel,
            cdiv(rows, block_b),
            (
                weight_hh.contiguous(),
                c.contiguous(),
                gates if resets is None else resets.contiguous(),
                cells.contiguous(),
                gates,
                gates if grad_output is None else grad_output.contiguous(),
                gates if grad_last_h is None else grad_last_h.contiguous(),
                gates if grad_last_c is None else grad_last_c.contiguous(),
                grad_projected,
                grad_h,
                grad_c,
                c.new_empty(parts_size, dtype=torch.bfloat16),
            ),
            (steps, rows, size),
            H=size,
            HAS_RESETS=resets is not None,
            HAS_OUTPUT=grad_output is not None,
            HAS_LAST_H=grad_last_h is not None,
            HAS_LAST_C=grad_last_c is not None,
            **_layout(BACKWARD_SHAPES, gates.dtype, in_parts, block_b),
        )
    return grad_projected, grad_h, grad_c.to(c.dtype)


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """Products keep their tensors' dtype: autocast would make float32 ones half precision."""
    if under_autocast(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def lstm_layer_forward_eager(
    projected: Tensor, weight_hh: Tensor, h: Tensor, c: Tensor, resets: Tensor | None, keep_gates: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """(output [T, B, H], cells [T, B, H], activated gates [T, B, 4H]) in plain PyTorch, step by step.

    Without `keep_gates`, which only the backward pass needs, gates is an empty tensor [0].
    """
    dtype, exact = projected.dtype, compute_dtype(projected.dtype)
    gates = torch.empty(projected.shape, dtype=exact, device=projected.device)
    cells = gates.new_empty(projected.shape[0], *h.shape)
    output = torch.empty_like(cells)
    weight = weight_hh.to(exact).t()
    inputs, hidden, cell = projected.to(exact), h.to(exact), c.to(exact)
    size = h.shape[1]
    with _without_autocast(projected.device):
        for t in range(projected.shape[0]):
            if resets is not None:
                reset_rows = resets[t].unsqueeze(1)
                hidden, cell = hidden.masked_fill(reset_rows, 0), cell.masked_fill(reset_rows, 0)
            torch.addmm(inputs[t], hidden, weight, out=gates[t])
            gate_i, gate_f, gate_g, gate_o = gates[t].split(size, dim=1)
            gates[t, :, : 2 * size].sigmoid_()
            gate_g.tanh_()
            gate_o.sigmoid_()
            torch.mul(gate_f, cell, out=cells[t]).addcmul_(gate_i, gate_g)
            torch.tanh(cells[t], out=output[t]).mul_(gate_o)
            hidden, cell = output[t].to(dtype).to(exact), cells[t].to(dtype).to(exact)
    return output.to(dtype), cells.to(dtype), gates.to(dtype) if keep_gates else projected.new_empty(0)


def lstm_step_eager_(
    projected: Tensor, weight_hh: Tensor, h: Tensor, c: Tensor, resets: Tensor | None, next_h: Tensor, next_c: Tensor
) -> None:
    """`lstm_layer_forward_eager` of one step, its state written into `next_h` and `next_c`."""
    output, cells, _ = lstm_layer_forward_eager(projected, weight_hh, h, c, resets, False)
    next_h.copy_(output[0])
    next_c.copy_(cells[0])


def lstm_layer_backward_eager(
    weight_hh: Tensor,
    c: Tensor,
    resets: Tensor | None,
    cells: Tensor,
    gates: Tensor,
    grad_output: Tensor | None,
    grad_last_h: Tensor | None,
    grad_last_c: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of projected, h and c in plain PyTorch; an upstream gradient that is None counts 0."""
    dtype, exact = weight_hh.dtype, compute_dtype(weight_hh.dtype)
    grad_projected = torch.empty_like(gates, memory_format=torch.contiguous_format)
    weight = weight_hh.to(exact)
    grad_h = torch.zeros_like(c, dtype=exact) if grad_last_h is None else grad_last_h.to(exact)
    grad_c = torch.zeros_like(c, dtype=exact) if grad_last_c is None else grad_last_c.to(exact)
    with _without_autocast(weight_hh.device):
        for t in reversed(range(gates.shape[0])):
            reset_rows = None if resets is None else resets[t].unsqueeze(1)
            if grad_output is not None:
                grad_h = grad_h + grad_output[t].to(exact)
            previous = (c if t == 0 else cells[t - 1]).to(exact)
            if reset_rows is not None:
                previous = previous.masked_fill(reset_rows, 0)
            grad_gates, grad_c = _step_backward(gates[t].to(exact), cells[t].to(exact), previous, grad_h, grad_c)
            grad_projected[t] = grad_gates
            grad_h = grad_projected[t].to(exact) @ weight
            if reset_rows is not None:
                grad_h, grad_c = grad_h.masked_fill(reset_rows, 0), grad_c.masked_fill(reset_rows, 0)
    return grad_projected, grad_h.to(dtype), grad_c.to(dtype)


def _step_backward(
    gates: Tensor, cell: Tensor, previous: Tensor, grad_h: Tensor, grad_c: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of one step's gates before their activation [B, 4H], and of the cell before the step [B, H]."""
    gate_i, gate_f, gate_g, gate_o = gates.chunk(4, dim=1)
    squashed = cell.tanh()
    grad_c = grad_c + _TANH_BACKWARD(grad_h * gate_o, squashed)
    grad_gates = (
        _SIGMOID_BACKWARD(grad_c * gate_g, gate_i),
        _SIGMOID_BACKWARD(grad_c * previous, gate_f),
        _TANH_BACKWARD(grad_c * gate_i, gate_g),
        _SIGMOID_BACKWARD(grad_h * squashed, gate_o),
    )
    return torch.cat(grad_gates, dim=1), grad_c * gate_f


def _lstm_layer_forward_native(
    projected: Tensor, weight_hh: Tensor, h: Tensor, c: Tensor, resets: Tensor | None, keep_gates: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    if projected.dtype not in NATIVE_DTYPES:
        return lstm_layer_forward_eager(projected, weight_hh, h, c, resets, keep_gates)
    output, cells, gates = torch.ops.metta_fastagent_native.lstm_layer_forward.default(
        projected.contiguous(), weight_hh.contiguous(), h.contiguous(), c.contiguous(), contiguous(resets)
    )
    return output, cells, gates if keep_gates else gates.new_empty(0)


def _lstm_layer_backward_native(
    weight_hh: Tensor,
    c: Tensor,
    resets: Tensor | None,
    cells: Tensor,
    gates: Tensor,
    grad_output: Tensor | None,
    grad_last_h: Tensor | None,
    grad_last_c: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    upstream = (grad_output, grad_last_h, grad_last_c)
    if weight_hh.dtype not in NATIVE_DTYPES:
        return lstm_layer_backward_eager(weight_hh, c, resets, cells, gates, *upstream)
    return torch.ops.metta_fastagent_native.lstm_layer_backward.default(
        weight_hh.contiguous(), c.contiguous(), contiguous(resets), cells, gates, *map(contiguous, upstream)
    )


def _forward_fake(
    projected: Tensor, weight_hh: Tensor, h: Tensor, c: Tensor, resets: Tensor | None, keep_gates: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (projected.shape[0], *h.shape)
    gates = projected.new_empty(projected.shape if keep_gates else 0)
    return projected.new_empty(shape), projected.new_empty(shape), gates


def _backward_fake(
    weight_hh: Tensor,
    c: Tensor,
    resets: Tensor | None,
    cells: Tensor,
    gates: Tensor,
    grad_output: Tensor | None,
    grad_last_h: Tensor | None,
    grad_last_c: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return gates.new_empty(gates.shape), c.new_empty(c.shape), c.new_empty(c.shape)


_lstm_layer_forward = register(
    "lstm_layer_forward(Tensor projected, Tensor weight_hh, Tensor h, Tensor c, Tensor? resets, bool keep_gates=True)"
    " -> (Tensor output, Tensor cells, Tensor gates)",
    lstm_layer_forward_eager,
    _forward_fake,
    _lstm_layer_forward_cuda,
    _lstm_layer_forward_native,
)
_lstm_step_ = register(
    "lstm_step_(Tensor projected, Tensor weight_hh, Tensor h, Tensor c, Tensor? resets, Tensor(a!) next_h,"
    " Tensor(b!) next_c) -> ()",
    lstm_step_eager_,
    lambda *args: None,
    _lstm_step_cuda_,
)
_lstm_layer_backward = register(
    "lstm_layer_backward(Tensor weight_hh, Tensor c, Tensor? resets, Tensor cells, Tensor gates, Tensor? grad_output,"
    " Tensor? grad_last_h, Tensor? grad_last_c) -> (Tensor grad_projected, Tensor grad_h, Tensor grad_c)",
    lstm_layer_backward_eager,
    _backward_fake,
    _lstm_layer_backward_cuda,
    _lstm_layer_backward_native,
)


class _LSTMLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projected: Tensor, weight_hh: Tensor, h: Tensor, c: Tensor, resets: Tensor | None):
        output, cells, gates = _lstm_layer_forward(projected, weight_hh, h, c, resets)
        ctx.save_for_backward(weight_hh, h, c, resets, output, cells, gates)
        ctx.set_materialize_grads(False)
        ctx.backend = chosen_backend()
        # Copies: views of the output could not be written in place.
        return output, output[-1].clone(), cells[-1].clone()

    @staticmethod
    def backward(ctx, *grads):
        with_graph = needs_graph()
        with torch.no_grad():
            results = _LSTMLayer._gradients(ctx, *grads)
        if with_graph:
            results = refuse_second_derivative("lstm_layer", results, (*ctx.saved_tensors[:3], *grads))
        return *results, None

    @staticmethod
    def _gradients(ctx, *grads: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        weight_hh, h, c, resets, output, cells, gates = ctx.saved_tensors
        grad_projected, grad_h, grad_c = run_backward(
            ctx.backend, _lstm_layer_backward, weight_hh, c, resets, cells, gates, *grads
        )
        grad_weight = _weight_gradient(grad_projected, h, output, resets) if ctx.needs_input_grad[1] else None
        return grad_projected, grad_weight, grad_h, grad_c


def _last_state(output: Tensor, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output and copies of its and the cells' last step; of one step's cells nobody else has a view."""
    return output, output[-1].clone(), cells.squeeze(0) if cells.shape[0] == 1 else cells[-1].clone()


def _formula(
    projected: Tensor, weight_hh: Tensor, h: Tensor, c: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`lstm_layer` in operations that autograd and torch.func differentiate any number of times."""
    outputs = []
    with _without_autocast(projected.device):
        for t, inputs in enumerate(projected):
            if resets is not None:
                reset_rows = resets[t].unsqueeze(1)
                h, c = h.masked_fill(reset_rows, 0), c.masked_fill(reset_rows, 0)
            gate_i, gate_f, gate_g, gate_o = (inputs + h @ weight_hh.t()).chunk(4, dim=-1)
            c = gate_f.sigmoid() * c + gate_i.sigmoid() * gate_g.tanh()
            h = gate_o.sigmoid() * c.tanh()
            outputs.append(h)
    return torch.stack(outputs), h, c


def _weight_gradient(grad_projected: Tensor, h: Tensor, output: Tensor, resets: Tensor | None) -> Tensor:
    """d W_hh [4H, H]: every step's gradient with the state before that step, all in one product."""
    previous = torch.cat((h.unsqueeze(0), output[:-1]))
    if resets is not None:
        previous.masked_fill_(resets.unsqueeze(-1), 0)
    with _without_autocast(h.device):
        return grad_projected.flatten(0, 1).t() @ previous.flatten(0, 1)


def lstm_layer(
    projected: Tensor, weight_hh: Tensor, h: Tensor, c: Tensor, resets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer over T steps, rows zeroed before the steps at which they are reset.

    Args:
        projected: floating-point tensor [T, B, 4H], T and H at least 1: each step's input times W_ih^T, plus both
            biases; gates in nn.LSTM's order (input, forget, cell, output).
        weight_hh: tensor [4H, H], as nn.LSTM's `weight_hh_l0`.
        h: tensor [B, H], the hidden state before step 0.
        c: tensor [B, H], the cell state before step 0.
        resets: bool tensor [T, B], or None for no resets: the state of row b is zeroed before step t (0 included) if
            `resets[t, b]`.

    Returns:
        (output [T, B, H], last_h [B, H], last_c [B, H]): the hidden state after each step, and the state after the last
        one. Dtype as `projected`, under autocast too. Differentiable once with respect to the four floating-point
        tensors, and under torch.func any number of times. On NVIDIA GPUs, float32 weights beyond 4095 and an `h` beyond
        1023 give NaN.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device.
    """
    _check(projected, weight_hh, h, c, resets)
    if in_plain_pytorch():
        return _formula(projected, weight_hh, h, c, resets)
    if not records_graph(projected, weight_hh, h, c):
        return _last_state(*_lstm_layer_forward(projected, weight_hh, h, c, resets, False)[:2])
    return _LSTMLayer.apply(projected, weight_hh, h, c, resets)


def lstm_step_into(
    projected: Tensor, weight_hh: Tensor, h: Tensor, c: Tensor, resets: Tensor | None, next_h: Tensor, next_c: Tensor
) -> Tensor:
    """`lstm_layer` of one step without gradients, its state written into `next_h` and `next_c`, contiguous [B, H].

    Returns the output [1, B, H], a view of `next_h`. Neither may share memory with `h` or `c`.
    """
    _check(projected, weight_hh, h, c, resets)
    _lstm_step_(projected, weight_hh, h, c, resets, next_h, next_c)
    return next_h.unsqueeze(0)


def _check(projected: Tensor, weight_hh: object, h: object, c: object, resets: object) -> None:
    steps, rows, size = _checked_sizes(projected)
    for name, value, shape in (
        ("weight_hh", weight_hh, (4 * size, size)),
        ("h", h, (rows, size)),
        ("c", c, (rows, size)),
    ):
        _require(name, value, shape, projected.dtype, projected)
    if resets is not None:
        _require("resets", resets, (steps, rows), torch.bool, projected)


def _checked_sizes(projected: object) -> tuple[int, int, int]:
    """(T, B, H) of a `projected` that is one."""
    expected = "a float32, float64, bfloat16 or float16 tensor of shape [T, B, 4H] with T >= 1 and H >= 1"
    projected = require_tensor("projected", projected, expected)
    if projected.dtype not in DTYPES:
        raise TypeError(f"projected: got {describe(projected)}, expected {expected}")
    if projected.dim() != 3 or projected.shape[0] < 1 or projected.shape[2] < 1 or projected.shape[2] % 4 != 0:
        raise ValueError(f"projected: got {describe(projected)}, expected {expected}")
    steps, rows, width = projected.shape
    return steps, rows, width // 4


def _require(name: str, value: object, shape: tuple[int, ...], dtype: torch.dtype, projected: Tensor) -> None:
    if isinstance(value, Tensor) and value.dtype == dtype and value.shape == shape and value.device == projected.device:
        return
    expected = f"a {str(dtype).removeprefix('torch.')} tensor of shape {list(shape)} for projected of shape"
    expected = f"{expected} {list(projected.shape)}"
    tensor = require_tensor(name, value, expected)
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: got {describe(tensor)}, expected {expected}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: got {describe(tensor)}, expected {expected}")
    require_same_device(name, tensor, "projected", projected)
