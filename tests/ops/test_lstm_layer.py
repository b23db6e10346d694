"""One LSTM layer with resets, against nn.LSTM and against its formula in float64."""

import pytest
import torch
from references import DTYPES, assert_close, check_lstm_layer, lstm, lstm_inputs
from torch import nn

from metta_fastagent.ops import lstm_layer


def test_hand_computed_values(device):
    # Open gates add 0.5 to the cell at each step; the reset starts from zero.
    projected = torch.tensor([40.0, 40.0, 0.5493061443340549, 40.0], dtype=torch.float64).expand(3, 1, 4).to(device)
    h, c = (torch.full((1, 1), value, dtype=torch.float64, device=device) for value in (9.0, 1.0))
    resets = torch.tensor([[False], [True], [False]], device=device)
    output, last_h, last_c = lstm_layer(projected, projected.new_zeros(4, 1), h, c, resets)
    assert_close(output.flatten(), torch.tensor([1.5, 0.5, 1.0], dtype=torch.float64).tanh(), torch.float64)
    assert_close(last_c, torch.ones(1, 1, dtype=torch.float64), torch.float64)
    assert torch.equal(last_h, output[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_it_is_a_layer_of_nn_lstm(dtype, device):
    layer, x = nn.LSTM(6, 7).double(), torch.randn(5, 3, 6, dtype=torch.float64)
    _, weight_hh, h, c = lstm_inputs(1, 3, 7)[0]
    layer.weight_hh_l0.data = weight_hh
    expected, state = layer(x, (h.unsqueeze(0), c.unsqueeze(0)))
    projected = x @ layer.weight_ih_l0.t() + layer.bias_ih_l0 + layer.bias_hh_l0
    inputs = (tensor.detach().to(device, dtype) for tensor in (projected, weight_hh, h, c))
    for got, wanted in zip(lstm_layer(*inputs), (expected, state[0][0], state[1][0]), strict=True):
        assert_close(got, wanted, dtype)


@pytest.mark.parametrize("resets", ["none", "no flag", "some", "first", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype, resets, device):
    check_lstm_layer(lstm_layer, *lstm_inputs(6, 5, 7, dtype, resets, device))


# On both sides of 4, 8, 16, 64 and 128 rows or columns.
@pytest.mark.parametrize(
    ("steps", "rows", "size"),
    [
        (1, 1, 1),
        (1, 4, 3),
        (9, 1, 5),
        (4, 2, 8),
        (3, 1, 9),
        (5, 4, 16),
        (3, 33, 17),
        (2, 7, 64),
        (2, 2, 65),
        (2, 11, 130),
    ],
)
@pytest.mark.parametrize("resets", ["none", "some"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sizes(steps, rows, size, resets, dtype, device):
    check_lstm_layer(lstm_layer, *lstm_inputs(steps, rows, size, dtype, resets, device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("subset", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_gradients_of_some_outputs(subset, dtype, device):
    check_lstm_layer(lstm_layer, *lstm_inputs(4, 3, 9, dtype, "some", device), subset)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_non_contiguous(dtype, device):
    (projected, weight_hh, h, c), resets = lstm_inputs(6, 5, 8, dtype, "some", device)
    strided = [projected.transpose(0, 1).contiguous().transpose(0, 1), weight_hh.t().contiguous().t()]
    strided += torch.stack((h, c), dim=-1).unbind(-1)
    flags = resets.t().contiguous().t()
    assert not any(tensor.is_contiguous() for tensor in (*strided, flags))
    check_lstm_layer(lstm_layer, strided, flags)
    expanded = [projected[:1].expand(6, 5, 32), weight_hh, h[:1].expand(5, 8), c[:, :1].expand(5, 8)]
    check_lstm_layer(lstm_layer, expanded, resets[:1, :1].expand(6, 5))


# NumPy, behind Triton's interpreter, warns of an exponential that is infinite; the gate is 0 there.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_saturated_and_unusable_gates(dtype, device):
    gates = torch.tensor([-1e30, 1e30, torch.inf, -torch.inf, torch.nan, 0.0, 50.0, -50.0], dtype=torch.float64)
    projected = gates.view(1, 8, 1).expand(1, 8, 12).contiguous()
    inputs = projected, projected.new_zeros(12, 3), projected.new_zeros(8, 3), projected.new_ones(8, 3)
    for got, wanted in zip(lstm_layer(*(x.to(device, dtype) for x in inputs)), lstm(*inputs), strict=True):
        assert_close(got, wanted, dtype)
    (projected, *others), resets = lstm_inputs(3, 4, 7, dtype, "some", device)
    check_lstm_layer(lstm_layer, [300 * projected, *others], resets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_segment_repeats_its_steps_bit_by_bit(dtype, device):
    (projected, weight_hh, *state), resets = lstm_inputs(8, 5, 4, dtype, "some", device)
    whole = lstm_layer(projected, weight_hh, *state, resets)
    _, *middle = lstm_layer(projected[:4], weight_hh, *state, resets[:4])
    second, *last = lstm_layer(projected[4:], weight_hh, *middle, resets[4:])
    assert torch.equal(whole[0][4:], second)
    assert all(map(torch.equal, whole[1:], last))
    inputs = [tensor.clone().requires_grad_() for tensor in (projected, weight_hh, *state)]
    # Training, which keeps the gates, has the results of a rollout.
    assert all(map(torch.equal, lstm_layer(*inputs, resets), whole))
    if dtype in (torch.float16, torch.bfloat16):
        for t in range(8):
            step, *state = lstm_layer(projected[t : t + 1], weight_hh, *state, resets[t : t + 1])
            assert torch.equal(step[0], whole[0][t])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_reset_hides_the_state_before_it_even_nan(dtype, device):
    (projected, weight_hh, h, c), resets = lstm_inputs(5, 3, 4, dtype, "no flag", device)
    resets[2] = True
    expected = lstm_layer(projected, weight_hh, h, c, resets)[0]
    projected[:2], h[:], c[:] = torch.nan, torch.nan, torch.nan
    assert torch.equal(lstm_layer(projected, weight_hh, h, c, resets)[0][2:], expected[2:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_no_gradient_passes_a_reset(dtype, device):
    inputs, resets = lstm_inputs(5, 3, 4, dtype, "no flag", device)
    resets[2, 1] = True
    output = lstm_layer(*(tensor.requires_grad_() for tensor in inputs), resets)[0]
    grad_projected, _, grad_h, grad_c = torch.autograd.grad(output[2:].sum(), inputs)
    for grad in (*grad_projected[:2], grad_h, grad_c):
        assert grad.ne(0).any(-1).tolist() == [True, False, True]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("grad", [True, False])
def test_the_last_state_may_be_written_in_place(grad, steps, device):
    inputs = [tensor.requires_grad_(grad) for tensor in lstm_inputs(steps, 2, 4, torch.float32, device=device)[0]]
    output, last_h, last_c = lstm_layer(*inputs)
    last = output[-1].detach().clone()
    last_h.mul_(2)
    last_c.zero_()
    assert torch.equal(output[-1], last)
    if grad:
        torch.autograd.grad(output.sum() + last_h.sum(), inputs)


def test_only_what_needs_a_gradient_gets_one(device):
    projected, weight_hh, h, c = lstm_inputs(3, 2, 4, torch.float32, device=device)[0]
    projected.requires_grad_()
    lstm_layer(projected, weight_hh, h, c)[0].sum().backward()
    assert projected.grad.any()
    assert all(tensor.grad is None for tensor in (weight_hh, h, c))
    assert not lstm_layer(projected.detach(), weight_hh, h, c)[0].requires_grad


def test_autocast_does_not_change_the_products(device):
    inputs = [tensor.requires_grad_() for tensor in lstm_inputs(4, 3, 8, torch.float32, device=device)[0]]
    results = []
    for enabled in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            outputs = lstm_layer(*inputs)
            results.append((*outputs, *torch.autograd.grad(outputs[0].sum() + outputs[2].sum(), inputs)))
    assert all(map(torch.equal, *results))
