"""Observation tokens to the normalised grid that Fast's encoder reads, and that encoder's first layer.

No row sets a cell twice, because upstream's indexing does not define on CUDA which token wins.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Case, Size, choose, parametrized, shapes
from metta_fastagent import ops

FEATURES, SIDE, EMPTY, LAYER_STRIDE = 25, 11, 255, 3
CELLS = FEATURES * SIDE * SIDE
# Coprime to the number of cells (5^2 11^2), so that no row visits a cell twice.
STRIDE = 1009
KINDS = ("tokens_to_grid", "tokens_conv2d forward", "tokens_conv2d forward + backward")
EMPTY_SHARE = 0.3
PROVIDERS = ("upstream", "torch.compile", "eager", "native", "triton")
SHAPES = shapes("rows tokens", quick=[(256, 64)], full=[(1, 200), (64, 200), (1024, 200)], gpu=[(16384, 200)])


def make_inputs(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens uint8 [rows, tokens, 3] in distinct cells, about a third of them empty, and each feature's scale."""
    rows, count = size["rows"], size["tokens"]
    generator = torch.Generator(device).manual_seed(0)
    start = torch.randint(CELLS, (rows, 1), device=device, generator=generator)
    cell = (start + STRIDE * torch.arange(count, device=device)) % CELLS
    feature, place = cell // (SIDE * SIDE), cell % (SIDE * SIDE)
    value = torch.randint(1, 256, (rows, count), device=device, generator=generator)
    tokens = torch.stack((place // SIDE * 16 + place % SIDE, feature, value), dim=-1).to(torch.uint8)
    tokens[torch.rand(rows, count, device=device, generator=generator) < EMPTY_SHARE] = EMPTY
    return tokens, torch.rand(FEATURES, device=device, generator=generator) * 9 + 1


def upstream(tokens: Tensor, scale: Tensor) -> Tensor:
    """The reference agent's encoder: boolean masks, then one assignment by advanced indexing, then a division."""
    rows, count = tokens.shape[:2]
    coordinate, feature, value = tokens[..., 0], tokens[..., 1].long(), tokens[..., 2].float()
    x, y = (coordinate >> 4).long(), (coordinate & 15).long()
    valid = (coordinate != EMPTY) & (x < SIDE) & (y < SIDE) & (feature < FEATURES)
    row = torch.arange(rows, device=tokens.device).unsqueeze(1).expand(rows, count)
    grid = torch.zeros(rows, FEATURES, SIDE, SIDE, device=tokens.device)
    grid[row[valid], feature[valid], x[valid], y[valid]] = value[valid]
    return grid / scale.view(1, -1, 1, 1)


def formula(tokens: Tensor, scale: Tensor, *layer: Tensor) -> Tensor:
    """The grid or, given a layer's weight and bias, its convolution and ReLU."""
    grid = upstream(tokens, scale)
    return F.relu(F.conv2d(grid, *layer, stride=LAYER_STRIDE)) if layer else grid


def package(tokens: Tensor, scale: Tensor, *layer: Tensor) -> Tensor:
    """The same with the package's operations."""
    if layer:
        return ops.tokens_conv2d(tokens, *layer, scale=scale, width=SIDE, height=SIDE, stride=LAYER_STRIDE, relu=True)
    return ops.tokens_to_grid(tokens, FEATURES, SIDE, SIDE, scale)


def make_case(kind: str, size: Size, device: torch.device) -> Case:
    leaves = [] if kind == "tokens_to_grid" else [*nn.Conv2d(FEATURES, 64, 5).to(device).parameters()]
    inputs = (*make_inputs(size, device), *leaves)

    def call_of(provider: str) -> Callable[[], Any]:
        run = functools.partial(choose(provider, {"upstream": formula}, package), *inputs)
        if not kind.endswith("backward"):
            return torch.no_grad()(run)
        return lambda: torch.autograd.grad(run().square().mean(), leaves)

    floats = 64 * 9 if leaves else CELLS
    return Case(kind, call_of, moved_bytes=size["rows"] * (3 * size["tokens"] + 4 * floats), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@parametrized(PROVIDERS, SHAPES)
def test_tokens(measure, kind):
    measure(functools.partial(make_case, kind))
