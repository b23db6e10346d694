"""ActionSpace: its tables written out by hand, its names, and what it takes as integers."""

import numpy as np
import pytest
import torch
from agents_for_tests import on_copies

from metta_fastagent import ActionSpace

# names, largest parameters, cum_action_max_params, action_index_tensor: written out by hand.
TABLES = [
    (["noop"], [0], [0, 0], [[0, 0]]),
    (["turn"], [3], [0, 3], [[0, 0], [0, 1], [0, 2], [0, 3]]),
    (["noop", "move"], [0, 3], [0, 0, 3], [[0, 0], [1, 0], [1, 1], [1, 2], [1, 3]]),
    (["a", "b", "c"], [1, 0, 2], [0, 1, 1, 3], [[0, 0], [0, 1], [1, 0], [2, 0], [2, 1], [2, 2]]),
    (["a", "b", "c", "d"], [0, 0, 0, 0], [0, 0, 0, 0, 0], [[0, 0], [1, 0], [2, 0], [3, 0]]),
]


@pytest.mark.parametrize(("names", "max_params", "cum_max_params", "pairs"), TABLES)
def test_literal_tables(names, max_params, cum_max_params, pairs):
    space = ActionSpace(names, max_params)
    assert space.cum_action_max_params.dtype == torch.int64
    assert space.cum_action_max_params.tolist() == cum_max_params
    assert space.action_index_tensor.dtype == torch.int32
    assert space.action_index_tensor.tolist() == pairs
    assert space.num_actions == len(pairs)
    assert (space.action_names, space.action_max_params) == (names, max_params)


@pytest.mark.parametrize("max_params", [[0], [4, 0, 1], [0] * 40, list(range(12)), [255, 0, 255]], ids=str)
def test_row_i_is_the_pair_of_index_i(max_params):
    space = ActionSpace([f"type{i}" for i in range(len(max_params))], max_params)
    cumulative = space.cum_action_max_params.tolist()
    pairs = space.action_index_tensor.tolist()
    assert [kind + cumulative[kind] + param for kind, param in pairs] == list(range(sum(max_params) + len(max_params)))
    assert all(0 <= param <= max_params[kind] for kind, param in pairs)


def test_names_of_actions():
    space = ActionSpace(["noop", "move", "change_color"], [0, 2, 1])
    expected = ["noop_0", "move_0", "move_1", "move_2", "change_color_0", "change_color_1"]
    assert space.full_action_names == expected
    assert repr(space) == "ActionSpace(noop: 0..0, move: 0..2, change_color: 0..1; 6 actions)"


@pytest.mark.parametrize(
    "max_params",
    [(1, 2), np.array([1, 2]), np.array([1, 2], dtype=np.uint8), [np.int32(1), np.int64(2)], range(1, 3)],
    ids=["tuple", "int64 array", "uint8 array", "numpy integers", "range"],
)
def test_integers_of_any_kind(max_params):
    space = ActionSpace(("a", "b"), max_params)
    assert space.action_index_tensor.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2]]
    assert [type(value) for value in space.action_max_params] == [int, int]


def test_the_callers_lists_are_not_kept():
    names, max_params = ["a", "b"], [1, 2]
    space = ActionSpace(names, max_params)
    names.append("c")
    max_params[0] = 9
    assert (space.action_names, space.action_max_params) == (["a", "b"], [1, 2])


def test_device():
    space = ActionSpace(["a"], [1], device="meta")
    assert space.cum_action_max_params.device.type == "meta"
    assert space.action_index_tensor.device.type == "meta"


@on_copies
def test_copies(copied):
    space = copied(ActionSpace(["a", "b"], [1, 0]))
    assert space.full_action_names == ["a_0", "a_1", "b_0"]
    assert space.action_index_tensor.tolist() == [[0, 0], [0, 1], [1, 0]]
