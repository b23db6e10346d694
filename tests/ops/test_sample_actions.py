import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from metta_fastagent import use_backend
from metta_fastagent.ops import sample_actions

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 9), (1, 1), (7, 1), (1, 5), (33, 9), (5, 21), (3, 128), (2, 5000), (257, 5)]
OUTPUT_SUBSETS = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]

# Two action types with largest parameters 1 and 2.
PAIRS = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [1, 2]], dtype=torch.int32)

LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every second column": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "every second row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "expanded": lambda x: x[:1].expand_as(x),
}

# Actions that may be drawn, of nine.
ALLOWED = {
    "first masked": range(1, 9),
    "last masked": range(8),
    "both ends masked": range(1, 8),
    "one allowed": [4],
    "only the first": [0],
    "only the last": [8],
    "every second": range(0, 9, 2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, check_categorical):
    check_categorical(sample_actions, torch.randn(shape).to(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_indices_are_in_range(shape):
    index = sample_actions(torch.zeros(shape, requires_grad=True))[0]
    assert (index.shape, index.dtype, index.requires_grad) == (shape[:1], torch.int64, False)
    assert ((index >= 0) & (index < shape[1])).all()


@pytest.mark.parametrize("subset", OUTPUT_SUBSETS, ids=str)
def test_each_subset_of_outputs(subset, check_categorical):
    check_categorical(sample_actions, torch.randn(13, 9), subset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e4, 1e-30])
def test_extreme_logits(scale, dtype, check_categorical):
    check_categorical(sample_actions, torch.randn(33, 9).to(dtype) * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest_finite_logits(dtype):
    logits = torch.full((64, 9), -torch.finfo(dtype).max, dtype=dtype)
    logits[:, 3] = torch.finfo(dtype).max
    index, log_prob, entropy, _ = sample_actions(logits)
    assert (index == 3).all()
    assert (log_prob == 0).all()
    assert (entropy == 0).all()


@pytest.mark.parametrize("explicit", [False, True], ids=["manual_seed", "generator"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_actions", [1, 5, 21, 5000])
@use_backend("eager")
def test_same_draws_as_multinomial(num_actions, dtype, explicit):
    logits = (3 * torch.randn(40, num_actions)).to(dtype)
    probs = torch.log_softmax(logits.double() if dtype == torch.float64 else logits.float(), dim=-1).exp()
    ours, theirs = (torch.Generator().manual_seed(11) if explicit else None for _ in range(2))
    torch.manual_seed(3)
    draws = [sample_actions(logits, generator=ours)[0] for _ in range(2)]
    state = torch.get_rng_state()
    torch.manual_seed(3)
    expected = [torch.multinomial(probs, 1, generator=theirs).view(-1) for _ in range(2)]
    assert torch.equal(torch.stack(draws), torch.stack(expected))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("explicit", [False, True], ids=["manual_seed", "generator"])
def test_seeds_reproduce_and_differ(explicit):
    logits = torch.zeros(200, 9)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed) if explicit else None
        torch.manual_seed(seed)
        return sample_actions(logits, generator=generator)[0]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_a_generator_leaves_the_default_one_alone():
    before = torch.get_rng_state()
    sample_actions(torch.zeros(20, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("allowed", ALLOWED.values(), ids=ALLOWED)
def test_never_a_forbidden_action(allowed, dtype, check_categorical):
    logits = torch.full((4096, 9), -torch.inf, dtype=dtype)
    logits[:, list(allowed)] = torch.randn(4096, len(allowed)).to(dtype)
    assert sample_actions(logits)[0].unique().tolist() == list(allowed)
    check_categorical(sample_actions, logits[:16])


def test_an_action_of_probability_zero_is_never_drawn():
    logits = torch.tensor([-200.0, 0.0, -1e30, 0.0, -200.0]).expand(4096, 5)
    assert sample_actions(logits)[0].unique().tolist() == [1, 3]


# Values of chi-squared that a right sampler passes with probability 1e-4, by degrees of freedom.
@pytest.mark.parametrize(("degrees", "limit"), [(4, 23.51), (8, 31.83), (20, 52.39)])
@pytest.mark.parametrize("explicit", [False, True], ids=["manual_seed", "generator"])
def test_chi_squared(degrees, limit, explicit):
    logits, rows = torch.linspace(-1.5, 1.5, degrees + 1), 100_000
    index = sample_actions(logits.expand(rows, -1), generator=torch.Generator().manual_seed(5) if explicit else None)[0]
    expected = rows * logits.double().exp() / logits.double().exp().sum()
    counts = torch.bincount(index, minlength=degrees + 1)
    assert ((counts - expected) ** 2 / expected).sum() < limit


def test_rows_are_drawn_independently():
    index = sample_actions(torch.zeros(20_000, 2))[0]
    # Neighbouring rows agree in half of the pairs; five standard deviations are 0.0177.
    assert abs((index[1:] == index[:-1]).double().mean() - 0.5) < 0.0177


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
def test_pairs(dtype):
    outputs = sample_actions(torch.randn(50, 5, requires_grad=True), PAIRS.to(dtype))
    index, pair = outputs[0], outputs[4]
    assert (pair.dtype, pair.requires_grad) == (torch.int32, False)
    assert pair.tolist() == [[[0, 0], [0, 1], [1, 0], [1, 1], [1, 2]][i] for i in index.tolist()]
    assert len(sample_actions(torch.randn(50, 5))) == 4


def test_pairs_of_no_rows():
    assert sample_actions(torch.randn(0, 5), PAIRS)[4].shape == (0, 2)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_non_contiguous(layout, check_categorical):
    check_categorical(sample_actions, layout(torch.randn(13, 9)))


@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["manual_seed", "generator"])
@pytest.mark.parametrize("row", [[0.0, torch.nan, 0.0], [0.0, torch.inf, 0.0], [-torch.inf] * 3], ids=str)
def test_a_row_without_a_distribution_is_refused(row, generator, refuses):
    logits = torch.zeros(4, 3)
    logits[2] = torch.tensor(row)
    before = torch.get_rng_state()
    with refuses(ValueError, "logits[2]", "NaN or +inf, or is -inf throughout", "finite values"):
        sample_actions(logits, generator=generator)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("mask", [False, True], ids=["finite", "masked"])
def test_gradcheck(mask):
    logits = torch.randn(4, 5, dtype=torch.float64)
    logits[:, 1] = -torch.inf if mask else 0.0
    # The difference of two infinite log-probabilities is NaN, so these are left out where logits are masked.
    outputs = slice(1, 3 if mask else 4)

    def sample(x):
        return sample_actions(x, generator=torch.Generator().manual_seed(1))[outputs]

    assert torch.autograd.gradcheck(sample, logits.requires_grad_())


@pytest.mark.parametrize("table", [None, PAIRS], ids=["index", "pairs"])
@pytest.mark.parametrize(
    "logits",
    [torch.randn(3, 5), torch.randn(5, 3).half().t(), torch.randn(0, 5)],
    ids=["float32", "transposed float16", "empty"],
)
def test_opcheck(logits, table):
    torch.library.opcheck(torch.ops.metta_fastagent.sample_actions.default, (logits, table))


def test_compile(check_categorical, compile_fullgraph):
    compiled = compile_fullgraph(sample_actions)
    for rows in (6, 3, 11):
        check_categorical(compiled, torch.randn(rows, 9))


@use_backend("eager")
def test_compiled_draws_are_those_of_multinomial(compile_fullgraph):
    logits = torch.randn(40, 5)
    torch.manual_seed(3)
    index, *_, pair = compile_fullgraph(sample_actions)(logits, PAIRS)
    torch.manual_seed(3)
    assert torch.equal(index, torch.multinomial(torch.log_softmax(logits, -1).exp(), 1).view(-1))
    assert torch.equal(pair, PAIRS[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_host_read(dtype):
    with FakeTensorMode():
        logits = torch.randn(4, 5, dtype=dtype, requires_grad=True)
        outputs = sample_actions(logits, torch.zeros(5, 2, dtype=torch.int32))
        (grad,) = torch.autograd.grad([output.sum() for output in outputs[1:4]], logits)
    expected = [((4,), torch.int64), ((4,), dtype), ((4,), dtype), ((4, 5), dtype), ((4, 2), torch.int32)]
    assert [(output.shape, output.dtype) for output in outputs] == expected
    assert (grad.shape, grad.dtype) == ((4, 5), dtype)


LOGITS = torch.zeros(3, 5)


@pytest.mark.parametrize(
    ("logits", "table", "generator", "error", "argument", "came", "expected"),
    [
        (None, None, None, TypeError, "logits", "None", "floating-point tensor"),
        (LOGITS.int(), None, None, TypeError, "logits", "int32", "floating-point tensor"),
        (LOGITS[0], None, None, ValueError, "logits", "shape [5]", "[N, A]"),
        (LOGITS[:, :0], None, None, ValueError, "logits", "shape [3, 0]", "A >= 1"),
        (LOGITS[:, :4], PAIRS, None, ValueError, "logits", "shape [3, 4]", "5 columns"),
        (LOGITS, PAIRS[:4], None, ValueError, "logits", "shape [3, 5]", "4 columns"),
        (LOGITS.to("meta"), PAIRS, None, ValueError, "logits", "on meta", "action_index_tensor (cpu)"),
        (LOGITS, PAIRS.tolist(), None, TypeError, "action_index_tensor", "list", "[num_actions, 2]"),
        (LOGITS, PAIRS.float(), None, TypeError, "action_index_tensor", "float32", "int32"),
        (LOGITS, PAIRS.T, None, ValueError, "action_index_tensor", "shape [2, 5]", "[num_actions, 2]"),
        (LOGITS, None, 3, TypeError, "generator", "3 (int)", "torch.Generator"),
    ],
)
def test_wrong_arguments(logits, table, generator, error, argument, came, expected, refuses):
    with refuses(error, argument, came, expected):
        sample_actions(logits, table, generator)
