"""The L2 distance of weights to their initial values."""

import pytest
import torch
from references import DTYPES, assert_close
from references import l2_init_loss as reference
from torch import nn

from metta_fastagent.ops import l2_init_loss

# Both sides of a vector's lanes and of the parts that a thread or a program takes.
SHAPES = [(1,), (7,), (9,), (257,), (17, 33), (3, 0), (), (2, 3, 5, 7), (4097,), (70_001,)]


def weights(dtype, device):
    return [torch.randn(shape).to(device, dtype) for shape in SHAPES]


def check(params, initial, scale):
    """The loss, and the gradients for a random upstream gradient, against float64 with autograd's own gradient."""
    params = [param.detach().requires_grad_() for param in params]
    exact = [param.detach().cpu().double().requires_grad_() for param in params]
    loss, expected = l2_init_loss(params, initial, scale), reference(exact, [start.cpu() for start in initial], scale)
    assert_close(loss, expected, torch.float32)
    upstream = torch.randn(())
    grads = torch.autograd.grad(loss, params, upstream.to(loss.device))
    for grad, param, wanted in zip(grads, params, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        assert grad.dtype == param.dtype
        # The factor 2 * scale * upstream is rounded to float32, as the loss is.
        grad = grad.float() if grad.dtype == torch.float64 else grad
        assert_close(grad, wanted, grad.dtype)


def test_hand_computed_values(device):
    values = [[1.0, 2.0], [3.0, -4.0]], [5.0]
    params = [torch.tensor(value, device=device, requires_grad=True) for value in values]
    loss = l2_init_loss(params, [torch.ones(2, 2, device=device), torch.tensor([7.0], device=device)], 0.5)
    loss.backward()
    assert loss.item() == 0.5 * (0 + 1 + 4 + 25 + 4)
    assert [param.grad.tolist() for param in params] == [[[0.0, 1.0], [2.0, -5.0]], [-2.0]]
    assert l2_init_loss([params[1]], [torch.tensor([1.0], device=device)]).item() == 16.0


@pytest.mark.parametrize("scale", [1.0, 0.0, 1e-3, -2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype, scale, device):
    check(weights(dtype, device), weights(dtype, device), scale)


def test_mixed_dtypes(device):
    params, initial = ([torch.randn(5, 3).to(device, dtype) for dtype in order] for order in (DTYPES, DTYPES[::-1]))
    check(params, initial, 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_small_change_of_a_large_weight_is_not_lost(dtype, device):
    start = torch.full((1000,), 64.0, dtype=dtype, device=device)
    change = 1.0 if dtype in (torch.bfloat16, torch.float16) else 2.0**-10
    assert l2_init_loss([start + change], [start]).item() == 1000 * change**2


def test_squares_beyond_half_precision(device):
    params = torch.full((4,), 1000.0, device=device).half()
    assert l2_init_loss([params], [torch.zeros_like(params)]).item() == 4e6


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x,
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(6, 6),
        lambda x: x.flatten()[1:26],
        lambda x: x.view(1, 3, 3, 4).contiguous(memory_format=torch.channels_last),
    ],
    ids=["contiguous", "transposed", "every second column", "expanded", "odd address", "channels last"],
)
def test_layouts(layout, device):
    param, start = (layout(torch.randn(6, 6, device=device)) for _ in range(2))
    for pair in ((param, start), (param, start.contiguous()), (param.contiguous(), start)):
        check(*([each] for each in pair), 0.7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_graph_even_when_zero(dtype, device):
    param = nn.Parameter(torch.ones(3, 2, dtype=dtype, device=device))
    loss = l2_init_loss([param], [param.detach().clone()])
    assert (loss.item(), loss.shape, loss.dtype, loss.requires_grad) == (0.0, (), torch.float32, True)
    loss.backward()
    assert param.grad.dtype == dtype
    assert not param.grad.any()


def test_no_tensors():
    loss = l2_init_loss([], [])
    assert (loss.item(), loss.shape, loss.dtype) == (0.0, (), torch.float32)


def test_only_params_that_need_it_get_a_gradient(device):
    params, initial = ([torch.full((2,), value, device=device) for _ in range(2)] for value in (1.0, 0.0))
    params[0].requires_grad_()
    initial[0].requires_grad_()
    l2_init_loss(params, initial).backward()
    assert params[0].grad.tolist() == [2.0, 2.0]
    assert params[1].grad is None
    assert initial[0].grad is None


@pytest.mark.parametrize(
    ("value", "loss", "grad"),
    [(torch.nan, torch.nan, torch.nan), (torch.inf, torch.inf, torch.inf), (1e30, torch.inf, 2e30)],
)
def test_nan_and_infinity_reach_the_loss_and_their_own_gradient_only(value, loss, grad, device):
    param = torch.tensor([value, 1.0] * 20, device=device, requires_grad=True)
    found = l2_init_loss([param], [torch.zeros(40, device=device)])
    found.backward()
    torch.testing.assert_close(found.item(), loss, equal_nan=True)
    torch.testing.assert_close(param.grad.cpu(), torch.tensor([grad, 2.0] * 20), equal_nan=True)
