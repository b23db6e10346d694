"""Scatter of observation tokens into the normalised grid that Fast's encoder reads.

The inputs hold no cell twice in a row, because which token then wins is undefined in upstream's indexing on CUDA.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Provider, Shape, Skipped, Suite, compiled_provider, package_providers
from metta_fastagent import ops

FEATURES, SIDE, EMPTY = 25, 11, 255
CELLS = FEATURES * SIDE * SIDE
# Prime to the number of cells (5^2 11^2), so that no row visits a cell twice.
STRIDE = 1009
EMPTY_SHARE = 0.3


class Inputs(NamedTuple):
    """Tokens uint8 [rows, tokens, 3] and what divides each feature's values."""

    tokens: Tensor
    scale: Tensor  # [25]


def make_inputs(size: Mapping[str, int], device: torch.device) -> Inputs:
    """Tokens in distinct cells, about a third of them empty."""
    rows, count = size["rows"], size["tokens"]
    generator = torch.Generator(device).manual_seed(0)
    start = torch.randint(CELLS, (rows, 1), device=device, generator=generator)
    cell = (start + STRIDE * torch.arange(count, device=device)) % CELLS
    feature, place = cell // (SIDE * SIDE), cell % (SIDE * SIDE)
    value = torch.randint(1, 256, (rows, count), device=device, generator=generator)
    tokens = torch.stack((place // SIDE * 16 + place % SIDE, feature, value), dim=-1).to(torch.uint8)
    empty = torch.rand(rows, count, device=device, generator=generator) < EMPTY_SHARE
    tokens[empty] = EMPTY
    return Inputs(tokens, torch.rand(FEATURES, device=device, generator=generator) * 9 + 1)


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


def make_providers(size: Mapping[str, int], device: torch.device, compiled: bool) -> list[Provider | Skipped]:
    """upstream, torch.compile and the package."""
    inputs = make_inputs(size, device)
    return [
        Provider("upstream", lambda: upstream(*inputs)),
        compiled_provider(upstream, lambda f: lambda: f(*inputs), compiled),
        *package_providers(device, lambda: ops.tokens_to_grid(inputs.tokens, FEATURES, SIDE, SIDE, inputs.scale)),
    ]


SUITES = [
    Suite(
        "tokens_to_grid",
        ("upstream", "torch.compile", "eager", "triton", "native"),
        [
            Shape("quick", {"rows": 256, "tokens": 64}),
            Shape("full", {"rows": 64, "tokens": 200}),
            Shape("full", {"rows": 1024, "tokens": 200}),
            Shape("gpu", {"rows": 16384, "tokens": 200}),
        ],
        make_providers,
        lambda size: size["rows"] * (3 * size["tokens"] + 4 * CELLS),
    )
]


def test_providers(case, run_case):
    run_case(case)
