"""Generalized advantages of a rollout.

`upstream` is the loop over time that trainers write. TorchRL multiplies by a matrix of discounts. pufferlib's operator
omits the last step, whose reward its layout does not have, so it is timed without a comparison.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Case, Size, choose, parametrized, shapes
from metta_fastagent import ops

PROVIDERS = ("upstream", "torch.compile", "eager", "native", "triton", "torchrl", "pufferlib")
GAMMA, LAMBDA = 0.99, 0.95
# Rows are environments.
SHAPES = shapes(
    "rows time",
    quick=[(64, 32), (512, 16)],
    full=[(4096, 16), (4096, 64), (16, 1024)],
    gpu=[(65536, 64)],
)


class Rollout(NamedTuple):
    """Numbers [rows, time], the episode ends, and the value after the last step [rows]."""

    rewards: Tensor
    values: Tensor
    ends: Tensor
    next_value: Tensor
    bootstrap_values: Tensor


def make_inputs(size: Size, device: torch.device) -> Rollout:
    """An episode ends at 3 % of the steps."""
    shape, generator = (size["rows"], size["time"]), torch.Generator(device).manual_seed(0)
    rewards, values, final = torch.randn(3, *shape, device=device, generator=generator)
    ends = torch.rand(shape, device=device, generator=generator) < 0.03
    next_value = torch.randn(size["rows"], device=device, generator=generator)
    return Rollout(rewards, values, ends, next_value, torch.where(ends, final, 0.0))


def upstream(rollout: Rollout) -> Tensor:
    """One step after the other, starting from the last."""
    rewards, values, ends, next_value, bootstrap_values = rollout
    advantages, running, following = torch.empty_like(values), torch.zeros_like(next_value), next_value
    for t in reversed(range(values.shape[1])):
        target = torch.where(ends[:, t], bootstrap_values[:, t], following)
        delta = rewards[:, t] + GAMMA * target - values[:, t]
        running = delta + GAMMA * LAMBDA * running * ~ends[:, t]
        advantages[:, t], following = running, values[:, t]
    return advantages


def with_torchrl(provider: str) -> Callable[[Rollout], Tensor]:
    """TorchRL's vectorized estimate."""
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    def advantages(rollout: Rollout) -> Tensor:
        rewards, values, ends, next_value, bootstrap_values = rollout
        following = torch.cat([values[:, 1:], next_value.unsqueeze(1)], dim=1)
        following = torch.where(ends, bootstrap_values, following)
        # Every end counts as a truncation: for a termination, the following value is 0.
        given = values, following, rewards, ends, torch.zeros_like(ends)
        found, _ = vec_generalized_advantage_estimate(GAMMA, LAMBDA, *(each.unsqueeze(-1) for each in given))
        return found.squeeze(-1)

    return advantages


def with_pufferlib(provider: str) -> Callable[[Rollout], Tensor]:
    """pufferlib's operator in C or CUDA."""
    from pufferlib import _C  # noqa: F401

    def advantages(rollout: Rollout) -> Tensor:
        found, ratios = torch.zeros_like(rollout.values), torch.ones_like(rollout.values)
        given = rollout.values, rollout.rewards, rollout.ends.float(), ratios, found
        torch.ops.pufferlib.compute_puff_advantage(*given, GAMMA, LAMBDA, 1.0, 1.0)
        return found

    return advantages


def package(rollout: Rollout) -> Tensor:
    """`ops.advantages`."""
    return ops.advantages(*rollout, GAMMA, LAMBDA)


FORMULAS = {"upstream": upstream, "torchrl": with_torchrl, "pufferlib": with_pufferlib}


def make_case(size: Size, device: torch.device) -> Case:
    rollout = make_inputs(size, device)

    def call_of(provider: str) -> Callable[[], Any]:
        advantages = choose(provider, FORMULAS, package)
        return lambda: advantages(rollout)

    # In: rewards, values, values at the ends, flags. Out: advantages.
    moved = size["rows"] * (17 * size["time"] + 4)
    return Case("advantages", call_of, uncompared=("pufferlib",), moved_bytes=moved)


@parametrized(PROVIDERS, SHAPES)
def test_advantages(measure):
    measure(make_case)
