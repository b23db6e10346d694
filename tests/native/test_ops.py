"""The C++ operators against float64 references, and the errors of the eager twins."""

import pytest
import torch

from metta_fastagent import _native, backend, ops, use_backend
from metta_fastagent.ops._clip_weights import clip_weights_eager_
from metta_fastagent.ops._evaluate_actions import evaluate_actions_backward_eager, evaluate_actions_forward_eager
from metta_fastagent.ops._l2_init_loss import l2_init_loss_backward_eager
from metta_fastagent.ops._sample_actions import _draw_native

pytestmark = pytest.mark.skipif(not _native.load(), reason=f"native operators: {_native.reason()}")

TOLERANCES = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2.0**-8, "atol": 2e-6},
    torch.float16: {"rtol": 2.0**-10, "atol": 2e-6},
}
DTYPES = list(TOLERANCES)
# Both sides of a vector's 4 or 8 lanes in rows and columns, one row, none, and long rows.
SHAPES = [(0, 3), (1, 1), (1, 9), (3, 2), (4, 4), (5, 7), (8, 8), (9, 5), (13, 21), (7, 40), (17, 129), (2, 4097)]
TABLE = torch.tensor([0, 1, 3, 3])
# Steps, rows, hidden size.
LSTM_SHAPES = [(1, 1, 1), (2, 3, 5), (4, 2, 8), (3, 1, 9), (5, 4, 16), (3, 17, 13), (2, 0, 4)]
LSTM = (torch.randn(2, 3, 16), torch.randn(16, 4), torch.randn(3, 4), torch.randn(3, 4))
CONV = (torch.zeros(2, 3, 3, dtype=torch.uint8), torch.randn(7, 5, 5, 5), torch.randn(7), torch.ones(5))
PAIRS = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [1, 2], [2, 0]], dtype=torch.int32)


@pytest.fixture(autouse=True)
def native():
    torch.manual_seed(5)
    with use_backend("native"):
        yield


def close(actual, expected, dtype):
    """`actual` has this dtype and is, within its tolerance, the float64 tensor `expected`."""
    assert (actual.dtype, actual.shape) == (dtype, expected.shape)
    rounded = expected.to(dtype).double()
    expected = torch.where(rounded.isinf(), rounded, expected)
    torch.testing.assert_close(actual.double(), expected, equal_nan=True, **TOLERANCES[dtype])


def reference(logits, index):
    """(log_prob, entropy, full_log_probs), written out in float64; a term with p = 0 counts 0."""
    x = logits.double()
    shifted = x - x.max(dim=-1, keepdim=True).values
    full = shifted - shifted.exp().sum(-1, keepdim=True).log()
    p = full.exp()
    entropy = -torch.where(p == 0, 0.0, p * full).sum(-1)
    return full[torch.arange(len(index)), index], entropy, full


def reference_gradient(logits, index, g, h, f):
    """Of the logits, in float64, for upstream gradients of log_prob, entropy and full_log_probs."""
    _, entropy, full = reference(logits, index)
    p, g, h, f = full.exp(), g.double(), h.double(), f.double()
    chosen = torch.nn.functional.one_hot(index, logits.shape[1])
    grad = g[:, None] * (chosen - p) + f - p * f.sum(-1, keepdim=True)
    return grad - h[:, None] * torch.where(p == 0, 0.0, p * (full + entropy[:, None]))


def make_logits(kind, shape, dtype):
    x = torch.randn(shape, dtype=torch.float64)
    if kind == "extreme":
        x *= 1e4
    elif kind == "tiny":
        x *= 1e-30
    elif kind == "masked":
        x = torch.where(torch.rand(shape) < 0.4, -torch.inf, x)
        x[:, shape[1] // 2] = 0.25
    elif kind == "underflow":
        # Shifted by up to 120: the float32 exponentials are normal, subnormal or 0.
        x = -120 * torch.rand(shape, dtype=torch.float64)
    return x.to(dtype)


def test_the_native_operators_are_chosen():
    assert backend("cpu") == "native"
    with use_backend("auto"):
        assert backend("cpu") == "native"
    with use_backend("eager"):
        assert backend("cpu") == "eager"


# evaluate_actions


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "extreme", "tiny", "masked", "underflow"])
def test_evaluate_values_and_gradients(kind, shape, dtype):
    logits = make_logits(kind, shape, dtype).requires_grad_()
    index = torch.randint(shape[1], shape[:1])
    outputs = ops.evaluate_actions(logits, index)
    for output, expected in zip(outputs, reference(logits.detach(), index), strict=True):
        close(output.detach(), expected, dtype)
    upstream = [torch.randn(output.shape).to(dtype) for output in outputs]
    (grad,) = torch.autograd.grad(outputs, logits, upstream)
    close(grad, reference_gradient(logits.detach(), index, *upstream), dtype)


@pytest.mark.parametrize("subset", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("kind", ["random", "masked"])
def test_evaluate_gradients_of_some_outputs(kind, subset):
    logits = make_logits(kind, (13, 9), torch.float32).requires_grad_()
    index = torch.randint(9, (13,))
    outputs = ops.evaluate_actions(logits, index)
    upstream = [torch.randn(output.shape) * (i in subset) for i, output in enumerate(outputs)]
    (grad,) = torch.autograd.grad([outputs[i] for i in subset], logits, [upstream[i] for i in subset])
    close(grad, reference_gradient(logits.detach(), index, *upstream), torch.float32)


def test_evaluate_expanded_upstream_gradients():
    logits, index = torch.randn(11, 9, requires_grad=True), torch.randint(9, (11,))
    log_prob, entropy, full = ops.evaluate_actions(logits, index)
    (2 * log_prob.sum() + 3 * entropy.sum() + 0.5 * full.sum()).backward()
    upstream = (torch.full((11,), 2.0), torch.full((11,), 3.0), torch.full((11, 9), 0.5))
    close(logits.grad, reference_gradient(logits.detach(), index, *upstream), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [[0.0, torch.nan, 1.0], [torch.inf, 0.0, 0.0], [-torch.inf] * 3], ids=str)
def test_evaluate_rows_without_a_distribution(bad, dtype):
    logits = torch.randn(11, 3, dtype=dtype)
    logits[4] = torch.tensor(bad)
    index = torch.randint(3, (11,))
    outputs = [*ops.evaluate_actions(logits, index)]
    upstream = [torch.randn_like(output) for output in outputs]
    outputs.append(torch.ops.metta_fastagent.evaluate_actions_backward(logits, index, *upstream))
    expected = [*evaluate_actions_forward_eager(logits, index, None)[:3]]
    expected.append(evaluate_actions_backward_eager(logits, index, *upstream))
    for output, wanted in zip(outputs, expected, strict=True):
        assert wanted[4].isnan().any()
        torch.testing.assert_close(output, wanted, equal_nan=True, **TOLERANCES[dtype])


@pytest.mark.parametrize("layout", ["transposed", "every second column", "every second row", "expanded", "offset"])
def test_evaluate_non_contiguous_logits(layout):
    x = torch.randn(13, 9)
    logits = {
        "transposed": lambda: x.t().contiguous().t(),
        "every second column": lambda: x.repeat_interleave(2, dim=1)[:, ::2],
        "every second row": lambda: x.repeat_interleave(2, dim=0)[::2],
        "expanded": lambda: x[:1].expand_as(x),
        "offset": lambda: torch.cat([x[:1], x])[1:],
    }[layout]()
    index = torch.randint(9, (13,))
    for output, expected in zip(ops.evaluate_actions(logits, index), reference(logits, index), strict=True):
        close(output, expected, torch.float32)


INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every second"])
def test_evaluate_pairs(layout, dtype):
    index = torch.arange(6).repeat(3)
    pairs = PAIRS[index].long()
    if layout == "transposed":
        pairs = pairs.t().contiguous().t()
    elif layout == "every second":
        pairs = torch.stack([pairs, pairs + 50], dim=-1).flatten(1)[:, ::2]
    logits = torch.randn(18, 6)
    for output, expected in zip(
        ops.evaluate_actions(logits, pairs.to(dtype), TABLE), reference(logits, index), strict=True
    ):
        close(output, expected, torch.float32)


def same_error(function):
    """Run the function under both backends: the errors are of one type and one text."""
    caught = []
    for name in ("native", "eager"):
        with use_backend(name), pytest.raises((ValueError, TypeError)) as error:
            function()
        caught.append((error.type, str(error.value)))
    assert caught[0] == caught[1]


@pytest.mark.parametrize(
    ("actions", "table"),
    [
        (torch.tensor([0, 5, 6, -1]), None),
        (torch.tensor([0, -1, 6, 1], dtype=torch.int32), None),
        (torch.tensor([[0, 0], [3, 0], [0, 2], [0, 0]]), TABLE),
        (torch.tensor([[0, 0], [0, 1], [-1, 0], [9, 9]]), TABLE),
        (torch.tensor([[1, 2], [1, 3], [0, 0], [0, 0]], dtype=torch.int16), TABLE),
        (torch.tensor([[2, 0], [1, 2], [0, -1], [0, 0]]), TABLE),
        # A legal pair whose logit the matrix does not have.
        (torch.tensor([[0, 0], [3, 0], [0, 0], [0, 0]]), torch.tensor([0, 1, 3, 3, 3])),
        # Such a pair before an illegal one, which the eager twin tells first.
        (torch.tensor([[0, 0], [3, 0], [7, 0], [0, 0]]), torch.tensor([0, 1, 3, 3, 3])),
        (torch.tensor([0.5, 1.0, 1.0, 1.0]), None),
        (torch.zeros(3, dtype=torch.int64), None),
    ],
)
def test_evaluate_errors_are_those_of_the_eager_twin(actions, table):
    logits = torch.randn(4, 6)
    same_error(lambda: ops.evaluate_actions(logits, actions, table))
    if table is not None:
        same_error(lambda: ops.action_to_logit_index(actions - 8, table))


def test_a_bad_row_deep_inside_a_large_batch_is_named():
    index = torch.zeros(200_000, dtype=torch.int64)
    index[[150_001, 199_999]] = 7
    with pytest.raises(ValueError, match=r"^actions\[150001\]: got logit index 7, expected 0 to 4$"):
        ops.evaluate_actions(torch.zeros(200_000, 5), index)


# sample_actions


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "extreme", "masked"])
def test_sample_values_and_gradients(kind, shape, dtype):
    logits = make_logits(kind, shape, dtype).requires_grad_()
    index, *outputs = ops.sample_actions(logits)
    assert (index.dtype, index.shape) == (torch.int64, shape[:1])
    for output, expected in zip(outputs, reference(logits.detach(), index), strict=True):
        close(output.detach(), expected, dtype)
    assert outputs[0].isfinite().all()
    upstream = [torch.randn(output.shape).to(dtype) for output in outputs]
    (grad,) = torch.autograd.grad(outputs, logits, upstream)
    close(grad, reference_gradient(logits.detach(), index, *upstream), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("num_actions", [1, 3, 9, 21, 300])
def test_sample_inverts_the_cumulative_distribution(num_actions, dtype):
    logits = 2 * torch.randn(500, num_actions, dtype=dtype)
    uniform = torch.rand(500, dtype=dtype)
    index = _draw_native(logits, None, uniform)[0]
    ends = torch.cat([torch.zeros(500, 1), logits.double().softmax(-1).cumsum(-1)], dim=-1)
    row, slack = torch.arange(500), 1e-6 if dtype == torch.float32 else 1e-14
    assert (ends[row, index] <= uniform + slack).all()
    assert (uniform <= ends[row, index + 1] + slack).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("edge", ["zero", "next to one"])
@pytest.mark.parametrize("num_actions", [2, 9, 64])
def test_sample_never_draws_a_masked_action_at_the_ends(num_actions, edge, dtype):
    logits = make_logits("masked", (4096, num_actions), dtype)
    logits[:, 0] = logits[:, -1] = -torch.inf
    logits[:, num_actions // 2] = torch.randn(4096).to(dtype) if num_actions > 2 else 0.0
    end = 0.0 if edge == "zero" else 1 - torch.finfo(dtype).eps / 2
    index, log_prob, *_ = _draw_native(logits, None, torch.full((4096,), end, dtype=dtype))
    assert log_prob.isfinite().all()
    assert logits.gather(1, index[:, None]).isfinite().all()


def test_sample_skips_actions_whose_probability_underflows():
    logits = torch.tensor([-200.0, 0.0, -1e30, 0.0, -200.0]).expand(4096, 5)
    assert ops.sample_actions(logits)[0].unique().tolist() == [1, 3]


@pytest.mark.parametrize("explicit", [False, True], ids=["manual_seed", "generator"])
def test_sample_is_governed_by_the_seed(explicit):
    logits = torch.zeros(200, 9)

    def draw(seed):
        torch.manual_seed(seed)
        return ops.sample_actions(logits, generator=torch.Generator().manual_seed(seed) if explicit else None)[0]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
def test_sample_pairs(dtype):
    for table in (PAIRS.to(dtype), PAIRS.to(dtype).t().contiguous().t()):
        index, *_, pair = ops.sample_actions(torch.randn(50, 6), table)
        assert pair.dtype == torch.int32
        assert torch.equal(pair, PAIRS[index])


@pytest.mark.parametrize("row", [[0.0, torch.nan, 0.0], [0.0, torch.inf, 0.0], [-torch.inf] * 3], ids=str)
def test_sample_errors_are_those_of_the_eager_twin(row):
    logits = torch.zeros(40, 3)
    logits[17], logits[30] = torch.tensor(row), torch.nan
    state = torch.get_rng_state()
    same_error(lambda: ops.sample_actions(logits))
    assert torch.equal(state, torch.get_rng_state())


# clip_weights_

CLIPPED_SHAPES = [
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
    (64, 33),
    (4, 3, 5, 5),
    (70_001,),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_clip_many_tensors_each_to_its_own_bound(dtype):
    tensors = [torch.randn(shape).to(dtype) for shape in CLIPPED_SHAPES]
    bounds = [0.1 * (i + 1) for i in range(len(tensors))]
    expected = [t.clamp(-b, b) for t, b in zip(tensors, bounds, strict=True)]
    ops.clip_weights_(tensors, bounds)
    for tensor, wanted in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bound", [0.0, 0.5, 1e6, 1e300, torch.inf], ids=str)
@pytest.mark.parametrize("count", [5, 300])
def test_clip_nan_and_infinities(count, bound, dtype):
    values = [torch.nan, torch.inf, -torch.inf, -0.25, 3.0]
    tensor = torch.tensor(values * (count // 5), dtype=dtype)
    expected = tensor.clone()
    clip_weights_eager_([expected], [bound])
    ops.clip_weights_([tensor], [bound])
    torch.testing.assert_close(tensor, expected, rtol=0, atol=0, equal_nan=True)


def test_clip_layouts_and_what_lies_between_the_elements():
    base = torch.full((20, 30), 9.0)
    holes = base[::2, ::3]
    channels_last = torch.full((3, 4, 5, 6), -7.0).contiguous(memory_format=torch.channels_last)
    transposed = torch.full((5, 9), 8.0).t()
    inner = torch.full((100,), 5.0)
    ops.clip_weights_([channels_last, transposed, inner[3:97]], [1.0, 2.0, 3.0])
    ops.clip_weights_([holes, torch.full((3,), 4.0)], [1.0, 1.0])
    assert (channels_last == -1).all()
    assert (transposed == 2).all()
    assert (inner[3:97] == 3).all()
    assert (inner[:3] == 5).all()
    assert (inner[97:] == 5).all()
    assert (holes == 1).all()
    assert int((base == 9).sum()) == base.numel() - holes.numel()


def test_clip_between_forward_and_backward_keeps_the_version():
    weight = torch.nn.Parameter(torch.full((3, 300), 4.0))
    loss = (weight * weight).sum()
    version = weight._version
    ops.clip_weights_([weight], [0.5])
    assert weight._version == version
    loss.backward()
    assert (weight.grad == 1.0).all()
    assert weight.is_leaf
    assert weight.grad_fn is None


@pytest.mark.parametrize(
    ("tensors", "bounds"),
    [
        ([torch.ones(3), 4], [1.0, 1.0]),
        ([torch.ones(3), torch.ones(3, dtype=torch.int32)], [1.0, 1.0]),
        ([torch.full((3,), 9.0), torch.ones(3)], [1.0, -1.0]),
        ([torch.full((3,), 9.0), torch.ones(3)], [1.0, float("nan")]),
        ([torch.full((3,), 9.0), torch.ones(3)], [1.0, True]),
        ([torch.full((3,), 9.0), torch.ones(3)], [1.0, "1"]),
        ([torch.full((3,), 9.0)], [1.0, 1.0]),
    ],
)
def test_clip_errors_are_those_of_the_eager_twin(tensors, bounds):
    before = [t.clone() for t in tensors if isinstance(t, torch.Tensor)]
    same_error(lambda: ops.clip_weights_(tensors, bounds))
    for tensor, kept in zip([t for t in tensors if isinstance(t, torch.Tensor)], before, strict=True):
        assert torch.equal(tensor, kept)


# l2_init_loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2_values_and_gradients(dtype):
    params = [torch.randn(shape).to(dtype).requires_grad_() for shape in CLIPPED_SHAPES]
    initial = [torch.randn(shape).to(dtype) for shape in CLIPPED_SHAPES]
    loss = ops.l2_init_loss(params, initial, 0.3)
    exact = [p.detach().double() - i.double() for p, i in zip(params, initial, strict=True)]
    close(loss.detach(), 0.3 * sum(d.square().sum() for d in exact), torch.float32)
    grads = torch.autograd.grad(loss, params, torch.tensor(1.75))
    for grad, difference in zip(grads, exact, strict=True):
        close(grad, 2 * 0.3 * 1.75 * difference, dtype)


def test_l2_layouts():
    pairs = [(torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)), (torch.randn(5, 9).t(), torch.randn(5, 9).t())]
    pairs += [(p.contiguous(memory_format=torch.channels_last), i) for p, i in pairs[:1]]
    pairs += [(torch.randn(20, 30)[::2, ::3], torch.randn(10, 10))]
    for param, start in pairs:
        loss = ops.l2_init_loss([param.requires_grad_()], [start], 2.0)
        exact = param.detach().double() - start.double()
        close(loss.detach(), 2 * exact.square().sum(), torch.float32)
        (grad,) = torch.autograd.grad(loss, param)
        close(grad, 4 * exact, torch.float32)


@pytest.mark.parametrize("values", [[torch.nan, 1.0], [torch.inf, 1.0], [1e30, 1.0]], ids=str)
def test_l2_nan_and_infinity(values):
    params, initial = [torch.tensor(values * 20)], [torch.zeros(40)]
    loss = ops.l2_init_loss(params, initial)
    with use_backend("eager"):
        torch.testing.assert_close(loss, ops.l2_init_loss(params, initial), equal_nan=True)
    grads = torch.ops.metta_fastagent.l2_init_loss_backward(params, initial, 1.0, torch.tensor(1.0))
    wanted = l2_init_loss_backward_eager(params, initial, 1.0, torch.tensor(1.0))
    torch.testing.assert_close(grads, wanted, equal_nan=True)


# tokens_to_grid


def slow_grid(tokens, features, width, height, scale):
    """One token after the other; float64."""
    grid = torch.zeros(len(tokens), features, width, height, dtype=torch.float64)
    for row, row_tokens in enumerate(tokens.tolist()):
        for coordinate, feature, value in row_tokens:
            x, y = divmod(coordinate, 16)
            if coordinate != 255 and x < width and y < height and feature < features:
                grid[row, feature, x, y] = value / scale[feature].item()
    return grid


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("features", "width", "height"), [(6, 11, 11), (256, 16, 16), (1, 1, 1), (3, 7, 2)])
def test_tokens_values(features, width, height, dtype, scale_dtype):
    tokens = torch.randint(256, (4, 300, 3), dtype=torch.uint8)
    # Half of them crowd on few cells, so that later ones replace earlier ones.
    tokens[:, ::2] = torch.where(torch.tensor([True, True, False]), tokens[:, ::2] & 0x11, tokens[:, ::2])
    scale = (torch.rand(features) + 0.5).to(scale_dtype)
    grid = ops.tokens_to_grid(tokens, features, width, height, scale, dtype)
    computed = torch.float32 if scale_dtype != torch.float64 else torch.float64
    expected = slow_grid(tokens, features, width, height, scale)
    assert expected.count_nonzero() > 0
    torch.testing.assert_close(grid, expected.to(computed).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (1, 1, 3)], ids=str)
def test_tokens_empty_and_single(shape):
    tokens = torch.full(shape, 2, dtype=torch.uint8)
    grid = ops.tokens_to_grid(tokens, 5, 11, 11, torch.ones(5))
    assert grid.shape == (shape[0], 5, 11, 11)
    torch.testing.assert_close(grid.double(), slow_grid(tokens, 5, 11, 11, torch.ones(5)))


def test_tokens_non_contiguous():
    tokens = torch.randint(12, (6, 40, 6), dtype=torch.uint8)[::2, ::2, ::2]
    scale = torch.rand(10)[::2] + 1
    grid = ops.tokens_to_grid(tokens, 5, 11, 11, scale)
    close(grid, slow_grid(tokens, 5, 11, 11, scale), torch.float32)


# Conversions


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (6,), (2, 3), (2, 0, 3)], ids=str)
def test_conversions(shape, dtype):
    index = torch.arange(6)[: max(1, torch.Size(shape).numel())]
    index = index[: torch.Size(shape).numel()].reshape(shape)
    pairs = ops.logit_index_to_action(index.to(dtype), PAIRS)
    assert (pairs.dtype, pairs.shape) == (torch.int32, (*shape, 2))
    assert torch.equal(pairs, PAIRS[index])
    for given in (pairs.to(dtype), pairs.to(dtype).t().contiguous().t() if len(shape) == 1 else pairs.to(dtype)):
        back = ops.action_to_logit_index(given, TABLE)
        assert (back.dtype, back.shape) == (torch.int64, shape)
        assert torch.equal(back, index)


@pytest.mark.parametrize("table", [PAIRS, PAIRS.long(), PAIRS.short(), PAIRS.t().contiguous().t()], ids=str)
def test_conversion_tables(table):
    pairs = ops.logit_index_to_action(torch.tensor([5, 0, 3])[::2], table)
    assert pairs.dtype == table.dtype
    assert pairs.tolist() == [[2, 0], [1, 1]]


@pytest.mark.parametrize("index", [[0, 6], [-1, 0], [[0, 1], [2, 99]]], ids=str)
def test_conversion_errors_are_those_of_the_eager_twin(index):
    same_error(lambda: ops.logit_index_to_action(torch.tensor(index), PAIRS))


# The LSTM layer


def lstm_reference(projected, weight_hh, h, c, resets):
    """(output, last h, last c) in float64, gate by gate."""
    projected, weight_hh, h, c = (tensor.double() for tensor in (projected, weight_hh, h, c))
    outputs = []
    for step, inputs in enumerate(projected):
        if resets is not None:
            h, c = (torch.where(resets[step][:, None], 0.0, state) for state in (h, c))
        i, f, g, o = (inputs + h @ weight_hh.t()).chunk(4, dim=1)
        c = 1 / (1 + (-f).exp()) * c + 1 / (1 + (-i).exp()) * g.tanh()
        h = 1 / (1 + (-o).exp()) * c.tanh()
        outputs.append(h)
    return torch.stack(outputs), h, c


def lstm_inputs(steps, rows, size, dtype, chance):
    shapes = [(steps, rows, 4 * size), (4 * size, size), (rows, size), (rows, size)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tensors[1] /= size**0.5
    tensors = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    return *tensors, None if chance is None else torch.rand(steps, rows) < chance


@pytest.mark.parametrize("chance", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", LSTM_SHAPES, ids=str)
def test_lstm_layer(shape, dtype, chance):
    *tensors, resets = lstm_inputs(*shape, dtype, chance)
    outputs = ops.lstm_layer(*tensors, resets)
    expected = lstm_reference(*tensors, resets)
    upstream = [torch.randn_like(output) for output in outputs]
    gradients = torch.autograd.grad(outputs, tensors, upstream)
    wanted = torch.autograd.grad(expected, tensors, [grad.double() for grad in upstream])
    for actual, exact in zip((*outputs, *gradients), (*expected, *wanted), strict=True):
        torch.testing.assert_close(actual, exact.to(dtype), **TOLERANCES[dtype])


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_lstm_layer_gradient_of_some_results(used):
    *tensors, resets = lstm_inputs(4, 3, 9, torch.float64, 0.3)
    outputs, expected = ops.lstm_layer(*tensors, resets), lstm_reference(*tensors, resets)
    upstream = [torch.randn_like(outputs[i]) for i in used]
    actual = torch.autograd.grad([outputs[i] for i in used], tensors, upstream)
    wanted = torch.autograd.grad([expected[i] for i in used], tensors, upstream)
    for one, other in zip(actual, wanted, strict=True):
        close(one, other, torch.float64)


def test_lstm_layer_of_saturated_and_unusable_gates():
    projected = torch.tensor([-1e30, 1e30, torch.inf, -torch.inf, torch.nan, 0.0, 50.0, -50.0])
    projected = projected[:, None].expand(8, 4 * 3).reshape(1, 8, 12).contiguous()
    arguments = (projected, torch.zeros(12, 3), torch.zeros(8, 3), torch.ones(8, 3))
    for actual, exact in zip(ops.lstm_layer(*arguments), lstm_reference(*arguments, None), strict=True):
        torch.testing.assert_close(actual, exact.float(), equal_nan=True, **TOLERANCES[torch.float32])


# All


def calls():
    """Operator name to arguments."""
    logits, index = torch.randn(5, 6), torch.arange(5)
    params = [torch.randn(3, 4), torch.randn(7)]
    initial = [torch.zeros(3, 4), torch.zeros(7)]
    tokens = torch.randint(12, (3, 40, 3), dtype=torch.uint8)
    projected, weight_hh, state = torch.randn(2, 3, 16), torch.randn(16, 4), torch.randn(3, 4)
    cells, gates, resets = torch.randn(2, 3, 4), torch.rand(2, 3, 16), torch.rand(2, 3) < 0.5
    kernel, sums = torch.randn(7, 12, 5, 5), torch.randn(3, 7, 3, 3)
    return {
        "evaluate_actions_forward": (logits, PAIRS[:5], TABLE),
        "evaluate_actions_backward": (logits, index, torch.randn(5), torch.randn(5), torch.randn(5, 6)),
        "sample_actions": (logits, PAIRS),
        "clip_weights_": (params, [0.1, 0.2]),
        "l2_init_loss_forward": (params, initial, 0.5),
        "l2_init_loss_backward": (params, initial, 0.5, torch.tensor(2.0)),
        "tokens_to_grid": (tokens, 12, 11, 11, torch.ones(12), torch.float32),
        "tokens_conv2d_forward": (tokens, kernel, torch.randn(7), torch.ones(12), 11, 11, 3, True),
        "tokens_conv2d_backward": (tokens, kernel, torch.ones(12), sums, sums, 11, 11, 3, True),
        "tanh": (logits,),
        "action_to_logit_index": (PAIRS, TABLE),
        "logit_index_to_action": (index, PAIRS),
        "lstm_layer_forward": (projected, weight_hh, state, state, resets),
        "lstm_layer_backward": (weight_hh, state, resets, cells, gates, torch.randn(2, 3, 4), state, None),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.metta_fastagent, name).default, calls()[name])


def test_every_operator_has_a_call_here():
    schemas = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("metta_fastagent_native::")}
    assert {name.removeprefix("metta_fastagent_native::") for name in schemas} == set(calls())


def test_compile_fullgraph():
    torch._dynamo.reset()

    def step(logits, pairs, weights, initial, tokens, kernel):
        log_prob, entropy, _ = ops.evaluate_actions(logits, pairs, TABLE)
        drawn = ops.sample_actions(logits, PAIRS)
        loss = log_prob.sum() + entropy.sum() + drawn[1].sum() + ops.l2_init_loss(weights, initial, 0.5)
        index = ops.action_to_logit_index(drawn[4], TABLE)
        grid = ops.tokens_to_grid(tokens, 5, 11, 11, torch.ones(5))
        loss = loss + ops.tokens_conv2d(tokens, kernel, None, torch.ones(5), 11, 11, 3, relu=True).sum()
        return loss, index, grid, ops.logit_index_to_action(index, PAIRS)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        torch.manual_seed(2)
        logits = torch.randn(9, 6).requires_grad_()
        weights = [torch.randn(4, 3).requires_grad_()]
        tokens = torch.randint(12, (9, 40, 3), dtype=torch.uint8)
        kernel = torch.randn(6, 5, 3, 3).requires_grad_()
        loss, *rest = function(logits, PAIRS[torch.arange(9) % 6], weights, [torch.ones(4, 3)], tokens, kernel)
        results.append((loss.detach(), *rest, *torch.autograd.grad(loss, [logits, kernel, *weights])))
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(plain, traced)
    torch._dynamo.reset()


def test_compile_clip():
    torch._dynamo.reset()
    weight = torch.full((40,), 3.0)
    torch.compile(lambda w: ops.clip_weights_([w], [1.0]), fullgraph=True, backend="aot_eager")(weight)
    assert (weight == 1).all()
    torch._dynamo.reset()


@pytest.fixture
def with_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(dtype, with_threads):
    # An odd number of rows, many times what one thread takes.
    logits = torch.randn(40_001, 21, dtype=dtype)
    index = torch.randint(21, (40_001,))
    pairs, table = torch.stack([torch.zeros_like(index), index], dim=1), torch.tensor([0, 20])
    entries = torch.stack([torch.zeros(21, dtype=torch.long), torch.arange(21)], dim=1)
    upstream = [torch.randn(shape, dtype=dtype) for shape in (40_001, 40_001, (40_001, 21))]
    params = [torch.randn(count, dtype=dtype) for count in (100_003, 7, 50_001)]
    initial = [torch.zeros_like(param) for param in params]
    tokens = torch.randint(12, (101, 200, 3), dtype=torch.uint8)
    # Several blocks of rows, each with a gradient of its own.
    seen, kernel, scale = torch.randint(12, (1025, 30, 3), dtype=torch.uint8), torch.randn(9, 12, 5, 5), torch.rand(12)
    kernel, scale = kernel.to(dtype), (scale + 0.5).to(dtype)
    sums = torch.randn(1025, 9, 3, 3, dtype=dtype)
    uniform = torch.rand(40_001, dtype=dtype)
    *lstm, resets = lstm_inputs(5, 2401, 24, dtype, 0.1)
    lstm = [tensor.detach() for tensor in lstm]
    # One entry in each row and column at most: the BLAS's products are then exact, in any order of summation.
    lstm[1] = torch.zeros(96, 24, dtype=dtype)
    lstm[1][torch.randperm(96)[:24], torch.arange(24)] = torch.randn(24, dtype=dtype)

    def everything():
        native = torch.ops.metta_fastagent
        clipped = [param.clone() for param in params]
        ops.clip_weights_(clipped, [0.5, 0.6, 0.7])
        states = native.lstm_layer_forward(*lstm, resets)
        return [
            *native.evaluate_actions_forward(logits, pairs, table),
            *native.evaluate_actions_forward(logits, index, None),
            native.evaluate_actions_backward(logits, index, *upstream),
            *_draw_native(logits, None, uniform),
            *clipped,
            native.l2_init_loss_forward(params, initial, 0.5),
            *native.l2_init_loss_backward(params, initial, 0.5, torch.tensor(3.0)),
            native.tokens_to_grid(tokens, 12, 11, 11, torch.rand(12).clamp(0.5, 0.5), dtype),
            native.tokens_conv2d_forward(seen, kernel, None, scale, 11, 11, 3, True),
            *native.tokens_conv2d_backward(seen, kernel, scale, None, sums, 11, 11, 3, True),
            native.tanh(logits),
            native.action_to_logit_index(pairs, table),
            native.logit_index_to_action(index, entries),
            *states,
            *native.lstm_layer_backward(lstm[1], lstm[3], resets, *states[1:], states[0], lstm[2], lstm[3]),
        ]

    with_threads(1)
    alone = everything()
    for threads in (2, 3):
        with_threads(threads)
        for one, many in zip(alone, everything(), strict=True):
            assert torch.equal(one, many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lstm_layers_agree_over_numbers_of_threads(dtype, with_threads):
    # Their products are the BLAS's, whose sums may depend on the number of threads.
    *lstm, resets = lstm_inputs(5, 601, 24, dtype, 0.1)
    lstm = [tensor.detach() for tensor in lstm]

    def layer():
        states = torch.ops.metta_fastagent.lstm_layer_forward(*lstm, resets)
        upstream = (states[0], lstm[2], lstm[3])
        return *states, *torch.ops.metta_fastagent.lstm_layer_backward(lstm[1], lstm[3], resets, *states[1:], *upstream)

    with_threads(1)
    alone = layer()
    for threads in (2, 3):
        with_threads(threads)
        for one, many in zip(alone, layer(), strict=True):
            torch.testing.assert_close(one, many, **TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("evaluate_actions_forward", (torch.randn(4, 6).t(), torch.arange(6), None)),
        ("evaluate_actions_forward", (torch.randn(4, 6), torch.arange(3), None)),
        ("evaluate_actions_forward", (torch.randn(4, 6).half(), torch.arange(4), None)),
        ("evaluate_actions_backward", (torch.randn(4, 6), torch.arange(4), torch.randn(3), None, None)),
        ("evaluate_actions_backward", (torch.randn(4, 6), torch.arange(4), None, None, torch.randn(4, 5))),
        ("sample_actions", (torch.randn(4, 6), torch.rand(3), None)),
        ("sample_actions", (torch.randn(4, 6), torch.rand(4), PAIRS[:5])),
        ("l2_init_loss_forward", ([torch.randn(4)], [torch.randn(3)], 1.0)),
        ("tokens_to_grid", (torch.zeros(2, 3, 3, dtype=torch.uint8), 5, 11, 17, torch.ones(5))),
        ("tokens_to_grid", (torch.zeros(2, 3, 3, dtype=torch.uint8), 5, 11, 11, torch.ones(4))),
        ("tokens_conv2d_forward", (*CONV[:3], torch.ones(4), 11, 11, 3, True)),
        ("tokens_conv2d_forward", (*CONV, 11, 17, 3, True)),
        ("tokens_conv2d_forward", (*CONV, 11, 4, 3, True)),
        ("tokens_conv2d_forward", (*CONV, 11, 11, 0, True)),
        ("tokens_conv2d_forward", (CONV[0], CONV[1], torch.ones(6), CONV[3], 11, 11, 3, True)),
        ("tokens_conv2d_forward", (CONV[0], CONV[1][:, :4], *CONV[2:], 11, 11, 3, True)),
        ("tokens_conv2d_backward", (*CONV[:2], CONV[3], None, torch.ones(2, 3, 3, 6), 11, 11, 3, True)),
        ("tokens_conv2d_backward", (*CONV[:2], CONV[3], torch.ones(2, 7), torch.ones(2, 3, 3, 7), 11, 11, 3, True)),
        ("tanh", (torch.randn(4, 6).t(),)),
        ("tanh", (torch.randn(4).half(),)),
        ("logit_index_to_action", (torch.arange(3), PAIRS.float())),
        ("lstm_layer_forward", (*LSTM[:3], torch.randn(2, 4), None)),
        ("lstm_layer_forward", (*LSTM, torch.zeros(3, 2, dtype=torch.bool))),
        ("lstm_layer_forward", (LSTM[0].double(), *LSTM[1:], None)),
        ("lstm_layer_backward", (LSTM[1], LSTM[3], None, torch.randn(2, 3, 3), LSTM[0], None, None, None)),
        ("lstm_layer_backward", (LSTM[1], LSTM[3], None, torch.randn(2, 3, 4), LSTM[0], LSTM[2], None, None)),
    ],
)
def test_a_direct_call_cannot_leave_the_tensors(name, arguments):
    with pytest.raises(RuntimeError, match=r"expected|wrong shape"):
        getattr(torch.ops.metta_fastagent_native, name)(*arguments)
