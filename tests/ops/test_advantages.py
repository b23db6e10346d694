"""Advantages against their definition, one sum for each row and step, and literal numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import DTYPES, assert_close, without

from metta_fastagent import ops
from metta_fastagent.runtime import triton

# Both sides of 4 and 8 steps and rows, one row, one step, and more steps than one pass of the kernel takes.
SHAPES = [(0, 3), (1, 1), (1, 9), (3, 4), (9, 5), (8, 8), (17, 31), (5, 64), (2, 300)]


def definition(rewards, values, ends, next_value, bootstrap_values, gamma, lam, valid, ratios, rho_clip, c_clip):
    """The sum over k of delta[t + k] times the factors of the steps before it, in plain numbers."""
    rewards, values, next_value, bootstrap_values = (
        each.double().tolist() for each in (rewards, values, next_value, bootstrap_values)
    )
    ends, valid = ends.tolist(), None if valid is None else valid.tolist()
    ratios = None if ratios is None else ratios.double().tolist()
    result = torch.zeros(len(values), len(values[0]) if values else 0, dtype=torch.float64)
    for b, row in enumerate(values):
        for t in range(len(row)):
            total, weight = 0.0, 1.0
            for k in range(t, len(row)):
                if valid is not None and not valid[b][k]:
                    break
                following = row[k + 1] if k + 1 < len(row) else next_value[b]
                target = bootstrap_values[b][k] if ends[b][k] else following
                rho, c = (1.0, 1.0) if ratios is None else (min(ratios[b][k], limit) for limit in (rho_clip, c_clip))
                total += weight * rho * (rewards[b][k] + gamma * target - row[k])
                if ends[b][k]:
                    break
                weight *= gamma * lam * c
            result[b, t] = total
    return result


def rollout(rows, steps, dtype=torch.float64, with_valid=False, with_ratios=False, end=0.2):
    """[rewards, values, ends, next_value, bootstrap_values], and the options by name."""
    rewards, values, bootstrap_values = (torch.randn(rows, steps).to(dtype) for _ in range(3))
    ends, next_value = torch.rand(rows, steps) < end, torch.randn(rows).to(dtype)
    valid = torch.rand(rows, steps) < 0.8 if with_valid else None
    ratios = torch.randn(rows, steps).exp().to(dtype) if with_ratios else None
    options = {"valid": valid, "ratios": ratios, "rho_clip": 1.1, "c_clip": 0.9}
    return [rewards, values, ends, next_value, bootstrap_values], options


def check(tensors, numbers, options, device):
    def there(value):
        return value.to(device) if isinstance(value, torch.Tensor) else value

    found = ops.advantages(*map(there, tensors), *numbers, **{name: there(value) for name, value in options.items()})
    expected = definition(*tensors, *numbers, **options) if tensors[1].numel() else tensors[1].double()
    assert_close(found, expected, tensors[1].dtype, of_sums=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_advantages_equal_the_definition(shape, dtype, options, device):
    # Without ends, sums reach over all steps.
    for end in (0.0, 0.2):
        tensors, named = rollout(*shape, dtype, *options, end)
        check(tensors, (0.99, 0.95), named, device)


@pytest.mark.parametrize("numbers", [(1.0, 1.0), (0.9, 0.0), (0.0, 0.7), (1, 0)])
def test_limits_of_the_numbers(numbers, device):
    tensors, options = rollout(5, 17, with_ratios=True)
    for limit in (0.0, 1e30, torch.inf):
        check(tensors, numbers, options | {"rho_clip": limit, "c_clip": limit}, device)


@st.composite
def cases(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    tensors, options = rollout(
        draw(st.integers(1, 20)),
        draw(st.integers(1, 40)),
        draw(st.sampled_from([torch.float32, torch.float64])),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from([0.0, 0.1, 0.9, 1.0])),
    )
    return tensors, (draw(st.floats(0, 1)), draw(st.floats(0, 1))), options


# Triton compiles anew for each power of two.
@without("triton-cuda")
@settings(max_examples=10 if triton.INTERPRETED else 300, deadline=None)
@given(case=cases())
def test_random_cases(case):
    check(*case, torch.device("cpu"))


def test_literal_numbers(device):
    # gamma = lam = 1/2. From the back: 4 + 8/2 - 2 = 6; the episode ends here: 2 - 4 = -2; 1 + 4/2 - 2 + (-2)/4 = 0.5
    found = ops.advantages(
        rewards=torch.tensor([[1.0, 2.0, 4.0]], device=device),
        values=torch.tensor([[2.0, 4.0, 2.0]], device=device),
        ends=torch.tensor([[False, True, False]], device=device),
        next_value=torch.tensor([8.0], device=device),
        bootstrap_values=torch.zeros(1, 3, device=device),
        gamma=0.5,
        lam=0.5,
    )
    assert found.tolist() == [[0.5, -2.0, 6.0]]


def test_a_truncated_step_bootstraps_and_a_terminated_one_does_not(device):
    zeros, ends = torch.zeros(2, 1, device=device), torch.ones(2, 1, dtype=torch.bool, device=device)
    next_value, bootstrap = torch.full((2,), 100.0, device=device), torch.tensor([[0.0], [10.0]], device=device)
    assert ops.advantages(zeros + 1, zeros, ends, next_value, bootstrap, 0.5, 0.9).tolist() == [[1.0], [6.0]]


def test_ratios_of_one_change_nothing(device):
    tensors, _ = rollout(9, 21, torch.float32)
    tensors = [each.to(device) for each in tensors]
    ones = torch.ones(9, 21, device=device)
    assert torch.equal(ops.advantages(*tensors, 0.9, 0.8, ratios=ones), ops.advantages(*tensors, 0.9, 0.8))


def test_an_invalid_step_hides_its_numbers(device):
    tensors, _ = rollout(3, 11, torch.float32)
    valid = torch.ones(3, 11, dtype=torch.bool)
    valid[1, 4] = False
    expected = definition(*tensors, 0.9, 0.8, valid, None, 1.0, 1.0)
    tensors[0][1, 4] = torch.nan
    tensors = [each.to(device) for each in tensors]
    assert_close(ops.advantages(*tensors, 0.9, 0.8, valid=valid.to(device)), expected, torch.float32)


def test_a_row_alone_has_the_bits_that_it_has_among_others(device):
    tensors, options = rollout(19, 37, torch.float32, True, True)
    tensors = [each.to(device) for each in tensors]
    valid, ratios = options["valid"].to(device), options["ratios"].to(device)
    together = ops.advantages(*tensors, 0.99, 0.95, valid=valid, ratios=ratios)
    for row in (0, 7, 8, 18):
        own = slice(row, row + 1)
        alone = ops.advantages(*(each[own] for each in tensors), 0.99, 0.95, valid=valid[own], ratios=ratios[own])
        assert torch.equal(alone[0], together[row])


def test_they_carry_a_gradient_where_one_is_wanted(device):
    tensors, _ = rollout(2, 5)
    tensors = [each.to(device) for each in tensors]
    floats = [each.requires_grad_() for each in tensors if each.is_floating_point()]

    def function(*floats):
        rewards, values, next_value, bootstrap_values = floats
        return ops.advantages(rewards, values, tensors[2], next_value, bootstrap_values, 0.9, 0.8)

    assert torch.autograd.gradcheck(function, floats) and torch.autograd.gradgradcheck(function, floats)
    with torch.no_grad():
        assert not function(*floats).requires_grad
