"""The convolution of the tokens against conv2d of a grid written token by token, in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from references import assert_close, random_tokens, token_grid, without
from references import tokens_conv2d as reference
from torch.nn import functional as F

from metta_fastagent.ops import tokens_conv2d

# It has no Triton kernel.
pytestmark = without("triton-cpu")
DTYPES = [torch.float64, torch.float32]


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def make_inputs(rows, count, features, channels, kernel, window, dtype, device="cpu", with_bias=True, order="xy"):
    """tokens, weight, bias or None, scale."""
    weight, bias = torch.randn(channels, features, *kernel), torch.randn(channels)
    leaves = [tensor.to(device, dtype).requires_grad_() for tensor in (weight, bias, torch.rand(features) * 99 + 1)]
    leaves[1] = leaves[1] if with_bias else None
    return random_tokens(rows, count, features, *window, order).to(device), *leaves


def check(inputs, window, stride, relu, upstream=None, order="xy"):
    """Values, layout and gradients, relative to their largest entries."""
    leaves = [tensor for tensor in inputs[1:] if tensor is not None]
    dtype = leaves[0].dtype
    output = tokens_conv2d(*inputs, *window, stride, relu, order)
    expected = reference(*(tensor if tensor is None else tensor.cpu() for tensor in inputs), *window, stride, order)
    assert output.is_cuda or output.permute(0, 2, 3, 1).is_contiguous()
    assert_close(output, expected.relu() if relu else expected, dtype, of_sums=True)
    upstream = torch.randn(expected.shape, dtype=dtype) if upstream is None else upstream
    grads = torch.autograd.grad(output, leaves, upstream.to(output.device))
    # The rounding of a sum about 0 decides whether ReLU passes its gradient on.
    passed = torch.where(output.detach().cpu() > 0, upstream.double(), 0.0) if relu else upstream.double()
    wanted = torch.autograd.grad(expected, leaves, passed)
    for grad, value in zip(grads, wanted, strict=True):
        assert_close(grad, value.double(), dtype, of_sums=True)


def test_hand_written_sums(device):
    empty = [255, 255, 255]
    tokens = torch.tensor(
        [[[0x00, 0, 10], [0x12, 1, 6], empty, [0x30, 0, 9]], [[0x11, 0, 10], [0x11, 0, 30], [0x11, 2, 9], empty]],
        dtype=torch.uint8,
        device=device,
    )
    # Channel 0 counts feature 0 at the window's first cell, channel 1 feature 1 at its last one.
    weight, scale = torch.zeros(2, 2, 2, 2, device=device), torch.tensor([10.0, 2.0], device=device)
    weight[0, 0, 0, 0], weight[1, 1, 1, 1] = 1.0, -1.0
    output = tokens_conv2d(tokens, weight, torch.tensor([0.5, 0.25], device=device), scale, 3, 3)
    assert output.tolist() == [
        [[[1.5, 0.5], [0.5, 0.5]], [[0.25, -2.75], [0.25, 0.25]]],
        [[[0.5, 0.5], [0.5, 3.5]], [[0.25, 0.25], [0.25, 0.25]]],
    ]
    assert tokens_conv2d(tokens, weight, None, scale, 3, 3, 2, relu=True).flatten().tolist() == [1.0, 0.0, 0.0, 0.0]


# Few windows, for each of which a kernel is compiled on a GPU.
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_sizes(dtype, relu, device, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 99)))
    window = draw(st.sampled_from([(1, 1), (16, 1), (3, 7), (7, 3), (9, 11), (11, 11), (16, 16)]))
    kernel = tuple(draw(st.integers(1, min(5, size))) for size in window)
    sizes = draw(st.tuples(st.integers(0, 5), st.integers(0, 60), st.sampled_from([1, 2, 7, 256]), st.integers(1, 90)))
    order = draw(st.sampled_from(["xy", "yx"]))
    inputs = make_inputs(*sizes, kernel, window, dtype, device, draw(st.booleans()), order)
    check(inputs, window, draw(st.integers(1, 3)), relu, order=order)


# Many rows, large kernels, and no rows or tokens.
@pytest.mark.parametrize(
    ("rows", "count", "channels", "kernel", "window", "stride"),
    [
        (1, 20, 9, (5, 5), (11, 11), 3),
        (4097, 20, 9, (5, 5), (11, 11), 3),
        (2, 400, 5, (16, 16), (16, 16), 1),
        (2, 400, 5, (8, 8), (16, 16), 1),
        (2, 400, 5, (1, 16), (16, 16), 1),
        (0, 7, 6, (3, 3), (5, 5), 2),
        (3, 0, 6, (3, 3), (5, 5), 2),
        (0, 0, 6, (3, 3), (5, 5), 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(rows, count, channels, kernel, window, stride, dtype, relu, device):
    check(make_inputs(rows, count, 4, channels, kernel, window, dtype, device), window, stride, relu)


def test_every_coordinate_of_a_window(device):
    coordinate = torch.arange(256, device=device)
    tokens = torch.stack([coordinate, coordinate * 0, coordinate * 0 + 7], dim=-1).to(torch.uint8).unsqueeze(1)
    one = torch.ones(1, device=device)
    for window in ((16, 16), (11, 11), (3, 7)):
        sums = tokens_conv2d(tokens, one.view(1, 1, 1, 1), None, one, *window).flatten(1)
        inside = (coordinate // 16 < window[0]) & (coordinate % 16 < window[1]) & (coordinate != 255)
        assert torch.equal(sums.sum(1), 7.0 * inside)
        assert torch.equal(sums.count_nonzero(1), inside.long())


def test_a_later_zero_counts_in_place_of_an_earlier_value(device):
    tokens, one = torch.tensor([[[0, 0, 9], [0, 0, 0]]], dtype=torch.uint8, device=device), torch.ones(1, device=device)
    assert tokens_conv2d(tokens, one.view(1, 1, 1, 1), None, one, 1, 1).item() == 0.0


@pytest.mark.parametrize("relu", [False, True])
def test_unusable_scales(relu, device):
    tokens = torch.tensor([[[0, feature, value]] for feature, value in enumerate((6, 6, 6, 6))] + [[[0, 0, 0]]])
    weight, scale = torch.ones(1, 4, 1, 1, device=device), torch.tensor([0.0, torch.inf, torch.nan, 2.0], device=device)
    sums = tokens_conv2d(tokens.to(device, torch.uint8), weight, None, scale, 1, 1, 1, relu)
    torch.testing.assert_close(sums.flatten().tolist(), [torch.inf, 0.0, torch.nan, 3.0, torch.nan], equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_contiguous(dtype, device):
    tokens, weight, bias, scale = make_inputs(6, 40, 6, 18, (3, 3), (9, 9), dtype, device)
    tokens = tokens.repeat_interleave(2, dim=1)[::2, ::2]
    weight = weight.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)[::2].requires_grad_()
    bias, scale = (x.detach().repeat_interleave(2)[::2].requires_grad_() for x in (bias[:9], scale))
    assert not any(tensor.is_contiguous() for tensor in (tokens, weight, bias, scale))
    check((tokens, weight, bias, scale), (9, 9), 2, True)
    expanded = torch.randn(1, dtype=dtype).expand(3, 9, 4, 4)
    check((tokens, weight, bias, scale), (9, 9), 2, False, expanded)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_gradients_of_some_arguments(wanted, device):
    tokens, *leaves = make_inputs(3, 30, 4, 7, (3, 3), (7, 7), torch.float64, device)
    leaves = [leaf.detach().requires_grad_(place in wanted) for place, leaf in enumerate(leaves)]
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    found = torch.autograd.grad(tokens_conv2d(tokens, *leaves, 7, 7, 2).square().sum(), asked)
    exact = torch.autograd.grad(reference(tokens, *leaves, 7, 7, 2).square().sum(), asked)
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_conv2d_of_the_grid(dtype, device):
    tokens, weight, bias, scale = make_inputs(3, 40, 5, 9, (3, 3), (7, 7), dtype, device)
    output = tokens_conv2d(tokens, weight, bias, scale, 7, 7, 2, True)
    grid = token_grid(tokens, scale.detach(), 7, 7).to(device, dtype)
    torch.testing.assert_close(output, F.conv2d(grid, weight, bias, 2).relu())
    gradients = torch.autograd.grad(output.sum(), [weight, bias, scale])
    assert all(grad.dtype == dtype and grad.any() for grad in gradients)


def test_autocast_is_conv2d_of_the_grid(device):
    tokens, weight, bias, scale = make_inputs(3, 40, 5, 9, (3, 3), (7, 7), torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        output = tokens_conv2d(tokens, weight, bias, scale, 7, 7, 2)
        expected = F.conv2d(token_grid(tokens, scale.detach(), 7, 7).float().to(device), weight, bias, 2)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected)
    assert torch.autograd.grad(output.float().sum(), weight)[0].dtype == torch.float32


def test_a_scale_of_another_dtype(device):
    tokens, weight, bias, scale = make_inputs(3, 40, 5, 9, (3, 3), (7, 7), torch.float32, device)
    scale = scale.detach().to(torch.bfloat16).requires_grad_()
    output = tokens_conv2d(tokens, weight, bias, scale, 7, 7)
    assert_close(output, reference(tokens, weight, bias, scale, 7, 7), torch.float32, of_sums=True)
    assert torch.autograd.grad(output.sum(), scale)[0].dtype == torch.bfloat16
