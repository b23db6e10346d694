import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from metta_fastagent.ops import tanh

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values(dtype, assert_close):
    edges = torch.tensor([0.0, 1e-30, 1e-7, 0.1, 1.0, 9.0, 20.0, 1e4, torch.inf, torch.nan], dtype=torch.float64)
    x = torch.cat((edges, -edges, torch.linspace(-12, 12, 1001, dtype=torch.float64))).to(dtype)
    assert_close(tanh(x), x.double().tanh(), dtype)
    # Small numbers are exact, not only near.
    small = torch.tensor([1e-30, -1e-7, 0.0], dtype=dtype)
    assert_close(tanh(small) * 1e7, small.double().tanh() * 1e7, dtype)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 0, 2), (5, 9), (2, 3, 4, 5, 6)], ids=str)
def test_shapes(shape, assert_close):
    x = torch.randn(shape)
    assert_close(tanh(x), x.double().tanh(), torch.float32)


def test_non_contiguous(assert_close):
    x = torch.randn(9, 14)[::2, ::3].t()
    assert_close(tanh(x), x.double().tanh(), torch.float32)


def test_gradcheck_of_first_and_second_derivatives():
    x = torch.randn(3, 5, dtype=torch.float64).t().requires_grad_()
    assert gradcheck(tanh, x)
    assert gradgradcheck(tanh, x)


def test_torch_func():
    x = torch.randn(3, 5)
    torch.testing.assert_close(torch.func.grad(lambda y: tanh(y).sum())(x), 1 - x.tanh() ** 2)
    torch.testing.assert_close(torch.vmap(tanh)(x), x.tanh())


@pytest.mark.parametrize(
    "x", [torch.randn(3, 5), torch.randn(3, 5).t(), torch.randn(0)], ids=["rows", "columns", "none"]
)
def test_opcheck(x):
    torch.library.opcheck(torch.ops.metta_fastagent.tanh.default, (x,))


def test_compile(compile_fullgraph):
    x = torch.randn(3, 5, requires_grad=True)
    output = compile_fullgraph(lambda y: 2 * tanh(y))(x)
    torch.testing.assert_close(output, 2 * x.tanh())
    torch.testing.assert_close(torch.autograd.grad(output.sum(), x)[0], 2 - 2 * x.tanh() ** 2)


def test_no_host_read():
    with FakeTensorMode():
        assert tanh(torch.ones(3, 4, requires_grad=True)).shape == (3, 4)


@pytest.mark.parametrize(("x", "came"), [([1.0], "list"), (torch.ones(2).int(), "int32"), (None, "None")], ids=str)
def test_wrong_arguments(x, came, refuses):
    with refuses(TypeError, "x", came, "floating-point"):
        tanh(x)
