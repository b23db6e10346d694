"""One LSTM layer with resets against nn.LSTM in float64, run step by step with the state zeroed by hand."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from metta_fastagent.ops import lstm_layer

OPERATORS = torch.ops.metta_fastagent
# Of float16 and bfloat16 the state is rounded after each step, so errors of several steps add up.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
NAMES = ("output", "last_h", "last_c")


def make_inputs(steps, rows, size, dtype=torch.float64):
    """projected, weight_hh, h, c."""
    shapes = (steps, rows, 4 * size), (4 * size, size), (rows, size), (rows, size)
    scales = (1.0, size**-0.5, 1.0, 1.0)
    return [(scale * torch.randn(shape)).to(dtype) for shape, scale in zip(shapes, scales, strict=True)]


def make_resets(kind, steps, rows):
    resets = torch.zeros(steps, rows, dtype=torch.bool)
    if kind == "none":
        return None
    if kind == "some":
        resets = torch.rand(steps, rows) < 0.3
    elif kind == "first":
        resets[0] = True
    elif kind == "all":
        resets[:] = True
    return resets


def reference(projected, weight_hh, h, c, resets):
    """Outputs of `nn.LSTM` on one step at a time, and the leaves to differentiate them by."""
    size = h.shape[1]
    lstm = nn.LSTM(4 * size, size, bias=False).double()
    lstm.weight_ih_l0.data = torch.eye(4 * size, dtype=torch.float64)
    lstm.weight_hh_l0.data = weight_hh.detach().double()
    leaves = [tensor.detach().double().requires_grad_() for tensor in (projected, h, c)]
    inputs, *state = leaves
    outputs = []
    for t in range(len(inputs)):
        if resets is not None:
            state = [torch.where(resets[t].unsqueeze(-1), 0.0, s) for s in state]
        output, state = lstm(inputs[t : t + 1], tuple(s.unsqueeze(0) for s in state))
        state = [s.squeeze(0) for s in state]
        outputs.append(output.squeeze(0))
    return (torch.stack(outputs), *state), [leaves[0], lstm.weight_hh_l0, *leaves[1:]]


def check(inputs, resets, function=lstm_layer, subset=(0, 1, 2)):
    """Values, and gradients for random upstream gradients of the outputs that `subset` names."""
    dtype, tolerance = inputs[0].dtype, TOLERANCE[inputs[0].dtype]
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs, (expected, leaves) = function(*inputs, resets), reference(*inputs, resets)
    for name, got, want in zip(NAMES, outputs, expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(
            got.double(), want, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    upstream = [torch.randn(outputs[i].shape).to(dtype) for i in subset]
    grads = torch.autograd.grad([outputs[i] for i in subset], inputs, upstream)
    wanted = torch.autograd.grad([expected[i] for i in subset], leaves, [g.double() for g in upstream])
    for name, got, want in zip(("projected", "weight_hh", "h", "c"), grads, wanted, strict=True):
        assert got.dtype == dtype
        scale = max(1.0, want.abs().max().item())
        torch.testing.assert_close(
            got.double(), want, rtol=tolerance, atol=scale * tolerance, msg=lambda m, n=name: f"gradient of {n}: {m}"
        )


def test_hand_computed_values():
    # Open gates add 0.5 to the cell at each step; the reset starts from zero.
    projected = torch.tensor([40.0, 40.0, 0.5493061443340549, 40.0], dtype=torch.float64).expand(3, 1, 4)
    h, c = torch.full((1, 1), 9.0, dtype=torch.float64), torch.full((1, 1), 1.0, dtype=torch.float64)
    output, last_h, last_c = lstm_layer(
        projected, torch.zeros(4, 1, dtype=torch.float64), h, c, torch.tensor([[False], [True], [False]])
    )
    expected = torch.tensor([1.5, 0.5, 1.0], dtype=torch.float64).tanh()
    torch.testing.assert_close(output.flatten(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(last_c.item(), 1.0, rtol=0, atol=1e-12)
    assert torch.equal(last_h, output[2])


@pytest.mark.parametrize("kind", ["none", "no flag", "some", "first", "all"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_values_and_gradients(dtype, kind):
    check(make_inputs(6, 5, 7, dtype), make_resets(kind, 6, 5))


@pytest.mark.parametrize(("steps", "rows", "size"), [(1, 1, 1), (1, 4, 3), (9, 1, 5), (3, 33, 17), (2, 2, 64)])
@pytest.mark.parametrize("kind", ["none", "some"])
def test_sizes(steps, rows, size, kind):
    check(make_inputs(steps, rows, size), make_resets(kind, steps, rows))


def test_no_rows():
    inputs = [tensor.requires_grad_() for tensor in make_inputs(3, 0, 2)]
    output, last_h, last_c = lstm_layer(*inputs, torch.zeros(3, 0, dtype=torch.bool))
    assert (output.shape, last_h.shape, last_c.shape) == ((3, 0, 2), (0, 2), (0, 2))
    grads = torch.autograd.grad(output.sum() + last_c.sum(), inputs)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in inputs]
    assert not grads[1].any()


@pytest.mark.parametrize("subset", [(0,), (1,), (2,), (1, 2)], ids=["output", "last_h", "last_c", "both states"])
def test_outputs_without_upstream_gradient(subset):
    check(make_inputs(4, 3, 5), make_resets("some", 4, 3), subset=subset)


def test_non_contiguous():
    projected, weight_hh, h, c = make_inputs(6, 5, 8)
    strided = [projected.transpose(0, 1).contiguous().transpose(0, 1), weight_hh.t().contiguous().t()]
    strided += [torch.stack((h, c), dim=-1)[..., i] for i in range(2)]
    resets = (torch.rand(5, 6) < 0.3).t()
    assert not any(tensor.is_contiguous() for tensor in (*strided, resets))
    check(strided, resets)
    expanded = [projected[:1].expand(6, 5, 32), weight_hh, h[:1].expand(5, 8), c[:, :1].expand(5, 8)]
    check(expanded, torch.ones(1, 1, dtype=torch.bool).expand(6, 5))


def test_a_segment_equals_its_parts():
    projected, weight_hh, h, c = make_inputs(7, 3, 4)
    resets = make_resets("some", 7, 3)
    whole = lstm_layer(projected, weight_hh, h, c, resets)
    first, *state = lstm_layer(projected[:3], weight_hh, h, c, resets[:3])
    second, *state = lstm_layer(projected[3:], weight_hh, *state, resets[3:])
    assert torch.equal(whole[0], torch.cat((first, second)))
    assert torch.equal(whole[1], state[0])
    assert torch.equal(whole[2], state[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_segment_repeats_its_steps_bit_by_bit(dtype):
    projected, weight_hh, *state = make_inputs(7, 3, 4, dtype)
    output = lstm_layer(projected, weight_hh, *state)[0]
    for t in range(7):
        step, *state = lstm_layer(projected[t : t + 1], weight_hh, *state)
        assert torch.equal(step[0], output[t])


def test_a_reset_hides_the_state_before_it_even_nan():
    projected, weight_hh, h, c = make_inputs(5, 3, 4)
    resets = torch.zeros(5, 3, dtype=torch.bool)
    resets[2] = True
    expected = lstm_layer(projected, weight_hh, h, c, resets)[0]
    projected[:2], h[:], c[:] = torch.nan, torch.nan, torch.nan
    assert torch.equal(lstm_layer(projected, weight_hh, h, c, resets)[0][2:], expected[2:])


def test_no_gradient_passes_a_reset():
    inputs = [tensor.requires_grad_() for tensor in make_inputs(5, 3, 4)]
    resets = torch.zeros(5, 3, dtype=torch.bool)
    resets[2, 1] = True
    output = lstm_layer(*inputs, resets)[0]
    grad_projected, _, grad_h, grad_c = torch.autograd.grad(output[2:].sum(), inputs)
    for grad in (*grad_projected[:2], grad_h, grad_c):
        assert grad.ne(0).any(-1).tolist() == [True, False, True]


def test_inputs_stay_as_they_are():
    inputs, resets = make_inputs(4, 3, 5), make_resets("some", 4, 3)
    copies = [tensor.clone() for tensor in (*inputs, resets)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    torch.autograd.grad(lstm_layer(*inputs, resets)[0].sum(), inputs)
    assert all(torch.equal(now, then) for now, then in zip((*inputs, resets), copies, strict=True))


def test_the_last_state_may_be_written_in_place():
    inputs = [tensor.requires_grad_() for tensor in make_inputs(3, 2, 4)]
    output, last_h, last_c = lstm_layer(*inputs)
    last = output[-1].detach().clone()
    last_h.mul_(2)
    last_c.zero_()
    assert torch.equal(output[-1], last)
    torch.autograd.grad(output.sum() + last_h.sum(), inputs)


def test_only_what_needs_a_gradient_gets_one():
    projected, weight_hh, h, c = make_inputs(3, 2, 4)
    projected.requires_grad_()
    lstm_layer(projected, weight_hh, h, c)[0].sum().backward()
    assert projected.grad.any()
    assert all(tensor.grad is None for tensor in (weight_hh, h, c))
    assert not lstm_layer(projected.detach(), weight_hh, h, c)[0].requires_grad


@pytest.mark.parametrize("kind", ["none", "some", "first"])
def test_gradcheck(kind):
    inputs, resets = [tensor.requires_grad_() for tensor in make_inputs(4, 3, 2)], make_resets(kind, 4, 3)
    assert torch.autograd.gradcheck(lambda *tensors: lstm_layer(*tensors, resets), inputs)


def test_autocast_does_not_change_the_products():
    inputs, resets = [tensor.requires_grad_() for tensor in make_inputs(4, 3, 8, torch.float32)], None
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = lstm_layer(*inputs, resets)
            results.append((*outputs, *torch.autograd.grad(outputs[0].sum() + outputs[2].sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", ["none", "some"])
def test_opcheck(dtype, kind):
    projected, weight_hh, h, c = make_inputs(3, 4, 5, dtype)
    resets = make_resets(kind, 3, 4)
    torch.library.opcheck(OPERATORS.lstm_layer_forward.default, (projected, weight_hh, h, c, resets))
    strided = projected.transpose(0, 1).contiguous().transpose(0, 1)
    torch.library.opcheck(OPERATORS.lstm_layer_forward.default, (strided, weight_hh, h, c, resets))
    torch.library.opcheck(OPERATORS.lstm_layer_forward.default, (projected, weight_hh, h, c, resets, False))
    output, cells, gates = OPERATORS.lstm_layer_forward(projected, weight_hh, h, c, resets)
    strided = output.transpose(0, 1).contiguous().transpose(0, 1)
    for upstream in ((output, h, c), (None, None, c), (strided, None, None)):
        torch.library.opcheck(OPERATORS.lstm_layer_backward.default, (weight_hh, c, resets, cells, gates, *upstream))


@pytest.mark.parametrize("kind", ["none", "some"])
def test_compile(kind, compile_fullgraph):
    compiled = compile_fullgraph(lstm_layer)
    for dtype in (torch.float32, torch.bfloat16):
        check(make_inputs(4, 3, 5, dtype), make_resets(kind, 4, 3), compiled)
        check(make_inputs(4, 3, 5, dtype), make_resets(kind, 4, 3), compiled, subset=(0,))


def test_no_host_read():
    with FakeTensorMode():
        inputs = [torch.randn(shape, requires_grad=True) for shape in ((3, 2, 20), (20, 5), (2, 5), (2, 5))]
        outputs = lstm_layer(*inputs, torch.zeros(3, 2, dtype=torch.bool))
        grads = torch.autograd.grad(outputs[0].sum() + outputs[2].sum(), inputs)
    assert [output.shape for output in outputs] == [(3, 2, 5), (2, 5), (2, 5)]
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in inputs]


P, W, S, R = torch.zeros(3, 2, 8), torch.zeros(8, 2), torch.zeros(2, 2), torch.zeros(3, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "error", "argument", "came", "expected"),
    [
        ((None, W, S, S), TypeError, "projected", "None", "[T, B, 4H]"),
        ((P.int(), W, S, S), TypeError, "projected", "int32", "[T, B, 4H]"),
        ((P.to(torch.float8_e5m2), W, S, S), TypeError, "projected", "float8_e5m2", "float32, float64"),
        ((P[0], W, S, S), ValueError, "projected", "shape [2, 8]", "[T, B, 4H]"),
        ((P[:0], W, S, S), ValueError, "projected", "shape [0, 2, 8]", "T >= 1"),
        ((P[..., :6], W, S, S), ValueError, "projected", "shape [3, 2, 6]", "4H"),
        ((P[..., :0], W, S, S), ValueError, "projected", "shape [3, 2, 0]", "H >= 1"),
        ((P, [1.0], S, S), TypeError, "weight_hh", "a list", "shape [8, 2]"),
        ((P, W.double(), S, S), TypeError, "weight_hh", "float64", "float32"),
        ((P, W.t(), S, S), ValueError, "weight_hh", "shape [2, 8]", "shape [8, 2]"),
        ((P, W.to("meta"), S, S), ValueError, "weight_hh", "on meta", "cpu"),
        ((P, W, None, S), TypeError, "h", "None", "shape [2, 2]"),
        ((P, W, S.half(), S), TypeError, "h", "float16", "float32"),
        ((P, W, S.unsqueeze(0), S), ValueError, "h", "shape [1, 2, 2]", "shape [2, 2]"),
        ((P, W, S.to("meta"), S), ValueError, "h", "on meta", "cpu"),
        ((P, W, S, 0.0), TypeError, "c", "0.0", "shape [2, 2]"),
        ((P, W, S, S.long()), TypeError, "c", "int64", "float32"),
        ((P, W, S, S[:1]), ValueError, "c", "shape [1, 2]", "shape [2, 2]"),
        ((P, W, S, S.to("meta")), ValueError, "c", "on meta", "cpu"),
        ((P, W, S, S, True), TypeError, "resets", "True", "bool tensor of shape [3, 2]"),
        ((P, W, S, S, R.float()), TypeError, "resets", "float32", "bool tensor of shape [3, 2]"),
        ((P, W, S, S, R.t()), ValueError, "resets", "shape [2, 3]", "shape [3, 2]"),
        ((P, W, S, S, R.to("meta")), ValueError, "resets", "on meta", "cpu"),
    ],
)
def test_wrong_arguments(arguments, error, argument, came, expected, refuses):
    with refuses(error, argument, came, expected):
        lstm_layer(*arguments)
