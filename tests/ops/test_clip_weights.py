import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from metta_fastagent.ops import clip_weights_

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def test_hand_computed_values():
    tensors = [torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0]), torch.tensor([[0.2], [-0.2]]), torch.tensor(7.0)]
    assert clip_weights_(tensors, [1.0, 0.125, 2]) is None
    assert [t.tolist() for t in tensors] == [[-1.0, -0.5, 0.0, 0.5, 1.0], [[0.125], [-0.125]], 2.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (1023,), (17, 33), (3, 4, 5, 7)], ids=str)
def test_values(shape, dtype, assert_close):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = torch.tensor([min(max(v, -0.3), 0.3) for v in weight.flatten().tolist()], dtype=torch.float64)
    clip_weights_([weight], [0.3])
    assert_close(weight, expected.view(shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_and_infinities_clip(dtype):
    weight = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.25], dtype=dtype)
    clip_weights_([weight], [0.5])
    torch.testing.assert_close(weight, torch.tensor([torch.nan, 0.5, -0.5, -0.25], dtype=dtype), equal_nan=True)


@pytest.mark.parametrize("bound", [0, 0.0])
def test_bound_zero(bound):
    weight = torch.tensor([-2.0, 0.0, torch.inf, torch.nan])
    clip_weights_([weight], [bound])
    torch.testing.assert_close(weight, torch.tensor([0.0, 0.0, 0.0, torch.nan]), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bound", [torch.inf, 1e300, 1e6], ids=str)
def test_a_bound_beyond_every_value_changes_none(bound, dtype):
    values = [-300.0, 0.0, 0.5, 7.0]
    weight = torch.tensor(values, dtype=dtype)
    clip_weights_([weight], [bound])
    assert weight.tolist() == values


def test_infinities_clip_to_the_largest_number_under_a_larger_bound():
    weight = torch.tensor([-torch.inf, torch.inf]).half()
    clip_weights_([weight], [1e6])
    assert weight.tolist() == [-65504.0, 65504.0]


def test_no_tensors():
    assert clip_weights_([], []) is None


def test_mixed_dtypes_in_tuples():
    weights = tuple(torch.full((3,), 4.0, dtype=dtype) for dtype in DTYPES)
    clip_weights_(weights, (1.0, 2.0, 3.0, 8.0))
    assert [w.tolist() for w in weights] == [[1.0] * 3, [2.0] * 3, [3.0] * 3, [4.0] * 3]
    assert [w.dtype for w in weights] == DTYPES


@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, ::2], lambda x: x.t(), lambda x: x[1:3, 2], lambda x: x.view(2, 3, 6).transpose(0, 2)[1]],
    ids=["columns", "transposed", "part of a column", "permuted"],
)
def test_a_view_clips_its_own_elements_only(view):
    base = torch.arange(-18.0, 18.0).view(6, 6)
    inside = torch.zeros(6, 6, dtype=torch.bool)
    view(inside).fill_(True)
    expected = torch.where(inside, base.clamp(-2.5, 2.5), base)
    clip_weights_([view(base)], [2.5])
    assert torch.equal(base, expected)


def test_leaf_parameters_keep_their_identity_version_and_gradient():
    weight = nn.Parameter(torch.tensor([-2.0, 0.5, 2.0]))
    weight.grad = torch.ones(3)
    address, version, grad = weight.data_ptr(), weight._version, weight.grad
    clip_weights_([weight], [1.0])
    assert weight.tolist() == [-1.0, 0.5, 1.0]
    assert (weight.data_ptr(), weight._version) == (address, version)
    assert weight.is_leaf
    assert weight.requires_grad
    assert weight.grad is grad


def test_clipping_between_forward_and_backward_is_legal():
    weight = nn.Parameter(torch.tensor([-2.0, 0.5, 2.0]))
    loss = (weight**2).sum()
    clip_weights_([weight], [1.0])
    loss.backward()
    # The square's gradient reads the weight as it is at the time of the backward pass.
    assert weight.grad.tolist() == [-2.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("tensors", "bounds", "error", "argument", "came", "expected"),
    [
        (2, [1.0], ValueError, "bounds", "1 values", "2"),
        (2, [1.0] * 3, ValueError, "bounds", "3 values", "2"),
        (0, [1.0], ValueError, "bounds", "1 values", "0"),
        (2, [1.0, -0.5], ValueError, "bounds[1]", "-0.5", ">= 0"),
        (2, [1.0, torch.nan], ValueError, "bounds[1]", "nan", ">= 0"),
        (2, [1.0, -torch.inf], ValueError, "bounds[1]", "-inf", ">= 0"),
        (2, [1.0, "x"], TypeError, "bounds[1]", "'x'", ">= 0"),
        (2, [1.0, None], TypeError, "bounds[1]", "None", ">= 0"),
    ],
)
def test_wrong_bounds_change_nothing(tensors, bounds, error, argument, came, expected, refuses):
    weights = [torch.full((2,), 9.0) for _ in range(tensors)]
    with refuses(error, argument, came, expected):
        clip_weights_(weights, bounds)
    assert all(weight.tolist() == [9.0, 9.0] for weight in weights)


@pytest.mark.parametrize(
    ("wrong", "came"),
    [(torch.ones(2).int(), "int32"), (torch.ones(2).cfloat(), "complex64"), ([1.0, 2.0], "list"), (None, "None")],
    ids=["integer", "complex", "list", "None"],
)
def test_a_wrong_tensor_changes_nothing(wrong, came, refuses):
    weight = torch.full((2,), 9.0)
    with refuses(TypeError, "tensors[1]", came, "floating-point"):
        clip_weights_([weight, wrong], [1.0, 1.0])
    assert weight.tolist() == [9.0, 9.0]


@pytest.mark.parametrize(
    "tensors",
    [[torch.randn(3, 5), torch.randn(2).double(), torch.randn(0)], [torch.randn(4, 3).t(), torch.randn(8)[::2]], []],
    ids=["contiguous", "non-contiguous", "none"],
)
def test_opcheck(tensors):
    operator = torch.ops.metta_fastagent.clip_weights_.default
    torch.library.opcheck(operator, (tensors, [0.1 * (i + 1) for i in range(len(tensors))]))


def test_compile_keeps_the_order_of_reads_and_clips(compile_fullgraph):
    layer = nn.Linear(2, 1, bias=False)

    def step(x):
        before = layer(x)
        with torch.no_grad():
            clip_weights_([layer.weight], [1.0])
        return before.detach(), layer(x)

    for value in (3.0, -4.0):
        nn.init.constant_(layer.weight, value)
        before, after = compile_fullgraph(step)(torch.ones(1, 2))
        assert before.item() == 2 * value
        assert after.item() == (2.0 if value > 0 else -2.0)
        after.backward()
        assert layer.weight.tolist() == [[1.0, 1.0] if value > 0 else [-1.0, -1.0]]
    assert layer.weight.grad.tolist() == [[2.0, 2.0]]


def test_no_host_read():
    with FakeTensorMode():
        weights = [nn.Parameter(torch.randn(3, 5)), torch.randn(2, dtype=torch.bfloat16)]
        assert clip_weights_(weights, [0.5, 0.0]) is None
