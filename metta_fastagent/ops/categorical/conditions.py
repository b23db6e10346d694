"""Masks and temperatures for the categorical distributions of `evaluate_actions` and `sample_actions`.

    z_j = x_j / temperature if the mask allows action j, else -inf

Log-probabilities, entropy and draws use the logits z. The kernels and the C++ operators compute z while they load the
logits x; `reference.condition` computes it in plain PyTorch. A temperature is a number or, so that it can change
between replays of a CUDA graph, a one-element tensor on the logits' device.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metta_fastagent.ops.autograd import checks_values
from metta_fastagent.ops.dtypes import contiguous
from metta_fastagent.runtime.checks import describe, is_number
from metta_fastagent.runtime.dispatch import needs_operator

MaskLike = Tensor | tuple[Tensor, Tensor] | None


class Conditions(NamedTuple):
    """A mask and a temperature for logits [N, A]; None instead of this tuple changes nothing."""

    mask: Tensor | None = None  # bool [N, A], False for a forbidden action
    temperature_tensor: Tensor | None = None  # [], the temperature in memory; then `temperature` is 1
    temperature: float = 1.0

    def divisor(self) -> Tensor | float:
        """The temperature; one in memory that is not positive gives NaN, or an error on the CPU, where it is read."""
        if self.temperature_tensor is None:
            return self.temperature
        if checks_values(self.temperature_tensor):
            _require_positive(float(self.temperature_tensor))
        return torch.where(self.temperature_tensor > 0, self.temperature_tensor, torch.nan)

    def native(self) -> tuple[Tensor | None, float]:
        """The mask and the temperature in the form that the C++ operators take."""
        return contiguous(self.mask), float(self.divisor())


# The fields as written in an operator's schema.
SCHEMA = "Tensor? mask, Tensor? temperature_tensor, float temperature"


def checked_conditions(
    logits: Tensor,
    mask: MaskLike,
    temperature: object,
    cum_action_max_params: Tensor | None = None,
    action_index_tensor: Tensor | None = None,
) -> Conditions | None:
    """The conditions given by `mask` and `temperature`; an error names the wrong argument.

    A pair of masks is combined into one, which needs one of the two action tables.
    """
    if mask is None and temperature.__class__ is float and temperature == 1:
        return None
    mask = _checked_mask(mask, logits, cum_action_max_params, action_index_tensor)
    expected = "a finite number > 0 or a tensor with one such number"
    if is_number(temperature):
        return Conditions(mask, None, _require_positive(temperature))
    if not isinstance(temperature, Tensor) or not temperature.is_floating_point():
        raise TypeError(f"temperature: got {describe(temperature)}, expected {expected}")
    if temperature.numel() != 1 or temperature.requires_grad or temperature.device != logits.device:
        found = f"{describe(temperature)}{' that requires a gradient' if temperature.requires_grad else ''}"
        raise ValueError(f"temperature: got {found}, expected {expected} on {logits.device}, without a gradient")
    return Conditions(mask, temperature.reshape(()))


def _require_positive(temperature: Any) -> float:
    if not 0 < float(temperature) < math.inf:
        raise ValueError(f"temperature: got {temperature!r}, expected a finite number > 0")
    return float(temperature)


def _checked_mask(
    mask: MaskLike, logits: Tensor, cum_action_max_params: Tensor | None, action_index_tensor: Tensor | None
) -> Tensor | None:
    """The mask as a bool tensor [N, A] or None."""
    if mask is None:
        return None
    if isinstance(mask, Tensor):
        return _require_mask("mask", mask, logits, logits.shape[1])
    if not isinstance(mask, tuple) or len(mask) != 2:
        raise TypeError(f"mask: got {describe(mask)}, expected a bool tensor or a pair of them")
    width = None
    if action_index_tensor is not None:
        kinds, params = action_index_tensor.long().unbind(1)
    elif cum_action_max_params is not None:
        kinds, params = _pairs_of(cum_action_max_params, logits.shape[1])
        width = cum_action_max_params.numel() - 1
    else:
        raise ValueError("mask: got a pair of masks without an action table, expected a bool tensor [N, A]")
    return _allowed("mask[0]", mask[0], logits, kinds, width) & _allowed("mask[1]", mask[1], logits, params)


def _allowed(name: str, mask: object, logits: Tensor, column: Tensor, width: int | None = None) -> Tensor:
    """[N, A]: for each action, the mask's entry at its `column`."""
    allowed = _require_mask(name, mask, logits, width)
    last = allowed.shape[1] - 1
    if checks_values(column) and not needs_operator(column) and int(column.max()) > last:
        raise ValueError(f"{name}: got {describe(allowed)}, expected at least {int(column.max()) + 1} columns")
    return allowed[:, column.clamp(max=last)]


def _require_mask(name: str, mask: object, logits: Tensor, width: int | None) -> Tensor:
    expected = f"a bool tensor of shape [{logits.shape[0]}, {'any' if width is None else width}] on {logits.device}"
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name}: got {describe(mask)}, expected {expected}")
    fits = mask.dim() == 2 and mask.shape[0] == logits.shape[0] and mask.shape[1] == (width or max(1, mask.shape[1]))
    if not fits or mask.device != logits.device:
        raise ValueError(f"{name}: got {describe(mask)}, expected {expected}")
    return mask


def _pairs_of(cum_action_max_params: Tensor, num_actions: int) -> tuple[Tensor, Tensor]:
    """(type [A], parameter [A]) of each logit index."""
    index = torch.arange(num_actions, device=cum_action_max_params.device)
    first = cum_action_max_params[:-1] + torch.arange(cum_action_max_params.numel() - 1, device=index.device)
    kind = torch.bucketize(index, first, right=True) - 1
    return kind, index - first[kind]
