"""Products of the LSTM's recurrence in a Triton program, and loads and stores of its gates.

NVIDIA's tensor cores have no float32, but 16-bit parts add up to the float32 number: forward three products of two
float16 parts, backward six of three bfloat16 parts, because gradients exceed float16's range. With sums rounded once
they are as accurate as a product in float32. PTX does not specify the rounding of sums, and published measurements
report that NVIDIA's tensor cores truncate: with truncation emulated, 64 steps of 128 columns are off by up to 1.2e-6 in
the hidden state, against 2e-7, and gradients by up to 6e-6 of the largest, against 5e-7.
"""

# pyright: reportInvalidTypeForm=false

from metta_fastagent.runtime.triton import jit, tl

# A state after a step is below 1; scaled by this, its float16 parts are exact to 2^-22 of it or to 2^-39. Triton only
# reads globals of this type.
STATE_SCALE = tl.constexpr(16384.0)


@jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))


@jit
def tanh(x):
    # Its absolute error is about 2^-22, for small results too. Triton's interpreter lacks libdevice's tanh.
    return 2.0 / (1.0 + tl.exp2(-2.8853900817779268 * x)) - 1.0


@jit
def kept_rows(resets, live, HAS_RESETS: tl.constexpr, BLOCK_B: tl.constexpr):
    """Live rows [BLOCK_B] that keep their state before a step; `resets` points at the first of these rows' flags."""
    if HAS_RESETS:
        live = live & (tl.load(resets + tl.arange(0, BLOCK_B), mask=live, other=1) == 0)
    return live


@jit
def load_gates(gates, mask, H: tl.constexpr):
    """The four gates [BLOCK_B, BLOCK_N] in float32; `gates` points at the input gate."""
    gate_i = tl.load(gates, mask=mask, other=0.0).to(tl.float32)
    gate_f = tl.load(gates + H, mask=mask, other=0.0).to(tl.float32)
    gate_g = tl.load(gates + 2 * H, mask=mask, other=0.0).to(tl.float32)
    gate_o = tl.load(gates + 3 * H, mask=mask, other=0.0).to(tl.float32)
    return gate_i, gate_f, gate_g, gate_o


@jit
def store_gates(gates, gate_i, gate_f, gate_g, gate_o, mask, H: tl.constexpr):
    dtype = gates.dtype.element_ty
    tl.store(gates, gate_i.to(dtype), mask=mask)
    tl.store(gates + H, gate_f.to(dtype), mask=mask)
    tl.store(gates + 2 * H, gate_g.to(dtype), mask=mask)
    tl.store(gates + 3 * H, gate_o.to(dtype), mask=mask)


@jit
def gate_product(
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
        # In this order, with the loads of each operand adjacent, sm_80 needs the fewest registers.
        if IN_PARTS:
            state_low = tl.load(states + H, mask=known, other=0.0)
        weight = tl.load(weights, mask=used, other=0.0)
        if IN_PARTS:
            weight_low = tl.load(weights + H, mask=used, other=0.0)
            # The product of both low parts would vanish in rounding.
            product = tl.dot(state_low, weight, product)
            product = tl.dot(state, weight_low, product)
        product = tl.dot(state, weight, product, input_precision=PRECISION)
    return product


@jit
def store_parts(parts, x, mask, distance: tl.constexpr):
    """Write float32 x as two float16 or three bfloat16 parts, depending on the type of `parts`, `distance` apart."""
    dtype = parts.dtype.element_ty
    high = x.to(dtype)
    rest = x - high.to(tl.float32)
    middle = rest.to(dtype)
    tl.store(parts, high, mask=mask)
    tl.store(parts + distance, middle, mask=mask)
    if dtype == tl.bfloat16:
        tl.store(parts + 2 * distance, (rest - middle.to(tl.float32)).to(dtype), mask=mask)


@jit
def scale_into_float16(source, size, BLOCK: tl.constexpr):
    """The power of two that scales the largest of `size` float32 elements into 2^14 to 2^15, and its inverse.

    The largest counts as 2^-40 if it is smaller, as 2^100 if it is larger.
    """
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(source + offset, mask=offset < size, other=0.0)))
    exponent = tl.max(largest, 0).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 127 - 40), 127 + 100)
    scale = ((2 * 127 + 14 - exponent) << 23).to(tl.float32, bitcast=True)
    return scale, ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@jit
def split_into_parts(
    source, scale, parts, size, H: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, LOADS: tl.constexpr
):
    """Write the parts of `size` scaled elements: for each row of H, the COUNT parts one after the other.

    BLOCK is four elements per thread: with more, a thread would take eight float32 to fill 128 bits of its parts, and
    each load would touch twice as many sectors. LOADS of these loads are in flight together.
    """
    lane = tl.arange(0, BLOCK)
    for start in range(0, size, LOADS * BLOCK):
        xs = ()
        for k in tl.static_range(LOADS):
            offset = start + k * BLOCK + lane
            xs = xs + (tl.load(source + offset, mask=offset < size, other=0.0) * scale,)  # noqa: RUF005
        for k in tl.static_range(LOADS):
            offset = start + k * BLOCK + lane
            store_parts(parts + (offset // H) * ((COUNT - 1) * H) + offset, xs[k], offset < size, H)


@jit
def state_gradient(
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
    """Gradient of h [BLOCK_B, BLOCK_N] through the gates of the next step; 0 outside `rows`."""
    count: tl.constexpr = 3 if IN_PARTS else 1
    grad = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for k in range(0, 4 * width, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        known = rows[:, None] & (depth < 4 * H)[None, :]
        upstream = grad_gates + tl.arange(0, BLOCK_B)[:, None] * (count * 4 * H) + depth[None, :]
        used = (depth < 4 * H)[:, None] & (column < H)[None, :]
        weights = weight_hh + depth[:, None] * (count * H) + column[None, :]
        high = tl.load(upstream, mask=known, other=0.0)
        # Same order as in `gate_product`.
        if IN_PARTS:
            middle = tl.load(upstream + 4 * H, mask=known, other=0.0)
            low = tl.load(upstream + 8 * H, mask=known, other=0.0)
        weight = tl.load(weights, mask=used, other=0.0)
        if IN_PARTS:
            weight_middle = tl.load(weights + H, mask=used, other=0.0)
            weight_low = tl.load(weights + 2 * H, mask=used, other=0.0)
            # The products left out would vanish in rounding.
            grad = tl.dot(low, weight, grad)
            grad = tl.dot(middle, weight_middle, grad)
            grad = tl.dot(high, weight_low, grad)
            grad = tl.dot(middle, weight, grad)
            grad = tl.dot(high, weight_middle, grad)
        grad = tl.dot(high, weight, grad, input_precision=PRECISION)
    return grad
