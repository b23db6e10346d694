"""Observation tokens to a grid, against a loop over the tokens and tables written by hand."""

import pytest
import torch
from references import DTYPES, assert_close, random_tokens, token_grid

from metta_fastagent.ops import tokens_to_grid

WINDOWS = [(11, 11), (1, 1), (16, 16), (3, 7), (7, 3), (16, 1)]
EMPTY = [255, 255, 255]


def test_hand_written_grid(device):
    tokens = torch.tensor(
        [
            [[0x00, 0, 10], [0x12, 1, 20], [0x21, 0, 255], EMPTY],
            [[0x20, 1, 3], EMPTY, [0x20, 1, 5], [0x02, 0, 0]],
        ],
        dtype=torch.uint8,
    )
    scale = torch.tensor([10.0, 2.0], device=device)
    grid = tokens_to_grid(tokens.to(device), 2, 3, 3, scale)
    assert grid.dtype == torch.float32
    assert grid.tolist() == [
        [[[1.0, 0, 0], [0, 0, 0], [0, 25.5, 0]], [[0, 0, 0], [0, 0, 10.0], [0, 0, 0]]],
        [[[0, 0, 0], [0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0], [2.5, 0, 0]]],
    ]
    # x in the low four bits; 0x21 and 0x20 are outside of a window two cells high.
    assert tokens_to_grid(tokens.to(device), 2, 3, 2, scale, coordinates="yx").tolist() == [
        [[[1.0, 0], [0, 0], [0, 0]], [[0, 0], [0, 0], [0, 10.0]]],
        [[[0, 0], [0, 0], [0, 0]], [[0, 0], [0, 0], [0, 0]]],
    ]


@pytest.mark.parametrize("coordinates", ["xy", "yx"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("features", [1, 5, 256])
def test_random_tokens_exactly(features, window, coordinates, device):
    for count in (101, 32, 33):
        tokens, scale = random_tokens(3, count, features, *window, coordinates), torch.rand(features) + 0.5
        expected = token_grid(tokens, scale, *window, coordinates)
        assert expected.count_nonzero() > 0
        grid = tokens_to_grid(tokens.to(device), features, *window, scale.to(device), coordinates=coordinates)
        assert torch.equal(grid.cpu(), expected.float())


@pytest.mark.parametrize("order", ["xy", "yx"])
def test_every_coordinate_of_a_window(order, device):
    coordinates = torch.arange(256)
    tokens = torch.stack([coordinates, torch.zeros(256), torch.full((256,), 7)], dim=-1).to(torch.uint8).unsqueeze(1)
    for width, height in WINDOWS[:4]:
        grids = tokens_to_grid(tokens.to(device), 1, width, height, torch.ones(1, device=device), coordinates=order)
        seen = {(c, x, y) for c, _, x, y in grids.nonzero().tolist()}
        high, low = (16, 1) if order == "xy" else (1, 16)
        assert seen == {(high * x + low * y, x, y) for x in range(width) for y in range(height)} - {(255, 15, 15)}
        assert set(grids.unique().tolist()) <= {0.0, 7.0}


@pytest.mark.parametrize(
    "token",
    [EMPTY, [255, 0, 9], [254, 0, 9], [0xB0, 0, 9], [0x0B, 0, 9], [0xBB, 0, 9], [0, 3, 9], [0, 255, 9], [0xAA, 4, 9]],
    ids=str,
)
def test_dropped_tokens_touch_no_cell(token, device):
    # Every cell of the three features holds 1 before the dropped token comes.
    cells = [[16 * x + y, feature, 1] for feature in range(3) for x in range(11) for y in range(11)]
    tokens = torch.tensor([[*cells, token]], dtype=torch.uint8, device=device)
    assert (tokens_to_grid(tokens, 3, 11, 11, torch.ones(3, device=device)) == 1).all()


@pytest.mark.parametrize(("rows", "count"), [(1, 5000), (16, 500), (64, 64)])
def test_the_later_token_wins(rows, count, device):
    tokens = torch.randint(256, (rows, count, 3), dtype=torch.uint8)
    tokens[..., 0], tokens[..., 1] = 0x34, 2
    tokens[0, -1, 2] = 0
    grid = tokens_to_grid(tokens.to(device), 3, 11, 11, torch.ones(3, device=device)).cpu()
    assert torch.equal(grid[:, 2, 3, 4], tokens[:, -1, 2].float())
    assert grid.count_nonzero() == tokens[:, -1, 2].count_nonzero()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("features", "window"), [(5, (11, 11)), (256, (16, 16))])
def test_dtypes(features, window, dtype, scale_dtype, backend, device):
    tokens = random_tokens(2, 60, features, *window)
    scale = (torch.rand(features) * 100 + 0.5).to(scale_dtype)
    grid = tokens_to_grid(tokens.to(device), features, *window, scale.to(device), dtype)
    # The division is in float32, by a float64 scale in float64 (which the kernel does not know), and rounded.
    in_float64 = scale_dtype == torch.float64 and (backend != "triton" or dtype == torch.float64)
    expected = token_grid(tokens, scale if in_float64 else scale.float(), *window)
    expected = expected if in_float64 else expected.float().double()
    assert grid.dtype == dtype
    assert torch.equal(grid.cpu(), expected.to(dtype))


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
        lambda x: x[:1].expand_as(x),
    ],
    ids=["tokens first", "columns first", "every second token", "expanded"],
)
def test_non_contiguous(layout, device):
    tokens, scale = layout(random_tokens(3, 50, 5, 11, 11).to(device)), (torch.rand(10, device=device) + 0.5)[::2]
    assert_close(tokens_to_grid(tokens, 5, 11, 11, scale), token_grid(tokens.cpu(), scale.cpu(), 11, 11), torch.float32)


@pytest.mark.parametrize("shape", [(0, 7, 3), (2, 0, 3), (0, 0, 3)], ids=str)
def test_empty(shape, device):
    tokens = torch.empty(shape, dtype=torch.uint8, device=device)
    grid = tokens_to_grid(tokens, 4, 3, 5, torch.ones(4, device=device), torch.float16)
    assert (grid.shape, grid.dtype) == ((shape[0], 4, 3, 5), torch.float16)
    assert not grid.any()
