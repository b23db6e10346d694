"""The metrics of weights: against numpy and against spectra written out by hand, and what is read and left alone."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from metta_fastagent import weight_metrics as module
from metta_fastagent.weight_metrics import analyze_weights

HOST_READS = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
ERROR_KEYS = {"name", "weight_norm", "svd_error"}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]


class OperatorLog(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((str(func.overloadpacket), args))
        return func(*args, **(kwargs or {}))

    def shapes_of(self, name):
        return [tuple(args[0].shape) for called, args in self.calls if called == name]


class HostReadLog(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in HOST_READS:
            self.reads.append(name)
        return func(*args, **(kwargs or {}))


def reference(weight, delta=0.01):
    """The metrics written out in numpy, float64."""
    matrix = weight.detach().cpu().double().numpy()
    sv = np.linalg.svd(matrix, compute_uv=False)
    live = sv[sv > 1e-10]
    out = {
        "weight_norm": np.sqrt((matrix**2).sum()),
        "mean_sv": sv.mean(),
        "largest_sv": sv[0],
        "sv_ratio": sv[0] / live[-1],
        "collapsed_dim_%": 1 - len(live) / len(sv),
        "effective_rank": next(k for k in range(1, len(sv) + 1) if sv[:k].sum() >= (1 - delta) * sv.sum()),
    }
    if len(sv) > 5:
        x, y = np.log(np.arange(1, len(live) + 1)), np.log(live + 1e-10)
        out["sv_loglog_slope"] = np.polyfit(x, y, 1)[0]
        out["sv_loglog_r2"] = np.corrcoef(x, y)[0, 1] ** 2
    return out


def assert_matches(got, expected, rel=1e-9):
    assert got.keys() - {"name"} == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=rel, abs=1e-12), key


def orthogonal(rows, columns, dtype=torch.float64):
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64))[0].to(dtype)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(3)


# One value, vectors, five singular values and six, which the fit needs, square, wide and tall; every dtype.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("shape", "delta", "dtype"),
    [
        ((1, 1), 0, torch.float32),
        ((1, 7), 0.5, torch.float64),
        ((7, 1), 0.01, torch.float32),
        ((5, 9), 0.01, torch.bfloat16),
        ((6, 40), 0.5, torch.float32),
        ((40, 6), 0, torch.float16),
        ((8, 8), 0.999, torch.float32),
        ((64, 33), 0.01, torch.float64),
    ],
)
def test_matches_numpy(shape, delta, dtype, device):
    weight = torch.randn(shape, device=device).to(dtype)
    (got,) = analyze_weights({"layer": weight}, delta)
    assert got["name"] == "layer"
    assert_matches(got, reference(weight, delta))
    assert isinstance(got["effective_rank"], int)
    assert all(isinstance(value, float) for key, value in got.items() if key not in ("name", "effective_rank"))


NO_FIT = {"sv_loglog_slope": 0.0, "sv_loglog_r2": 0.0}
SPECTRA = {
    # Singular values, delta, and metrics: 4 + 2 = 6 is below 0.9 x 7.5 = 6.75, 4 + 2 + 1 = 7 is not.
    "mixed": (
        [4, 2, 1, 0.5, 0, 0],
        0.1,
        {"weight_norm": math.sqrt(16 + 4 + 1 + 0.25), "mean_sv": 7.5 / 6, "largest_sv": 4.0, "sv_ratio": 8.0}
        | {"collapsed_dim_%": 2 / 6, "effective_rank": 3},
    ),
    "zeros": (
        [0] * 8,
        0.01,
        {"weight_norm": 0.0, "mean_sv": 0.0, "largest_sv": 0.0, "sv_ratio": 0.0, "collapsed_dim_%": 1.0} | NO_FIT,
    ),
    "few zeros": ([0] * 3, 0.01, {"sv_ratio": 0.0, "collapsed_dim_%": 1.0, "effective_rank": 1}),
    "one alive": ([2.5, *[0] * 6], 0.01, {"sv_ratio": 1.0, "collapsed_dim_%": 6 / 7} | NO_FIT),
    "two alive": ([2, 1, *[0] * 5], 0.01, {"sv_loglog_slope": -1.0, "sv_loglog_r2": 1.0}),
    "steep power law": ([k**-2.0 for k in range(1, 13)], 0.01, {"sv_loglog_slope": -2.0, "sv_loglog_r2": 1.0}),
    "power law": ([k**-0.25 for k in range(1, 13)], 0.01, {"sv_loglog_slope": -0.25, "sv_loglog_r2": 1.0}),
}


@pytest.mark.parametrize(("spectrum", "delta", "expected"), SPECTRA.values(), ids=SPECTRA.keys())
def test_spectra_written_out(spectrum, delta, expected):
    (got,) = analyze_weights({"w": torch.diag(torch.tensor(spectrum, dtype=torch.float64))}, delta)
    assert {key: got[key] for key in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert ("sv_loglog_slope" in got) == (len(spectrum) > 5)


@pytest.mark.parametrize(
    ("size", "dtype"), [(8, torch.bfloat16), (300, torch.bfloat16), (128, torch.float32), (300, torch.float64)]
)
def test_flat_spectrum_has_no_slope(size, dtype):
    (got,) = analyze_weights({"w": orthogonal(size, size, dtype)})
    assert got["sv_loglog_slope"] == 0.0
    assert got["sv_loglog_r2"] == 0.0
    assert got["sv_ratio"] == pytest.approx(1.0, abs=20 * torch.finfo(dtype).eps)
    assert got["effective_rank"] == math.ceil(0.99 * size)


def test_a_shallow_slope_is_not_taken_for_rounding():
    (got,) = analyze_weights({"w": torch.diag(torch.arange(1, 9).double() ** -0.001).float()})
    assert got["sv_loglog_slope"] == pytest.approx(-0.001, rel=1e-2)
    assert got["sv_loglog_r2"] > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_duplicated_columns_are_collapsed(dtype):
    weight = torch.randn(32, 16).to(dtype)
    weight[:, 12:] = weight[:, :4]
    (got,) = analyze_weights({"w": weight}, delta=0)
    assert got["collapsed_dim_%"] == pytest.approx(4 / 16)
    assert got["effective_rank"] <= 12
    live = np.linalg.svd(weight.double().numpy(), compute_uv=False)[:12]
    assert got["sv_ratio"] == pytest.approx(live[0] / live[-1], rel=1e-6)
    x, y = np.log(np.arange(1, 13)), np.log(live + 1e-10)
    assert got["sv_loglog_slope"] == pytest.approx(np.polyfit(x, y, 1)[0], rel=1e-6)


def test_a_fit_is_never_better_than_exact():
    spectra = torch.zeros(200, 7)
    spectra[:, :2] = torch.rand(200, 2) + 0.1
    for record in analyze_weights({str(i): torch.diag(spectrum) for i, spectrum in enumerate(spectra)}):
        assert 1 - 1e-9 <= record["sv_loglog_r2"] <= 1


def test_svdvals_sees_finite_values_only():
    with OperatorLog() as log:
        analyze_weights({"nan": torch.full((4, 4), math.nan), "good": torch.randn(4, 4)})
    (stacked,) = [args[0] for name, args in log.calls if name == "aten._linalg_svd"]
    assert stacked.shape == (2, 4, 4)
    assert stacked.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_empty_and_non_finite_weights_are_named_and_leave_the_others_alone(device):
    good = torch.randn(8, 8, device=device)
    with_nan, with_inf = good.clone(), good.clone()
    with_nan[1, 1] = math.nan
    with_inf[0, :2] = math.inf
    weights = {"nan": with_nan, "good": good, "empty": good[:0], "inf": with_inf}
    got = {record["name"]: record for record in analyze_weights(weights)}
    assert list(got) == ["nan", "good", "empty", "inf"]
    assert_matches(got["good"], reference(good))
    for name in ("nan", "empty", "inf"):
        assert got[name].keys() == ERROR_KEYS
    assert "1 of the weight's 64 values" in got["nan"]["svd_error"]
    assert "2 of the weight's 64 values" in got["inf"]["svd_error"]
    assert "[0, 8]" in got["empty"]["svd_error"]
    assert math.isnan(got["nan"]["weight_norm"])
    assert got["inf"]["weight_norm"] == math.inf
    assert got["empty"]["weight_norm"] == 0.0


def test_only_the_matrix_that_does_not_converge_loses_its_metrics(monkeypatch):
    svdvals = torch.linalg.svdvals

    def fails_on_seven(stacked):
        if (stacked[:, 0, 0] == 7).any():
            raise module.LinAlgError("did not converge")
        return svdvals(stacked)

    monkeypatch.setattr(torch.linalg, "svdvals", fails_on_seven)
    good, hard = torch.randn(6, 6), torch.randn(6, 6)
    hard[0, 0] = 7
    first, second = analyze_weights({"hard": hard, "good": good})
    assert first.keys() == ERROR_KEYS
    assert "did not converge" in first["svd_error"]
    assert_matches(second, reference(good))


def test_equal_shapes_share_a_call_and_keep_their_order():
    shapes = {"a": (6, 9), "b": (4, 4), "c": (9, 6), "d": (6, 9), "e": (4, 4), "f": (7, 2)}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    weights |= {"double": torch.randn(6, 9).double(), "half": torch.randn(6, 9).bfloat16()}
    with OperatorLog() as log:
        got = analyze_weights(weights)
    assert sorted(log.shapes_of("aten._linalg_svd")) == [(1, 2, 7), (1, 6, 9), (1, 6, 9), (2, 4, 4), (3, 6, 9)]
    assert [record["name"] for record in got] == list(weights)
    for record in got:
        assert_matches(record, reference(weights[record["name"]]))


def test_a_large_group_is_split(monkeypatch):
    monkeypatch.setattr(module, "MAX_BATCH_ELEMENTS", 100)
    weights = {str(i): torch.randn(6, 8) for i in range(5)}
    with OperatorLog() as log:
        got = analyze_weights(weights)
    assert log.shapes_of("aten._linalg_svd") == [(2, 6, 8), (2, 6, 8), (1, 6, 8)]
    for record in got:
        assert_matches(record, reference(weights[record["name"]]))


def test_one_host_read_for_all_weights():
    weights = {"a": torch.randn(6, 9), "b": torch.randn(3, 3), "nan": torch.full((4, 4), math.nan)}
    with HostReadLog() as log, OperatorLog() as operators:
        analyze_weights(weights)
    assert log.reads == ["tolist"]
    assert operators.shapes_of("aten._local_scalar_dense") == []


def test_nothing_is_read_before_the_transfer():
    with FakeTensorMode():
        weights = {"a": torch.randn(6, 9), "b": torch.randn(9, 6), "c": torch.randn(3, 3, dtype=torch.bfloat16)}
        names, table = module._metrics_table(weights, 0.01)
    assert names == ["a", "b", "c"]
    assert table.shape == (3, len(module.COLUMNS))
    assert table.dtype == torch.float64


def test_random_numbers_and_weights_are_left_alone():
    weight = torch.nn.Parameter(torch.randn(8, 8))
    before, state = weight.detach().clone(), torch.get_rng_state()
    first = analyze_weights({"w": weight})
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weight.detach(), before)
    assert weight.grad is None
    assert weight._version == 0
    assert not module._metrics_table({"w": weight}, 0.01)[1].requires_grad
    assert analyze_weights({"w": weight}) == first


def test_strided_views_and_no_weights():
    base = torch.randn(20, 30)
    view = base[::2, 1::3]
    (got,) = analyze_weights({"w": view})
    assert_matches(got, reference(view))
    assert analyze_weights({}) == []


ONES = torch.ones(2, 2)
DELTA = r"expected a real number in \[0, 1\)"


@pytest.mark.parametrize(
    ("weights", "delta", "error", "message"),
    [
        ([ONES], 0, TypeError, r"weights: got list, expected a mapping"),
        ({0: ONES}, 0, TypeError, r"weights: got the name 0 \(int\), expected a string"),
        ({"w": [[1.0]]}, 0, TypeError, r"weights\['w'\]: got list, expected a tensor"),
        ({"w": ONES.long()}, 0, TypeError, r"weights\['w'\]: got torch.int64, expected a floating-point dtype"),
        ({"w": ONES.cfloat()}, 0, TypeError, r"weights\['w'\]: got torch.complex64, expected"),
        ({"w": torch.ones(3)}, 0, ValueError, r"weights\['w'\]: got shape \[3\], expected two"),
        ({"w": torch.ones(1, 2, 3)}, 0, ValueError, r"weights\['w'\]: got shape \[1, 2, 3\]"),
        ({"w": ONES}, -0.01, ValueError, f"delta: got -0.01, {DELTA}"),
        ({"w": ONES}, 1.0, ValueError, f"delta: got 1.0, {DELTA}"),
        ({"w": ONES}, math.nan, ValueError, f"delta: got nan, {DELTA}"),
        ({"w": ONES}, math.inf, ValueError, f"delta: got inf, {DELTA}"),
        ({"w": ONES}, "0.01", TypeError, r"delta: got '0.01' \(str\), expected a real number"),
        ({"w": ONES}, None, TypeError, r"delta: got None \(NoneType\), expected a real number"),
        ({"w": ONES}, True, TypeError, r"delta: got True \(bool\), expected a real number"),
        ({"w": ONES}, torch.tensor(0.01), TypeError, "delta: got a .*tensor.*, expected a real number"),
    ],
)
def test_bad_arguments(weights, delta, error, message):
    with pytest.raises(error, match=message):
        analyze_weights(weights, delta)
