"""The functions of csrc/vec.h against those of extended precision."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

from metta_fastagent import _native

DTYPES = [np.float32, np.float64]
FUNCTIONS = ("exp", "log", "expm1", "sigmoid", "tanh")


@pytest.fixture(scope="module", params=["processor's", "plain"])
def functions(request, tmp_path_factory):
    """FUNCTIONS of an array by name: with this processor's instructions, fused products among them, and without."""
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
        outputs = np.full((len(FUNCTIONS), len(padded)), np.nan, x.dtype)
        pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (padded, outputs)]
        getattr(loaded, f"apply_{x.dtype}")(*pointers, ctypes.c_int64(len(padded)))
        return dict(zip(FUNCTIONS, outputs[:, : len(x)], strict=True))

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
    assert ulps(functions(x)["exp"], np.exp(x.astype(np.longdouble)), dtype).max() < 2


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
    assert ulps(functions(x)["log"], np.log(x.astype(np.longdouble)), dtype).max() < 2


# The range of an LSTM's gates, from where the functions are linear to where they are flat.
def both_signs(dtype):
    random = np.random.default_rng(3)
    magnitudes = np.concatenate(
        [
            np.linspace(0, 30, 200_001),
            np.geomspace(1e-30, 80, 100_000),
            random.exponential(1.0, 200_000),
            np.log(2) / 2 * np.arange(40),
        ]
    )
    return np.concatenate([magnitudes, -magnitudes]).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_expm1_within_three_ulp(functions, dtype):
    x = both_signs(dtype)
    x = x[x <= 0]
    assert ulps(functions(x)["expm1"], np.expm1(x.astype(np.longdouble)), dtype).max() < 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoid_and_tanh_within_four_ulp(functions, dtype):
    x = both_signs(dtype)
    exact = x.astype(np.longdouble)
    results = functions(x)
    assert ulps(results["sigmoid"], 1 / (1 + np.exp(-exact)), dtype).max() < 4
    assert ulps(results["tanh"], np.tanh(exact), dtype).max() < 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(functions, dtype):
    x = np.array([0.0, -0.0, -1e30, -np.inf, np.nan, 1.0, np.inf, -1.0], dtype)
    results = functions(x)
    np.testing.assert_array_equal(results["exp"][:5], np.array([1, 1, 0, 0, np.nan], dtype))
    np.testing.assert_array_equal(
        results["log"], np.array([-np.inf, -np.inf, np.nan, np.nan, np.nan, 0, np.inf, np.nan], dtype)
    )
    np.testing.assert_array_equal(results["expm1"][:5], np.array([0, 0, -1, -1, np.nan], dtype))
    np.testing.assert_array_equal(results["sigmoid"][[0, 1, 2, 3, 4, 6]], np.array([0.5, 0.5, 0, 0, np.nan, 1], dtype))
    np.testing.assert_array_equal(results["tanh"][[0, 1, 2, 3, 4, 6]], np.array([0, 0, -1, -1, np.nan, 1], dtype))
