"""Generalized advantage estimates of a rollout, with V-trace's clipped importance ratios as an option.

    delta[t]     = min(ratio[t], rho_clip) (reward[t] + gamma v[t + 1] - value[t])
    advantage[t] = delta[t] + gamma lam min(ratio[t], c_clip) advantage[t + 1]

with v[t + 1] = value[t + 1]; where step t ended an episode, v[t + 1] is its bootstrap value, and advantage[t + 1]
counts as 0. Without ratios the factors are 1. Schulman et al. 2016 (https://arxiv.org/abs/1506.02438), section 3;
Espeholt et al. 2018 (https://arxiv.org/abs/1802.01561), section 4.1, whose targets are these advantages plus the
values.
"""

import torch
from torch import Tensor

from metta_fastagent.ops import autograd
from metta_fastagent.ops.dtypes import NATIVE_DTYPES, compute_dtype, contiguous
from metta_fastagent.ops.ppo.reference import Rollout, advantages_eager
from metta_fastagent.runtime.checks import describe, is_floating, require_number, require_tensor
from metta_fastagent.runtime.dispatch import Operator


def advantages(
    rewards: Tensor,
    values: Tensor,
    ends: Tensor,
    next_value: Tensor,
    bootstrap_values: Tensor,
    gamma: float,
    lam: float,
    *,
    valid: Tensor | None = None,
    ratios: Tensor | None = None,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
) -> Tensor:
    """Generalized advantages; advantages plus `values` are the targets of the value function.

    Args:
        rewards: floating-point tensor [B, T] of the same dtype as `values` and all other floating-point arguments.
        values: [B, T], T >= 1, value of the observation before each step.
        ends: bool [B, T], True if the step ended an episode, by termination or truncation.
        next_value: [B], value of the observation after the last step.
        bootstrap_values: [B, T], read where `ends` is True: 0 for a termination, the value of the final observation
            for a truncation.
        gamma: discount of a step, 0 to 1.
        lam: lambda, 0 to 1.
        valid: bool [B, T], False for a step whose advantage is 0, also in the sums of earlier steps; None counts all
            steps.
        ratios: [B, T], probability of each action now over that in the rollout; None means 1 throughout, unclipped.
        rho_clip, c_clip: upper clips of the ratios, numbers >= 0; inf does not clip.

    Returns:
        Tensor [B, T] of the dtype of `values`; arithmetic is float32 (float64 for float64). If a gradient is needed,
        plain PyTorch runs, which is differentiable any number of times.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or number.

    Example:
        >>> rewards, values, bootstrap_values = torch.rand(3, 4, 16)
        >>> ends, next_value = torch.rand(4, 16) < 0.1, torch.rand(4)
        >>> advantages(rewards, values, ends, next_value, bootstrap_values, gamma=0.99, lam=0.95).shape
        torch.Size([4, 16])
    """
    expected = "a floating-point tensor of shape [B, T] with T >= 1"
    values = require_tensor("values", values, expected, is_floating, lambda t: t.dim() == 2 and t.shape[1] > 0)
    for name, tensor, dtype, shape in (
        ("rewards", rewards, values.dtype, values.shape),
        ("ends", ends, torch.bool, values.shape),
        ("next_value", next_value, values.dtype, values.shape[:1]),
        ("bootstrap_values", bootstrap_values, values.dtype, values.shape),
    ):
        _require_like(name, tensor, dtype, shape, values)
    if valid is not None:
        _require_like("valid", valid, torch.bool, values.shape, values)
    if ratios is not None:
        _require_like("ratios", ratios, values.dtype, values.shape, values)
    gamma, lam = _require_fraction("gamma", gamma), _require_fraction("lam", lam)
    rho_clip, c_clip = (
        require_number(name, number, "a number >= 0", 0.0)
        for name, number in (("rho_clip", rho_clip), ("c_clip", c_clip))
    )
    tensors = rewards, values, ends, next_value, bootstrap_values, valid, ratios
    rollout = Rollout(*tensors, gamma, lam, rho_clip, c_clip)
    numbers = (rewards, values, next_value, bootstrap_values, *(() if ratios is None else (ratios,)))
    if autograd.in_plain_pytorch() or autograd.records_graph(*numbers):
        return advantages_eager(rollout)
    return _advantages(rollout)


def _require_like(name: str, tensor: object, dtype: torch.dtype, shape: torch.Size, values: Tensor) -> None:
    if (
        isinstance(tensor, Tensor)
        and tensor.dtype == dtype
        and tensor.shape == shape
        and tensor.device == values.device
    ):
        return
    kind = "bool" if dtype == torch.bool else str(dtype).removeprefix("torch.")
    expected = f"a {kind} tensor of shape {list(shape)} on {values.device} for values [B, T] = {list(values.shape)}"
    require_tensor(name, tensor, expected, lambda found: found == dtype)
    raise ValueError(f"{name}: got {describe(tensor)}, expected {expected}")


def _require_fraction(name: str, value: object) -> float:
    number = require_number(name, value, "a number from 0 to 1", 0.0)
    if number > 1:
        raise ValueError(f"{name}: got {value!r}, expected a number from 0 to 1")
    return number


def _native(rollout: Rollout) -> Tensor:
    dtype = rollout.values.dtype
    given = rollout[:7] if dtype in NATIVE_DTYPES else rollout.tensors(compute_dtype(dtype))
    found = torch.ops.metta_fastagent_native.advantages.default(*map(contiguous, given), *rollout[7:])
    return found if found.dtype == dtype else found.to(dtype)


_advantages = Operator(
    "advantages(Tensor rewards, Tensor values, Tensor ends, Tensor next_value, Tensor bootstrap_values, Tensor? valid,"
    " Tensor? ratios, float gamma, float lam, float rho_clip, float c_clip) -> Tensor",
    advantages_eager,
    lambda rollout: rollout.values.new_empty(rollout.values.shape),
    f"{__package__}.kernels:advantages_cuda",
    _native,
    packed=(0, Rollout),
)
