"""Pairs (action type, parameter) to logit indices and back, against a table written by hand."""

import pytest
import torch
from references import CUM_MAX_PARAMS, INTEGERS, LAYOUTS, PAIRS, refuses

from metta_fastagent.ops import action_to_logit_index, logit_index_to_action, sample_actions

INDEX = torch.tensor([[5, 0, 3, 2], [1, 1, 4, 0], [2, 5, 5, 3]])
PAIRS_OF_INDEX = torch.tensor(
    [
        [[2, 2], [0, 0], [2, 0], [1, 0]],
        [[0, 1], [0, 1], [2, 1], [0, 0]],
        [[1, 0], [2, 2], [2, 2], [2, 0]],
    ],
    dtype=torch.int32,
)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_every_pair_and_every_index_of_a_literal_table(dtype, device):
    index = action_to_logit_index(PAIRS.to(device, dtype), CUM_MAX_PARAMS.to(device))
    assert (index.dtype, index.tolist()) == (torch.int64, [0, 1, 2, 3, 4, 5])
    pairs = logit_index_to_action(torch.tensor([5, 0, 3, 2, 1, 4]).to(device, dtype), PAIRS.to(device))
    assert (pairs.dtype, pairs.tolist()) == (torch.int32, [[2, 2], [0, 0], [2, 0], [1, 0], [0, 1], [2, 1]])


@pytest.mark.parametrize(
    ("max_params", "pair", "index"), [([0], [0, 0], 0), ([4999], [0, 4999], 4999), ([0] * 300, [299, 0], 299)]
)
def test_one_action_many_parameters_many_types(max_params, pair, index, device):
    table = torch.tensor([0, *max_params], device=device).cumsum(0)
    assert action_to_logit_index(torch.tensor(pair, device=device), table).item() == index


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_and_leading_dimensions(layout, device):
    table, cum = layout(PAIRS.to(device)), torch.stack([CUM_MAX_PARAMS, CUM_MAX_PARAMS], dim=1).to(device)[:, 0]
    index, pairs = layout(INDEX.to(device)), layout(PAIRS_OF_INDEX.flatten(1).to(device)).view(3, 4, 2)
    found = logit_index_to_action(index, table)
    assert torch.equal(found, table[index])
    assert found.is_contiguous()
    expected = layout(INDEX.repeat_interleave(2, 1).to(device))[:, ::2]
    assert torch.equal(action_to_logit_index(pairs, cum), expected)
    assert torch.equal(action_to_logit_index(pairs.transpose(0, 1), cum), expected.t())
    assert torch.equal(action_to_logit_index(pairs[0], cum), expected[0])


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_pairs_have_the_dtype_of_their_table(dtype, device):
    pairs = logit_index_to_action(torch.tensor([5, 0], device=device), PAIRS.to(device, dtype))
    assert (pairs.dtype, pairs.tolist()) == (dtype, [[2, 2], [0, 0]])


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_a_draw_takes_a_table_of_any_integer_dtype(dtype, device):
    logits = torch.full((3, 6), -torch.inf, device=device)
    logits[:, 4] = 0.0
    *_, pairs = sample_actions(logits, PAIRS.to(device, dtype))
    assert (pairs.dtype, pairs.tolist()) == (torch.int32, [[2, 1]] * 3)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ([0, 2], "got parameter 2 for action type 0, expected 0 to 1"),
        ([2, 3], "got parameter 3 for action type 2, expected 0 to 2"),
        ([1, -1], "got parameter -1 for action type 1, expected 0 to 0"),
        ([3, 0], "got action type 3, .*expected .*0 to 2"),
        ([-1, 0], "got action type -1, .*expected .*0 to 2"),
        ([2**62, 2**62], r"got action type \d+, .*expected .*0 to 2"),
        ([0, 2**63 - 1], r"got parameter \d+ for action type 0, expected 0 to 1"),
    ],
)
def test_a_pair_out_of_range_is_refused(pair, message, device):
    table = CUM_MAX_PARAMS.to(device)
    with refuses(rf"actions\[2\]: {message}", table):
        index = action_to_logit_index(torch.tensor([[0, 0], [2, 1], pair, [1, 0]], device=device), table)
        # A kernel does not stop.
        assert index.tolist() == [0, 4, -1, 2]


@pytest.mark.parametrize("index", [-1, 6, 2**62])
def test_an_index_out_of_range_is_refused(index, device):
    with refuses(r"\[2\]: got (logit index )?-?\d+, expected (0 to 5|one of the actions)"):
        pairs = logit_index_to_action(torch.tensor([0, 5, index], device=device), PAIRS.to(device))
        assert pairs.tolist() == [[0, 0], [2, 2], [-1, -1]]


def test_the_place_of_a_bad_row_among_several_dimensions(backend, device):
    pairs = torch.zeros(2, 3, 2, dtype=torch.int64, device=device)
    pairs[1, 2, 1] = 2
    place = r"\[5\]" if backend == "triton" else r"\[1, 2\]"
    with refuses(rf"actions{place}: got parameter 2", CUM_MAX_PARAMS):
        action_to_logit_index(pairs, CUM_MAX_PARAMS.to(device))
    with refuses(rf"{place}: got (logit index )?7"):
        logit_index_to_action(torch.tensor([[0, 1, 2], [3, 4, 7]], device=device), PAIRS.to(device))
