import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from metta_fastagent.ops import l2_init_loss

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (17, 33), (3, 0), (), (2, 3, 5, 7), (1023,)]
OPERATORS = torch.ops.metta_fastagent


def weights(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def check(params, initial, scale, assert_close, function=l2_init_loss):
    """The loss, and the gradients for a random upstream gradient, against float64 with autograd's own gradient."""
    params = [param.detach().requires_grad_() for param in params]
    exact = [param.detach().double().requires_grad_() for param in params]
    loss = function(params, initial, scale)
    squares = [((e - start.double()) ** 2).sum() for e, start in zip(exact, initial, strict=True)]
    expected = scale * sum(squares)
    assert loss.shape == ()
    assert_close(loss, expected.detach(), torch.float32)
    upstream = torch.randn(())
    grads = torch.autograd.grad(loss, params, upstream)
    for param, grad, wanted in zip(params, grads, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        assert grad.dtype == param.dtype
        # The factor 2 * scale * upstream is rounded to float32, as the loss is.
        grad = grad.float() if grad.dtype == torch.float64 else grad
        assert_close(grad, wanted, grad.dtype)


def test_hand_computed_values():
    param = torch.tensor([[1.0, 2.0], [3.0, -4.0]], requires_grad=True)
    other = torch.tensor([5.0], requires_grad=True)
    loss = l2_init_loss([param, other], [torch.ones(2, 2), torch.tensor([7.0])], 0.5)
    loss.backward()
    assert loss.item() == 0.5 * (0 + 1 + 4 + 25 + 4)
    assert param.grad.tolist() == [[0.0, 1.0], [2.0, -5.0]]
    assert other.grad.tolist() == [-2.0]


@pytest.mark.parametrize("scale", [1.0, 0.0, 1e-3, -2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype, scale, assert_close):
    check(weights(dtype, 1), weights(dtype, 2), scale, assert_close)


def test_scale_is_one_by_default():
    assert l2_init_loss([torch.tensor([3.0])], [torch.tensor([1.0])]).item() == 4.0


def test_mixed_dtypes(assert_close):
    params = [torch.randn(5, 3).to(dtype) for dtype in DTYPES]
    check(params, [torch.randn(5, 3).to(dtype) for dtype in reversed(DTYPES)], 0.5, assert_close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_small_change_of_a_large_weight_is_not_lost(dtype):
    start = torch.full((1000,), 64.0, dtype=dtype)
    change = 1.0 if dtype in (torch.bfloat16, torch.float16) else 2.0**-10
    assert l2_init_loss([start + change], [start]).item() == 1000 * change**2


def test_squares_beyond_half_precision():
    assert l2_init_loss([torch.full((4,), 1000.0).half()], [torch.zeros(4).half()]).item() == 4e6


@pytest.mark.parametrize(
    "layout",
    [lambda x: x.t(), lambda x: x[:, ::2], lambda x: x[:1].expand(5, 6)],
    ids=["transposed", "every second column", "expanded"],
)
def test_non_contiguous(layout, assert_close):
    param, start = layout(torch.randn(5, 6)), layout(torch.randn(5, 6))
    check([param, param.contiguous()], [start.contiguous(), start], 0.7, assert_close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_graph_even_when_zero(dtype):
    param = nn.Parameter(torch.ones(3, 2, dtype=dtype))
    loss = l2_init_loss([param], [param.detach().clone()])
    assert (loss.item(), loss.dtype, loss.requires_grad) == (0.0, torch.float32, True)
    loss.backward()
    assert param.grad.dtype == dtype
    assert not param.grad.any()


def test_no_tensors():
    loss = l2_init_loss([], [])
    assert (loss.item(), loss.shape, loss.dtype) == (0.0, (), torch.float32)


def test_only_params_that_need_it_get_a_gradient():
    params = [torch.ones(2, requires_grad=True), torch.ones(2)]
    initial = [torch.zeros(2, requires_grad=True), torch.zeros(2)]
    l2_init_loss(params, initial).backward()
    assert params[0].grad.tolist() == [2.0, 2.0]
    assert params[1].grad is None
    assert initial[0].grad is None


def test_nan_reaches_the_loss_and_its_own_gradient_only():
    param = torch.tensor([1.0, torch.nan], requires_grad=True)
    loss = l2_init_loss([param], [torch.zeros(2)])
    loss.backward()
    assert loss.isnan()
    assert param.grad.isnan().tolist() == [False, True]


def test_gradcheck():
    params = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64)]
    initial = [torch.randn(2, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    # The loss is a float32 number and a quadratic: central differences of a wide step are exact but for its rounding.
    assert torch.autograd.gradcheck(
        lambda x: l2_init_loss([x, params[1]], initial, 0.5).double(), params[0], eps=0.1, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.t(), lambda x: x[:, ::2]], ids=["rows", "columns", "gaps"])
def test_opcheck(layout, dtype):
    params = [layout(torch.randn(5, 4).to(dtype)), torch.randn(3), torch.randn(0)]
    initial = [layout(torch.randn(5, 4)).contiguous(), torch.randn(3), torch.randn(0)]
    torch.library.opcheck(OPERATORS.l2_init_loss_forward.default, (params, initial, 0.5))
    torch.library.opcheck(OPERATORS.l2_init_loss_backward.default, (params, initial, 0.5, torch.randn(())))


def test_compile(assert_close, compile_fullgraph):
    compiled = compile_fullgraph(l2_init_loss)
    for dtype in (torch.float32, torch.bfloat16):
        check(weights(dtype, 1), weights(dtype, 2), 0.25, assert_close, compiled)


def test_no_host_read():
    with FakeTensorMode():
        params = [torch.randn(3, 5, requires_grad=True), torch.randn(2, dtype=torch.bfloat16, requires_grad=True)]
        loss = l2_init_loss(params, [torch.randn(3, 5), torch.randn(2)], 0.5)
        grads = torch.autograd.grad(loss, params)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert [(grad.shape, grad.dtype) for grad in grads] == [((3, 5), torch.float32), ((2,), torch.bfloat16)]


ONES = torch.ones(2)


@pytest.mark.parametrize(
    ("params", "initial", "scale", "error", "argument", "came", "expected"),
    [
        ([ONES], [], 1.0, ValueError, "initial", "0 tensors", "1"),
        ([], [ONES], 1.0, ValueError, "initial", "1 tensors", "0"),
        ([ONES, ONES], [ONES, torch.ones(1)], 1.0, ValueError, "initial[1]", "shape [1]", "same shape"),
        ([ONES], [torch.ones(2, 1)], 1.0, ValueError, "initial[0]", "shape [2, 1]", "same shape"),
        ([ONES], [ONES.to("meta")], 1.0, ValueError, "initial[0]", "on meta", "on cpu"),
        ([ONES, ONES.to("meta")], [ONES, ONES.to("meta")], 1.0, ValueError, "initial[1]", "on meta", "on cpu"),
        ([ONES, ONES.int()], [ONES, ONES], 1.0, TypeError, "params[1]", "int32", "floating-point"),
        ([ONES.cfloat()], [ONES], 1.0, TypeError, "params[0]", "complex64", "floating-point"),
        ([1.0], [ONES], 1.0, TypeError, "params[0]", "1.0 (float)", "tensor"),
        ([ONES], [None], 1.0, TypeError, "initial[0]", "None", "tensor"),
        ([ONES], [ONES], "x", TypeError, "scale", "'x'", "number"),
        ([ONES], [ONES], None, TypeError, "scale", "None", "number"),
    ],
)
def test_wrong_arguments(params, initial, scale, error, argument, came, expected, refuses):
    with refuses(error, argument, came, expected):
        l2_init_loss(params, initial, scale)
