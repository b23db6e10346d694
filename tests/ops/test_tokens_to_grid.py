import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from metta_fastagent.ops import tokens_to_grid

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WINDOWS = [(11, 11), (1, 1), (16, 16), (3, 7), (7, 3), (16, 1)]
EMPTY = [255, 255, 255]


def slow_grid(tokens, num_features, width, height, scale):
    """One token after the other into nested lists; float64."""
    grid = torch.zeros(len(tokens), num_features, width, height, dtype=torch.float64)
    for row, row_tokens in enumerate(tokens.tolist()):
        for coordinate, feature, value in row_tokens:
            x, y = divmod(coordinate, 16)
            if coordinate != 255 and x < width and y < height and feature < num_features:
                grid[row, feature, x, y] = value / scale[feature].item()
    return grid


def random_tokens(rows, count, num_features, width, height, seed):
    """Half of the tokens fall on a few cells and features again and again, the others are any three bytes."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(256, (rows, count, 3), generator=generator, dtype=torch.uint8)
    few = torch.stack(
        [torch.randint(min(limit, 3), (rows, count), generator=generator) for limit in (width, height, num_features)]
    )
    crowded = torch.stack([few[0] * 16 + few[1], few[2], tokens[..., 2].long()], dim=-1)
    return torch.where(torch.rand(rows, count, 1, generator=generator) < 0.5, crowded, tokens.long()).to(torch.uint8)


def test_hand_written_grid():
    tokens = torch.tensor(
        [
            [[0x00, 0, 10], [0x12, 1, 20], [0x21, 0, 255], EMPTY],
            [[0x20, 1, 3], EMPTY, [0x20, 1, 5], [0x02, 0, 0]],
        ],
        dtype=torch.uint8,
    )
    grid = tokens_to_grid(tokens, 2, 3, 3, torch.tensor([10.0, 2.0]))
    assert grid.dtype == torch.float32
    assert grid.tolist() == [
        [[[1.0, 0, 0], [0, 0, 0], [0, 25.5, 0]], [[0, 0, 0], [0, 0, 10.0], [0, 0, 0]]],
        [[[0, 0, 0], [0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0], [2.5, 0, 0]]],
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("num_features", [1, 5, 256])
def test_random_tokens_against_a_slow_loop(num_features, window, seed, assert_close):
    tokens = random_tokens(3, 101, num_features, *window, seed)
    scale = torch.rand(num_features) + 0.5
    expected = slow_grid(tokens, num_features, *window, scale)
    assert expected.count_nonzero() > 0
    assert_close(tokens_to_grid(tokens, num_features, *window, scale), expected, torch.float32)


def test_every_coordinate_of_a_window():
    coordinates = torch.arange(256)
    tokens = torch.stack([coordinates, torch.zeros(256), torch.full((256,), 7)], dim=-1).to(torch.uint8)
    for width, height in WINDOWS:
        grids = tokens_to_grid(tokens.unsqueeze(1), 1, width, height, torch.ones(1))
        seen = {(c, x, y) for c, _, x, y in grids.nonzero().tolist()}
        assert seen == {(16 * x + y, x, y) for x in range(width) for y in range(height)} - {(255, 15, 15)}
        assert set(grids.unique().tolist()) <= {0.0, 7.0}


@pytest.mark.parametrize(
    "token",
    [EMPTY, [255, 0, 9], [254, 0, 9], [0xB0, 0, 9], [0x0B, 0, 9], [0xBB, 0, 9], [0, 3, 9], [0, 255, 9], [0xAA, 4, 9]],
    ids=str,
)
def test_dropped_tokens_touch_no_cell(token):
    # Every cell of the three features holds 1 before the dropped token comes.
    cells = [[16 * x + y, feature, 1] for feature in range(3) for x in range(11) for y in range(11)]
    grid = tokens_to_grid(torch.tensor([[*cells, token]], dtype=torch.uint8), 3, 11, 11, torch.ones(3))
    assert (grid == 1).all()


@pytest.mark.parametrize(("rows", "count"), [(1, 5000), (64, 500), (500, 64)])
def test_the_later_token_wins(rows, count):
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(256, (rows, count, 3), generator=generator, dtype=torch.uint8)
    tokens[..., 0], tokens[..., 1] = 0x34, 2
    grid = tokens_to_grid(tokens, 3, 11, 11, torch.ones(3))
    assert torch.equal(grid[:, 2, 3, 4], tokens[:, -1, 2].float())
    assert grid.count_nonzero() == tokens[:, -1, 2].count_nonzero()


def test_a_later_zero_wins_over_an_earlier_value():
    grid = tokens_to_grid(torch.tensor([[[0, 0, 9], [0, 0, 0]]], dtype=torch.uint8), 1, 1, 1, torch.ones(1))
    assert grid.item() == 0.0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
def test_dtypes(dtype, scale_dtype, assert_close):
    tokens = random_tokens(2, 60, 5, 11, 11, seed=3)
    scale = (torch.rand(5) * 100 + 0.5).to(scale_dtype)
    expected = slow_grid(tokens, 5, 11, 11, scale)
    grid = tokens_to_grid(tokens, 5, 11, 11, scale, dtype)
    if dtype == torch.float64 and scale_dtype != torch.float64:
        assert grid.dtype == dtype
        # The division is done in float32.
        assert_close(grid.float(), expected, torch.float32)
    else:
        assert_close(grid, expected, dtype)


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
def test_non_contiguous(layout, assert_close):
    tokens, scale = layout(random_tokens(3, 50, 5, 11, 11, seed=1)), torch.rand(10)[::2] + 0.5
    assert_close(tokens_to_grid(tokens, 5, 11, 11, scale), slow_grid(tokens, 5, 11, 11, scale), torch.float32)


@pytest.mark.parametrize("shape", [(0, 7, 3), (2, 0, 3), (0, 0, 3)], ids=str)
def test_empty(shape):
    grid = tokens_to_grid(torch.empty(shape, dtype=torch.uint8), 4, 3, 5, torch.ones(4), torch.bfloat16)
    assert (grid.shape, grid.dtype) == ((shape[0], 4, 3, 5), torch.bfloat16)
    assert not grid.any()


def test_arguments_stay_as_they_are():
    tokens, scale = random_tokens(2, 50, 5, 11, 11, seed=2), torch.full((5,), 3.0)
    before = tokens.clone()
    tokens_to_grid(tokens, 5, 11, 11, scale)
    assert torch.equal(tokens, before)
    assert scale.tolist() == [3.0] * 5


TOKENS = random_tokens(3, 20, 5, 11, 11, seed=0)


@pytest.mark.parametrize("window", [(11, 11), (1, 1), (3, 7)], ids=str)
@pytest.mark.parametrize(
    "tokens",
    [TOKENS, TOKENS.transpose(0, 1), TOKENS[:0], TOKENS[:, :0]],
    ids=["rows", "transposed", "no rows", "no tokens"],
)
def test_opcheck(tokens, window):
    operator = torch.ops.metta_fastagent.tokens_to_grid.default
    torch.library.opcheck(operator, (tokens, 5, *window, torch.rand(5) + 0.5, torch.bfloat16))


def test_compile(assert_close, compile_fullgraph):
    compiled, scale = compile_fullgraph(tokens_to_grid), torch.rand(5) + 0.5
    for rows, count in ((3, 20), (2, 20), (5, 9)):
        tokens = random_tokens(rows, count, 5, 11, 11, seed=rows)
        assert_close(compiled(tokens, 5, 11, 11, scale), slow_grid(tokens, 5, 11, 11, scale), torch.float32)


def test_no_host_read():
    with FakeTensorMode():
        grid = tokens_to_grid(torch.zeros(4, 6, 3, dtype=torch.uint8), 5, 3, 7, torch.ones(5), torch.float16)
    assert (grid.shape, grid.dtype) == ((4, 5, 3, 7), torch.float16)


@pytest.mark.parametrize(
    ("change", "error", "argument", "came", "expected"),
    [
        ({"tokens": TOKENS.tolist()}, TypeError, "tokens", "list", "uint8"),
        ({"tokens": TOKENS.int()}, TypeError, "tokens", "int32", "uint8"),
        ({"tokens": TOKENS[0]}, ValueError, "tokens", "shape [20, 3]", "[N, M, 3]"),
        ({"tokens": TOKENS[..., :2]}, ValueError, "tokens", "shape [3, 20, 2]", "[N, M, 3]"),
        ({"tokens": TOKENS[None]}, ValueError, "tokens", "shape [1, 3, 20, 3]", "[N, M, 3]"),
        ({"num_features": 0}, ValueError, "num_features", "0", "1 to 256"),
        ({"num_features": 257}, ValueError, "num_features", "257", "1 to 256"),
        ({"num_features": 5.0}, TypeError, "num_features", "5.0", "1 to 256"),
        ({"num_features": "5"}, TypeError, "num_features", "'5'", "1 to 256"),
        ({"num_features": True, "scale": torch.ones(1)}, TypeError, "num_features", "True", "1 to 256"),
        ({"width": 0}, ValueError, "width", "0", "1 to 16"),
        ({"width": 17}, ValueError, "width", "17", "1 to 16"),
        ({"width": 1.5}, TypeError, "width", "1.5", "1 to 16"),
        ({"height": -1}, ValueError, "height", "-1", "1 to 16"),
        ({"height": None}, TypeError, "height", "None", "1 to 16"),
        ({"scale": None}, TypeError, "scale", "None", "[5]"),
        ({"scale": torch.ones(5).int()}, (TypeError, ValueError), "scale", "int32", "floating-point"),
        ({"scale": torch.ones(4)}, ValueError, "scale", "shape [4]", "[5]"),
        ({"scale": torch.ones(5, 1)}, ValueError, "scale", "shape [5, 1]", "[5]"),
        ({"scale": torch.ones(5, device="meta")}, ValueError, "scale", "on meta", "tokens (cpu)"),
        ({"dtype": torch.uint8}, TypeError, "dtype", "torch.uint8", "floating-point"),
        ({"dtype": "float32"}, TypeError, "dtype", "'float32'", "floating-point"),
        ({"dtype": None}, TypeError, "dtype", "None", "floating-point"),
    ],
)
def test_wrong_arguments(change, error, argument, came, expected, refuses):
    arguments = {"tokens": TOKENS, "num_features": 5, "width": 11, "height": 11, "scale": torch.ones(5)}
    with refuses(error, argument, came, expected):
        tokens_to_grid(**(arguments | change))
