"""The loss against fp64 autograd, normalised advantages, and what an update averages."""

import math
from typing import NamedTuple

import pytest
import torch

from metta_fastagent import ops
from metta_fastagent.train import ppo
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.trainer import Trainer


def minibatch(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    names = ("log_prob", "entropy", "value", "old_log_prob", "old_value", "advantages", "returns")
    tensors = {name: torch.randn(6, 9, generator=generator, dtype=torch.float64) for name in names}
    # ratios and changes of the value on both sides of the clip's edges and inside
    tensors["old_log_prob"] = tensors["log_prob"] + 0.3 * tensors["old_log_prob"]
    tensors["old_value"] = tensors["value"] + 0.3 * tensors["old_value"]
    return tensors


def textbook_loss(
    log_prob, entropy, value, old_log_prob, old_value, advantages, returns, clip_coef, vf_clip_coef, vf_coef, ent_coef
):
    """Sample by sample, with plain numbers outside the clip range."""
    surrogates, errors = [], []
    for new, old, advantage in zip(log_prob.flatten(), old_log_prob.flatten(), advantages.flatten(), strict=True):
        ratio = torch.exp(new) / torch.exp(old)
        low, high = 1 - clip_coef, 1 + clip_coef
        clipped = ratio if low < ratio < high else torch.tensor(low if ratio <= low else high, dtype=ratio.dtype)
        surrogates.append(min(ratio * advantage, clipped * advantage, key=lambda x: x.item()))
    for new, old, target in zip(value.flatten(), old_value.flatten(), returns.flatten(), strict=True):
        error = (new - target) ** 2
        if vf_clip_coef:
            change = (new - old).item()
            near = new if abs(change) < vf_clip_coef else old + math.copysign(vf_clip_coef, change)
            error = max(error, (near - target) ** 2, key=lambda x: x.item())
        errors.append(error)
    value_loss = sum(errors) / len(errors) / 2
    return -sum(surrogates) / len(surrogates) + vf_coef * value_loss - ent_coef * entropy.mean()


class Loss(NamedTuple):
    total: torch.Tensor
    policy_loss: torch.Tensor
    value_loss: torch.Tensor
    entropy: torch.Tensor
    approx_kl: torch.Tensor
    clip_fraction: torch.Tensor


def loss_of(**arguments):
    total, statistics = ops.ppo_loss_of_log_prob(**arguments)
    return Loss(total, *statistics)


COEFFICIENTS = {"clip_coef": 0.2, "vf_clip_coef": 0.0, "vf_coef": 0.7, "ent_coef": 0.03}


@pytest.mark.parametrize("vf_clip_coef", [0.0, 0.2])
def test_loss_and_gradients_equal_the_textbook(vf_clip_coef):
    names = ("log_prob", "entropy", "value")
    ours, theirs = minibatch(), minibatch()
    for tensors in (ours, theirs):
        for name in names:
            tensors[name].requires_grad_()
    coefficients = COEFFICIENTS | {"vf_clip_coef": vf_clip_coef}
    loss = loss_of(**ours, **coefficients)
    expected = textbook_loss(**theirs, **coefficients)
    torch.testing.assert_close(loss.total, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(loss.total, [ours[name] for name in names])
    wanted = torch.autograd.grad(expected, [theirs[name] for name in names])
    for name, gradient, right in zip(names, gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-10, atol=1e-14, msg=lambda m, name=name: f"{name}: {m}")
    # some of the ratios are clipped and some are not, or the comparison would say little
    assert 0.1 < loss.clip_fraction.item() < 0.9


def test_the_value_clip_changes_some_samples():
    # old 0, so 1 is clipped to 0.2: further from the target 2 it counts, nearer to the target -2 it does not
    tensors = {name: torch.zeros(1, 3) for name in ("log_prob", "entropy", "old_log_prob", "old_value", "advantages")}
    tensors |= {"value": torch.tensor([[1.0, 1.0, 0.1]]), "returns": torch.tensor([[2.0, -2.0, 0.0]])}
    tensors["value"].requires_grad_()
    loss = loss_of(**tensors, **COEFFICIENTS | {"vf_clip_coef": 0.2, "vf_coef": 1.0})
    assert loss.value_loss.item() == pytest.approx((1.8**2 + 3.0**2 + 0.1**2) / 3 / 2)
    (gradient,) = torch.autograd.grad(loss.total, tensors["value"])
    assert gradient.tolist() == [[0.0, pytest.approx(1.0), pytest.approx(0.1 / 3)]]


def test_statistics_of_the_loss():
    tensors = minibatch(1)
    loss = loss_of(**tensors, **COEFFICIENTS)
    ratio = (tensors["log_prob"] - tensors["old_log_prob"]).exp()
    assert loss.approx_kl.item() == pytest.approx((ratio - 1 - ratio.log()).mean().item(), rel=1e-12)
    assert loss.approx_kl.item() >= 0
    assert loss.clip_fraction.item() == pytest.approx(((ratio < 0.8) | (ratio > 1.2)).double().mean().item())
    assert loss.value_loss.item() == pytest.approx(0.5 * (tensors["value"] - tensors["returns"]).pow(2).mean().item())
    assert not any(part.requires_grad for part in loss[1:])


def test_advantages_are_normalised_by_minibatch():
    advantages = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantages *= torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1)
    advantages += torch.tensor([0.0, -5.0, 1e6]).view(3, 1, 1)
    scaled = ppo.normalized(advantages)
    for ours, given in zip(scaled, advantages, strict=True):
        deviation = ((given - given.mean()) ** 2).mean() ** 0.5
        torch.testing.assert_close(ours, (given - given.mean()) / (deviation + 1e-8), rtol=1e-9, atol=1e-9)


def test_equal_advantages_are_zero_and_not_nan():
    assert ppo.normalized(torch.full((2, 6, 9), 3.0)).abs().max().item() == 0


def test_a_floor_keeps_small_advantages_small():
    # deviations 0.5 and 2, of which only the smaller one is below the floor of 1
    advantages = torch.tensor([[[0.0, 1.0, 0.0, 1.0]], [[0.0, 4.0, 0.0, 4.0]]])
    expected = [[[-0.5, 0.5, -0.5, 0.5]], [[-1.0, 1.0, -1.0, 1.0]]]
    torch.testing.assert_close(ppo.normalized(advantages, floor=1.0), torch.tensor(expected))


def test_the_floor_reaches_the_update():
    (plain, _), (same, _), (small, _) = (update_of(advantage_floor=floor) for floor in (0.0, 1e-9, 1e9))
    name = next(iter(plain))
    assert torch.equal(plain[name], same[name]) and not torch.equal(plain[name], small[name])


def test_target_kl_ends_the_passes():
    def epochs(target_kl: float) -> float:
        config = TrainConfig.for_environment("memory", num_envs=8, segment_length=6, epochs=5, target_kl=target_kl)
        return Trainer(config).train_update()["epochs"]

    assert epochs(0.0) == 5 == epochs(1e6)
    assert epochs(1e-12) == 1


def update_of(own_head=False, **changes) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Parameters and statistics after one update in float64, from the same rollout with the same shuffles.

    With `own_head` the agent evaluates the actions itself: it has a temperature, of 1.
    """
    config = TrainConfig.for_environment("memory", num_envs=16, segment_length=6, minibatches=2, **changes)
    trainer = Trainer(config)
    trainer.collect()
    trainer.agent.double()
    if own_head:
        trainer.agent.policy.temperature = torch.tensor(1.0, dtype=torch.float64)
    advantages = trainer.advantages().double()
    torch.manual_seed(7)
    arguments = (advantages, advantages + trainer.experience.values, config, trainer.timer)
    statistics, _ = ppo.update(trainer.agent, trainer.optimizer, trainer.experience, *arguments)
    return {name: parameter.detach() for name, parameter in trainer.agent.named_parameters()}, statistics


@pytest.mark.parametrize("accumulate", [2, 8])
def test_micro_batches_add_up_to_the_minibatch(accumulate):
    options = {"l2_init_coef": 0.1, "clip_range": 0.05}
    (whole, expected), (parts, statistics) = update_of(**options), update_of(**options, accumulate=accumulate)
    for name, parameter in parts.items():
        torch.testing.assert_close(parameter, whole[name], rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(statistics, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"vf_clip_coef": 0.05, "clip_coef": 0.01, "ent_coef": 0.1}], ids=["", "clips"])
def test_the_loss_of_logits_and_that_of_log_probabilities_train_alike(options, monkeypatch):
    calls = []
    monkeypatch.setattr(
        ppo.ops, "ppo_loss", lambda *args, loss=ppo.ops.ppo_loss, **kw: calls.append(1) or loss(*args, **kw)
    )
    (fused, expected), fused_calls = update_of(**options), len(calls)
    own, statistics = update_of(own_head=True, **options)
    assert fused_calls > 0 and len(calls) == fused_calls
    for name, parameter in own.items():
        torch.testing.assert_close(parameter, fused[name], rtol=0, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(statistics, expected, rtol=1e-6, atol=1e-9)


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert ppo.explained_variance(returns, returns).item() == 1
    assert ppo.explained_variance(torch.zeros(4), returns).item() == 0
    assert ppo.explained_variance(-returns, returns).item() == pytest.approx(-3)
    assert not math.isfinite(ppo.explained_variance(returns, torch.ones(4)).item())
