"""L2-init loss: the sum of squared differences of the weights from their initial values, and its gradient.

`upstream` adds one term per weight. The initial weights are on the device for all providers, which saves upstream the
transfers that it makes if they are stored on the CPU.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Case, Size, choose, parametrized, shapes
from metta_fastagent import ops

PROVIDERS = ("upstream", "foreach", "torch.compile", "eager", "native", "triton")
MODES = ("forward", "forward + backward")
SHAPES = shapes(
    "tensors parameters",
    quick=[(7, 300_000)],
    full=[(1, 64), (14, 14_000_000), (100, 200_000), (100, 3_000_000)],
    gpu=[(100, 30_000_000), (1000, 2_000_000)],
)


def make_inputs(size: Size, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Square weights slightly off their initial values, and those initial values."""
    width = round((size["parameters"] / size["tensors"]) ** 0.5)
    generator = torch.Generator(device).manual_seed(0)
    initial = [torch.randn(width, width, device=device, generator=generator) for _ in range(size["tensors"])]
    moved = [start + 0.01 * torch.randn(width, width, device=device, generator=generator) for start in initial]
    return [param.requires_grad_() for param in moved], initial


def upstream(params: Sequence[Tensor], initial: Sequence[Tensor]) -> Tensor:
    """One subtraction, square and sum per weight."""
    total = torch.zeros((), device=params[0].device)
    for param, start in zip(params, initial, strict=True):
        total = total + torch.sum((param - start) ** 2)
    return total


def foreach(params: Sequence[Tensor], initial: Sequence[Tensor]) -> Tensor:
    """Differences and norms of all weights in one call each."""
    norms = torch._foreach_norm(torch._foreach_sub(list(params), list(initial)))
    return torch.stack(norms).square().sum()


def make_case(mode: str, size: Size, device: torch.device) -> Case:
    params, initial = make_inputs(size, device)

    def call_of(provider: str) -> Callable[[], Any]:
        loss = choose(provider, {"upstream": upstream, "foreach": foreach}, ops.l2_init_loss)

        def with_backward() -> tuple[Tensor, ...]:
            value = loss(params, initial)
            return value, *torch.autograd.grad(value, params)

        return with_backward if mode != "forward" else torch.no_grad()(lambda: loss(params, initial))

    # Both lists in; with the backward both again, and the gradient out.
    per_parameter = 8 if mode == "forward" else 20
    return Case(f"l2_init_loss {mode}", call_of, moved_bytes=per_parameter * size["parameters"])


@pytest.mark.parametrize("mode", MODES)
@parametrized(PROVIDERS, SHAPES)
def test_l2_init_loss(measure, mode):
    measure(functools.partial(make_case, mode))
