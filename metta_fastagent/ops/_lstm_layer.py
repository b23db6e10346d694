"""One LSTM layer over a segment whose rows may start anew at any step, with its gradient.

    h', c'     = h_{t-1}, c_{t-1}                 0 in a row that is reset before step t
    i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of the four parts of projected_t + h' W_hh^T
    c_t        = f c' + i g
    h_t        = o tanh(c_t)

with projected_t = x_t W_ih^T + b_ih + b_hh, which the caller makes for all steps in one product. Backwards in time, for
upstream gradients of every h_t and of the last h and c, dh and dc being all that reaches h_t and c_t:

    dc        += dh o (1 - tanh(c_t)^2)
    d gates    = dc g i (1 - i), dc c' f (1 - f), dc i (1 - g^2), dh tanh(c_t) o (1 - o)         d projected_t too
    dc', dh'   = dc f, d gates W_hh               0 in a row that is reset before step t
    d W_hh     = sum_t d gates_t^T h'_t           one product over all steps

Source: Hochreiter and Schmidhuber, "Long Short-Term Memory" (1997), with the forget gate of Gers, Schmidhuber and
Cummins, "Learning to Forget" (2000); gates in nn.LSTM's order. Arithmetic is float32 (float64 for float64). The state
is rounded to the tensors' dtype after each step, as between the calls of a rollout, so a segment repeats its rollout.
"""

# pyright: reportInvalidTypeForm=false

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metta_fastagent._dispatch import register
from metta_fastagent.ops._checks import (
    NATIVE_DTYPES,
    compute_dtype,
    contiguous,
    describe,
    require_same_device,
    require_tensor,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """Products keep their tensors' dtype: autocast would make float32 ones half precision."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def lstm_layer_forward_eager(
    projected: Tensor, weight_hh: Tensor, h: Tensor, c: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(output [T, B, H], cells [T, B, H], activated gates [T, B, 4H]) in plain PyTorch, step by step."""
    dtype, exact = projected.dtype, compute_dtype(projected.dtype)
    gates = torch.empty(projected.shape, dtype=exact, device=projected.device)
    cells = gates.new_empty(projected.shape[0], *h.shape)
    output = torch.empty_like(cells)
    weight = weight_hh.to(exact).t()
    inputs, hidden, cell = projected.to(exact), h.to(exact), c.to(exact)
    size = h.shape[1]
    with _without_autocast(projected.device):
        for t in range(projected.shape[0]):
            if resets is not None:
                restarted = resets[t].unsqueeze(1)
                hidden, cell = hidden.masked_fill(restarted, 0), cell.masked_fill(restarted, 0)
            torch.addmm(inputs[t], hidden, weight, out=gates[t])
            gate_i, gate_f, gate_g, gate_o = gates[t].split(size, dim=1)
            gates[t, :, : 2 * size].sigmoid_()
            gate_g.tanh_()
            gate_o.sigmoid_()
            torch.mul(gate_f, cell, out=cells[t]).addcmul_(gate_i, gate_g)
            torch.tanh(cells[t], out=output[t]).mul_(gate_o)
            hidden, cell = output[t].to(dtype).to(exact), cells[t].to(dtype).to(exact)
    return output.to(dtype), cells.to(dtype), gates.to(dtype)


def lstm_layer_backward_eager(
    weight_hh: Tensor,
    c: Tensor,
    resets: Tensor | None,
    cells: Tensor,
    gates: Tensor,
    grad_output: Tensor | None,
    grad_last_h: Tensor | None,
    grad_last_c: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of projected, h and c in plain PyTorch; an upstream gradient that is None counts 0."""
    dtype, exact = weight_hh.dtype, compute_dtype(weight_hh.dtype)
    grad_projected = torch.empty_like(gates, memory_format=torch.contiguous_format)
    weight = weight_hh.to(exact)
    grad_h = torch.zeros_like(c, dtype=exact) if grad_last_h is None else grad_last_h.to(exact)
    grad_c = torch.zeros_like(c, dtype=exact) if grad_last_c is None else grad_last_c.to(exact)
    with _without_autocast(weight_hh.device):
        for t in reversed(range(gates.shape[0])):
            restarted = None if resets is None else resets[t].unsqueeze(1)
            if grad_output is not None:
                grad_h = grad_h + grad_output[t].to(exact)
            previous = (c if t == 0 else cells[t - 1]).to(exact)
            if restarted is not None:
                previous = previous.masked_fill(restarted, 0)
            grad_gates, grad_c = _step_backward(gates[t].to(exact), cells[t].to(exact), previous, grad_h, grad_c)
            grad_projected[t] = grad_gates
            grad_h = grad_projected[t].to(exact) @ weight
            if restarted is not None:
                grad_h, grad_c = grad_h.masked_fill(restarted, 0), grad_c.masked_fill(restarted, 0)
    return grad_projected, grad_h.to(dtype), grad_c.to(dtype)


def _step_backward(
    gates: Tensor, cell: Tensor, previous: Tensor, grad_h: Tensor, grad_c: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of one step's gates before their activation [B, 4H], and of the cell before the step [B, H]."""
    gate_i, gate_f, gate_g, gate_o = gates.chunk(4, dim=1)
    squashed = cell.tanh()
    grad_c = grad_c + grad_h * gate_o * (1 - squashed * squashed)
    grad_gates = (
        grad_c * gate_g * gate_i * (1 - gate_i),
        grad_c * previous * gate_f * (1 - gate_f),
        grad_c * gate_i * (1 - gate_g * gate_g),
        grad_h * squashed * gate_o * (1 - gate_o),
    )
    return torch.cat(grad_gates, dim=1), grad_c * gate_f


def _lstm_layer_forward_native(
    projected: Tensor, weight_hh: Tensor, h: Tensor, c: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if projected.dtype not in NATIVE_DTYPES:
        return lstm_layer_forward_eager(projected, weight_hh, h, c, resets)
    return torch.ops.metta_fastagent_native.lstm_layer_forward.default(
        projected.contiguous(), weight_hh.contiguous(), h.contiguous(), c.contiguous(), contiguous(resets)
    )


def _lstm_layer_backward_native(
    weight_hh: Tensor,
    c: Tensor,
    resets: Tensor | None,
    cells: Tensor,
    gates: Tensor,
    grad_output: Tensor | None,
    grad_last_h: Tensor | None,
    grad_last_c: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    upstream = (grad_output, grad_last_h, grad_last_c)
    if weight_hh.dtype not in NATIVE_DTYPES:
        return lstm_layer_backward_eager(weight_hh, c, resets, cells, gates, *upstream)
    return torch.ops.metta_fastagent_native.lstm_layer_backward.default(
        weight_hh.contiguous(), c.contiguous(), contiguous(resets), cells, gates, *map(contiguous, upstream)
    )


def _forward_fake(
    projected: Tensor, weight_hh: Tensor, h: Tensor, c: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (projected.shape[0], *h.shape)
    return projected.new_empty(shape), projected.new_empty(shape), projected.new_empty(projected.shape)


def _backward_fake(
    weight_hh: Tensor,
    c: Tensor,
    resets: Tensor | None,
    cells: Tensor,
    gates: Tensor,
    grad_output: Tensor | None,
    grad_last_h: Tensor | None,
    grad_last_c: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return gates.new_empty(gates.shape), c.new_empty(c.shape), c.new_empty(c.shape)


_lstm_layer_forward = register(
    "lstm_layer_forward(Tensor projected, Tensor weight_hh, Tensor h, Tensor c, Tensor? resets)"
    " -> (Tensor output, Tensor cells, Tensor gates)",
    lstm_layer_forward_eager,
    _forward_fake,
    native=_lstm_layer_forward_native,
)
_lstm_layer_backward = register(
    "lstm_layer_backward(Tensor weight_hh, Tensor c, Tensor? resets, Tensor cells, Tensor gates, Tensor? grad_output,"
    " Tensor? grad_last_h, Tensor? grad_last_c) -> (Tensor grad_projected, Tensor grad_h, Tensor grad_c)",
    lstm_layer_backward_eager,
    _backward_fake,
    native=_lstm_layer_backward_native,
)


class _LSTMLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projected: Tensor, weight_hh: Tensor, h: Tensor, c: Tensor, resets: Tensor | None):
        output, cells, gates = _lstm_layer_forward(projected, weight_hh, h, c, resets)
        ctx.save_for_backward(weight_hh, h, c, resets, output, cells, gates)
        ctx.set_materialize_grads(False)
        # Copies: views of the output could not be written in place.
        return output, output[-1].clone(), cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_last_h, grad_last_c):
        weight_hh, h, c, resets, output, cells, gates = ctx.saved_tensors
        grad_projected, grad_h, grad_c = _lstm_layer_backward(
            weight_hh, c, resets, cells, gates, grad_output, grad_last_h, grad_last_c
        )
        grad_weight = _weight_gradient(grad_projected, h, output, resets) if ctx.needs_input_grad[1] else None
        return grad_projected, grad_weight, grad_h, grad_c, None


def _weight_gradient(grad_projected: Tensor, h: Tensor, output: Tensor, resets: Tensor | None) -> Tensor:
    """d W_hh [4H, H]: every step's gradient with the state before that step, all in one product."""
    previous = torch.cat((h.unsqueeze(0), output[:-1]))
    if resets is not None:
        previous = previous.masked_fill(resets.unsqueeze(-1), 0)
    with _without_autocast(h.device):
        return grad_projected.flatten(0, 1).t() @ previous.flatten(0, 1)


def lstm_layer(
    projected: Tensor, weight_hh: Tensor, h: Tensor, c: Tensor, resets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer over T steps, rows zeroed before the steps at which they are reset.

    Args:
        projected: floating-point tensor [T, B, 4H], T and H at least 1: each step's input times W_ih^T, plus both
            biases; gates in nn.LSTM's order (input, forget, cell, output).
        weight_hh: tensor [4H, H], as nn.LSTM's `weight_hh_l0`.
        h: tensor [B, H], the hidden state before step 0.
        c: tensor [B, H], the cell state before step 0.
        resets: bool tensor [T, B], or None for no resets: the state of row b is zero before step t, 0 included, where
            `resets[t, b]`.

    Returns:
        (output [T, B, H], last_h [B, H], last_c [B, H]): the hidden state after each step, and the state after the last
        one. Dtype as `projected`, under autocast too. Differentiable once with respect to the four floating-point
        tensors.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device.
    """
    steps, rows, size = _checked_sizes(projected)
    for name, value, shape in (
        ("weight_hh", weight_hh, (4 * size, size)),
        ("h", h, (rows, size)),
        ("c", c, (rows, size)),
    ):
        _require(name, value, shape, projected.dtype, projected)
    if resets is not None:
        _require("resets", resets, (steps, rows), torch.bool, projected)
    return _LSTMLayer.apply(projected, weight_hh, h, c, resets)


def _checked_sizes(projected: object) -> tuple[int, int, int]:
    """(T, B, H) of a `projected` that is one."""
    expected = "a float32, float64, bfloat16 or float16 tensor of shape [T, B, 4H] with T >= 1 and H >= 1"
    projected = require_tensor("projected", projected, expected)
    if projected.dtype not in DTYPES:
        raise TypeError(f"projected: got {describe(projected)}, expected {expected}")
    if projected.dim() != 3 or projected.shape[0] < 1 or projected.shape[2] < 1 or projected.shape[2] % 4 != 0:
        raise ValueError(f"projected: got {describe(projected)}, expected {expected}")
    steps, rows, width = projected.shape
    return steps, rows, width // 4


def _require(name: str, value: object, shape: tuple[int, ...], dtype: torch.dtype, projected: Tensor) -> None:
    expected = f"a {str(dtype).removeprefix('torch.')} tensor of shape {list(shape)} for projected of shape"
    expected = f"{expected} {list(projected.shape)}"
    tensor = require_tensor(name, value, expected)
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: got {describe(tensor)}, expected {expected}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: got {describe(tensor)}, expected {expected}")
    require_same_device(name, tensor, "projected", projected)
