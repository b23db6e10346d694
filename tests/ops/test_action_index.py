import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from metta_fastagent.ops import action_to_logit_index, logit_index_to_action

INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every second": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "reversed columns in memory": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}

# Three action types with largest parameters 1, 0 and 2: written out by hand.
CUM_MAX_PARAMS = torch.tensor([0, 1, 1, 3])
PAIRS = torch.tensor([[0, 0], [0, 1], [1, 0], [2, 0], [2, 1], [2, 2]], dtype=torch.int32)


@pytest.fixture
def grid():
    """Indices [3, 4] and their pairs [3, 4, 2]."""
    index = torch.tensor([[5, 0, 3, 2], [1, 1, 4, 0], [2, 5, 5, 3]])
    pairs = [[[2, 2], [0, 0], [2, 0], [1, 0]], [[0, 1], [0, 1], [2, 1], [0, 0]], [[1, 0], [2, 2], [2, 2], [2, 0]]]
    return index, torch.tensor(pairs, dtype=torch.int32)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_every_pair_of_a_literal_table(dtype):
    index = action_to_logit_index(PAIRS.to(dtype), CUM_MAX_PARAMS)
    assert index.dtype == torch.int64
    assert index.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_every_index_of_a_literal_table(dtype):
    pairs = logit_index_to_action(torch.tensor([5, 0, 3, 2, 1, 4]).to(dtype), PAIRS)
    assert pairs.dtype == torch.int32
    assert pairs.tolist() == [[2, 2], [0, 0], [2, 0], [1, 0], [0, 1], [2, 1]]


@pytest.mark.parametrize(
    ("max_params", "pair", "index"), [([0], [0, 0], 0), ([4999], [0, 4999], 4999), ([0] * 300, [299, 0], 299)]
)
def test_one_action_many_parameters_many_types(max_params, pair, index):
    table = torch.tensor([0, *max_params]).cumsum(0)
    assert action_to_logit_index(torch.tensor(pair), table).item() == index


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_and_leading_dimensions(layout, grid):
    index, pairs = grid
    assert torch.equal(action_to_logit_index(layout(pairs), CUM_MAX_PARAMS), index)
    assert torch.equal(logit_index_to_action(layout(index), PAIRS), pairs)


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()], ids=str)
def test_empty_and_single(shape):
    index = action_to_logit_index(torch.zeros(*shape, 2, dtype=torch.int32), CUM_MAX_PARAMS)
    assert index.shape == shape
    assert not index.any()
    assert logit_index_to_action(index, PAIRS).shape == (*shape, 2)


@pytest.mark.parametrize(
    ("pair", "came", "expected"),
    [
        ([0, 2], "got parameter 2 for action type 0", "0 to 1"),
        ([2, 3], "got parameter 3 for action type 2", "0 to 2"),
        ([1, -1], "got parameter -1 for action type 1", "0 to 0"),
        ([3, 0], "got action type 3", "0 to 2"),
        ([-1, 0], "got action type -1", "0 to 2"),
        ([2**62, 2**62], f"got action type {2**62}", "0 to 2"),
        ([0, 2**63 - 1], f"got parameter {2**63 - 1} for action type 0", "0 to 1"),
    ],
)
def test_a_pair_out_of_range_is_refused(pair, came, expected, refuses):
    actions = torch.zeros(2, 3, 2, dtype=torch.int64)
    actions[1, 2] = torch.tensor(pair)
    with refuses(ValueError, "actions[1, 2]", came, expected):
        action_to_logit_index(actions, CUM_MAX_PARAMS)


@pytest.mark.parametrize("index", [-1, 6, 2**62])
def test_an_index_out_of_range_is_refused(index, refuses):
    with refuses(ValueError, "action_logit_index[2]", f"got {index}", "0 to 5"):
        logit_index_to_action(torch.tensor([0, 5, index]), PAIRS)


@pytest.mark.parametrize(
    ("actions", "table", "error", "argument", "came", "expected"),
    [
        ([[0, 0]], CUM_MAX_PARAMS, TypeError, "actions", "list", "integer tensor"),
        (PAIRS.float(), CUM_MAX_PARAMS, TypeError, "actions", "float32", "integer tensor"),
        (PAIRS.bool(), CUM_MAX_PARAMS, TypeError, "actions", "bool", "integer tensor"),
        (PAIRS[:, 0], CUM_MAX_PARAMS, ValueError, "actions", "shape [6]", "[..., 2]"),
        (PAIRS[0, 0], CUM_MAX_PARAMS, ValueError, "actions", "shape []", "[..., 2]"),
        (PAIRS.to("meta"), CUM_MAX_PARAMS, ValueError, "actions", "on meta", "cum_action_max_params (cpu)"),
        (PAIRS, [0, 1, 1, 3], TypeError, "cum_action_max_params", "list", "int64 tensor"),
        (PAIRS, CUM_MAX_PARAMS.int(), TypeError, "cum_action_max_params", "int32", "int64 tensor"),
        (PAIRS, CUM_MAX_PARAMS[:1], ValueError, "cum_action_max_params", "shape [1]", "[action types + 1]"),
        (PAIRS, CUM_MAX_PARAMS[None], ValueError, "cum_action_max_params", "shape [1, 4]", "[action types + 1]"),
    ],
)
def test_wrong_arguments_of_action_to_logit_index(actions, table, error, argument, came, expected, refuses):
    with refuses(error, argument, came, expected):
        action_to_logit_index(actions, table)


@pytest.mark.parametrize(
    ("index", "table", "error", "argument", "came", "expected"),
    [
        (3, PAIRS, TypeError, "action_logit_index", "3 (int)", "integer tensor"),
        (torch.ones(2), PAIRS, TypeError, "action_logit_index", "float32", "integer tensor"),
        (torch.ones(2).bool(), PAIRS, TypeError, "action_logit_index", "bool", "integer tensor"),
        (torch.ones(2).int().to("meta"), PAIRS, ValueError, "action_logit_index", "on meta", "(cpu)"),
        (torch.ones(2).int(), None, TypeError, "action_index_tensor", "None", "[num_actions, 2]"),
        (torch.ones(2).int(), PAIRS.float(), TypeError, "action_index_tensor", "float32", "int32"),
        (torch.ones(2).int(), PAIRS[0], ValueError, "action_index_tensor", "shape [2]", "[num_actions, 2]"),
        (torch.ones(2).int(), PAIRS.T, ValueError, "action_index_tensor", "shape [2, 6]", "[num_actions, 2]"),
        (torch.ones(2).int(), PAIRS[:0], ValueError, "action_index_tensor", "shape [0, 2]", "[num_actions, 2]"),
    ],
)
def test_wrong_arguments_of_logit_index_to_action(index, table, error, argument, came, expected, refuses):
    with refuses(error, argument, came, expected):
        logit_index_to_action(index, table)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_opcheck(layout, grid):
    index, pairs = grid
    torch.library.opcheck(torch.ops.metta_fastagent.action_to_logit_index.default, (layout(pairs), CUM_MAX_PARAMS))
    torch.library.opcheck(torch.ops.metta_fastagent.logit_index_to_action.default, (layout(index), PAIRS))


def test_compile(compile_fullgraph, grid):
    index, pairs = grid
    to_index, to_pair = compile_fullgraph(action_to_logit_index), compile_fullgraph(logit_index_to_action)
    for rows in (3, 2, 1):
        assert torch.equal(to_index(pairs[:rows], CUM_MAX_PARAMS), index[:rows])
        assert torch.equal(to_pair(index[:rows], PAIRS), pairs[:rows])


def test_no_host_read():
    with FakeTensorMode():
        index = action_to_logit_index(torch.zeros(4, 3, 2, dtype=torch.int16), torch.zeros(4, dtype=torch.int64))
        pairs = logit_index_to_action(index, torch.zeros(6, 2, dtype=torch.int32))
    assert (index.shape, index.dtype) == ((4, 3), torch.int64)
    assert (pairs.shape, pairs.dtype) == ((4, 3, 2), torch.int32)
