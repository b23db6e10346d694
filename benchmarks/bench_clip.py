"""Clip of an agent's weights: `clip_weights()`, as a trainer calls it after each optimizer step.

The weights are within the range from the second call on, as nearly all are in training. `upstream` walks the modules
and clamps weight and bias of each; `foreach` clamps lists of tensors that were gathered before, so it is spared the
walk; the others are the mixin's `clip_weights()`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness import Provider, Shape, Skipped, Suite, compiled_provider, package_providers
from metta_fastagent import PyTorchAgentMixin

BOUND = 0.5


class Stack(PyTorchAgentMixin, nn.Module):
    """Linear layers [width, width], each a weight and a bias."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, device="meta") for _ in range(layers))
        self.clip_range, self.clip_mode = BOUND, "absolute"


class Inputs(NamedTuple):
    """The agent, and its weights as they were."""

    agent: Stack
    initial: list[Tensor]

    def reset(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(list(self.agent.parameters()), self.initial)


def make_inputs(size: Mapping[str, int], device: torch.device) -> Inputs:
    """An agent of `tensors` tensors, `parameters` in all, some of its weights outside of the range."""
    layers = size["tensors"] // 2
    width = round((size["parameters"] / layers) ** 0.5)
    agent = Stack(layers, width).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for param in agent.parameters():
        nn.init.normal_(param, std=0.4, generator=generator)
    return Inputs(agent, [param.detach().clone() for param in agent.parameters()])


def clip_by_module(agent: nn.Module) -> None:
    """Upstream's loop: every module, weight and bias by itself."""
    for module in agent.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            module.weight.data.clamp_(-BOUND, BOUND)
            if module.bias is not None:
                module.bias.data.clamp_(-BOUND, BOUND)


def clip_foreach(tensors: list[Tensor]) -> None:
    """All tensors in two calls."""
    torch._foreach_clamp_min_(tensors, -BOUND)
    torch._foreach_clamp_max_(tensors, BOUND)


def clip_all(tensors: list[Tensor]) -> None:
    """One call for each tensor, for torch.compile to join."""
    for tensor in tensors:
        tensor.clamp_(-BOUND, BOUND)


def make_providers(size: Mapping[str, int], device: torch.device, compiled: bool) -> list[Provider | Skipped]:
    """upstream, foreach, torch.compile and the package."""
    inputs = make_inputs(size, device)
    data = [param.data for param in inputs.agent.parameters()]
    shared: dict[str, Any] = {"compared": lambda _: data, "reset": inputs.reset}
    return [
        Provider("upstream", lambda: clip_by_module(inputs.agent), **shared),
        Provider("foreach", lambda: clip_foreach(data), **shared),
        compiled_provider(clip_all, lambda f: lambda: f(data), compiled, **shared),
        *package_providers(device, inputs.agent.clip_weights, **shared),
    ]


SUITES = [
    Suite(
        "clip_weights",
        ("upstream", "foreach", "torch.compile", "eager", "triton", "native"),
        [
            Shape("quick", {"tensors": 14, "parameters": 300_000}),
            Shape("quick", {"tensors": 200, "parameters": 200_000}),
            Shape("full", {"tensors": 200, "parameters": 3_000_000}),
            Shape("full", {"tensors": 200, "parameters": 30_000_000}),
            Shape("full", {"tensors": 2000, "parameters": 2_000_000}),
            Shape("gpu", {"tensors": 200, "parameters": 100_000_000}),
        ],
        make_providers,
        # fp32, read: nothing is out of range any more. What writes it all the same moves twice as much.
        count_bytes=lambda size: 4 * size["parameters"],
    )
]


def test_providers(case, run_case):
    run_case(case)
