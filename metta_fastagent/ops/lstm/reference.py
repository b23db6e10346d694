"""One LSTM layer over a segment whose rows may be reset at any step, in plain PyTorch, with its gradient.

    h', c'     = h_{t-1}, c_{t-1}                 0 in a row that is reset before step t
    i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of the four parts of projected_t + h' W_hh^T
    c_t        = f c' + i g
    h_t        = o tanh(c_t)

with projected_t = x_t W_ih^T + b_ih + b_hh, which the caller computes for all steps in one product. Backwards in time,
for upstream gradients of every h_t and of the last h and c, where dh and dc are the total gradients of h_t and c_t:

    dc        += dh o (1 - tanh(c_t)^2)
    d gates    = dc g i (1 - i), dc c' f (1 - f), dc i (1 - g^2), dh tanh(c_t) o (1 - o)         d projected_t too
    dc', dh'   = dc f, d gates W_hh               0 in a row that is reset before step t
    d W_hh     = sum_t d gates_t^T h'_t           one product over all steps

Arithmetic is float32 (float64 for float64). The state is rounded to the tensors' dtype after each step, as between the
calls of a rollout, so that a segment reproduces its rollout.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metta_fastagent.ops.dtypes import compute_dtype, without_autocast

# Gradient of x from y and the gradient of y: autograd's own functions, each one pass over memory.
_SIGMOID_BACKWARD, _TANH_BACKWARD = torch.ops.aten.sigmoid_backward.default, torch.ops.aten.tanh_backward.default


class LayerInputs(NamedTuple):
    """The tensors from which a layer is computed."""

    projected: Tensor  # [T, B, 4H], each step's input times W_ih^T plus both biases
    weight_hh: Tensor  # [4H, H]
    h: Tensor  # [B, H], before step 0
    c: Tensor  # [B, H], before step 0
    resets: Tensor | None  # bool [T, B]


class BackwardInputs(NamedTuple):
    """The tensors from which a layer's gradient is computed; an upstream gradient of None counts as 0."""

    weight_hh: Tensor  # [4H, H]
    c: Tensor  # [B, H], before step 0
    resets: Tensor | None  # bool [T, B]
    cells: Tensor  # [T, B, H]
    gates: Tensor  # [T, B, 4H], activated
    grad_output: Tensor | None  # [T, B, H]
    grad_last_h: Tensor | None  # [B, H]
    grad_last_c: Tensor | None  # [B, H]


def any_of(flags: Sequence[Tensor]) -> Tensor:
    """Where any of the bool tensors is set."""
    return functools.reduce(torch.bitwise_or, flags)


def lstm_layer_formula(inputs: LayerInputs) -> tuple[Tensor, Tensor, Tensor]:
    """(output [T, B, H], last h, last c), which autograd and torch.func differentiate any number of times."""
    projected, weight_hh, h, c, resets = inputs
    outputs = []
    with without_autocast(projected.device):
        for t, step in enumerate(projected):
            if resets is not None:
                reset_rows = resets[t].unsqueeze(1)
                h, c = h.masked_fill(reset_rows, 0), c.masked_fill(reset_rows, 0)
            gate_i, gate_f, gate_g, gate_o = (step + h @ weight_hh.t()).chunk(4, dim=-1)
            c = gate_f.sigmoid() * c + gate_i.sigmoid() * gate_g.tanh()
            h = gate_o.sigmoid() * c.tanh()
            outputs.append(h)
    return torch.stack(outputs), h, c


def lstm_layer_forward_eager(inputs: LayerInputs, keep_gates: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(output [T, B, H], cells [T, B, H], activated gates [T, B, 4H]), step by step.

    Without `keep_gates`, which only the backward pass needs, gates is an empty tensor [0].
    """
    projected, weight_hh, h, c, resets = inputs
    dtype, exact = projected.dtype, compute_dtype(projected.dtype)
    gates = torch.empty(projected.shape, dtype=exact, device=projected.device)
    cells = gates.new_empty(projected.shape[0], *h.shape)
    output = torch.empty_like(cells)
    weight = weight_hh.to(exact).t()
    steps, hidden, cell = projected.to(exact), h.to(exact), c.to(exact)
    size = h.shape[1]
    with without_autocast(projected.device):
        for t in range(projected.shape[0]):
            if resets is not None:
                reset_rows = resets[t].unsqueeze(1)
                hidden, cell = hidden.masked_fill(reset_rows, 0), cell.masked_fill(reset_rows, 0)
            torch.addmm(steps[t], hidden, weight, out=gates[t])
            gate_i, gate_f, gate_g, gate_o = gates[t].split(size, dim=1)
            gates[t, :, : 2 * size].sigmoid_()
            gate_g.tanh_()
            gate_o.sigmoid_()
            torch.mul(gate_f, cell, out=cells[t]).addcmul_(gate_i, gate_g)
            torch.tanh(cells[t], out=output[t]).mul_(gate_o)
            hidden, cell = output[t].to(dtype).to(exact), cells[t].to(dtype).to(exact)
    return output.to(dtype), cells.to(dtype), gates.to(dtype) if keep_gates else projected.new_empty(0)


def lstm_step_eager_(
    inputs: LayerInputs, more_resets: Tensor | None, bias: Tensor | None, next_h: Tensor, next_c: Tensor
) -> Tensor:
    """One step: returns the output [1, B, H] and writes the state into `next_h` and `next_c`, which may be `h` and `c`.

    `more_resets`, bool [1, B], resets further rows, and `bias` [4H] is added to `projected`.
    """
    projected, weight_hh, h, c, resets = inputs
    if bias is not None:
        projected = projected + bias
    if more_resets is not None:
        resets = more_resets if resets is None else resets | more_resets
    output, cells, _ = lstm_layer_forward_eager(LayerInputs(projected, weight_hh, h, c, resets), False)
    next_h.copy_(output[0])
    next_c.copy_(cells[0])
    return output


def lstm_layer_backward_eager(inputs: BackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of projected [T, B, 4H], h and c [B, H]."""
    weight_hh, c, resets, cells, gates, grad_output, grad_last_h, grad_last_c = inputs
    dtype, exact = weight_hh.dtype, compute_dtype(weight_hh.dtype)
    grad_projected = torch.empty_like(gates, memory_format=torch.contiguous_format)
    weight = weight_hh.to(exact)
    grad_h = torch.zeros_like(c, dtype=exact) if grad_last_h is None else grad_last_h.to(exact)
    grad_c = torch.zeros_like(c, dtype=exact) if grad_last_c is None else grad_last_c.to(exact)
    with without_autocast(weight_hh.device):
        for t in reversed(range(gates.shape[0])):
            reset_rows = None if resets is None else resets[t].unsqueeze(1)
            if grad_output is not None:
                grad_h = grad_h + grad_output[t].to(exact)
            previous = (c if t == 0 else cells[t - 1]).to(exact)
            if reset_rows is not None:
                previous = previous.masked_fill(reset_rows, 0)
            grad_gates, grad_c = _step_backward(gates[t].to(exact), cells[t].to(exact), previous, grad_h, grad_c)
            grad_projected[t] = grad_gates
            grad_h = grad_projected[t].to(exact) @ weight
            if reset_rows is not None:
                grad_h, grad_c = grad_h.masked_fill(reset_rows, 0), grad_c.masked_fill(reset_rows, 0)
    return grad_projected, grad_h.to(dtype), grad_c.to(dtype)


def _step_backward(
    gates: Tensor, cell: Tensor, previous: Tensor, grad_h: Tensor, grad_c: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of one step's gates before activation [B, 4H], and of the cell before the step [B, H]."""
    gate_i, gate_f, gate_g, gate_o = gates.chunk(4, dim=1)
    squashed = cell.tanh()
    grad_c = grad_c + _TANH_BACKWARD(grad_h * gate_o, squashed)
    grad_gates = (
        _SIGMOID_BACKWARD(grad_c * gate_g, gate_i),
        _SIGMOID_BACKWARD(grad_c * previous, gate_f),
        _TANH_BACKWARD(grad_c * gate_i, gate_g),
        _SIGMOID_BACKWARD(grad_h * squashed, gate_o),
    )
    return torch.cat(grad_gates, dim=1), grad_c * gate_f
