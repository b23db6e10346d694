"""Clipping an agent's weights: `clip_weights()`, as a trainer calls it after each optimizer step.

The weights are within the range from the second call on, as nearly all are in training. `upstream` walks the modules
and clamps the weight and bias of each; `foreach` clamps lists of tensors gathered beforehand, so it skips the walk.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Size, parametrized, shapes
from metta_fastagent import PyTorchAgentMixin

BOUND = 0.5
PROVIDERS = ("upstream", "foreach", "torch.compile", "eager", "native", "triton")
SHAPES = shapes(
    "tensors parameters",
    quick=[(14, 300_000), (200, 200_000)],
    full=[(2, 64), (14, 14_000_000), (200, 3_000_000), (200, 30_000_000), (2000, 2_000_000)],
    gpu=[(200, 100_000_000)],
)


class Stack(PyTorchAgentMixin, nn.Module):
    """Linear layers [width, width], each a weight and a bias."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, device="meta") for _ in range(layers))
        self.clip_range, self.clip_mode = BOUND, "absolute"


def clip_by_module(agent: nn.Module) -> None:
    """Upstream's loop over modules."""
    for module in agent.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            module.weight.data.clamp_(-BOUND, BOUND)
            if module.bias is not None:
                module.bias.data.clamp_(-BOUND, BOUND)


def clip_foreach(tensors: list[Tensor]) -> None:
    """All tensors in two calls."""
    torch._foreach_clamp_min_(tensors, -BOUND)
    torch._foreach_clamp_max_(tensors, BOUND)


def clip_each(tensors: list[Tensor]) -> None:
    """One call per tensor, for torch.compile to fuse."""
    for tensor in tensors:
        tensor.clamp_(-BOUND, BOUND)


def make_case(size: Size, device: torch.device) -> Case:
    layers = size["tensors"] // 2
    agent = Stack(layers, round((size["parameters"] / layers) ** 0.5)).to_empty(device=device)
    data = [param.data for param in agent.parameters()]
    generator = torch.Generator(device).manual_seed(0)
    for tensor in data:
        tensor.normal_(std=0.4, generator=generator)
    initial = [tensor.clone() for tensor in data]

    def call_of(provider: str) -> Callable[[], Any]:
        if provider == "torch.compile":
            return functools.partial(torch.compile(clip_each, dynamic=False), data)
        calls = {"upstream": lambda: clip_by_module(agent), "foreach": lambda: clip_foreach(data)}
        return calls.get(provider, agent.clip_weights)

    return Case(
        "clip_weights",
        call_of,
        compared=lambda _: data,
        reset=lambda: torch._foreach_copy_(data, initial),
        # float32, read once: nothing is out of range any more, so nothing is written.
        moved_bytes=4 * size["parameters"],
    )


@parametrized(PROVIDERS, SHAPES)
def test_clip_weights(measure):
    measure(make_case)
