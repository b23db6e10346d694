"""Instructions of the emulator, one by one, against NumPy."""

import emulator
import numpy as np
import pytest
import torch
from ptx_for_tests import at, kernel, needs_emulator, on_lanes

pytestmark = needs_emulator
LANE = np.arange(32)
BITS = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}
R = {2: "%h", 4: "%r", 8: "%d"}
SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 65504.0, 65519.99, 65520.0, 2.0**-24, 2.0**-25, 2.0**-14]


def integers(dtype, seed=0):
    """Random numbers, small ones and the extremes."""
    rng, info = np.random.default_rng(seed), np.iinfo(dtype)
    x = rng.integers(info.min, info.max, 32, dtype, endpoint=True)
    x[:6] = [0, 1, info.max, info.min, 7, 2]
    x[20:] = rng.integers(0, 40, 12)
    return rng.permutation(x)


def floats(dtype, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(32) * 10.0 ** rng.integers(-6, 6, 32)
    x[: len(SPECIAL)] = SPECIAL
    return rng.permutation(x).astype(dtype)


def same(got, want):
    __tracebackhide__ = True
    want = np.asarray(want)
    equal = (got == want) | ((got != got) & (want != want))
    if got.dtype.kind == "f":
        equal &= (np.signbit(got) == np.signbit(want)) | np.isnan(want)
    assert got.dtype == want.dtype and equal.all(), f"{got[~equal][:4]} instead of {want[~equal][:4]}"


def python(function, *arrays):
    """`function` of Python's integers, lane by lane, wrapped to the dtype of the first array."""
    dtype, bits = arrays[0].dtype, 8 * arrays[0].itemsize
    values = [int(function(*map(int, lane))) % 2**bits for lane in zip(*arrays, strict=True)]
    return np.array(values, f"u{dtype.itemsize}").view(dtype)


def truncated(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER_OPERATIONS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": lambda a, b: truncated(a, b) if b else -1,
    "rem": lambda a, b: a - b * truncated(a, b) if b else a,
}
INTEGER_TYPES = {
    "s16": np.int16,
    "u16": np.uint16,
    "s32": np.int32,
    "u32": np.uint32,
    "s64": np.int64,
    "u64": np.uint64,
}


@pytest.mark.parametrize("kind", INTEGER_TYPES)
@pytest.mark.parametrize("name", INTEGER_OPERATIONS)
def test_integers(name, kind):
    a, b = integers(INTEGER_TYPES[kind], 1), integers(INTEGER_TYPES[kind], 2)
    r = R[a.itemsize]
    same(on_lanes(f"{name}.{kind} {r}0, {r}1, {r}2;", [a, b], a.dtype), python(INTEGER_OPERATIONS[name], a, b))


@pytest.mark.parametrize("kind", INTEGER_TYPES)
def test_products_and_sums_of_two_widths(kind):
    a, b, c = (integers(INTEGER_TYPES[kind], seed) for seed in (1, 2, 3))
    r, bits = R[a.itemsize], 8 * a.itemsize
    same(on_lanes(f"mul.hi.{kind} {r}0, {r}1, {r}2;", [a, b], a.dtype), python(lambda x, y: (x * y) >> bits, a, b))
    same(
        on_lanes(f"mad.lo.{kind} {r}0, {r}1, {r}2, {r}3;", [a, b, c], a.dtype),
        python(lambda x, y, z: x * y + z, a, b, c),
    )
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
        d, z = R[wide.itemsize], integers(wide, 4)
        got = on_lanes(f"mul.wide.{kind} {d}0, {r}1, {r}2;", [a, b], wide)
        same(got, a.astype(wide) * b.astype(wide))
        got = on_lanes(f"mad.wide.{kind} {d}0, {r}1, {r}2, {d}3;", [a, b, z], wide)
        same(got, a.astype(wide) * b.astype(wide) + z)


@pytest.mark.parametrize("kind", INTEGER_TYPES)
def test_signs_and_shifts(kind):
    a, amounts = integers(INTEGER_TYPES[kind]), np.arange(32, dtype=np.uint32) * 3
    r, bits = R[a.itemsize], 8 * a.itemsize
    unsigned = BITS[a.itemsize]
    same(on_lanes(f"neg.{kind} {r}0, {r}1;", [a], a.dtype), python(lambda x: -x, a))
    same(on_lanes(f"abs.{kind} {r}0, {r}1;", [a], a.dtype), python(abs, a))
    same(on_lanes(f"not.{unsigned} {r}0, {r}1;", [a], a.dtype), ~a)
    shifted = on_lanes(f"shl.{unsigned} {r}0, {r}1, %r2;", [a, amounts], a.dtype)
    same(shifted, python(lambda x, n: x << n, a, amounts))
    same(on_lanes(f"shr.{kind} {r}0, {r}1, %r2;", [a, amounts], a.dtype), python(lambda x, n: x >> n, a, amounts))
    for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        b = integers(a.dtype, 5)
        same(on_lanes(f"{name}.{unsigned} {r}0, {r}1, {r}2;", [a, b], a.dtype), function(a, b))
    assert bits == 8 * a.itemsize


COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}


def predicate(code, inputs):
    return on_lanes(f"{code}\nselp.b32 %r0, 1, 0, %p1;", inputs, np.uint32) == 1


FLOAT_TYPES = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("kind", [*INTEGER_TYPES, *FLOAT_TYPES])
def test_comparisons(kind):
    if kind in FLOAT_TYPES:
        a, b = floats(FLOAT_TYPES[kind], 1), floats(FLOAT_TYPES[kind], 2)
    else:
        dtype = INTEGER_TYPES[kind]
        a, b = integers(dtype, 1), integers(dtype, 2)
    b[::5] = a[::5]
    r, nan = R[a.itemsize], (a != a) | (b != b)
    for name, function in COMPARISONS.items():
        same(predicate(f"setp.{name}.{kind} %p1, {r}1, {r}2;", [a, b]), function(a, b) & ~nan)
        joined = f"setp.{name}.and.{kind} %p1|%p3, {r}1, {r}2, !%p2;"
        some = f"setp.lt.u32 %p2, %r90, 9;\n{joined}"
        same(predicate(some, [a, b]), function(a, b) & ~nan & (LANE >= 9))
        same(predicate(f"{some}\nmov.pred %p1, %p3;", [a, b]), ~(function(a, b) & ~nan) & (LANE >= 9))
    if kind[0] == "f":
        for name, ordered in UNORDERED.items():
            same(predicate(f"setp.{name}.{kind} %p1, {r}1, {r}2;", [a, b]), COMPARISONS[ordered](a, b) | nan)
        same(predicate(f"setp.nan.{kind} %p1, {r}1, {r}2;", [a, b]), nan)
        same(predicate(f"setp.num.{kind} %p1, {r}1, {r}2;", [a, b]), ~nan)


def test_predicates():
    first, second = LANE < 9, LANE % 2 == 0
    code = "setp.lt.u32 %p2, %r90, 9;\nand.b32 %r5, %r90, 1;\nsetp.eq.u32 %p3, %r5, 0;\n"
    for name, function in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        same(predicate(code + f"{name}.pred %p1, %p2, %p3;", []), function(first, second))
    same(predicate(code + "not.pred %p1, %p2;", []), ~first)
    same(predicate(code + "mov.pred %p1, %p2;\n@!%p3 mov.pred %p1, %p3;", []), first & second)


FLOAT_OPERATIONS = {
    "add": np.add,
    "sub.rn": np.subtract,
    "mul": np.multiply,
    "div.rn": np.divide,
    "min": np.fmin,
    "max": np.fmax,
    "min.NaN": np.minimum,
    "max.NaN": np.maximum,
}


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("name", FLOAT_OPERATIONS)
def test_float_arithmetic(name, kind):
    dtype = np.float32 if kind == "f32" else np.float64
    a, b = floats(dtype, 1), floats(dtype, 2)
    # The sign of the smaller or larger of two zeros is not NumPy's.
    zeros = (a == 0) & (b == 0)
    a[zeros] = 1.0
    r = R[a.itemsize]
    with np.errstate(all="ignore"):
        same(on_lanes(f"{name}.{kind} {r}0, {r}1, {r}2;", [a, b], dtype), FLOAT_OPERATIONS[name](a, b))


def test_the_smaller_of_two_zeros():
    zeros = np.array([0.0, -0.0] * 16, np.float32)
    same(on_lanes("min.f32 %r0, %r1, %r2;", [zeros, -zeros], np.float32), np.full(32, -0.0, np.float32))
    same(on_lanes("max.f32 %r0, %r1, %r2;", [zeros, -zeros], np.float32), np.zeros(32, np.float32))


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_functions_of_floats(kind):
    dtype = np.float32 if kind == "f32" else np.float64
    a = floats(dtype)
    r = R[a.itemsize]
    with np.errstate(all="ignore"):
        for name, function in (
            ("neg", np.negative),
            ("abs", np.abs),
            ("rcp.rn", lambda x: dtype(1) / x),
            ("sqrt.rn", np.sqrt),
        ):
            same(on_lanes(f"{name}.{kind} {r}0, {r}1;", [a], dtype), function(a))


def test_a_fused_product_and_sum_is_rounded_once():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(1, 2**24, 32).astype(np.float32) for _ in range(2))
    c = -(a * b)
    # The product is exact in float64, and so is its distance to the nearest float32.
    exact = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (exact != 0).any()
    same(on_lanes("fma.rn.f32 %r0, %r1, %r2, %r3;", [a, b, c], np.float32), exact)


def test_subnormal_numbers_are_flushed():
    x = np.array([1e-39, -1e-39, 1e-38, 2.0] * 8, np.float32)
    one = np.ones(32, np.float32)
    expected = np.array([0.0, -0.0, 0.0, 2.0] * 8, np.float32)
    zero = np.zeros(32, np.float32)
    got = on_lanes("fma.rn.ftz.f32 %r0, %r1, %r2, %r3;", [x, one, zero], np.float32)
    assert np.array_equal(got, expected)
    same(on_lanes("abs.ftz.f32 %r0, %r1;", [x], np.float32), np.abs(expected))


APPROXIMATE = {
    "ex2.approx.f32": (np.exp2, 2),
    "ex2.approx.ftz.f32": (np.exp2, 2),
    "lg2.approx.f32": (np.log2, 2),
    "rcp.approx.f32": (np.reciprocal, 1),
    "sqrt.approx.f32": (np.sqrt, 1),
    "rsqrt.approx.f32": (lambda x: 1 / np.sqrt(x), 2),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate_instructions(name):
    function, units = APPROXIMATE[name]
    x = np.random.default_rng(0).uniform(0.6, 1.9, 32).astype(np.float32)
    exact = function(x.astype(np.float64)).astype(np.float32)
    same(on_lanes(f"{name} %r0, %r1;", [x], np.float32), exact)
    for mode in (1, 2, 3):
        with emulator.option(approximate=mode):
            moved = on_lanes(f"{name} %r0, %r1;", [x], np.float32)
        # A logarithm's error is absolute.
        unit = np.float32(2.0**-22) if name.startswith("lg2") else units * np.spacing(np.abs(exact))
        off = (moved.astype(np.float64) - exact) / unit
        assert (np.abs(off) <= 1.01).all() and (np.abs(off) > 0.4).mean() > 0.5
        assert {1: (off < 0).any() and (off > 0).any(), 2: (off > 0).all(), 3: (off < 0).all()}[mode]


def test_full_division():
    a, b = (np.random.default_rng(seed).uniform(1, 2, 32).astype(np.float32) for seed in (0, 1))
    same(on_lanes("div.full.f32 %r0, %r1, %r2;", [a, b], np.float32), a / b)
    with emulator.option(approximate=2):
        moved = on_lanes("div.full.f32 %r0, %r1, %r2;", [a, b], np.float32)
    same(moved, np.nextafter(np.nextafter(a / b, np.float32(9)), np.float32(9)))


def test_half_of_a_reciprocal():
    x = np.random.default_rng(0).uniform(0.1, 9, 32)
    got = on_lanes("rcp.approx.ftz.f64 %d0, %d1;", [x], np.float64)
    np.testing.assert_allclose(got, 1 / x, rtol=2.0**-19)
    assert (got.view(np.uint64) & 0xFFFFFFFF == 0).all()


SOURCES = {"s8": np.int8, "u8": np.uint8, **INTEGER_TYPES}


@pytest.mark.parametrize("source", SOURCES)
def test_conversions_of_integers(source):
    x = integers(SOURCES[source])
    r = PREFIX = {1: "%h", 2: "%h", 4: "%r", 8: "%d"}[x.itemsize]
    for to, dtype in SOURCES.items():
        wide = np.dtype(dtype) if np.dtype(dtype).itemsize > 1 else np.dtype(f"{np.dtype(dtype).kind}2")
        got = on_lanes(f"cvt.{to}.{source} {R[wide.itemsize]}0, {r}1;", [x], wide)
        same(got, x.astype(dtype).astype(wide))
    same(on_lanes(f"cvt.rn.f32.{source} %r0, {PREFIX}1;", [x], np.float32), x.astype(np.float32))
    same(on_lanes(f"cvt.rn.f64.{source} %d0, {PREFIX}1;", [x], np.float64), x.astype(np.float64))


def test_a_conversion_of_part_of_a_register():
    x = integers(np.int64)
    same(on_lanes("cvt.s64.s8 %d0, %d1;", [x], np.int64), x.astype(np.int8).astype(np.int64))


@pytest.mark.parametrize("source", ["f32", "f64"])
@pytest.mark.parametrize("to", INTEGER_TYPES)
def test_conversions_to_integers(to, source):
    dtype, target = np.float32 if source == "f32" else np.float64, INTEGER_TYPES[to]
    x, info = floats(dtype), np.iinfo(target)
    x[:3] = [2.0**70, -(2.0**70), 2.5]
    for rounding, function in (("rzi", np.trunc), ("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil)):
        got = on_lanes(f"cvt.{rounding}.{to}.{source} {R[info.bits // 8]}0, {R[x.itemsize]}1;", [x], target)
        # NaN becomes 0, or 2^63 of 64 bits.
        of_nan = 2**63 if info.bits == 64 else 0
        wanted = [of_nan if v != v else min(max(function(v), info.min), info.max) for v in x.astype(np.float64)]
        same(got, np.array([int(v) % 2**info.bits for v in wanted], f"u{info.bits // 8}").view(target))


def test_conversions_between_floats():
    x, wide = floats(np.float32), floats(np.float64, 3)
    with np.errstate(all="ignore"):
        same(on_lanes("cvt.rn.f16.f32 %h0, %r1;", [x], np.float16), x.astype(np.float16))
        same(on_lanes("cvt.rn.f16.f64 %h0, %d1;", [wide], np.float16), wide.astype(np.float16))
        same(on_lanes("cvt.rn.f32.f64 %r0, %d1;", [wide], np.float32), wide.astype(np.float32))
        half = x.astype(np.float16)
    same(on_lanes("cvt.f64.f32 %d0, %r1;", [x], np.float64), x.astype(np.float64))
    same(on_lanes("cvt.f32.f16 %r0, %h1;", [half], np.float32), half.astype(np.float32))
    bfloat = torch.from_numpy(x).bfloat16()
    raw = bfloat.view(torch.int16).numpy()
    got = on_lanes("cvt.rn.bf16.f32 %h0, %r1;", [x], np.int16)
    finite = np.isfinite(x)
    same(got[finite], raw[finite])
    same(on_lanes("cvt.f32.bf16 %r0, %h1;", [raw], np.float32), bfloat.float().numpy())
    pair = on_lanes("cvt.rn.bf16x2.f32 %r0, %r1, %r1;", [x], np.uint32)
    same(pair[finite], (raw.view(np.uint16).astype(np.uint32) * 0x10001)[finite])
    pair = on_lanes("cvt.rn.f16x2.f32 %r0, %r1, 0f00000000;", [x], np.uint32)
    same((pair >> 16).astype(np.uint16)[finite], half.view(np.uint16)[finite])
    assert (pair & 0xFFFF == 0).all()


def test_tf32_rounds_ties_away_from_zero():
    x = floats(np.float32)
    x[:4] = np.array([0x3F801000, 0x3F800FFF, 0xBF801000, 0x3F803000], np.uint32).view(np.float32)
    finite = np.isfinite(x)
    expected = ((x.view(np.uint32).astype(np.uint64) + 0x1000) & 0xFFFFE000).astype(np.uint32)
    same(on_lanes("cvt.rna.tf32.f32 %r0, %r1;", [x], np.uint32)[finite], expected[finite])


def test_fields_of_bits():
    a, b = integers(np.uint32, 1), integers(np.uint32, 2)
    position, length = (LANE * 5 % 37).astype(np.uint32), (LANE * 7 % 35).astype(np.uint32)

    def field(x, at, count):
        return (x >> at) & ((1 << count) - 1)

    got = on_lanes("bfe.u32 %r0, %r1, %r2, %r3;", [a, position, length], np.uint32)
    same(got, python(field, a, position, length))

    def signed(x, at, count):
        x -= (x & 2**31) * 2
        return 0 if count == 0 else field(x, at, count) - (2**count if x >> min(at + count - 1, 31) & 1 else 0)

    got = on_lanes("bfe.s32 %r0, %r1, %r2, %r3;", [a, position, length], np.uint32)
    same(got, python(signed, a, position, length))

    def inserted(x, y, at, count):
        mask = (((1 << min(count, 32)) - 1) << at) & 0xFFFFFFFF
        return y & ~mask | (x << at) & mask

    got = on_lanes("bfi.b32 %r0, %r1, %r2, %r3, %r4;", [a, b, position, length], np.uint32)
    same(got, python(inserted, a, b, position, length))
    same(on_lanes("popc.b32 %r0, %r1;", [a], np.uint32), python(lambda x: x.bit_count(), a))
    same(on_lanes("clz.b32 %r0, %r1;", [a], np.uint32), python(lambda x: 32 - x.bit_length(), a))
    same(on_lanes("brev.b32 %r0, %r1;", [a], np.uint32), python(lambda x: int(f"{x:032b}"[::-1], 2), a))


def test_permuted_bytes():
    a, b, selectors = (integers(np.uint32, seed) for seed in range(3))

    def permuted(x, y, selector):
        source, result = (x | y << 32).to_bytes(8, "little"), 0
        for k in range(4):
            s = selector >> 4 * k & 15
            byte = source[s & 7]
            result |= (255 * (byte >> 7) if s & 8 else byte) << 8 * k
        return result

    same(on_lanes("prmt.b32 %r0, %r1, %r2, %r3;", [a, b, selectors], np.uint32), python(permuted, a, b, selectors))


@pytest.mark.parametrize(("name", "function"), [("add", np.add), ("min", np.minimum), ("max", np.maximum)])
@pytest.mark.parametrize("kind", ["u16", "s16"])
def test_pairs_of_integers(name, function, kind):
    a, b = integers(np.uint32, 1), integers(np.uint32, 2)
    halves = function(a.view(INTEGER_TYPES[kind]), b.view(INTEGER_TYPES[kind]))
    same(on_lanes(f"{name}.{kind}x2 %r0, %r1, %r2;", [a, b], np.uint32), halves.view(np.uint32))


def test_moves_pack_and_unpack():
    a, b = integers(np.uint16, 1), integers(np.uint16, 2)
    packed = a.astype(np.uint32) | b.astype(np.uint32) << 16
    same(on_lanes("mov.b32 %r0, {%h1, %h2};", [a, b], np.uint32), packed)
    same(on_lanes("mov.b32 {_, %h0}, %r1;", [packed], np.uint16), b)
    same(on_lanes("mov.b64 %d1, {%r1, %r1};\nmov.b64 {%h1, %h2, %h3, %h0}, %d1;", [packed], np.uint16), b)
    same(on_lanes("mov.b64 %d0, 0d3FF8000000000000;", [], np.float64), np.full(32, 1.5))
    same(on_lanes("mov.b32 %r0, -3;", [], np.int32), np.full(32, -3, np.int32))
    same(on_lanes("mov.u32 %r0, %ntid.x;", [], np.int32), np.full(32, 32, np.int32))
    same(
        on_lanes("selp.b64 %d0, %d1, %d2, %p1;", [a.astype(np.int64), b.astype(np.int64)], np.int64), b.astype(np.int64)
    )


def test_vectors_and_extension():
    x = np.arange(128, dtype=np.int32).reshape(32, 4)
    code = at(91, 16) + "ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%d80];\n"
    code += "mov.b32 %r5, global_smem;\nmad.lo.s32 %r5, %r90, 16, %r5;\nst.shared.v4.b32 [%r5], {%r3, %r2, %r1, %r0};\n"
    code += "ld.shared.v2.b32 {%r0, _}, [%r5+8];\nld.shared.b32 %r1, [%r5];"
    source = torch.from_numpy(x)
    out = torch.zeros(32, 2, dtype=torch.int32)
    emulator.run(kernel(code + at(90, 8) + "st.global.v2.b32 [%d80], {%r0, %r1};"), out, source, shared=512)
    assert torch.equal(out, source[:, [1, 3]])
    small = integers(np.int8)
    for kind, dtype in (("s8", np.int8), ("u8", np.uint8)):
        out = torch.zeros(32, dtype=torch.int64)
        code = at(91, 1) + f"ld.global.{kind} %d0, [%d80];\n" + at(90, 8) + "st.global.b64 [%d80], %d0;"
        emulator.run(kernel(code), out, torch.from_numpy(small))
        assert out.tolist() == small.view(dtype).astype(np.int64).tolist()


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("add.u32", lambda a, b: a + b),
        ("min.s32", min),
        ("max.s32", max),
        ("or.b32", lambda a, b: a | b),
        ("exch.b32", lambda a, b: b),
    ],
)
def test_atomic_operations(name, function):
    counter, x = torch.tensor([5], dtype=torch.int32), torch.arange(32, dtype=torch.int32) - 9
    out = torch.zeros(32, dtype=torch.int32)
    code = at(92, 4) + f"ld.global.b32 %r1, [%d80];\natom.global.gpu.acq_rel.{name} %r0, [%d91], %r1;\n"
    emulator.run(kernel(code + at(90, 4) + "st.global.b32 [%d80], %r0;", 3), out, counter, x)
    value, before = 5, []
    for each in x.tolist():
        before.append(value)
        value = function(value, each)
    assert (out.tolist(), counter.item()) == (before, value)


def test_asynchronous_copies_arrive_and_fill_with_zeros():
    x, out = torch.arange(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    code = at(91, 16) + "mul.lo.s32 %r5, %r90, 16;\nsetp.lt.u32 %p1, %r90, 20;\nselp.b32 %r6, 16, 0, %p1;\n"
    code += "cp.async.cg.shared.global [%r5], [%d80], 16, %r6;\ncp.async.commit_group;\ncp.async.wait_group 0;\n"
    code += (
        "ld.shared.v4.b32 {%r0, %r1, %r2, %r3}, [%r5];\n"
        + at(90, 16)
        + "st.global.v4.b32 [%d80], {%r0, %r1, %r2, %r3};"
    )
    emulator.run(kernel(code), out, x, shared=512)
    assert torch.equal(out, torch.where(x < 80, x, 0))


def test_shuffles():
    x = integers(np.uint32)
    for distance in (1, 2, 4, 8, 16):
        same(on_lanes(f"shfl.sync.bfly.b32 %r0, %r1, {distance}, 31, -1;", [x], np.uint32), x[LANE ^ distance])
        up = np.where(distance <= LANE, x[LANE - distance], x)
        same(on_lanes(f"shfl.sync.up.b32 %r0, %r1, {distance}, 0, -1;", [x], np.uint32), up)
        down = np.where(LANE + distance < 32, x[(LANE + distance) % 32], x)
        same(on_lanes(f"shfl.sync.down.b32 %r0, %r1, {distance}, 31, -1;", [x], np.uint32), down)
    same(on_lanes("shfl.sync.idx.b32 %r0, %r1, 3, 31, -1;", [x], np.uint32), x[np.full(32, 3)])
    # In segments of 8 lanes.
    same(on_lanes("shfl.sync.idx.b32 %r0, %r1, 3, 6175, -1;", [x], np.uint32), x[LANE // 8 * 8 + 3])
    inside = "shfl.sync.down.b32 %r0|%p1, %r1, 5, 31, -1;\nselp.b32 %r0, 1, 0, %p1;"
    same(on_lanes(inside, [x], np.uint32), (LANE < 27).astype(np.uint32))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("add.u32", np.add),
        ("min.s32", np.minimum),
        ("max.s32", np.maximum),
        ("and.b32", np.bitwise_and),
        ("xor.b32", np.bitwise_xor),
    ],
)
def test_reductions(name, function):
    x = integers(np.int32)
    same(on_lanes(f"redux.sync.{name} %r0, %r1, -1;", [x], np.int32), np.full(32, function.reduce(x, dtype=np.int32)))


def matrices(count, dtype=np.uint16):
    return np.random.default_rng(0).integers(0, 2**16, (count, 8, 8)).astype(dtype)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", ["", ".trans"])
def test_matrices_of_shared_memory(count, transposed):
    x = matrices(count)
    source, out = torch.from_numpy(x.view(np.uint8).copy()), torch.zeros(32 * count, dtype=torch.int32)
    words = count * 32
    # Word by word into shared memory; lane l gives the address of row l.
    code = "".join(
        f"mad.wide.u32 %d80, %r90, 4, %d91;\nld.global.b32 %r1, [%d80+{128 * k}];\nmul.lo.s32 %r2, %r90, 4;\n"
        f"st.shared.b32 [%r2+{128 * k}], %r1;\n"
        for k in range(words // 32)
    )
    registers = ", ".join(f"%r{10 + k}" for k in range(count))
    shape = f"sync.aligned.m8n8.x{count}{transposed}.shared.b16"
    code += f"bar.sync 0;\nmul.lo.s32 %r3, %r90, 16;\nldmatrix.{shape} {{{registers}}}, [%r3];\n"
    stored = f"stmatrix.{shape} [%r3+1024], {{{registers}}};\n"
    code += "".join(
        f"mad.wide.u32 %d80, %r90, 4, %d90;\nst.global.b32 [%d80+{128 * k}], %r{10 + k};\n" for k in range(count)
    )
    emulator.run(kernel(code), out, source, shared=2048)
    expected = x.transpose(0, 2, 1) if transposed else x
    assert np.array_equal(out.numpy().view(np.uint16).reshape(count, 8, 8), expected)
    # What was loaded is stored as it was.
    code += stored + "bar.sync 0;\n"
    code += "".join(
        f"mul.lo.s32 %r2, %r90, 4;\nld.shared.b32 %r1, [%r2+{1024 + 128 * k}];\nmad.wide.u32 %d80, %r90, 4, %d90;\n"
        f"st.global.b32 [%d80+{128 * k}], %r1;\n"
        for k in range(count)
    )
    emulator.run(kernel(code), out, source, shared=2048)
    assert np.array_equal(out.numpy().view(np.uint16).reshape(count, 8, 8), x)


def multiply(kind, a, b, c):
    """A [16, depth] B [depth, 8] + C [16, 8] by mma, with the fragments as PTX documents them."""
    depth = a.shape[1]
    group, t = LANE // 4, LANE % 4

    def fragment(x, rows, columns):
        return x[rows, columns]

    if kind == "tf32":
        parts = [a[group, t], a[group + 8, t], a[group, t + 4], a[group + 8, t + 4], b[t, group], b[t + 4, group]]
        parts = [part.astype(np.float32).view(np.uint32) for part in parts]
        name = "m16n8k8.row.col.f32.tf32.tf32.f32"
    else:

        def pair(x, transposed, row, column):
            values = [x[column + k, row] if transposed else x[row, column + k] for k in (0, 1)]
            tensor = torch.from_numpy(np.stack(values, 1))
            tensor = tensor.half() if kind == "f16" else tensor.bfloat16()
            return tensor.view(torch.int16).numpy().view(np.uint32).ravel()

        parts = [pair(a, False, group + 8 * (k % 2), 2 * t + 8 * (k // 2)) for k in range(4)]
        parts += [pair(b, True, group, 2 * t + 8 * k) for k in range(2)]
        name = f"m16n8k16.row.col.f32.{kind}.{kind}.f32"
    sums = [c[group + 8 * (k // 2), 2 * t + k % 2].astype(np.float32) for k in range(4)]
    code = f"mma.sync.aligned.{name} {{%r0, %r11, %r12, %r13}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, "
    code += "{%r7, %r8, %r9, %r10};\nmov.b32 %r1, %r11;\nmov.b32 %r2, %r12;\nmov.b32 %r3, %r13;"
    got = on_lanes(code, [*parts, *sums], np.float32, vector=4)
    out = np.zeros((16, 8), np.float32)
    for k in range(4):
        out[group + 8 * (k // 2), 2 * t + k % 2] = got[:, k]
    assert depth in (8, 16)
    return out


@pytest.mark.parametrize(("kind", "depth"), [("tf32", 8), ("f16", 16), ("bf16", 16)])
def test_products_of_matrices(kind, depth):
    rng = np.random.default_rng(0)
    # Of few bits, so that every type holds them.
    a, b = rng.integers(-63, 63, (16, depth)) / 32.0, rng.integers(-63, 63, (depth, 8)) / 8.0
    c = rng.standard_normal((16, 8)).astype(np.float32).astype(np.float64)
    same(multiply(kind, a, b, c), (a @ b + c).astype(np.float32))


def test_matrix_units_may_truncate_their_sums():
    a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.full((16, 8), 1.0)
    a[:, 0], b[0] = 1.0, 1.9 * 2.0**-24
    with emulator.option(truncate=1):
        # Below the last bit of 1.
        same(multiply("bf16", a, b, c), c.astype(np.float32))
    with emulator.option(truncate=1, extra_bits=2):
        same(multiply("bf16", a, b, c), c.astype(np.float32))
        a[:, 1], b[1] = 1.0, 1.0 * 2.0**-24
        same(multiply("bf16", a, b, c), np.nextafter(c.astype(np.float32), np.float32(2)))
    same(multiply("bf16", a, b, c), np.nextafter(c.astype(np.float32), np.float32(2)))


def test_lanes_that_part_meet_again():
    count = np.random.default_rng(0).integers(0, 9, 32).astype(np.uint32)
    code = """
    mov.b32 %r0, 0;
$loop:
    setp.eq.u32 %p1, %r1, 0;
    @%p1 bra $done;
    add.s32 %r0, %r0, %r1;
    add.s32 %r1, %r1, -1;
    bra.uni $loop;
$done:
    bar.warp.sync -1;
    add.s32 %r0, %r0, 1;"""
    same(on_lanes(code, [count], np.uint32), count * (count + 1) // 2 + 1)


def test_all_warps_and_programs_run():
    out = torch.zeros(2, 96, dtype=torch.int32)
    code = "mov.u32 %r1, %ctaid.x;\nmad.lo.s32 %r2, %r1, 96, %r90;\nmad.wide.u32 %d80, %r2, 4, %d90;\n"
    emulator.run(kernel(code + "st.global.b32 [%d80], %r2;", 1, threads=96), out, programs=2)
    assert out.flatten().tolist() == list(range(192))


def test_what_is_not_known_is_named():
    with pytest.raises(RuntimeError, match=r"not supported by the emulator: frobnicate\.f32 %r1, %r2"):
        emulator.run(kernel("frobnicate.f32 %r1, %r2;", 0))
