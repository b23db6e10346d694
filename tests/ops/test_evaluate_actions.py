import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Categorical

from metta_fastagent.ops import evaluate_actions

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
SHAPES = [(0, 9), (1, 1), (7, 1), (1, 5), (33, 9), (5, 21), (3, 128), (2, 5000), (257, 5)]
OUTPUT_SUBSETS = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
OPERATORS = torch.ops.metta_fastagent

# Two action types with largest parameters 1 and 2.
CUM_MAX_PARAMS = torch.tensor([0, 1, 3])
PAIRS = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [1, 2]], dtype=torch.int32)


def masked(logits):
    """Each row keeps the action of its own number, and about half of the others."""
    mask = torch.rand(logits.shape) < 0.5
    mask[torch.arange(len(logits)), torch.arange(len(logits)) % logits.shape[1]] = False
    return logits.masked_fill(mask, -torch.inf)


def only_one_allowed(logits):
    forbidden = torch.arange(logits.shape[1]) != torch.arange(len(logits)).unsqueeze(1) % logits.shape[1]
    return logits.masked_fill(forbidden, -torch.inf)


EXTREMES = {
    "1e4": lambda logits: logits * 1e4,
    "far from zero": lambda logits: logits + 1e4,
    "tiny": lambda logits: logits * 1e-30,
    "largest finite": lambda logits: logits.sign() * torch.finfo(logits.dtype).max,
    "masked": masked,
    "first masked": lambda logits: logits.index_fill(1, torch.tensor([0]), -torch.inf),
    "last masked": lambda logits: logits.index_fill(1, torch.tensor([8]), -torch.inf),
    "one allowed": only_one_allowed,
}
LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every second column": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "every second row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


def indexed(index, actions=None, table=None, function=evaluate_actions):
    """A function of the logits alone that returns the indices too."""
    return lambda logits: (index, *function(logits, index if actions is None else actions, table))


def test_hand_computed_values():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, 3.0 + torch.tensor(3.0).log(), -torch.inf, -torch.inf]])
    log_prob, entropy, full_log_probs = evaluate_actions(logits, torch.tensor([2, 1]))
    # A uniform row, and a row with probabilities 1/4 and 3/4.
    torch.testing.assert_close(log_prob, torch.tensor([-1.3862944, -0.2876821]))
    torch.testing.assert_close(entropy, torch.tensor([1.3862944, 0.5623351]))
    torch.testing.assert_close(full_log_probs[1], torch.tensor([-1.3862944, -0.2876821, -torch.inf, -torch.inf]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, check_categorical):
    check_categorical(indexed(torch.randint(shape[1], shape[:1])), torch.randn(shape).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extreme", EXTREMES.values(), ids=EXTREMES)
def test_extreme_logits(extreme, dtype, check_categorical):
    check_categorical(indexed(torch.arange(33) % 9), extreme(torch.randn(33, 9).to(dtype)))


@pytest.mark.parametrize("name", ["masked", "first masked", "last masked", "one allowed"])
def test_no_nan_from_masked_logits(name):
    logits = EXTREMES[name](torch.randn(33, 9)).requires_grad_()
    log_prob, entropy, full_log_probs = evaluate_actions(logits, torch.arange(33) % 9)
    (grad,) = torch.autograd.grad((log_prob.sum() + entropy.sum()), logits)
    assert entropy.isfinite().all()
    assert not full_log_probs.isnan().any()
    assert grad.isfinite().all()
    assert (grad[logits.isinf() & (torch.arange(9) != torch.arange(33).unsqueeze(1) % 9)] == 0).all()


@pytest.mark.parametrize("subset", OUTPUT_SUBSETS, ids=str)
@pytest.mark.parametrize("with_table", [False, True], ids=["index", "pairs"])
def test_each_subset_of_outputs(subset, with_table, check_categorical):
    index = torch.randint(5, (13,))
    pairs = (PAIRS[index], CUM_MAX_PARAMS) if with_table else ()
    check_categorical(indexed(index, *pairs), torch.randn(13, 5), subset)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_non_contiguous(layout, check_categorical):
    index = torch.randint(5, (13,))
    pairs = PAIRS[index].t().contiguous().t()
    check_categorical(indexed(index, pairs, CUM_MAX_PARAMS), layout(torch.randn(13, 5)))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integer_dtypes_of_actions(dtype, check_categorical):
    index = torch.tensor([4, 0, 2, 1, 3])
    check_categorical(indexed(index, index.to(dtype)), torch.randn(5, 5))
    check_categorical(indexed(index, PAIRS[index].to(dtype), CUM_MAX_PARAMS), torch.randn(5, 5))


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_agrees_with_categorical(scale):
    logits, index = torch.randn(50, 9, dtype=torch.float64) * scale, torch.randint(9, (50,))
    log_prob, entropy, full_log_probs = evaluate_actions(logits, index)
    distribution = Categorical(logits=logits)
    torch.testing.assert_close(log_prob, distribution.log_prob(index))
    torch.testing.assert_close(entropy, distribution.entropy())
    torch.testing.assert_close(full_log_probs, distribution.logits)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_without_a_distribution_stays_alone(bad, categorical, assert_close):
    logits, index = torch.randn(6, 9), torch.randint(9, (6,))
    logits[2, 3] = bad
    logits.requires_grad_()
    outputs = evaluate_actions(logits, index)
    (grad,) = torch.autograd.grad([output.sum() for output in outputs], logits)
    good = torch.tensor([0, 1, 3, 4, 5])
    exact = logits.detach()[good].double().requires_grad_()
    expected = categorical(exact, index[good])
    for output, value in zip(outputs, expected, strict=True):
        assert output[2].isnan().all()
        assert_close(output[good], value.detach(), torch.float32)
    assert grad[2].isnan().all()
    assert_close(grad[good], *torch.autograd.grad([v.sum() for v in expected], exact), torch.float32)


def test_outputs_without_gradient():
    outputs = evaluate_actions(torch.randn(3, 5), torch.tensor([0, 1, 2]))
    assert not any(output.requires_grad for output in outputs)


@pytest.mark.parametrize("mask", [False, True], ids=["finite", "masked"])
def test_gradcheck(mask):
    logits, index = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    logits = (masked(logits) if mask else logits).requires_grad_()
    # The difference of two infinite log-probabilities is NaN, so these are left out where logits are masked.
    outputs = slice(0, 2 if mask else 3)
    assert torch.autograd.gradcheck(lambda x: evaluate_actions(x, index)[outputs], logits)


@pytest.mark.parametrize(
    "logits",
    [torch.randn(3, 5), torch.randn(5, 3).bfloat16().t(), torch.randn(0, 5)],
    ids=["float32", "transposed bfloat16", "empty"],
)
@pytest.mark.parametrize(
    ("actions", "table"),
    [(torch.tensor([4, 0, 2]), None), (torch.tensor([4, 0, 2]).short(), None), (PAIRS[2:], CUM_MAX_PARAMS)],
    ids=["int64 index", "int16 index", "pairs"],
)
def test_opcheck_forward(logits, actions, table):
    torch.library.opcheck(OPERATORS.evaluate_actions_forward.default, (logits, actions[: len(logits)], table))


@pytest.mark.parametrize("subset", OUTPUT_SUBSETS, ids=str)
def test_opcheck_backward(subset):
    upstream = [torch.randn(3), torch.randn(3), torch.randn(5, 3).t()]
    grads = [g if i in subset else None for i, g in enumerate(upstream)]
    torch.library.opcheck(
        OPERATORS.evaluate_actions_backward.default, (torch.randn(5, 3).t(), torch.tensor([4, 0, 2]), *grads)
    )


@pytest.mark.parametrize("with_table", [False, True], ids=["index", "pairs"])
def test_compile(with_table, check_categorical, compile_fullgraph):
    compiled = compile_fullgraph(evaluate_actions)
    for rows in (6, 3, 11):
        index = torch.randint(5, (rows,))
        pairs = (PAIRS[index], CUM_MAX_PARAMS) if with_table else (index, None)
        check_categorical(indexed(index, *pairs, compiled), torch.randn(rows, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_host_read(dtype):
    with FakeTensorMode():
        logits = torch.randn(4, 5, dtype=dtype, requires_grad=True)
        actions, table = torch.zeros(4, 2, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
        outputs = evaluate_actions(logits, actions, table)
        (grad,) = torch.autograd.grad([output.sum() for output in outputs], logits)
    assert [(output.shape, output.dtype) for output in outputs] == [((4,), dtype), ((4,), dtype), ((4, 5), dtype)]
    assert (grad.shape, grad.dtype) == ((4, 5), dtype)


LOGITS, INDEX = torch.zeros(3, 5), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("logits", "actions", "table", "error", "argument", "came", "expected"),
    [
        ([[0.0]], INDEX, None, TypeError, "logits", "list", "floating-point tensor"),
        (LOGITS.long(), INDEX, None, TypeError, "logits", "int64", "floating-point tensor"),
        (LOGITS.cfloat(), INDEX, None, TypeError, "logits", "complex64", "floating-point tensor"),
        (LOGITS[0], INDEX, None, ValueError, "logits", "shape [5]", "[N, A]"),
        (LOGITS[None], INDEX, None, ValueError, "logits", "shape [1, 3, 5]", "[N, A]"),
        (LOGITS[:, :0], INDEX, None, ValueError, "logits", "shape [3, 0]", "A >= 1"),
        (LOGITS, 1, None, TypeError, "actions", "1 (int)", "[3]"),
        (LOGITS, INDEX.float(), None, TypeError, "actions", "float32", "integer tensor of shape [3]"),
        (LOGITS, INDEX.bool(), None, TypeError, "actions", "bool", "integer tensor of shape [3]"),
        (LOGITS, INDEX[:2], None, ValueError, "actions", "shape [2]", "[3]"),
        (LOGITS, PAIRS[:3], None, ValueError, "actions", "shape [3, 2]", "[3]"),
        (LOGITS, INDEX.to("meta"), None, ValueError, "actions", "on meta", "logits (cpu)"),
        (LOGITS.to("meta"), PAIRS[:3], CUM_MAX_PARAMS, ValueError, "actions", "on cpu", "logits (meta)"),
        (LOGITS, INDEX, CUM_MAX_PARAMS, ValueError, "actions", "shape [3]", "[..., 2]"),
        (LOGITS, PAIRS[:2], CUM_MAX_PARAMS, ValueError, "actions", "shape [2, 2]", "[3, 2]"),
        (LOGITS, PAIRS[None, :3], CUM_MAX_PARAMS, ValueError, "actions", "shape [1, 3, 2]", "[3, 2]"),
        (LOGITS, PAIRS[:3], CUM_MAX_PARAMS.int(), TypeError, "cum_action_max_params", "int32", "int64 tensor"),
        (LOGITS, torch.tensor([0, 5, 1]), None, ValueError, "actions[1]", "5", "0 to 4"),
        (LOGITS, torch.tensor([0, 1, -1]), None, ValueError, "actions[2]", "-1", "0 to 4"),
        (
            LOGITS,
            torch.tensor([[0, 0], [1, 3], [0, 0]]),
            CUM_MAX_PARAMS,
            ValueError,
            "actions[1]",
            "parameter 3",
            "0 to 2",
        ),
        (LOGITS[:, :4], PAIRS[2:], CUM_MAX_PARAMS, ValueError, "actions[2]", "logit index 4", "0 to 3"),
    ],
)
def test_wrong_arguments(logits, actions, table, error, argument, came, expected, refuses):
    with refuses(error, argument, came, expected):
        evaluate_actions(logits, actions, table)
