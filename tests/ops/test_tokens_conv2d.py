"""The convolution of the tokens against conv2d of a grid written token by token, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from metta_fastagent import use_backend
from metta_fastagent.ops import tokens_conv2d

EMPTY = [255, 255, 255]
# Sums of many terms, forwards and over rows.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5}


def random_tokens(rows, count, features, width, height, generator):
    """Most tokens lie in the window and crowd on few cells; the others are any three bytes, or empty."""
    x, y, feature = (
        torch.randint(limit, (rows, count), generator=generator) for limit in (width, height, min(features, 3))
    )
    inside = torch.stack([x * 16 + y, feature, torch.randint(256, (rows, count), generator=generator)], dim=-1)
    anything = torch.randint(256, (rows, count, 3), generator=generator)
    kind = torch.rand(rows, count, 1, generator=generator)
    tokens = torch.where(kind < 0.6, inside, torch.where(kind < 0.9, anything, 255))
    return tokens.to(torch.uint8)


def slow_grid(tokens, scale, width, height):
    """One token after the other, in float64, differentiable with respect to `scale`."""
    values = torch.zeros(len(tokens), len(scale), width, height, dtype=torch.float64)
    for row, row_tokens in enumerate(tokens.tolist()):
        for coordinate, feature, value in row_tokens:
            x, y = divmod(coordinate, 16)
            if coordinate != 255 and x < width and y < height and feature < len(scale):
                values[row, feature, x, y] = value
    return values / scale.double().view(1, -1, 1, 1)


def reference(tokens, weight, bias, scale, width, height, stride=1, relu=False):
    grid = slow_grid(tokens, scale, width, height)
    sums = F.conv2d(grid, weight.double(), None if bias is None else bias.double(), stride)
    return sums.relu() if relu else sums


def make_inputs(rows, count, features, channels, kernel, window, dtype, seed=0, with_bias=True):
    generator = torch.Generator().manual_seed(seed)
    tokens = random_tokens(rows, count, features, *window, generator)
    weight = torch.randn(channels, features, *kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(channels, generator=generator, dtype=torch.float64)
    scale = torch.rand(features, generator=generator, dtype=torch.float64) * 99 + 1
    weight, bias, scale = (tensor.to(dtype).requires_grad_() for tensor in (weight, bias, scale))
    return tokens, weight, bias if with_bias else None, scale


def check(inputs, window, stride, relu):
    """Values, layout, and the gradients of all that have one, within the dtype's tolerance of the largest entry."""
    leaves = [tensor for tensor in inputs[1:] if tensor is not None]
    dtype = leaves[0].dtype
    output = tokens_conv2d(*inputs, *window, stride, relu)
    expected = reference(*inputs, *window, stride, relu)
    assert output.permute(0, 2, 3, 1).is_contiguous()
    upstream = torch.randn(expected.shape, dtype=dtype, generator=torch.Generator().manual_seed(9))
    found = [output.detach(), *torch.autograd.grad(output, leaves, upstream)]
    # The rounding of a sum about 0 decides whether ReLU passes its gradient on.
    if relu:
        expected = reference(*inputs, *window, stride)
        expected = torch.where(output > 0, expected, expected * 0)
    wanted = [expected.detach(), *torch.autograd.grad(expected, leaves, upstream.double())]
    for one, exact in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        largest = exact.abs().max().item() if exact.numel() else 0.0
        torch.testing.assert_close(one.double(), exact.double(), rtol=0, atol=TOLERANCES[dtype] * max(1.0, largest))


def test_hand_written_sums():
    tokens = torch.tensor(
        [[[0x00, 0, 10], [0x12, 1, 6], EMPTY, [0x30, 0, 9]], [[0x11, 0, 10], [0x11, 0, 30], [0x11, 2, 9], EMPTY]],
        dtype=torch.uint8,
    )
    # Channel 0 counts feature 0 at the window's first cell, channel 1 feature 1 at its last one.
    weight = torch.zeros(2, 2, 2, 2)
    weight[0, 0, 0, 0], weight[1, 1, 1, 1] = 1.0, -1.0
    output = tokens_conv2d(tokens, weight, torch.tensor([0.5, 0.25]), torch.tensor([10.0, 2.0]), 3, 3)
    assert output.tolist() == [
        [[[1.5, 0.5], [0.5, 0.5]], [[0.25, -2.75], [0.25, 0.25]]],
        [[[0.5, 0.5], [0.5, 3.5]], [[0.25, 0.25], [0.25, 0.25]]],
    ]
    rectified = tokens_conv2d(tokens, weight, None, torch.tensor([10.0, 2.0]), 3, 3, 2, relu=True)
    assert rectified.flatten().tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.data())
def test_random_sizes(dtype, relu, data):
    draw = data.draw
    kernel = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    window = draw(st.integers(kernel[0], 16)), draw(st.integers(kernel[1], 16))
    sizes = draw(st.tuples(st.integers(0, 5), st.integers(0, 60), st.sampled_from([1, 2, 7, 256]), st.integers(1, 90)))
    inputs = make_inputs(*sizes, kernel, window, dtype, draw(st.integers(0, 99)), draw(st.booleans()))
    check(inputs, window, draw(st.integers(1, 3)), relu)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rows", [1, 4097])
def test_one_row_and_many(rows, dtype, relu):
    check(make_inputs(rows, 20, 4, 9, (5, 5), (11, 11), dtype), (11, 11), 3, relu)


@pytest.mark.parametrize("kernel", [(16, 16), (8, 8), (1, 16)], ids=str)
def test_large_kernels(kernel):
    check(make_inputs(2, 400, 3, 5, kernel, (16, 16), torch.float64), (16, 16), 1, True)


@pytest.mark.parametrize("shape", [(0, 7, 3), (3, 0, 3), (0, 0, 3)], ids=str)
def test_without_rows_or_tokens(shape):
    _, weight, bias, scale = make_inputs(1, 1, 4, 6, (3, 3), (5, 5), torch.float32)
    check((torch.empty(shape, dtype=torch.uint8), weight, bias, scale), (5, 5), 2, False)
    check((torch.full(shape, 255, dtype=torch.uint8), weight, bias, scale), (5, 5), 2, True)


def test_every_coordinate_of_a_window():
    coordinate = torch.arange(256)
    tokens = torch.stack([coordinate, torch.zeros(256), torch.full((256,), 7)], dim=-1).to(torch.uint8).unsqueeze(1)
    for window in ((16, 16), (11, 11), (3, 7)):
        sums = tokens_conv2d(tokens, torch.ones(1, 1, 1, 1), None, torch.ones(1), *window).flatten(1)
        inside = (coordinate // 16 < window[0]) & (coordinate % 16 < window[1]) & (coordinate != 255)
        assert torch.equal(sums.sum(1), 7.0 * inside)
        assert torch.equal(sums.count_nonzero(1), inside.long())


def test_a_later_zero_counts_in_place_of_an_earlier_value():
    tokens = torch.tensor([[[0, 0, 9], [0, 0, 0]]], dtype=torch.uint8)
    assert tokens_conv2d(tokens, torch.ones(1, 1, 1, 1), None, torch.ones(1), 1, 1).item() == 0.0


@pytest.mark.parametrize("relu", [False, True])
def test_unusable_scales(relu):
    tokens = torch.tensor([[[0, feature, value]] for feature, value in enumerate((6, 6, 6, 6))] + [[[0, 0, 0]]])
    scale = torch.tensor([0.0, torch.inf, torch.nan, 2.0])
    sums = tokens_conv2d(tokens.to(torch.uint8), torch.ones(1, 4, 1, 1), None, scale, 1, 1, 1, relu)
    torch.testing.assert_close(sums.flatten().tolist(), [torch.inf, 0.0, torch.nan, 3.0, torch.nan], equal_nan=True)


def test_arguments_stay_as_they_are():
    inputs = make_inputs(3, 30, 4, 9, (3, 3), (7, 7), torch.float32)
    before = [tensor.detach().clone() for tensor in inputs]
    tokens_conv2d(*inputs, 7, 7, 1, True).sum().backward()
    assert all(torch.equal(one, other) for one, other in zip(inputs, before, strict=True))


def test_non_contiguous():
    tokens, weight, bias, scale = make_inputs(6, 40, 6, 18, (3, 3), (9, 9), torch.float32)
    tokens = tokens.repeat_interleave(2, dim=1)[::2, ::2]
    weight = weight.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)[::2].requires_grad_()
    bias = bias.detach()[::2].requires_grad_()
    assert not (tokens.is_contiguous() or weight.is_contiguous() or bias.is_contiguous())
    check((tokens, weight, bias, scale), (9, 9), 2, True)


@pytest.mark.parametrize("layout", ["contiguous", "expanded"])
def test_layouts_of_the_upstream_gradient(layout):
    tokens, *leaves = make_inputs(5, 40, 6, 9, (3, 3), (9, 9), torch.float64)
    output, expected = tokens_conv2d(tokens, *leaves, 9, 9, 3), reference(tokens, *leaves, 9, 9, 3)
    upstream = torch.randn(output.shape, dtype=torch.float64)
    if layout == "expanded":
        upstream = torch.randn(1, dtype=torch.float64).expand(output.shape)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    for one, exact in zip(torch.autograd.grad(output, leaves, upstream), wanted, strict=True):
        torch.testing.assert_close(one, exact)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_gradients_of_some_arguments(wanted):
    tokens, *leaves = make_inputs(3, 30, 4, 7, (3, 3), (7, 7), torch.float64)
    leaves = [leaf.detach().requires_grad_(place in wanted) for place, leaf in enumerate(leaves)]
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    found = torch.autograd.grad(tokens_conv2d(tokens, *leaves, 7, 7, 2).square().sum(), asked)
    exact = torch.autograd.grad(reference(tokens, *leaves, 7, 7, 2).square().sum(), asked)
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("relu", [False, True])
def test_gradcheck_of_first_and_second_derivatives(relu):
    tokens, *leaves = make_inputs(3, 12, 3, 5, (2, 3), (5, 4), torch.float64)

    def function(*leaves):
        return tokens_conv2d(tokens, *leaves, 5, 4, 2, relu)

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)
    assert gradcheck(lambda weight, scale: tokens_conv2d(tokens, weight, None, scale, 5, 4, 2, relu), leaves[::2])


def test_torch_func_and_vmap():
    tokens, *leaves = (tensor.detach() for tensor in make_inputs(3, 12, 3, 5, (2, 2), (5, 5), torch.float64))

    def loss(weight, bias, scale, function):
        return function(tokens, weight, bias, scale, 5, 5, 2, True).square().sum()

    found = torch.func.grad(loss, argnums=(0, 1, 2))(*leaves, tokens_conv2d)
    copies = [leaf.clone().requires_grad_() for leaf in leaves]
    torch.testing.assert_close(found, torch.autograd.grad(loss(*copies, reference), copies))
    weights = torch.stack([leaves[0], 2 * leaves[0]])
    each = torch.vmap(lambda weight: tokens_conv2d(tokens, weight, leaves[1], leaves[2], 5, 5))(weights)
    for one, weight in zip(each, weights, strict=True):
        torch.testing.assert_close(one, reference(tokens, weight, leaves[1], leaves[2], 5, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_conv2d_of_the_grid(dtype):
    tokens, weight, bias, scale = make_inputs(3, 40, 5, 9, (3, 3), (7, 7), dtype)
    output = tokens_conv2d(tokens, weight, bias, scale, 7, 7, 2, True)
    grid = slow_grid(tokens, scale.detach(), 7, 7).to(dtype)
    torch.testing.assert_close(output, F.conv2d(grid, weight, bias, 2).relu())
    gradients = torch.autograd.grad(output.sum(), [weight, bias, scale])
    assert all(grad.dtype == dtype and grad.any() for grad in gradients)


def test_autocast_is_conv2d_of_the_grid():
    tokens, weight, bias, scale = make_inputs(3, 40, 5, 9, (3, 3), (7, 7), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = tokens_conv2d(tokens, weight, bias, scale, 7, 7, 2)
        expected = F.conv2d(slow_grid(tokens, scale.detach(), 7, 7).float(), weight, bias, 2)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected)
    assert torch.autograd.grad(output.float().sum(), weight)[0].dtype == torch.float32


def test_a_scale_of_another_dtype():
    tokens, weight, bias, scale = make_inputs(3, 40, 5, 9, (3, 3), (7, 7), torch.float32)
    scale = scale.detach().to(torch.bfloat16).requires_grad_()
    output = tokens_conv2d(tokens, weight, bias, scale, 7, 7)
    expected = reference(tokens, weight, bias, scale, 7, 7)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.autograd.grad(output.sum(), scale)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_backward_outside_uses_the_backend_of_its_forward(dtype):
    tokens, *leaves = make_inputs(3, 30, 4, 7, (3, 3), (7, 7), dtype)
    with use_backend("eager"):
        output = tokens_conv2d(tokens, *leaves, 7, 7, 2)
    upstream = torch.randn_like(output)
    found = torch.autograd.grad(output, leaves, upstream, retain_graph=True)
    with use_backend("eager"):
        wanted = torch.autograd.grad(output, leaves, upstream)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("window", [(5, 5), (9, 7)], ids=str)
def test_opcheck(rows, with_bias, window):
    operators = torch.ops.metta_fastagent
    tokens, weight, bias, scale = make_inputs(rows, 20, 4, 6, (5, 5), window, torch.float32, with_bias=with_bias)
    weight, bias, scale = (None if tensor is None else tensor.detach() for tensor in (weight, bias, scale))
    arguments = (tokens, weight, bias, scale, *window, 2, True)
    torch.library.opcheck(operators.tokens_conv2d_forward.default, arguments)
    output = operators.tokens_conv2d_forward(*arguments)
    for kept in (None, output):
        arguments = (tokens, weight, scale, kept, torch.randn_like(output), *window, 2, with_bias)
        torch.library.opcheck(operators.tokens_conv2d_backward.default, arguments)


def test_compile(compile_fullgraph):
    def step(tokens, weight, bias, scale):
        return tokens_conv2d(tokens, weight, bias, scale, 7, 7, 2, True)

    compiled = compile_fullgraph(step)
    for rows, count in ((3, 20), (2, 20), (5, 9)):
        tokens, *leaves = make_inputs(rows, count, 4, 9, (3, 3), (7, 7), torch.float32, seed=rows)
        found, expected = compiled(tokens, *leaves), reference(tokens, *leaves, 7, 7, 2, True)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
        gradients = torch.autograd.grad(found.square().sum(), leaves)
        plain = torch.autograd.grad(step(tokens, *leaves).square().sum(), leaves)
        torch.testing.assert_close(gradients, plain, rtol=1e-4, atol=1e-3)


def test_no_host_read():
    with FakeTensorMode():
        weight = torch.ones(6, 5, 3, 3, requires_grad=True)
        scale = torch.ones(5, requires_grad=True)
        tokens = torch.zeros(4, 6, 3, dtype=torch.uint8)
        output = tokens_conv2d(tokens, weight, torch.ones(6), scale, 7, 9, 2, True)
        gradients = torch.autograd.grad(output.sum(), [weight, scale])
    assert (output.shape, output.dtype) == ((4, 6, 3, 4), torch.float32)
    assert [grad.shape for grad in gradients] == [weight.shape, scale.shape]


TOKENS, WEIGHT, BIAS, SCALE = make_inputs(3, 20, 5, 6, (3, 4), (11, 11), torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "argument", "came", "expected"),
    [
        ({"tokens": TOKENS.tolist()}, TypeError, "tokens", "list", "uint8"),
        ({"tokens": TOKENS.int()}, TypeError, "tokens", "int32", "uint8"),
        ({"tokens": TOKENS[0]}, ValueError, "tokens", "shape [20, 3]", "[N, M, 3]"),
        ({"tokens": TOKENS[..., :2]}, ValueError, "tokens", "shape [3, 20, 2]", "[N, M, 3]"),
        ({"weight": None}, TypeError, "weight", "None", "floating-point"),
        ({"weight": WEIGHT.int()}, TypeError, "weight", "int32", "floating-point"),
        ({"weight": WEIGHT[0]}, ValueError, "weight", "shape [5, 3, 4]", "[O, L, kernel_x, kernel_y]"),
        ({"weight": WEIGHT[:0]}, ValueError, "weight", "shape [0, 5, 3, 4]", "[O, L, kernel_x, kernel_y]"),
        ({"weight": torch.ones(1, 257, 1, 1)}, ValueError, "weight", "shape [1, 257, 1, 1]", "at most 256"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight", "on meta", "tokens (cpu)"),
        ({"bias": 1.0}, TypeError, "bias", "1.0", "floating-point"),
        ({"bias": BIAS[:5]}, ValueError, "bias", "shape [5]", "a float32 tensor of shape [6]"),
        ({"bias": BIAS.double()}, ValueError, "bias", "float64", "a float32 tensor of shape [6]"),
        ({"bias": BIAS.to("meta")}, ValueError, "bias", "on meta", "tokens (cpu)"),
        ({"scale": None}, TypeError, "scale", "None", "[5]"),
        ({"scale": SCALE.int()}, ValueError, "scale", "int32", "floating-point"),
        ({"scale": SCALE[:4]}, ValueError, "scale", "shape [4]", "[5]"),
        ({"scale": SCALE.to("meta")}, ValueError, "scale", "on meta", "tokens (cpu)"),
        ({"width": 2}, ValueError, "width", "2", "3 to 16"),
        ({"width": 17}, ValueError, "width", "17", "3 to 16"),
        ({"width": 11.0}, TypeError, "width", "11.0", "3 to 16"),
        ({"height": 3}, ValueError, "height", "3", "4 to 16"),
        ({"height": None}, TypeError, "height", "None", "4 to 16"),
        ({"stride": 0}, ValueError, "stride", "0", "1 to"),
        ({"stride": (1, 1)}, TypeError, "stride", "tuple", "integer"),
        ({"stride": True}, TypeError, "stride", "True", "integer"),
        ({"relu": 1}, TypeError, "relu", "1 (int)", "True or False"),
    ],
)
def test_wrong_arguments(change, error, argument, came, expected, refuses):
    arguments = {"tokens": TOKENS, "weight": WEIGHT, "bias": BIAS, "scale": SCALE, "width": 11, "height": 11}
    with refuses(error, argument, came, expected):
        tokens_conv2d(**(arguments | change))
