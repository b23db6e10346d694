"""Masks and temperatures of the categorical distributions of `evaluate_actions` and `sample_actions`.

    z_j = x_j / temperature if the mask allows action j, else -inf

Log-probabilities, entropy and draws are those of the logits z. The kernels and the C++ operators compute z as they load
the logits x; `condition` is the eager twin. A temperature is a float or, so that it can be changed while a CUDA graph
replays, a tensor with one element on the logits' device.
"""

import math
from typing import Any

import torch
from torch import Tensor

from metta_fastagent._dispatch import needs_operator
from metta_fastagent.ops._autograd import checks_values
from metta_fastagent.ops._checks import BadRowError, compute_dtype, contiguous, describe, is_number

MaskLike = Tensor | tuple[Tensor, Tensor] | None
_PLAIN = {"MASKED": False, "TEMPERATURE": 0}
# Of the operators' schemas.
ARGUMENTS = "Tensor? mask=None, Tensor? temperature_tensor=None, float temperature=1.0"


def condition(logits: Tensor, mask: Tensor | None, temperature_tensor: Tensor | None, temperature: float) -> Tensor:
    """z [N, A] in the dtype that arithmetic runs in; a temperature that is not positive makes it NaN."""
    z = logits.to(compute_dtype(logits.dtype))
    if temperature_tensor is not None:
        if checks_values(temperature_tensor):
            _read(temperature_tensor)
        z = z / torch.where(temperature_tensor > 0, temperature_tensor, torch.nan).to(z.dtype)
    elif temperature != 1:
        z = z / temperature
    return z if mask is None else z.masked_fill(~mask, -torch.inf)


def gradient_of_logits(
    grad: Tensor, mask: Tensor | None, temperature_tensor: Tensor | None, temperature: float
) -> Tensor:
    """The gradient of the logits x, of that of z."""
    if mask is not None:
        grad = torch.where(mask, grad, 0.0)
    if temperature_tensor is not None:
        return grad / temperature_tensor.to(grad.dtype)
    return grad / temperature if temperature != 1 else grad


def checked_conditions(
    logits: Tensor,
    mask: MaskLike,
    temperature: object,
    cum_action_max_params: Tensor | None = None,
    action_index_tensor: Tensor | None = None,
) -> tuple[Any, ...]:
    """The operators' arguments (mask, temperature as a tensor or None, as a float); none if they change nothing."""
    if mask is None and temperature.__class__ is float and temperature == 1:
        return ()
    mask = _checked_mask(mask, logits, cum_action_max_params, action_index_tensor)
    return mask, *_checked_temperature(temperature, logits)


def _checked_temperature(temperature: object, logits: Tensor) -> tuple[Tensor | None, float]:
    """The temperature as (tensor or None, float); the operators read a tensor on the CPU only."""
    expected = "a finite number > 0 or a tensor with one such number"
    if is_number(temperature):
        _require_positive(temperature)
        if logits.dtype == torch.float64 and temperature != 1:
            # A kernel's own numbers are float32.
            return torch.full((), float(temperature), dtype=torch.float64, device=logits.device), 1.0
        return None, float(temperature)
    if not isinstance(temperature, Tensor) or not temperature.is_floating_point():
        raise TypeError(f"temperature: got {describe(temperature)}, expected {expected}")
    if temperature.numel() != 1 or temperature.requires_grad or temperature.device != logits.device:
        found = f"{describe(temperature)}{' that requires a gradient' if temperature.requires_grad else ''}"
        raise ValueError(f"temperature: got {found}, expected {expected} on {logits.device}, without a gradient")
    return temperature.reshape(()), 1.0


def _read(temperature: Tensor) -> float:
    return _require_positive(float(temperature))


def _require_positive(temperature: Any) -> float:
    if not 0 < float(temperature) < math.inf:
        raise ValueError(f"temperature: got {temperature!r}, expected a finite number > 0")
    return float(temperature)


def _checked_mask(
    mask: MaskLike, logits: Tensor, cum_action_max_params: Tensor | None, action_index_tensor: Tensor | None
) -> Tensor | None:
    """The mask as a bool tensor [N, A] or None; a pair of masks is combined, which takes the table of the actions."""
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
    """[N, A]: the mask's entry at `column` of each action."""
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


def kernel_arguments(
    logits: Tensor, mask: Tensor | None, temperature_tensor: Tensor | None, temperature: float
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """The kernels' tensors, for which the logits stand in if there are none, and their constants."""
    if mask is None and temperature_tensor is None and temperature == 1:
        return (logits, logits), _PLAIN
    masked = mask is not None
    tempered = 2 if temperature_tensor is not None else int(temperature != 1)
    tensors = mask.contiguous() if masked else logits, logits if temperature_tensor is None else temperature_tensor
    return tensors, {"MASKED": masked, "TEMPERATURE": tempered}


def native_arguments(mask: Tensor | None, temperature_tensor: Tensor | None, temperature: float) -> tuple[Any, ...]:
    """The mask and the temperature as the C++ operators take them; none if they change nothing."""
    if mask is None and temperature_tensor is None and temperature == 1:
        return ()
    return contiguous(mask), temperature if temperature_tensor is None else _read(temperature_tensor)


def refuse_rows_without_distribution(entropy: Tensor, logits: Tensor, mask: Tensor | None) -> None:
    """Raise a BadRowError for the first row whose entropy is NaN: its logits z are NaN, +inf or -inf throughout."""
    bad = entropy.isnan()
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        if mask is not None and not bool((mask[row] & (logits[row] != -torch.inf)).any()):
            raise BadRowError(f"mask[{row}]: {NO_ACTION}")
        raise BadRowError(f"logits[{row}]: {NO_DISTRIBUTION}")


NO_ACTION = "got no allowed action with a logit above -inf, expected at least one"
NO_DISTRIBUTION = "holds NaN or +inf, or is -inf throughout; expected finite values or some -inf"
