"""Masks, temperatures and greedy actions of every backend against float64 formulas written out here.

Under Triton's interpreter the kernels run; otherwise the eager twin and, if they are built, the C++ operators.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from metta_fastagent import _native, _triton, ops, use_backend
from metta_fastagent._dispatch import requested
from metta_fastagent.ops._categorical import MAX_COLUMNS

if _triton.INTERPRETED:
    BACKENDS = ["triton"]
elif requested() == "auto":
    BACKENDS = ["eager", *(["native"] if _native.load() else [])]
else:
    BACKENDS = [requested()]
CASES = 300 if _triton.INTERPRETED else 2000
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-11, torch.float16: 5e-3, torch.bfloat16: 4e-2}
# bfloat16 arithmetic and rounding are wrong in the interpreter.
DTYPES = [dtype for dtype in TOLERANCES if not (_triton.INTERPRETED and dtype == torch.bfloat16)]
# Types 0, 1 and 2 with largest parameters 1, 0 and 2.
PAIRS = torch.tensor([[0, 0], [0, 1], [1, 0], [2, 0], [2, 1], [2, 2]], dtype=torch.int32)
CUM = torch.tensor([0, 1, 1, 3])

pytestmark = [
    pytest.mark.parametrize("name", BACKENDS),
    pytest.mark.skipif(BACKENDS == ["native"] and not _native.load(), reason=f"native operators: {_native.reason()}"),
]


@pytest.fixture(autouse=True)
def chosen(name):
    torch.manual_seed(0)
    with use_backend(name):
        yield


def close(got, expected, dtype):
    assert got.dtype == dtype
    # To the dtype and back, so that what overflows there is infinite in both.
    expected = torch.where(expected.to(dtype).isinf(), expected.to(dtype).double(), expected)
    torch.testing.assert_close(got.double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype], equal_nan=True)


def rounded_quotient(logits, temperature, dtype):
    """logits / temperature in float64, rounded as their dtype's arithmetic does: large logits lose digits."""
    exact = logits / float(temperature)
    if dtype == torch.float64:
        return exact
    rounded = (logits.detach().float() / torch.as_tensor(temperature, dtype=torch.float32)).double()
    return exact + (rounded - exact.detach())


def reference(logits, index, mask=None, temperature=1.0, dtype=torch.float32):
    """(log_prob, entropy, full_log_probs) in float64; p log p of a forbidden action counts 0."""
    z = rounded_quotient(logits.double(), temperature, dtype)
    if mask is not None:
        z = torch.where(mask, z, -torch.inf)
    full = z - z.logsumexp(-1, keepdim=True)
    entropy = -torch.where(full == -torch.inf, 0.0, full.exp() * full.clamp(min=-1e300)).sum(-1)
    return full.gather(1, index[:, None]).squeeze(1), entropy, full


@st.composite
def cases(draw):
    """(logits, mask or None, temperature, index of an allowed action, dtype)."""
    dtype = draw(st.sampled_from(DTYPES))
    rows, actions = draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 3, 5, 8, 9, 21, 33, MAX_COLUMNS + 1]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-30, 1.0, 30.0, 1e4]))
    logits = (scale * torch.randn(rows, actions, dtype=torch.float64, generator=generator)).to(dtype)
    share = draw(st.sampled_from([0.1, 0.5, 0.95]))
    mask = torch.rand(rows, actions, generator=generator) < share
    index = torch.randint(actions, (rows,), generator=generator)
    mask[torch.arange(rows), index] = True
    temperature = draw(st.sampled_from([1.0, 0.5, 1.7, 20.0]))
    if draw(st.booleans()):
        temperature = torch.tensor(temperature, dtype=draw(st.sampled_from([torch.float32, torch.float64])))
    return logits, draw(st.sampled_from([mask, mask, None])), temperature, index, dtype


@settings(max_examples=CASES, deadline=None)
@given(case=cases())
def test_values_gradients_and_greedy_actions(name, case):
    logits, mask, temperature, index, dtype = case
    exact = logits.double().requires_grad_()
    logits.requires_grad_()
    outputs = ops.evaluate_actions(logits, index, mask=mask, temperature=temperature)
    wanted = reference(exact, index, mask, temperature, dtype)
    for got, expected in zip(outputs, wanted, strict=True):
        close(got, expected, dtype)
    weights = torch.linspace(-1, 2, logits.shape[0])
    (grad,) = torch.autograd.grad([outputs[0], outputs[1]], logits, [weights.to(dtype)] * 2)
    (expected,) = torch.autograd.grad([wanted[0], wanted[1]], exact, [weights.to(dtype).double()] * 2)
    close(grad, expected.double(), dtype)
    if mask is not None:
        assert (grad[~mask] == 0).all()
    drawn, log_prob, entropy, full = ops.sample_actions(logits, mask=mask, temperature=temperature)
    assert mask is None or mask[torch.arange(len(drawn)), drawn].all()
    close(log_prob, reference(exact, drawn, mask, temperature, dtype)[0], dtype)
    assert torch.equal(entropy, outputs[1])
    assert torch.equal(full, outputs[2])
    greedy = ops.sample_actions(logits, mask=mask, temperature=temperature, greedy=True)[0]
    allowed = logits if mask is None else torch.where(mask, logits, -torch.inf)
    # Division may make two logits equal: then the first counts.
    compute = torch.promote_types(dtype, torch.float32)
    tempered = allowed.to(compute) / torch.as_tensor(temperature, dtype=compute)
    assert (tempered.gather(1, greedy[:, None]).squeeze(1) == tempered.max(-1).values).all()
    assert (
        (tempered < tempered.max(-1, keepdim=True).values) | (torch.arange(logits.shape[1]) >= greedy[:, None])
    ).all()


@pytest.mark.parametrize("output", range(3))
def test_gradcheck(name, output):
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    mask, index = torch.rand(5, 4) < 0.6, torch.tensor([3, 1, 0, 2, 2])
    mask[torch.arange(5), index] = True

    def function(x):
        result = ops.evaluate_actions(x, index, mask=mask, temperature=0.6)[output]
        return torch.where(mask, result, 0.0) if output == 2 else result

    assert torch.autograd.gradcheck(function, (logits,))
    assert torch.autograd.gradgradcheck(function, (logits,))


def test_of_equal_logits_the_first_allowed_is_greedy(name):
    mask = torch.tensor([[True, True, True], [False, True, True], [False, False, True]])
    index, log_prob, _, _ = ops.sample_actions(torch.ones(3, 3), mask=mask, greedy=True)
    assert index.tolist() == [0, 1, 2]
    close(log_prob, torch.tensor([1 / 3, 1 / 2, 1.0], dtype=torch.float64).log(), torch.float32)


def test_greedy_draws_no_random_number(name):
    logits, before = torch.randn(4, 9), torch.get_rng_state()
    ops.sample_actions(logits, greedy=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_under_a_mask_follow_the_distribution(name):
    rows = 20_000
    logits, allowed = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0]), torch.tensor([True, False, True, True, True])
    index = ops.sample_actions(logits.expand(rows, 5), mask=allowed.expand(rows, 5), temperature=2.0)[0]
    p = torch.where(allowed, logits.double() / 2, -torch.inf).softmax(-1)
    counts = torch.bincount(index, minlength=5)
    assert counts[1] == 0
    # 0.9999 quantile of chi squared with 3 degrees of freedom
    assert ((counts - rows * p)[allowed] ** 2 / (rows * p)[allowed]).sum() < 21.1


@pytest.mark.skipif(_triton.INTERPRETED, reason="two million rows take minutes in the interpreter")
def test_two_million_draws_and_no_forbidden_action(name):
    rows = 200_000
    for scale in (0.1, 1.0, 10.0, 100.0, 1000.0) * 2:
        mask = torch.rand(rows, 9) < 0.4
        mask[torch.arange(rows), torch.randint(9, (rows,))] = True
        index = ops.sample_actions(scale * torch.randn(rows, 9), mask=mask)[0]
        assert mask[torch.arange(rows), index].all()


@pytest.mark.parametrize("actions", [3, MAX_COLUMNS + 1])
@pytest.mark.parametrize("greedy", [False, True])
def test_a_row_without_an_allowed_action(name, actions, greedy):
    logits, mask = torch.randn(4, actions, requires_grad=True), torch.ones(4, actions, dtype=torch.bool)
    mask[1], mask[3, 0] = False, False
    index, log_prob, entropy, _ = ops.sample_actions(logits, mask=mask, greedy=greedy, strict=False)
    assert index[1] == 0
    assert log_prob.isnan().tolist() == entropy.isnan().tolist() == [False, True, False, False]
    log_prob, entropy, _ = ops.evaluate_actions(logits, torch.tensor([1, 1, 1, 1]), mask=mask)
    assert log_prob.isnan().tolist() == entropy.isnan().tolist() == [False, True, False, False]
    (grad,) = torch.autograd.grad(log_prob.nansum(), logits)
    assert (grad[1] == 0).all()
    assert not grad.isnan().any()


def call_and_read_report(call):
    call()
    ops.raise_if_reported()


@pytest.mark.parametrize("actions", [3, MAX_COLUMNS + 1])
@pytest.mark.parametrize(
    ("row", "masked", "message"),
    [
        ("nan", False, r"logits\[2\]: holds NaN or \+inf, or is -inf throughout; expected finite values or some -inf"),
        ("inf", True, r"logits\[2\]: holds NaN or \+inf, or is -inf throughout; expected finite values or some -inf"),
        ("-inf", False, r"logits\[2\]: holds NaN or \+inf, or is -inf throughout; expected finite values or some -inf"),
        ("0", True, r"mask\[2\]: got no allowed action with a logit above -inf, expected at least one"),
    ],
)
def test_strict_calls_name_the_row(name, actions, row, masked, message):
    logits = torch.zeros(5, actions)
    logits[2] = float(row)
    mask = torch.ones(5, actions, dtype=torch.bool) if masked else None
    if row == "0":
        mask[2] = False
    index = torch.zeros(5, dtype=torch.int64)
    for call in (
        lambda: ops.evaluate_actions(logits, index, mask=mask, strict=True),
        lambda: ops.sample_actions(logits, mask=mask),
        lambda: ops.sample_actions(logits, mask=mask, greedy=True),
    ):
        with pytest.raises(ValueError, match=message):
            call_and_read_report(call)
    ops.evaluate_actions(logits, index, mask=mask)
    ops.sample_actions(logits, mask=mask, strict=False)
    ops.raise_if_reported()


def test_what_a_mask_forbids_may_be_nan(name):
    logits = torch.tensor([[1.0, torch.nan, 2.0], [torch.inf, 0.0, -1.0]])
    mask = torch.tensor([[True, False, True], [False, True, True]])
    index = ops.sample_actions(logits, mask=mask, greedy=True)[0]
    assert index.tolist() == [2, 1]
    _, entropy, _ = ops.evaluate_actions(logits, index, mask=mask, strict=True)
    assert entropy.isfinite().all()


def test_a_temperature_of_three_dimensions(name):
    logits, index = torch.randn(2, 3), torch.tensor([1, 2])
    outputs = ops.evaluate_actions(logits, index, temperature=torch.full((1, 1, 1), 2.0))
    for got, expected in zip(outputs, reference(logits, index, None, 2.0), strict=True):
        close(got, expected, torch.float32)


def test_a_pair_of_masks(name):
    types = torch.tensor([[True, False, True], [False, True, True]])
    params = torch.tensor([[True, False, True], [True, True, False]])
    expected = torch.tensor([[True, False, False, True, False, True], [False, False, True, True, True, False]])
    logits, actions = torch.randn(2, 6), torch.tensor([[2, 2], [1, 0]])
    for got, wanted in zip(
        ops.evaluate_actions(logits, actions, CUM, mask=(types, params)),
        ops.evaluate_actions(logits, actions, CUM, mask=expected),
        strict=True,
    ):
        assert torch.equal(got, wanted)
    full = ops.sample_actions(logits, PAIRS, mask=(types, params))[3]
    assert torch.equal(full > -torch.inf, expected)


def test_without_options_nothing_changes(name):
    logits, index = torch.randn(50, 9), torch.randint(9, (50,))
    everything = torch.ones(50, 9, dtype=torch.bool)
    plain = ops.evaluate_actions(logits, index)
    for options in ({"mask": everything}, {"temperature": torch.ones(())}, {"mask": everything, "temperature": 1}):
        for got, expected in zip(ops.evaluate_actions(logits, index, **options), plain, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan])
def test_a_temperature_tensor_that_is_not_positive(name, value):
    logits, temperature = torch.zeros(2, 3), torch.tensor(value)
    if name == "triton":
        assert ops.sample_actions(logits, temperature=temperature)[1].isnan().all()
        with pytest.raises(ValueError, match=r"logits\[\d\]: holds NaN"):
            ops.raise_if_reported()
    else:
        with pytest.raises(ValueError, match=r"temperature: got .*, expected a finite number > 0"):
            ops.sample_actions(logits, temperature=temperature)


MASK = torch.ones(2, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"mask": MASK.int()},
            TypeError,
            r"mask: got an int32 tensor of shape \[2, 6\] on cpu, expected a bool tensor of shape \[2, 6\] on cpu",
        ),
        (
            {"mask": MASK[:, :5]},
            ValueError,
            r"mask: got .* of shape \[2, 5\] .*, expected a bool tensor of shape \[2, 6\]",
        ),
        ({"mask": MASK[:1]}, ValueError, r"mask: got .* of shape \[1, 6\]"),
        ({"mask": MASK.to("meta")}, ValueError, r"mask: got .* on meta, expected .* on cpu"),
        ({"mask": [MASK, MASK]}, TypeError, r"mask: got a list of length 2, expected a bool tensor or a pair of them"),
        ({"mask": (MASK, MASK, MASK)}, TypeError, r"mask: got a tuple of length 3"),
        ({"mask": (MASK[:, :3].int(), MASK)}, TypeError, r"mask\[0\]: got an int32 tensor"),
        ({"mask": (MASK[:, :2], MASK)}, ValueError, r"mask\[0\]: got .* of shape \[2, 2\]"),
        ({"mask": (MASK[:, :3], MASK[:, :2])}, ValueError, r"mask\[1\]: got .*, expected at least 3 columns"),
        ({"temperature": 0}, ValueError, r"temperature: got 0, expected a finite number > 0"),
        ({"temperature": -0.5}, ValueError, r"temperature: got -0.5"),
        ({"temperature": torch.inf}, ValueError, r"temperature: got inf"),
        ({"temperature": torch.nan}, ValueError, r"temperature: got nan"),
        ({"temperature": "hot"}, TypeError, r"temperature: got 'hot' \(str\)"),
        ({"temperature": True}, TypeError, r"temperature: got True \(bool\)"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature: got a float32 tensor of shape \[2\]"),
        ({"temperature": torch.ones((), dtype=torch.int64)}, TypeError, r"temperature: got an int64 tensor"),
        (
            {"temperature": torch.ones((), requires_grad=True)},
            ValueError,
            r"temperature: got .* that requires a gradient",
        ),
        ({"temperature": torch.ones((), device="meta")}, ValueError, r"temperature: got .* on meta"),
    ],
)
def test_wrong_arguments(name, options, error, message):
    for call in (
        lambda: ops.evaluate_actions(torch.zeros(2, 6), torch.zeros(2, 2, dtype=torch.int64), CUM, **options),
        lambda: ops.sample_actions(torch.zeros(2, 6), PAIRS, **options),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_pair_of_masks_needs_a_table(name):
    pair = (MASK[:, :3], MASK[:, :3])
    with pytest.raises(ValueError, match="mask: got a pair of masks without an action table"):
        ops.evaluate_actions(torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64), mask=pair)
    with pytest.raises(ValueError, match="mask: got a pair of masks without an action table"):
        ops.sample_actions(torch.zeros(2, 6), mask=pair)


def test_no_host_read(name):
    with FakeTensorMode():
        logits = torch.randn(4, 6, requires_grad=True)
        masks = torch.ones(4, 6, dtype=torch.bool), (torch.ones(4, 3) > 0, torch.ones(4, 3) > 0)
        table, pairs = torch.tensor([0, 1, 1, 3]), torch.zeros(6, 2, dtype=torch.int32)
        for mask in masks:
            options = {"mask": mask, "temperature": torch.ones(()), "strict": True}
            outputs = ops.evaluate_actions(logits, torch.zeros(4, 2, dtype=torch.int64), table, **options)
            outputs += ops.sample_actions(logits, pairs, **options)[1:4]
            ops.sample_actions(logits, pairs, greedy=True, **options)
            torch.autograd.grad([output.sum() for output in outputs], logits)


@pytest.mark.skipif(_triton.INTERPRETED, reason="compiled code does not run in the interpreter")
def test_compile(name):
    compiled = torch.compile(
        lambda x, i, m: ops.evaluate_actions(x, i, mask=m, temperature=0.5, strict=True),
        fullgraph=True,
        backend="aot_eager",
    )
    for rows in (4, 7):
        logits, index = torch.randn(rows, 5), torch.randint(5, (rows,))
        mask = torch.ones(rows, 5, dtype=torch.bool)
        for got, expected in zip(compiled(logits, index, mask), reference(logits, index, mask, 0.5), strict=True):
            close(got, expected, torch.float32)
