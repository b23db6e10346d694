"""Singular-value metrics of an agent's Linear weights.

`upstream` decomposes one weight after the other in float32 and reads each figure from the device. The package works in
float64, which costs time but separates a collapsed dimension from rounding.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Size, parametrized, shapes
from metta_fastagent.weight_metrics import ZERO_SV, analyze_weights

DELTA = 0.01
# The figures that do not depend on the smallest singular value.
COMPARED = ("weight_norm", "mean_sv", "largest_sv", "sv_loglog_r2", "sv_loglog_slope", "effective_rank")
PROVIDERS = ("upstream", "eager")
SHAPES = shapes("weights width", quick=[(6, 64)], full=[(6, 128), (24, 128)], gpu=[(24, 512)])


def upstream(name: str, weight: Tensor) -> dict[str, Any]:
    """Metrics of a single weight, each value read separately."""
    values = torch.linalg.svdvals(weight)
    live = values[values > ZERO_SV]
    x = torch.arange(1, live.numel() + 1, device=weight.device, dtype=weight.dtype).log()
    y = (live + ZERO_SV).log()
    dx, dy = x - x.mean(), y - y.mean()
    slope = (dx * dy).sum() / (dx * dx).sum()
    residual = dy - slope * dx
    shares = values.cumsum(0) / values.sum()
    return {
        "name": name,
        "weight_norm": torch.linalg.norm(weight).item(),
        "mean_sv": values.mean().item(),
        "largest_sv": values.max().item(),
        "sv_ratio": (live.max() / live.min()).item() if live.numel() else 0.0,
        "collapsed_dim_%": (values <= ZERO_SV).float().mean().item(),
        "sv_loglog_r2": (1 - (residual * residual).sum() / (dy * dy).sum()).item(),
        "sv_loglog_slope": slope.item(),
        "effective_rank": int((shares < 1 - DELTA).sum().item()) + 1,
    }


def make_case(size: Size, device: torch.device) -> Case:
    generator = torch.Generator(device).manual_seed(0)
    shape = (size["width"], size["width"] * 2)
    weights = {f"layer{i}": torch.randn(*shape, device=device, generator=generator) for i in range(size["weights"])}

    def call_of(provider: str) -> Callable[[], Any]:
        return lambda: (
            [upstream(*w) for w in weights.items()] if provider == "upstream" else analyze_weights(weights, DELTA)
        )

    def compared(records: list[dict[str, Any]]) -> list[list[float]]:
        return [[float(record.get(key, math.nan)) for key in COMPARED] for record in records]

    # A float32 decomposition against a float64 one.
    return Case("weight_metrics", call_of, compared, rtol=1e-3, atol=1e-4)


@parametrized(PROVIDERS, SHAPES)
def test_weight_metrics(measure):
    measure(make_case)
