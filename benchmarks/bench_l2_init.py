"""L2-init loss: the sum of squared differences of the weights to their initial values, and its gradient.

`upstream` adds up one term for each weight. The initial weights are on the device in all providers, which spares
upstream the transfers that it makes where they were remembered on the CPU.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Provider, Shape, Skipped, Suite, compiled_provider, package_providers
from metta_fastagent import ops

NAMES = ("upstream", "foreach", "torch.compile", "eager", "triton", "native")
SHAPES = [
    Shape("quick", {"tensors": 7, "parameters": 300_000}),
    Shape("full", {"tensors": 100, "parameters": 200_000}),
    Shape("full", {"tensors": 100, "parameters": 3_000_000}),
    Shape("gpu", {"tensors": 100, "parameters": 30_000_000}),
    Shape("gpu", {"tensors": 1000, "parameters": 2_000_000}),
]
Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


class Inputs(NamedTuple):
    """Square weights and their initial values."""

    params: list[Tensor]
    initial: list[Tensor]


def make_inputs(size: Mapping[str, int], device: torch.device) -> Inputs:
    """Weights a little away from where they began."""
    width = round((size["parameters"] / size["tensors"]) ** 0.5)
    generator = torch.Generator(device).manual_seed(0)
    initial = [torch.randn(width, width, device=device, generator=generator) for _ in range(size["tensors"])]
    moved = [start + 0.01 * torch.randn(width, width, device=device, generator=generator) for start in initial]
    return Inputs([param.requires_grad_() for param in moved], initial)


def upstream(params: Sequence[Tensor], initial: Sequence[Tensor]) -> Tensor:
    """One subtraction, square and sum for each weight."""
    total = torch.zeros((), device=params[0].device)
    for param, start in zip(params, initial, strict=True):
        total = total + torch.sum((param - start) ** 2)
    return total


def foreach(params: Sequence[Tensor], initial: Sequence[Tensor]) -> Tensor:
    """Differences and norms of all weights in one call each."""
    norms = torch._foreach_norm(torch._foreach_sub(list(params), list(initial)))
    return torch.stack(norms).square().sum()


def with_backward(loss: Loss, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """A function that returns the loss and its gradients."""

    def run() -> tuple[Tensor, ...]:
        value = loss(inputs.params, inputs.initial)
        return value, *torch.autograd.grad(value, inputs.params)

    return run


def forward_only(loss: Loss, inputs: Inputs) -> Callable[[], Tensor]:
    """A function that returns the loss."""
    return torch.no_grad()(lambda: loss(inputs.params, inputs.initial))


def make_providers(
    bind: Callable[[Loss, Inputs], Callable], size: Mapping[str, int], device: torch.device, compiled: bool
) -> list[Provider | Skipped]:
    """upstream, foreach, torch.compile and the package, each bound to the inputs by `bind`."""
    inputs = make_inputs(size, device)
    return [
        Provider("upstream", bind(upstream, inputs)),
        Provider("foreach", bind(foreach, inputs)),
        compiled_provider(upstream, lambda f: bind(f, inputs), compiled),
        *package_providers(device, bind(ops.l2_init_loss, inputs)),
    ]


SUITES = [
    Suite(
        "l2_init_loss forward",
        NAMES,
        SHAPES,
        lambda size, device, compiled: make_providers(forward_only, size, device, compiled),
        lambda size: 8 * size["parameters"],
    ),
    Suite(
        "l2_init_loss forward + backward",
        NAMES,
        SHAPES,
        lambda size, device, compiled: make_providers(with_backward, size, device, compiled),
        # Both lists in, twice, and the gradient out.
        lambda size: 20 * size["parameters"],
    ),
]


def test_providers(case, run_case):
    run_case(case)
