"""Advantages against their definition and literal numbers, the loss against fp64 autograd."""

import math

import pytest
import torch

from metta_fastagent.train import ppo


def slow_advantages(rewards, values, ends, next_value, cut_values, gamma, lam):
    """One sum per row and time, straight from the definition: sum over k of (gamma lam)^k delta[t + k]."""
    rows, length = rewards.shape
    result = torch.zeros(rows, length, dtype=torch.float64)
    for b in range(rows):
        for t in range(length):
            total, weight = 0.0, 1.0
            for k in range(t, length):
                if ends[b, k]:
                    following = cut_values[b, k].item()
                elif k + 1 < length:
                    following = values[b, k + 1].item()
                else:
                    following = next_value[b].item()
                total += weight * (rewards[b, k].item() + gamma * following - values[b, k].item())
                if ends[b, k]:
                    break
                weight *= gamma * lam
            result[b, t] = total
    return result


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.7)])
def test_advantages_equal_the_definition(gamma, lam):
    generator = torch.Generator().manual_seed(3)
    rewards, values, cut_values = (torch.randn(5, 17, generator=generator, dtype=torch.float64) for _ in range(3))
    ends = torch.rand(5, 17, generator=generator) < 0.2
    ends[0, -1], ends[1, -1] = True, False
    next_value = torch.randn(5, generator=generator, dtype=torch.float64)
    arguments = (rewards, values, ends, next_value, cut_values, gamma, lam)
    torch.testing.assert_close(ppo.generalized_advantages(*arguments), slow_advantages(*arguments), rtol=0, atol=1e-12)


def test_advantages_literal_numbers():
    # gamma = lam = 1/2. From the back: 4 + 8/2 - 2 = 6; the episode ends here: 2 - 4 = -2; 1 + 4/2 - 2 + (-2)/4 = 0.5
    advantages = ppo.generalized_advantages(
        rewards=torch.tensor([[1.0, 2.0, 4.0]]),
        values=torch.tensor([[2.0, 4.0, 2.0]]),
        ends=torch.tensor([[False, True, False]]),
        next_value=torch.tensor([8.0]),
        cut_values=torch.zeros(1, 3),
        gamma=0.5,
        lam=0.5,
    )
    assert advantages.tolist() == [[0.5, -2.0, 6.0]]


def test_a_truncated_step_bootstraps_and_a_terminated_one_does_not():
    advantages = ppo.generalized_advantages(
        rewards=torch.ones(2, 1),
        values=torch.zeros(2, 1),
        ends=torch.ones(2, 1, dtype=torch.bool),
        next_value=torch.full((2,), 100.0),
        cut_values=torch.tensor([[0.0], [10.0]]),
        gamma=0.5,
        lam=0.9,
    )
    assert advantages.tolist() == [[1.0], [6.0]]


def minibatch(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    names = ("log_prob", "entropy", "value", "old_log_prob", "advantages", "returns")
    tensors = {name: torch.randn(6, 9, generator=generator, dtype=torch.float64) for name in names}
    # ratios on both sides of the clip's edges and inside
    tensors["old_log_prob"] = tensors["log_prob"] + 0.3 * tensors["old_log_prob"]
    return tensors


def textbook_loss(log_prob, entropy, value, old_log_prob, advantages, returns, clip_coef, vf_coef, ent_coef):
    advantages = (advantages - advantages.mean()) / (advantages.var(correction=0).sqrt() + 1e-8)
    terms = []
    for new, old, advantage in zip(log_prob.flatten(), old_log_prob.flatten(), advantages.flatten(), strict=True):
        ratio = torch.exp(new) / torch.exp(old)
        low, high = 1 - clip_coef, 1 + clip_coef
        clipped = ratio if low < ratio < high else torch.tensor(low if ratio <= low else high, dtype=ratio.dtype)
        terms.append(min(ratio * advantage, clipped * advantage, key=lambda x: x.item()))
    surrogate = sum(terms) / len(terms)
    return -surrogate + vf_coef * ((value - returns) ** 2).mean() / 2 - ent_coef * entropy.mean()


def test_loss_and_gradients_equal_the_textbook():
    names = ("log_prob", "entropy", "value")
    ours, theirs = minibatch(), minibatch()
    for tensors in (ours, theirs):
        for name in names:
            tensors[name].requires_grad_()
    coefficients = {"clip_coef": 0.2, "vf_coef": 0.7, "ent_coef": 0.03}
    loss = ppo.ppo_loss(**ours, **coefficients)
    expected = textbook_loss(**theirs, **coefficients)
    torch.testing.assert_close(loss.total, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(loss.total, [ours[name] for name in names])
    for name, gradient, wanted in zip(
        names, gradients, torch.autograd.grad(expected, [theirs[name] for name in names]), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-14, msg=lambda m, name=name: f"{name}: {m}")
    # some of the ratios are clipped and some are not, or the comparison would say little
    assert 0.1 < loss.clip_fraction.item() < 0.9


def test_statistics_of_the_loss():
    tensors = minibatch(1)
    loss = ppo.ppo_loss(**tensors, clip_coef=0.2, vf_coef=0.5, ent_coef=0.01)
    ratio = (tensors["log_prob"] - tensors["old_log_prob"]).exp()
    assert loss.approx_kl.item() == pytest.approx((ratio - 1 - ratio.log()).mean().item(), rel=1e-12)
    assert loss.approx_kl.item() >= 0
    assert loss.clip_fraction.item() == pytest.approx(((ratio < 0.8) | (ratio > 1.2)).double().mean().item())
    assert loss.value_loss.item() == pytest.approx(0.5 * (tensors["value"] - tensors["returns"]).pow(2).mean().item())
    assert not any(part.requires_grad for part in loss[1:])


def test_equal_advantages_give_no_policy_gradient_and_no_nan():
    tensors = minibatch(2) | {"advantages": torch.full((6, 9), 3.0, dtype=torch.float64)}
    tensors["log_prob"].requires_grad_()
    loss = ppo.ppo_loss(**tensors, clip_coef=0.2, vf_coef=0.5, ent_coef=0.0)
    (gradient,) = torch.autograd.grad(loss.total, tensors["log_prob"])
    assert gradient.abs().max().item() < 1e-5


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert ppo.explained_variance(returns, returns).item() == 1
    assert ppo.explained_variance(torch.zeros(4), returns).item() == 0
    assert ppo.explained_variance(-returns, returns).item() == pytest.approx(-3)
    assert not math.isfinite(ppo.explained_variance(returns, torch.ones(4)).item())
