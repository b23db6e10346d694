"""The exponential and the logarithm of csrc/vec.h against those of extended precision."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

from metta_fastagent import _native

DTYPES = [np.float32, np.float64]


@pytest.fixture(scope="module", params=["processor's", "plain"])
def functions(request, tmp_path_factory):
    """(exp, log) of an array: with this processor's instructions, fused products among them, and without."""
    try:
        compiler = _native.find_compiler()
    except _native.CannotBuildError as error:
        pytest.skip(str(error))
    library = tmp_path_factory.mktemp("vec") / "vec.so"
    source = Path(__file__).with_name("vec_for_tests.cpp")
    flags = ["-std=c++17", "-O3", "-fPIC", "-shared", "-Wno-psabi", f"-I{_native.SOURCES}"]
    flags += ["-march=native"] if request.param == "processor's" else []
    subprocess.run([*compiler, *flags, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))

    def apply(x):
        padded = np.ones(-(-len(x) // 8) * 8, x.dtype)
        padded[: len(x)] = x
        outputs = np.full((2, len(padded)), np.nan, x.dtype)
        pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (padded, outputs[0], outputs[1])]
        getattr(loaded, f"apply_{x.dtype}")(*pointers, ctypes.c_int64(len(padded)))
        return outputs[:, : len(x)]

    return apply


def ulps(actual, exact, dtype):
    """Distance in units in the last place of the exact value's neighbourhood."""
    rounded = exact.astype(dtype)
    return np.abs(actual.astype(np.longdouble) - exact) / np.spacing(np.abs(rounded)).astype(np.longdouble)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exp_within_two_ulp(functions, dtype):
    random = np.random.default_rng(1)
    lowest = -104 if dtype == np.float32 else -746
    x = np.concatenate(
        [
            np.linspace(lowest, 0, 400_001),
            -random.exponential(2.0, 400_000),
            -np.logspace(-40, 0, 10_000),
            np.log(2) * np.arange(lowest, 1),
            np.log(2) * (np.arange(lowest, 1) + 0.5),
        ]
    ).astype(dtype)
    x = x[x <= 0]
    assert ulps(functions(x)[0], np.exp(x.astype(np.longdouble)), dtype).max() < 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_within_two_ulp(functions, dtype):
    random = np.random.default_rng(2)
    x = np.concatenate(
        [
            np.linspace(0.4, 4, 400_001),
            random.exponential(100.0, 200_000),
            1 + random.normal(0, 1e-4, 100_000),
            np.geomspace(np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max / 2, 200_000),
            2.0 ** np.arange(-140, 120),
        ]
    ).astype(dtype)
    x = x[x > 0]
    assert ulps(functions(x)[1], np.log(x.astype(np.longdouble)), dtype).max() < 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(functions, dtype):
    x = np.array([0.0, -0.0, -1e30, -np.inf, np.nan, 1.0, np.inf, -1.0], dtype)
    exponential, logarithm = functions(x)
    np.testing.assert_array_equal(exponential[:5], np.array([1, 1, 0, 0, np.nan], dtype))
    np.testing.assert_array_equal(
        logarithm, np.array([-np.inf, -np.inf, np.nan, np.nan, np.nan, 0, np.inf, np.nan], dtype)
    )
