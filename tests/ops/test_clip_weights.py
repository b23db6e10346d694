"""Clipping of tensors in place, each to its own range."""

import pytest
import torch
from references import DTYPES
from torch import nn

from metta_fastagent.ops import clip_weights_

# Both sides of a vector's lanes and of the parts that a thread or a program takes.
SHAPES = [
    (),
    (0,),
    (1,),
    (7,),
    (8,),
    (9,),
    (255,),
    (256,),
    (257,),
    (3, 0, 2),
    (17, 33),
    (4, 3, 5, 5),
    (4097,),
    (70_001,),
]


def clipped(tensor, bound):
    """Each element within its range; NaN stays."""
    bound = torch.tensor(bound, dtype=torch.float64).to(tensor.dtype)
    return torch.where(tensor > bound, bound, torch.where(tensor < -bound, -bound, tensor))


def assert_same(tensors, expected):
    torch.testing.assert_close([t.cpu() for t in tensors], expected, rtol=0, atol=0, equal_nan=True)


def test_hand_computed_values(device):
    values = [-3.0, -0.5, 0.0, 0.5, 3.0], [[0.2], [-0.2]], 7.0
    tensors = [torch.tensor(value, device=device) for value in values]
    assert clip_weights_(tensors, [1.0, 0.125, 2]) is None
    assert [t.tolist() for t in tensors] == [[-1.0, -0.5, 0.0, 0.5, 1.0], [[0.125], [-0.125]], 2.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tensors_each_to_its_own_bound(dtype, device):
    values = [torch.randn(shape).to(dtype) for shape in SHAPES]
    bounds = [0.1 * (i + 1) for i in range(len(values))]
    tensors = [value.clone().to(device) for value in values]
    clip_weights_(tensors, bounds)
    assert_same(tensors, [clipped(value, bound) for value, bound in zip(values, bounds, strict=True)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bound", [0, 0.0, 0.5, 1e6, 1e300, torch.inf], ids=str)
@pytest.mark.parametrize("count", [5, 300])
def test_nan_infinities_and_large_bounds(count, bound, dtype, device):
    # Infinities clip to the dtype's largest number if the bound is finite and larger.
    limit = bound if bound == torch.inf else min(bound, torch.finfo(dtype).max)
    expected = [torch.nan, limit, -limit, max(-0.25, -limit), min(3.0, limit)]
    tensor = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.25, 3.0] * (count // 5), dtype=dtype, device=device)
    clip_weights_([tensor], [bound])
    assert_same([tensor], [torch.tensor(expected * (count // 5), dtype=torch.float64).to(dtype)])


def test_mixed_dtypes_in_tuples(device):
    weights = tuple(torch.full((3,), 4.0, dtype=dtype, device=device) for dtype in DTYPES)
    clip_weights_(weights, (1.0, 2.0, 3.0, 8.0)[: len(DTYPES)])
    assert [w.tolist() for w in weights] == [[1.0] * 3, [2.0] * 3, [3.0] * 3, [4.0] * 3][: len(DTYPES)]
    assert [w.dtype for w in weights] == DTYPES


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[::2, ::3],
        lambda x: x.t(),
        lambda x: x[1:3, 2],
        lambda x: x.view(2, 3, 6).transpose(0, 2)[1],
        lambda x: x.view(2, 3, 3, 2).permute(0, 3, 1, 2),
        lambda x: x.flatten()[3:33],
    ],
    ids=["columns", "holes", "transposed", "part of a column", "permuted", "channels last", "inner"],
)
def test_a_view_clips_its_own_elements_only(view, device):
    base = torch.arange(-18.0, 18.0).view(6, 6)
    inside = torch.zeros(6, 6, dtype=torch.bool)
    view(inside).fill_(True)
    expected = torch.where(inside, clipped(base, 2.5), base)
    base, other = base.to(device), torch.full((3,), 9.0, device=device)
    clip_weights_([view(base), other], [2.5, 1.0])
    assert_same([base, other], [expected, torch.ones(3)])


def test_leaf_parameters_keep_their_identity_version_and_gradient(device):
    weight = nn.Parameter(torch.tensor([-2.0, 0.5, 2.0], device=device))
    weight.grad = torch.ones(3, device=device)
    address, version, grad = weight.data_ptr(), weight._version, weight.grad
    loss = (weight**2).sum()
    clip_weights_([weight], [1.0])
    assert weight.tolist() == [-1.0, 0.5, 1.0]
    assert (weight.data_ptr(), weight._version, weight.is_leaf) == (address, version, True)
    assert weight.requires_grad and weight.grad is grad
    # Clipping between forward and backward is legal: the square's gradient reads the weight as it is now.
    assert torch.autograd.grad(loss, weight)[0].tolist() == [-2.0, 1.0, 2.0]


def test_no_tensors():
    assert clip_weights_([], []) is None


@pytest.mark.parametrize(
    ("tensors", "bounds"),
    [
        ([9.0, 9.0], [1.0]),
        ([9.0, 9.0], [1.0, -0.5]),
        ([9.0, 9.0], [1.0, torch.nan]),
        ([9.0, 9.0], [1.0, True]),
        ([9.0, 9], [1.0, 1.0]),
        ([9.0, None], [1.0, 1.0]),
    ],
    ids=str,
)
def test_wrong_arguments_change_nothing(tensors, bounds, device):
    weights = [None if value is None else torch.full((2,), value, device=device) for value in tensors]
    with pytest.raises((TypeError, ValueError)):
        clip_weights_(weights, bounds)
    assert [None if weight is None else weight.tolist() for weight in weights] == [
        None if value is None else [value] * 2 for value in tensors
    ]


def test_compile_keeps_the_order_of_reads_and_clips(compile_fullgraph, device):
    layer = nn.Linear(2, 1, bias=False, device=device)

    def step(x):
        before = layer(x)
        with torch.no_grad():
            clip_weights_([layer.weight], [1.0])
        return before.detach(), layer(x)

    for value in (3.0, -4.0):
        nn.init.constant_(layer.weight, value)
        before, after = compile_fullgraph(step)(torch.ones(1, 2, device=device))
        assert before.item() == 2 * value
        assert after.item() == (2.0 if value > 0 else -2.0)
        after.backward()
        assert layer.weight.tolist() == [[1.0, 1.0] if value > 0 else [-1.0, -1.0]]
    assert layer.weight.grad.tolist() == [[2.0, 2.0]]
