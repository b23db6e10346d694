"""Log-probability, entropy and their gradient for given actions."""

import pytest
import torch
from references import (
    CUM_MAX_PARAMS,
    DTYPES,
    INTEGERS,
    LAYOUTS,
    PAIRS,
    assert_close,
    categorical,
    check_categorical,
    refuses,
)
from torch.distributions import Categorical

from metta_fastagent.ops import evaluate_actions, raise_if_reported

# One row, one action, both sides of 4, 8 and 32 columns and of 8 and 128 rows, more actions than a kernel takes.
SHAPES = [(0, 9), (1, 1), (7, 1), (1, 5), (3, 2), (8, 8), (33, 9), (129, 9), (13, 21), (5, 32), (9, 33), (2, 5000)]
SUBSETS = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]


def masked(logits):
    """Each row keeps the action of its own number, and about half of the others."""
    mask = torch.rand(logits.shape) < 0.5
    mask[torch.arange(len(logits)), torch.arange(len(logits)) % logits.shape[1]] = False
    return logits.masked_fill(mask, -torch.inf)


def only_one_allowed(logits):
    forbidden = torch.arange(logits.shape[1]) != torch.arange(len(logits)).unsqueeze(1) % logits.shape[1]
    return logits.masked_fill(forbidden, -torch.inf)


EXTREMES = {
    "large": lambda logits: logits * 1e4,
    "far from zero": lambda logits: logits + 1e4,
    "tiny": lambda logits: logits * 1e-30,
    "largest finite": lambda logits: logits.sign() * torch.finfo(logits.dtype).max,
    # Float32 exponentials that are normal, subnormal or 0.
    "underflow": lambda logits: -120 * torch.rand_like(logits),
    "masked": masked,
    "first masked": lambda logits: logits.index_fill(1, torch.tensor([0]), -torch.inf),
    "last masked": lambda logits: logits.index_fill(1, torch.tensor([logits.shape[1] - 1]), -torch.inf),
    "one allowed": only_one_allowed,
}


def of(index, *actions):
    """A function of the logits alone that returns the indices too; `actions` may give them in another form."""
    return lambda logits: (index, *evaluate_actions(logits, *(actions or (index,)), strict=False))


def test_hand_computed_values(device):
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, 3.0 + torch.tensor(3.0).log(), -torch.inf, -torch.inf]])
    index = torch.tensor([2, 1], device=device)
    # A uniform row, and a row with probabilities 1/4 and 3/4.
    expected = [-1.3862944, -0.2876821], [1.3862944, 0.5623351]
    log_prob, entropy, full_log_probs = evaluate_actions(logits.to(device), index, strict=True)
    torch.testing.assert_close((log_prob.cpu(), entropy.cpu()), tuple(map(torch.tensor, expected)))
    torch.testing.assert_close(full_log_probs[1].cpu(), torch.tensor([*expected[0], -torch.inf, -torch.inf]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, device):
    index = torch.randint(shape[1], shape[:1], device=device)
    check_categorical(of(index), torch.randn(shape).to(device, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("actions", [9, 33])
@pytest.mark.parametrize("extreme", EXTREMES.values(), ids=EXTREMES)
def test_extreme_logits(extreme, actions, dtype, device):
    logits = extreme(torch.randn(35, actions).to(dtype))
    index = torch.arange(35) % actions
    _, grad = check_categorical(of(index.to(device)), logits.to(device))
    # An entropy and a gradient without NaN also where p log p is 0 times infinity.
    assert grad.isfinite().all()
    logits = logits.to(device).requires_grad_()
    log_prob, entropy, _ = evaluate_actions(logits, index.to(device), strict=True)
    (grad,) = torch.autograd.grad(log_prob.sum() + entropy.sum(), logits)
    forbidden = logits.isinf().cpu() & (torch.arange(actions) != index.unsqueeze(1))
    assert (grad.cpu()[forbidden] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("actions", [9, 33])
@pytest.mark.parametrize("subset", SUBSETS, ids=str)
def test_gradients_of_some_outputs(subset, actions, dtype, device):
    index = torch.randint(actions, (13,), device=device)
    check_categorical(of(index), masked(torch.randn(13, actions)).to(device, dtype), subset)


@pytest.mark.parametrize("actions", [9, 33])
def test_expanded_upstream_gradients(actions, device):
    logits, index = torch.randn(11, actions), torch.randint(actions, (11,))

    def gradient(logits, outputs):
        log_prob, entropy, full_log_probs = outputs
        return torch.autograd.grad(2 * log_prob.sum() + 3 * entropy.sum() + 0.5 * full_log_probs.sum(), logits)[0]

    exact = logits.double().requires_grad_()
    logits = logits.to(device).requires_grad_()
    found = gradient(logits, evaluate_actions(logits, index.to(device), strict=True))
    assert_close(found, gradient(exact, categorical(exact, index)), torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_logits_and_pairs(layout, device):
    logits, pairs = layout(torch.randn(13, 6, device=device)), layout(PAIRS.to(device)[torch.randint(6, (13,))])
    table = torch.stack([CUM_MAX_PARAMS, CUM_MAX_PARAMS], dim=1).to(device)[:, 0]
    index = pairs.long().sum(1) + table[pairs[:, 0].long()]
    check_categorical(of(index, pairs, table), logits)
    check_categorical(of(index, layout(index.unsqueeze(1).repeat(1, 2))[:, 0]), logits)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integer_dtypes_of_actions(dtype, device):
    index = torch.tensor([4, 0, 2, 1, 3, 5], device=device)
    logits = torch.randn(6, 6, device=device)
    check_categorical(of(index, index.to(dtype)), logits)
    check_categorical(of(index, PAIRS.to(device)[index].to(dtype), CUM_MAX_PARAMS.to(device)), logits)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_agrees_with_torch_distributions(scale, device):
    logits, index = torch.randn(50, 9, dtype=torch.float64) * scale, torch.randint(9, (50,))
    log_prob, entropy, full_log_probs = evaluate_actions(logits.to(device), index.to(device), strict=True)
    distribution = Categorical(logits=logits)
    torch.testing.assert_close(log_prob.cpu(), distribution.log_prob(index))
    torch.testing.assert_close(entropy.cpu(), distribution.entropy())
    torch.testing.assert_close(full_log_probs.cpu(), distribution.logits)


@pytest.mark.parametrize("actions", [9, 33])
@pytest.mark.parametrize("bad", [[torch.nan], [torch.inf], None], ids=["nan", "inf", "-inf throughout"])
def test_a_row_without_a_distribution_stays_alone(bad, actions, device):
    logits, index = torch.randn(6, actions), torch.randint(actions, (6,))
    logits[2] = -torch.inf if bad is None else logits[2]
    logits[2, 3] = logits[2, 3] if bad is None else bad[0]
    leaf = logits.to(device).requires_grad_()
    outputs = evaluate_actions(leaf, index.to(device), strict=False)
    (grad,) = torch.autograd.grad([output.sum() for output in outputs], leaf)
    good = torch.tensor([0, 1, 3, 4, 5])
    exact = logits[good].double().requires_grad_()
    expected = categorical(exact, index[good])
    (wanted,) = torch.autograd.grad([value.sum() for value in expected], exact)
    for output, value in zip((*outputs, grad), (*expected, wanted), strict=True):
        assert output[2].isnan().all()
        assert_close(output[good.to(device)], value, torch.float32)


def test_outputs_without_gradient(device):
    outputs = evaluate_actions(torch.randn(3, 5, device=device), torch.tensor([0, 1, 2], device=device), strict=True)
    assert not any(output.requires_grad for output in outputs)


# One more action type than the logits have columns for.
LONG_TABLE = torch.tensor([0, 1, 1, 3, 3])


@pytest.mark.parametrize(
    ("columns", "bad", "table", "message"),
    [
        (6, 6, None, "got logit index 6, expected (0 to 5|one of the actions)"),
        (6, 10**12, None, r"got logit index \d+, expected (0 to 5|one of the actions)"),
        (6, -1, None, "got logit index -1, expected (0 to 5|one of the actions)"),
        (40, -1, None, "got logit index -1, expected (0 to 39|one of the actions)"),
        (6, [2, 3], CUM_MAX_PARAMS, "got parameter 3 for action type 2, expected 0 to 2"),
        (40, [0, -1], CUM_MAX_PARAMS, "got parameter -1 for action type 0, expected 0 to 1"),
        (6, [3, 0], CUM_MAX_PARAMS, "got action type 3, .*expected .*0 to 2"),
        (6, [-1, 2], CUM_MAX_PARAMS, "got action type -1, .*expected .*0 to 2"),
        # A legal pair whose logit the matrix does not have.
        (6, [3, 0], LONG_TABLE, "got (logit index 6, expected 0 to 5|parameter 0 for action type 3)"),
    ],
)
def test_an_action_out_of_range_is_refused_and_harms_no_other_row(columns, bad, table, message, device):
    good = [0, 1, 2] if table is None else [[0, 0], [1, 0], [2, 1]]
    actions = torch.tensor([*good[:2], bad, good[2]], device=device)
    table = None if table is None else table.to(device)
    logits = torch.randn(4, columns, device=device, requires_grad=True)
    with refuses(rf"actions\[2\]: {message}", table):
        log_prob, entropy, _ = evaluate_actions(logits, actions, table, strict=True)
        # A kernel does not stop.
        assert log_prob.isnan().tolist() == [False, False, True, False]
        (grad,) = torch.autograd.grad(log_prob.nansum() + entropy.sum(), logits)
        assert (grad == 0).all(1).tolist() == [False, False, True, False]
    raise_if_reported(synchronize=True)
