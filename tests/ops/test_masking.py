"""Masks, temperatures and greedy actions of evaluate_actions and sample_actions."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import (
    ARITHMETIC,
    CUM_MAX_PARAMS,
    DTYPES,
    PAIRS,
    arithmetic,
    assert_close,
    check_categorical,
    refuses,
    without,
)

from metta_fastagent import ops
from metta_fastagent.runtime import triton


def masked_logits(rows, actions, share=0.5, dtype=torch.float32, scale=1.0):
    """Logits, a mask that allows this share of them, and an allowed action of each row."""
    logits = (scale * torch.randn(rows, actions, dtype=torch.float64)).to(dtype)
    mask, index = torch.rand(rows, actions) < share, torch.randint(actions, (rows,))
    mask[torch.arange(rows), index] = True
    return logits, mask, index


def check(logits, mask, temperature, index):
    """Values and gradients of both operations, and the greedy action."""
    options = {"mask": mask, "temperature": temperature}
    _, grad = check_categorical(
        lambda x: (index, *ops.evaluate_actions(x, index, **options, strict=True)), logits, **options
    )
    assert mask is None or (grad[~mask] == 0).all()
    drawn, _ = check_categorical(lambda x: ops.sample_actions(x, **options), logits, **options)
    greedy, _ = check_categorical(lambda x: ops.sample_actions(x, **options, greedy=True), logits, **options)
    for chosen in (drawn, greedy):
        assert mask is None or mask.gather(1, chosen.unsqueeze(1)).all()
    # Division may make two logits equal: then the first counts.
    compute = torch.promote_types(logits.dtype, torch.float32)
    tempered = logits.to(compute) / torch.tensor(float(temperature), dtype=compute)
    tempered = tempered if mask is None else torch.where(mask, tempered, -torch.inf)
    assert torch.equal(greedy, (tempered == tempered.max(-1, keepdim=True).values).int().argmax(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6, torch.tensor(1.7), torch.full((1, 1, 1), 0.3, dtype=torch.float64)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("actions", [9, 33])
@pytest.mark.parametrize("masked", [True, False])
def test_values_and_gradients(masked, actions, temperature, dtype, device):
    logits, mask, index = masked_logits(35, actions, dtype=dtype)
    temperature = temperature.to(device) if isinstance(temperature, torch.Tensor) else temperature
    check(logits.to(device), mask.to(device) if masked else None, temperature, index.to(device))


@st.composite
def cases(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    logits, mask, index = masked_logits(
        draw(st.integers(1, 9)),
        draw(st.sampled_from([1, 2, 3, 5, 8, 9, 21, 32, 33])),
        draw(st.sampled_from([0.1, 0.5, 0.95])),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from([1e-30, 1.0, 30.0, 1e4])),
    )
    temperature = draw(st.sampled_from([1.0, 0.5, 1.7, 20.0]))
    if draw(st.booleans()):
        temperature = torch.tensor(temperature, dtype=draw(st.sampled_from([torch.float32, torch.float64])))
    return logits, draw(st.sampled_from([mask, mask, None])), temperature, index


# Triton would compile many cases once more on a GPU.
@without("triton-cuda")
@settings(max_examples=50 if triton.INTERPRETED else 1000, deadline=None)
@given(case=cases())
def test_random_cases(case):
    check(*case)


def test_of_equal_logits_the_first_allowed_is_greedy(device):
    mask = torch.tensor([[True, True, True], [False, True, True], [False, False, True]], device=device)
    index, log_prob, _, _ = ops.sample_actions(torch.ones(3, 3, device=device), mask=mask, greedy=True)
    assert index.tolist() == [0, 1, 2]
    assert_close(log_prob, torch.tensor([1 / 3, 1 / 2, 1.0], dtype=torch.float64).log(), torch.float32)


def test_greedy_draws_no_random_number(device):
    logits = torch.randn(4, 9, device=device)
    torch.manual_seed(1)
    ops.sample_actions(logits, greedy=True)
    after = torch.rand(5, device=device)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(5, device=device))


def test_draws_under_a_mask_follow_the_distribution(device):
    rows = 20_000
    logits, allowed = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0]), torch.tensor([True, False, True, True, True])
    expanded = {"mask": allowed.to(device).expand(rows, 5), "temperature": 2.0}
    counts = torch.bincount(ops.sample_actions(logits.to(device).expand(rows, 5), **expanded)[0].cpu(), minlength=5)
    expected = rows * torch.where(allowed, logits.double() / 2, -torch.inf).softmax(-1)
    assert counts[1] == 0
    # 0.9999 quantile of chi squared with 3 degrees of freedom
    assert ((counts - expected)[allowed] ** 2 / expected[allowed]).sum() < 21.1


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 100.0, 1000.0])
def test_many_draws_and_no_forbidden_action(scale, device):
    logits, mask, _ = masked_logits(2_000 if triton.INTERPRETED else 400_000, 9, 0.4, scale=scale)
    index = ops.sample_actions(logits.to(device), mask=mask.to(device))[0]
    assert mask.gather(1, index.cpu().unsqueeze(1)).all()


@pytest.mark.parametrize("actions", [3, 33])
@pytest.mark.parametrize("greedy", [False, True])
def test_a_row_without_an_allowed_action(actions, greedy, device):
    logits = torch.randn(4, actions, device=device, requires_grad=True)
    mask = torch.ones(4, actions, dtype=torch.bool, device=device)
    mask[1], mask[3, 0] = False, False
    index, log_prob, entropy, _ = ops.sample_actions(logits, mask=mask, greedy=greedy, strict=False)
    assert index[1] == 0
    assert log_prob.isnan().tolist() == entropy.isnan().tolist() == [False, True, False, False]
    log_prob, entropy, _ = ops.evaluate_actions(logits, torch.ones_like(index), mask=mask, strict=False)
    assert log_prob.isnan().tolist() == entropy.isnan().tolist() == [False, True, False, False]
    (grad,) = torch.autograd.grad(log_prob.nansum(), logits)
    assert (grad[1] == 0).all()
    assert not grad.isnan().any()


NO_DISTRIBUTION = r"logits\[2\]: holds NaN or \+inf, or is -inf throughout; expected finite values or some -inf"
NO_ACTION = r"mask\[2\]: got no allowed action with a logit above -inf, expected at least one"


@pytest.mark.parametrize("actions", [3, 33])
@pytest.mark.parametrize(
    ("row", "allowed", "message"),
    [
        (torch.nan, None, NO_DISTRIBUTION),
        (torch.inf, True, NO_DISTRIBUTION),
        (-torch.inf, None, NO_DISTRIBUTION),
        (-torch.inf, True, NO_ACTION),
        (0.0, False, NO_ACTION),
    ],
)
def test_strict_calls_name_the_row(actions, row, allowed, message, device):
    logits, index = torch.zeros(5, actions, device=device), torch.zeros(5, dtype=torch.int64, device=device)
    logits[2], mask = row, None
    if allowed is not None:
        mask = torch.ones(5, actions, dtype=torch.bool, device=device)
        mask[2] = allowed
    calls = [
        lambda strict: ops.evaluate_actions(logits, index, mask=mask, strict=strict),
        lambda strict: ops.sample_actions(logits, mask=mask, strict=strict),
        lambda strict: ops.sample_actions(logits, mask=mask, greedy=True, strict=strict),
    ]
    for call in calls:
        call(False)
        ops.raise_if_reported(synchronize=True)
        with refuses(message):
            call(True)


def test_what_a_mask_forbids_may_be_nan(device):
    logits = torch.tensor([[1.0, torch.nan, 2.0], [torch.inf, 0.0, -1.0]], device=device)
    mask = torch.tensor([[True, False, True], [False, True, True]], device=device)
    index = ops.sample_actions(logits, mask=mask, greedy=True)[0]
    assert index.tolist() == [2, 1]
    _, entropy, _ = ops.evaluate_actions(logits, index, mask=mask, strict=True)
    assert entropy.isfinite().all()
    ops.raise_if_reported(synchronize=True)


def test_a_pair_of_masks(device):
    types = torch.tensor([[True, False, True], [False, True, True]], device=device)
    params = torch.tensor([[True, False, True], [True, True, False]], device=device)
    expected = [[True, False, False, True, False, True], [False, False, True, True, True, False]]
    logits, actions = torch.randn(2, 6, device=device), torch.tensor([[2, 2], [1, 0]], device=device)
    full = ops.evaluate_actions(logits, actions, CUM_MAX_PARAMS.to(device), mask=(types, params), strict=True)[2]
    assert (full > -torch.inf).tolist() == expected
    full = ops.sample_actions(logits, PAIRS.to(device), mask=(types, params))[3]
    assert (full > -torch.inf).tolist() == expected


def test_options_that_change_nothing(device):
    logits, index = torch.randn(50, 9, device=device), torch.randint(9, (50,), device=device)
    everything = torch.ones(50, 9, dtype=torch.bool, device=device)
    plain = ops.evaluate_actions(logits, index, strict=True)
    for options in (
        {"mask": everything},
        {"temperature": torch.ones((), device=device)},
        {"mask": everything, "temperature": 1},
    ):
        for got, expected in zip(ops.evaluate_actions(logits, index, **options, strict=True), plain, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan])
def test_a_temperature_tensor_that_is_not_positive(value, backend, device):
    expected = (
        r"logits\[\d\]: holds NaN" if backend == "triton" else r"temperature: got .*, expected a finite number > 0"
    )
    with refuses(expected):
        logits, temperature = torch.zeros(2, 3, device=device), torch.tensor(value, device=device)
        # Off the CPU the value is not read.
        assert ops.sample_actions(logits, temperature=temperature)[1].isnan().all()


# A GPU's fast division is off by up to two units in the last place, which swaps such neighbours.
@pytest.mark.parametrize("actions", [9, 33])
@pytest.mark.parametrize("temperature", [torch.tensor(1.0), 0.7, 1.7], ids=str)
@pytest.mark.parametrize("instructions", ARITHMETIC)
def test_greedy_actions_of_logits_one_unit_in_the_last_place_apart(instructions, actions, temperature, device):
    logits = (1 + torch.rand(200, 1)).expand(200, actions).contiguous()
    above = torch.nextafter(logits, torch.tensor(torch.inf))
    logits = torch.where(torch.rand(200, actions) < 0.3, above, logits)
    temperature = temperature.to(device) if isinstance(temperature, torch.Tensor) else temperature
    with arithmetic(instructions):
        index = ops.sample_actions(logits.to(device), temperature=temperature, greedy=True)[0].cpu()
    quotients = logits.numpy() / numpy.float32(temperature)
    assert index.tolist() == quotients.argmax(-1).tolist()
