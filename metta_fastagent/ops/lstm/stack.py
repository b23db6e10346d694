"""All layers of an `nn.LSTM`, or of a module that replaces one, over a segment with resets."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from metta_fastagent.ops.autograd import in_plain_pytorch
from metta_fastagent.ops.dtypes import under_autocast
from metta_fastagent.ops.lstm.layer import lstm_segment_native, lstm_step_into, run_layer
from metta_fastagent.ops.lstm.reference import LayerInputs, any_of
from metta_fastagent.ops.products import linear
from metta_fastagent.runtime.checks import describe, own_computation, require_same_device, require_tensor
from metta_fastagent.runtime.dispatch import uses_native, uses_triton

State = tuple[Tensor, Tensor]


def lstm(
    module: nn.Module,
    inputs: Tensor,
    state: State | None = None,
    resets: Tensor | Sequence[Tensor] | None = None,
    *,
    in_place: bool = False,
    with_state: bool = True,
) -> tuple[Tensor, State]:
    """`module(inputs, state)`, but with the state of row b zeroed before step t where `resets` is set for them.

    A plain `nn.LSTM` runs layer by layer: one product projects a layer's whole input, and `ops.lstm_layer` computes the
    recurrence; on the CPU without gradients, one C++ operator does all. A module that computes something else (hooks, a
    replaced forward, a subclass, any class with nn.LSTM's arguments and results) is called once per step, as slow as a
    loop. Without `resets` the module is called once. Autocast and dropout work as in the module.

    Args:
        module: unidirectional `nn.LSTM` without projection, or a module that replaces it.
        inputs: [T, B, input_size]; [B, T, input_size] if the module is `batch_first`; T at least 1.
        state: (h, c) before the first step, [num_layers, B, hidden_size] each; None for zeros.
        resets: bool tensor with the layout of the inputs, [T, B] or [B, T], or a list of them, such as `dones` and
            `truncateds`, any of which resets a row; None resets no row.
        in_place: the caller keeps its state in the tensors of `state`. Without gradients the new state may then be
            written there and these tensors returned, or tensors that share memory with the output of a single step.
        with_state: False if the caller drops the new state, which may then be (None, None); this saves copies.

    Returns:
        (output, (h, c)) in the module's own layout. Differentiable once with respect to inputs, state and
        weights, and under torch.func any number of times.

    Raises:
        TypeError, ValueError: another recurrent module, `bidirectional`, `proj_size` or a packed sequence; with
            `resets`, also a wrong type, dtype, shape or device.

    Example:
        >>> module, state = nn.LSTM(3, 5), (torch.zeros(1, 2, 5), torch.zeros(1, 2, 5))
        >>> output, (h, c) = lstm(module, torch.randn(7, 2, 3), state, resets=torch.rand(7, 2) < 0.1)
        >>> output.shape, h.shape
        (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]))
    """
    _require_supported(module, inputs)
    flags: Any = resets if isinstance(resets, (list, tuple)) else [resets]
    if resets is None or not flags:
        return module(inputs, state)
    time = 1 if getattr(module, "batch_first", False) else 0
    _check(inputs, state, flags, time)
    # A single step takes the same path as segments, because a segment must reproduce its rollout, and on CUDA cuDNN
    # rounds nn.LSTM's products to TF32 by default. In plain PyTorch on the CPU nn.LSTM is faster.
    device = inputs.device
    as_segment = inputs.shape[time] > 1 or device.type == "cuda" or uses_triton(device) or uses_native(device)
    if not as_segment or own_computation(module, nn.LSTM):
        return _step_by_step(module, inputs, state, any_of(flags), time)
    h, c = _fitting_state(module, inputs, state, inputs.shape[1 - time])
    if time == 0:
        return _layer_by_layer(module, inputs, h, c, flags, in_place, with_state)
    sequence, flags = inputs.transpose(0, 1), [each.transpose(0, 1) for each in flags]
    output, state = _layer_by_layer(module, sequence, h, c, flags, in_place, with_state)
    return output.transpose(0, 1), state


def _require_supported(module: object, inputs: object) -> None:
    expected = "nn.LSTM or a module with its arguments and results"
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: got {describe(module)}, expected {expected}")
    if isinstance(module, nn.RNNBase) and not isinstance(module, nn.LSTM):
        raise TypeError(f"module: got {type(module).__name__}, expected {expected}")
    for name in ("bidirectional", "proj_size"):
        value = getattr(module, name, False)
        if value:
            raise ValueError(f"module: got {name}={value}, expected nn.LSTM in one direction and without projection")
    if isinstance(inputs, PackedSequence):
        raise TypeError(
            "inputs: got a PackedSequence, expected a tensor; torch.nn.utils.rnn.pad_packed_sequence makes one"
        )


def _check(inputs: Any, state: object, flags: Sequence[Any], time: int) -> None:
    """The inputs and the resets must have the same layout, and the state must be a pair of tensors or None."""
    if not isinstance(inputs, Tensor) or inputs.dim() != 3 or inputs.shape[time] == 0:
        layout = "[B, T, input_size]" if time else "[T, B, input_size]"
        require_tensor("inputs", inputs, f"a tensor {layout} with T >= 1", None, lambda _: False)
    shape = inputs.shape[:2]
    for resets in flags:
        if not isinstance(resets, Tensor) or resets.dtype != torch.bool or resets.shape != shape:
            expected = f"a bool tensor of shape {list(shape)}, as inputs"
            require_tensor("resets", resets, expected, (torch.bool,).__contains__, lambda _: False)
        require_same_device("resets", resets, "inputs", inputs)
    if state is None:
        return
    if not isinstance(state, (tuple, list)) or len(state) != 2 or not all(isinstance(part, Tensor) for part in state):
        raise TypeError(f"state: got {describe(state)}, expected a pair (h, c) of tensors, or None")


def _fitting_state(module: Any, inputs: Tensor, state: State | None, rows: int) -> State:
    """The state of a plain `nn.LSTM` before the first step, after checking sizes and dtypes against the module."""
    weight = module.weight_hh_l0
    if inputs.shape[2] != module.input_size:
        raise ValueError(f"inputs: got {describe(inputs)}, expected {module.input_size} features as input_size")
    if inputs.dtype != weight.dtype and not under_autocast(inputs.device):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise TypeError(f"inputs: got {describe(inputs)}, expected {dtype} as the module's weights")
    require_same_device("inputs", inputs, "module", weight)
    shape = (module.num_layers, rows, module.hidden_size)
    if state is None:
        return inputs.new_zeros(shape), inputs.new_zeros(shape)
    for name, part in zip(("state[0]", "state[1]"), state, strict=True):
        if part.shape != shape:
            raise ValueError(f"{name}: got {describe(part)}, expected shape {list(shape)}")
        require_same_device(name, part, "inputs", inputs)
    return state[0], state[1]


def _step_by_step(module: nn.Module, inputs: Tensor, state: Any, resets: Tensor, time: int) -> tuple[Tensor, State]:
    outputs = []
    for step, reset in zip(inputs.split(1, dim=time), resets.unbind(time), strict=True):
        if state is not None:
            reset_rows = reset.unsqueeze(-1)
            state = state[0].masked_fill(reset_rows, 0), state[1].masked_fill(reset_rows, 0)
        output, state = module(step, state)
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=time), state


def _layer_by_layer(
    module: Any, sequence: Tensor, h: Tensor, c: Tensor, flags: Sequence[Tensor], in_place: bool, with_state: bool
) -> tuple[Tensor, State]:
    dtype = _autocast_dtype(sequence)
    weights = module.all_weights
    if any(tensor.dtype != dtype for tensor in (sequence, h, c, weights[0][0])):
        sequence, h, c = sequence.to(dtype), h.to(dtype), c.to(dtype)
        weights = [[weight.to(dtype) for weight in layer] for layer in weights]
    # On a transposed view F.linear adds the bias separately.
    sequence = sequence.contiguous()
    if not torch.is_grad_enabled() and not in_plain_pytorch():
        in_place = in_place and _may_overwrite(h, c)
        done = None
        if not (module.dropout and module.training):
            done = lstm_segment_native(sequence, [each for own in weights for each in own], h, c, flags, in_place)
        if done is None and len(sequence) == 1:
            done = _one_step(module, weights, sequence, h, c, flags, in_place)
        if done is not None:
            if in_place and not torch.compiler.is_compiling():
                # The operators write past autograd, which must notice if it needs the old values.
                torch.autograd.graph.increment_version((h, c))
            return done
    # One copy of transposed flags serves all layers.
    resets = any_of(flags).contiguous()
    biases, last_h, last_c = _bias_sums(weights), [], []
    for layer, own in enumerate(weights):
        projected = _projected(module, layer, own[0], biases[layer], sequence)
        sequence, hidden, cell = run_layer(LayerInputs(projected, own[1], h[layer], c[layer], resets), with_state)
        last_h.append(hidden)
        last_c.append(cell)
    unknown: Any = (None, None)
    return sequence, (torch.stack(last_h), torch.stack(last_c)) if with_state else unknown


def _one_step(
    module: Any, weights: list[list[Tensor]], sequence: Tensor, h: Tensor, c: Tensor, flags: Sequence[Tensor],
    in_place: bool,
) -> tuple[Tensor, State]:  # fmt: skip
    """A single step without gradients, which writes the new state to its place."""
    first, more = flags[0], any_of(flags[1:]) if len(flags) > 1 else None
    state = (h, c) if in_place else (h.new_empty(h.shape), c.new_empty(c.shape))
    for layer, (weight_ih, weight_hh, *biases) in enumerate(weights):
        bias_ih, bias_hh = biases or (None, None)
        projected = _projected(module, layer, weight_ih, bias_ih, sequence)
        inputs = LayerInputs(projected, weight_hh, h[layer], c[layer], first)
        sequence = lstm_step_into(inputs, more, bias_hh, state[0][layer], state[1][layer])
    return sequence, state


def _may_overwrite(h: Tensor, c: Tensor) -> bool:
    """Whether the operators may write the new state into `h` and `c`."""
    if not h.is_contiguous() or not c.is_contiguous():
        return False
    if torch.compiler.is_compiling():
        return True
    if torch._C._is_alias_of(h, c):  # pyright: ignore[reportAttributeAccessIssue]
        return False
    outside = not torch.is_inference_mode_enabled()
    # PyTorch's own operators would refuse to write these, or return a state with a graph.
    return not any(part.requires_grad or part.is_neg() or (outside and part.is_inference()) for part in (h, c))


def _bias_sums(weights: list[list[Tensor]]) -> Sequence[Tensor | None]:
    """b_ih + b_hh of each layer, in one launch; None for layers without biases."""
    if len(weights[0]) == 2:
        return [None] * len(weights)
    if in_plain_pytorch():
        # vmap has no rule for lists.
        return [own[2] + own[3] for own in weights]
    return torch.ops.aten._foreach_add.List([own[2] for own in weights], [own[3] for own in weights])


def _projected(module: Any, layer: int, weight_ih: Tensor, bias: Tensor | None, sequence: Tensor) -> Tensor:
    """A layer's input times W_ih^T, plus the sum of its biases."""
    if layer > 0:
        sequence = nn.functional.dropout(sequence, module.dropout, module.training)
    return linear(sequence, weight_ih, bias)


def _autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that nn.LSTM computes in: autocast's where it is on, except for float64 tensors."""
    cast = under_autocast(tensor.device) and tensor.dtype != torch.float64
    return torch.get_autocast_dtype(tensor.device.type) if cast else tensor.dtype
