"""The functions of csrc/vec.h against those of extended precision."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

from metta_fastagent.runtime import native as _native

DTYPES = [np.float32, np.float64]
FUNCTIONS = ("exp of negative numbers", "log", "expm1", "sigmoid", "tanh", "exp")


@pytest.fixture(scope="module", params=["processor's", "processor's, 64 bytes", "plain"])
def functions(request, tmp_path_factory):
    """FUNCTIONS of an array by name: with this processor's instructions, fused products among them, and without."""
    try:
        compiler = _native.find_compiler()
    except _native.CannotBuildError as error:
        pytest.skip(str(error))
    library = tmp_path_factory.mktemp("vec") / "vec.so"
    source = Path(__file__).with_name("vec_for_tests.cpp")
    flags = ["-std=c++17", "-O3", "-fPIC", "-shared", "-Wno-psabi", f"-I{_native.SOURCES}"]
    flags += ["-march=native"] if request.param != "plain" else []
    flags += ["-DMETTA_VECTOR_BYTES=64"] if "64" in request.param else []
    subprocess.run([*compiler, *flags, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))

    def apply(x):
        padded = np.ones(-(-len(x) // 16) * 16, x.dtype)
        padded[: len(x)] = x
        outputs = np.full((len(FUNCTIONS), len(padded)), np.nan, x.dtype)
        pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (padded, outputs)]
        getattr(loaded, f"apply_{x.dtype}")(*pointers, ctypes.c_int64(len(padded)))
        return dict(zip(FUNCTIONS, outputs[:, : len(x)], strict=True))

    return apply


def not_positive(dtype):
    random = np.random.default_rng(1)
    lowest = -104 if dtype == np.float32 else -746
    yield np.linspace(lowest, 0, 400_001)
    yield -random.exponential(2.0, 400_000)
    yield -np.logspace(-40, 0, 10_000)
    yield np.log(2) * np.arange(lowest, 1)
    yield np.log(2) * (np.arange(lowest, 0) + 0.5)


def positive(dtype):
    random = np.random.default_rng(2)
    yield np.linspace(0.4, 4, 400_001)
    yield random.exponential(100.0, 200_000)
    yield 1 + random.normal(0, 1e-4, 100_000)
    yield np.geomspace(np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max / 2, 200_000)
    yield 2.0 ** np.arange(-140, 120)


def gates():
    """The range of an LSTM's gates, from where the functions are linear to where they are flat."""
    yield np.linspace(0, 30, 200_001)
    yield np.geomspace(1e-30, 80, 100_000)
    yield np.random.default_rng(3).exponential(1.0, 200_000)
    yield np.log(2) / 2 * np.arange(40)


def negative_gates(dtype):
    return [-x for x in gates()]


def both_signs(dtype):
    return [*gates(), *negative_gates(dtype)]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# The largest error in units in the last place of the exact value's neighbourhood.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "exact", "inputs", "limit"),
    [
        ("exp of negative numbers", np.exp, not_positive, 2),
        ("exp", np.exp, both_signs, 4),
        ("log", np.log, positive, 2),
        ("expm1", np.expm1, negative_gates, 3),
        ("sigmoid", sigmoid, both_signs, 4),
        ("tanh", np.tanh, both_signs, 4),
    ],
)
def test_error_in_last_places(functions, dtype, name, exact, inputs, limit):
    x = np.concatenate([*inputs(dtype)]).astype(dtype)
    right = exact(x.astype(np.longdouble))
    place = np.spacing(np.abs(right.astype(dtype))).astype(np.longdouble)
    assert (np.abs(functions(x)[name].astype(np.longdouble) - right) / place).max() < limit


INF, NAN = np.inf, np.nan


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("exp of negative numbers", [0, -0.0, -1e30, -INF, NAN], [1, 1, 0, 0, NAN]),
        ("exp", [0, -0.0, -1e30, -INF, NAN, 1e30, INF], [1, 1, 0, 0, NAN, INF, INF]),
        ("log", [0, -0.0, -1e30, -INF, NAN, 1, INF, -1], [-INF, -INF, NAN, NAN, NAN, 0, INF, NAN]),
        ("expm1", [0, -0.0, -1e30, -INF, NAN], [0, 0, -1, -1, NAN]),
        ("sigmoid", [0, -0.0, -1e30, -INF, NAN, INF], [0.5, 0.5, 0, 0, NAN, 1]),
        ("tanh", [0, -0.0, -1e30, -INF, NAN, INF], [0, 0, -1, -1, NAN, 1]),
    ],
)
def test_special_values(functions, dtype, name, x, expected):
    np.testing.assert_array_equal(functions(np.array(x, dtype))[name], np.array(expected, dtype))
