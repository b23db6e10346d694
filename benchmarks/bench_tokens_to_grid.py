"""Scatter of observation tokens into the normalised grid that Fast's encoder reads.

No row holds a cell twice, because the token that wins is undefined in upstream's indexing on CUDA.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Size, choose, parametrized, shapes
from metta_fastagent import ops

FEATURES, SIDE, EMPTY = 25, 11, 255
CELLS = FEATURES * SIDE * SIDE
# Coprime to the number of cells (5^2 11^2), so that no row visits a cell twice.
STRIDE = 1009
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


def package(tokens: Tensor, scale: Tensor) -> Tensor:
    """The package's operation."""
    return ops.tokens_to_grid(tokens, FEATURES, SIDE, SIDE, scale)


def make_case(size: Size, device: torch.device) -> Case:
    inputs = make_inputs(size, device)

    def call_of(provider: str) -> Callable[[], Any]:
        return functools.partial(choose(provider, {"upstream": upstream}, package), *inputs)

    return Case("tokens_to_grid", call_of, moved_bytes=size["rows"] * (3 * size["tokens"] + 4 * CELLS))


@parametrized(PROVIDERS, SHAPES)
def test_tokens_to_grid(measure):
    measure(make_case)
