"""One LSTM layer over a segment whose rows may be reset at any step.

`reference` has the formulas, forward and backward, and `kernels` the Triton kernels: one launch each way. The caller
multiplies the inputs by W_ih, for all steps at once; the gradient of W_hh is one product over all steps.

Source: Hochreiter and Schmidhuber, "Long Short-Term Memory" (1997), with the forget gate of Gers, Schmidhuber and
Cummins, "Learning to Forget" (2000); gates in nn.LSTM's order.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metta_fastagent.ops import autograd
from metta_fastagent.ops.dtypes import NATIVE_DTYPES, contiguous
from metta_fastagent.ops.lstm import kernels
from metta_fastagent.ops.lstm.reference import (
    BackwardInputs,
    LayerInputs,
    any_of,
    lstm_layer_backward_eager,
    lstm_layer_formula,
    lstm_layer_forward_eager,
    lstm_step_eager_,
)
from metta_fastagent.ops.products import weight_gradient
from metta_fastagent.runtime.checks import require_same_device, require_tensor
from metta_fastagent.runtime.dispatch import Operator, needs_operator, uses_native

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# A segment with fewer rows, or with weights that exceed the L2 cache, is faster with one product for all its inputs.
FEWEST_ROWS, MOST_BYTES = 6, 2**21


def lstm_layer(
    projected: Tensor, weight_hh: Tensor, h: Tensor, c: Tensor, resets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer over T steps; a row's state is zeroed before each step at which the row is reset.

    Args:
        projected: floating-point tensor [T, B, 4H], T and H at least 1: each step's input times W_ih^T, plus both
            biases; gates in nn.LSTM's order (input, forget, cell, output).
        weight_hh: tensor [4H, H], as nn.LSTM's `weight_hh_l0`.
        h: tensor [B, H], the hidden state before step 0.
        c: tensor [B, H], the cell state before step 0.
        resets: bool tensor [T, B], or None for no resets: the state of row b is zeroed before step t (0 included) if
            `resets[t, b]`.

    Returns:
        (output [T, B, H], last_h [B, H], last_c [B, H]): the hidden state after each step, and the state after the last
        one. Their dtype is that of `projected`, under autocast too. Differentiable once with respect to the four
        floating-point tensors, and under torch.func any number of times.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device.

    Example:
        >>> lstm, inputs, zeros = torch.nn.LSTM(3, 5), torch.randn(7, 2, 3), torch.zeros(2, 5)
        >>> projected = inputs @ lstm.weight_ih_l0.T + lstm.bias_ih_l0 + lstm.bias_hh_l0
        >>> output, h, c = lstm_layer(projected, lstm.weight_hh_l0, zeros, zeros, torch.rand(7, 2) < 0.1)
        >>> output.shape, h.shape
        (torch.Size([7, 2, 5]), torch.Size([2, 5]))
    """
    return run_layer(LayerInputs(projected, weight_hh, h, c, resets), True)


def run_layer(inputs: LayerInputs, with_state: bool) -> tuple[Tensor, Any, Any]:
    """`lstm_layer`; without `with_state`, the state after the last step may be None, which saves two copies."""
    _check(*inputs)
    if autograd.in_plain_pytorch():
        return lstm_layer_formula(inputs)
    if autograd.records_graph(*inputs[:4]):
        return _LSTMLayer.apply(with_state, *inputs)
    output, cells, _ = _lstm_layer_forward(inputs, False)
    if not with_state:
        return output, None, None
    # The cells of a single step share no memory.
    return output, output[-1].clone(), cells.squeeze(0) if len(cells) == 1 else cells[-1].clone()


def lstm_step_into(
    inputs: LayerInputs, more_resets: Tensor | None, bias: Tensor | None, next_h: Tensor, next_c: Tensor
) -> Tensor:
    """`lstm_layer` for one step without gradients; writes the state into `next_h` and `next_c`, contiguous [B, H].

    They may be `h` and `c`. Returns the output [1, B, H]; `lstm_step_eager_` explains the other arguments.
    """
    _check(*inputs)
    return _lstm_step_(inputs, more_resets, bias, next_h, next_c)


def lstm_segment_native(
    sequence: Tensor, weights: list[Tensor], h: Tensor, c: Tensor, flags: Sequence[Tensor], in_place: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]] | None:
    """All layers over a segment without gradients, in one call of the C++ operator; None if that is not applicable.

    Args:
        sequence: [T, B, input_size].
        weights: each layer's weight_ih, weight_hh and, with biases, bias_ih and bias_hh.
        h, c: state before the first step, [num_layers, B, hidden_size].
        flags: bool [T, B] each; a row's state is zeroed before a step if any of its flags is set.
        in_place: overwrite `h` and `c`, which must be contiguous.

    Returns:
        (output [T, B, hidden_size], state after the last step: `h` and `c`, or new tensors).
    """
    tensors = [sequence, h, c, *weights]
    if not uses_native(sequence.device) or h.dtype not in NATIVE_DTYPES or needs_operator(tensors, flags):
        return None
    for tensor in tensors:
        if tensor.dtype != h.dtype:
            return None
    if len(sequence) > 1 and (sequence.shape[1] < FEWEST_ROWS or weights[0].nbytes + weights[1].nbytes > MOST_BYTES):
        return None
    h, c, resets = h.contiguous(), c.contiguous(), any_of(flags).contiguous()
    state = (h, c) if in_place else (torch.empty_like(h), torch.empty_like(c))
    segment = torch.ops.metta_fastagent_native.lstm_segment_.default
    try:
        output = segment(sequence.contiguous(), list(map(contiguous, weights)), h, c, resets, *state)
    except RuntimeError:
        # A weight does not fit, and nothing has been written: the general path says which, or broadcasts it.
        return None
    return output, state


class _LSTMLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, with_state: bool, *given: Any):
        inputs = LayerInputs(*given)
        output, cells, gates = _lstm_layer_forward(inputs, True)
        ctx.save_for_backward(*inputs[1:], output, cells, gates)
        ctx.set_materialize_grads(False)
        ctx.backend = autograd.chosen_backend()
        # Copies, because views of the output could not be written in place.
        return (output, output[-1].clone(), cells[-1].clone()) if with_state else (output, None, None)

    @staticmethod
    def backward(ctx, *grads):
        with_graph = autograd.needs_graph()
        with torch.no_grad():
            results = _LSTMLayer._gradients(ctx, *grads)
        if with_graph:
            results = autograd.refuse_second_derivative("lstm_layer", results, (*ctx.saved_tensors[:3], *grads))
        return None, *results, None

    @staticmethod
    def _gradients(ctx, *grads: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        weight_hh, h, c, resets, output, cells, gates = ctx.saved_tensors
        inputs = BackwardInputs(weight_hh, c, resets, cells, gates, *grads)
        grad_projected, grad_h, grad_c = autograd.run_backward(ctx.backend, _lstm_layer_backward, inputs)
        grad_weight = _weight_gradient(grad_projected, h, output, resets) if ctx.needs_input_grad[2] else None
        return grad_projected, grad_weight, grad_h, grad_c


def _weight_gradient(grad_projected: Tensor, h: Tensor, output: Tensor, resets: Tensor | None) -> Tensor:
    """d W_hh [4H, H]: every step's gradient times the state before that step, all in one product."""
    previous = torch.cat((h.unsqueeze(0), output[:-1]))
    if resets is not None:
        previous.masked_fill_(resets.unsqueeze(-1), 0)
    return weight_gradient(grad_projected.flatten(0, 1), previous.flatten(0, 1))


def _forward_native(inputs: LayerInputs, keep_gates: bool) -> tuple[Tensor, Tensor, Tensor]:
    if inputs.projected.dtype not in NATIVE_DTYPES:
        return lstm_layer_forward_eager(inputs, keep_gates)
    return torch.ops.metta_fastagent_native.lstm_layer_forward.default(*map(contiguous, inputs), keep_gates)


def _backward_native(inputs: BackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    if inputs.weight_hh.dtype not in NATIVE_DTYPES:
        return lstm_layer_backward_eager(inputs)
    return torch.ops.metta_fastagent_native.lstm_layer_backward.default(*map(contiguous, inputs))


def _forward_fake(inputs: LayerInputs, keep_gates: bool) -> tuple[Tensor, Tensor, Tensor]:
    projected, shape = inputs.projected, (inputs.projected.shape[0], *inputs.h.shape)
    gates = projected.new_empty(projected.shape if keep_gates else 0)
    return projected.new_empty(shape), projected.new_empty(shape), gates


def _backward_fake(inputs: BackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    c, gates = inputs.c, inputs.gates
    return gates.new_empty(gates.shape), c.new_empty(c.shape), c.new_empty(c.shape)


_INPUTS = "Tensor projected, Tensor weight_hh, Tensor h, Tensor c, Tensor? resets"
_lstm_layer_forward = Operator(
    f"lstm_layer_forward({_INPUTS}, bool keep_gates) -> (Tensor output, Tensor cells, Tensor gates)",
    lstm_layer_forward_eager,
    _forward_fake,
    kernels.lstm_layer_forward_cuda,
    _forward_native,
    packed=(0, LayerInputs),
)
_lstm_step_ = Operator(
    f"lstm_step_({_INPUTS}, Tensor? more_resets, Tensor? bias, Tensor(a!) next_h, Tensor(b!) next_c) -> Tensor",
    lstm_step_eager_,
    lambda inputs, *_: inputs.projected.new_empty(1, *inputs.h.shape),
    kernels.lstm_step_cuda_,
    packed=(0, LayerInputs),
)
_lstm_layer_backward = Operator(
    "lstm_layer_backward(Tensor weight_hh, Tensor c, Tensor? resets, Tensor cells, Tensor gates, Tensor? grad_output,"
    " Tensor? grad_last_h, Tensor? grad_last_c) -> (Tensor grad_projected, Tensor grad_h, Tensor grad_c)",
    lstm_layer_backward_eager,
    _backward_fake,
    kernels.lstm_layer_backward_cuda,
    _backward_native,
    packed=(0, BackwardInputs),
)


def _check(projected: Tensor, weight_hh: object, h: object, c: object, resets: object) -> None:
    steps, rows, size = _checked_sizes(projected)
    for name, value, shape in (
        ("weight_hh", weight_hh, (4 * size, size)),
        ("h", h, (rows, size)),
        ("c", c, (rows, size)),
    ):
        _require(name, value, shape, projected.dtype, projected)
    if resets is not None:
        _require("resets", resets, (steps, rows), torch.bool, projected)


def _checked_sizes(projected: object) -> tuple[int, int, int]:
    """(T, B, H) of `projected`, after checking it."""
    expected = "a float32, float64, bfloat16 or float16 tensor of shape [T, B, 4H] with T >= 1 and H >= 1"
    shaped = lambda t: t.dim() == 3 and t.shape[0] > 0 and t.shape[2] > 0 and t.shape[2] % 4 == 0  # noqa: E731
    steps, rows, width = require_tensor("projected", projected, expected, DTYPES.__contains__, shaped).shape
    return steps, rows, width // 4


def _require(name: str, value: object, shape: tuple[int, ...], dtype: torch.dtype, projected: Tensor) -> None:
    if isinstance(value, Tensor) and value.dtype == dtype and value.shape == shape and value.device == projected.device:
        return
    expected = f"a {str(dtype).removeprefix('torch.')} tensor of shape {list(shape)} for projected of shape"
    expected = f"{expected} {list(projected.shape)}"
    tensor = require_tensor(name, value, expected, (dtype,).__contains__, lambda t: t.shape == shape)
    require_same_device(name, tensor, "projected", projected)
