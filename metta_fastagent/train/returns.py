"""The scale of returns: the running standard deviation of discounted rewards, by which the trainer divides rewards.

Engstrom et al. 2020, https://arxiv.org/abs/2005.12729; moments are merged as in Chan et al. 1983,
https://doi.org/10.1080/00031305.1983.10483115.
"""

import torch
from torch import Tensor

from metta_fastagent.train import ranks

# Returns that hardly differ, for example with a constant reward, would become huge in units of their deviation.
SMALLEST_SHARE = 0.01


def no_moments(device: torch.device) -> Tensor:
    """Count, mean and variance of no samples, [3]; in float64, where squares of large rewards do not overflow."""
    return torch.zeros(3, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def discounted_sums(rewards: Tensor, ends: Tensor, before: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """sum[t] = rewards[t] + gamma * sum[t - 1], with sum[t - 1] = 0 where an episode starts; [B, T] like `rewards`.

    `ends`, bool [B, T], is True if step t ended an episode; `before`, [B], is the sum before the first step. Also
    returns the sum before the next step, [B].
    """
    sums = torch.empty_like(rewards)
    for t in range(rewards.shape[1]):
        sums[:, t] = rewards[:, t] + gamma * before
        before = sums[:, t] * ~ends[:, t]
    return sums, before


def merged(moments: Tensor, samples: Tensor, valid: Tensor | None = None) -> Tensor:
    """`moments`, [3], updated with all ranks' `samples`, [B, T], where `valid`, bool [B, T] or None, is True."""
    mean, variance = (each.squeeze() for each in ranks.moments(samples.to(moments.dtype), (0, 1), valid))
    new = ranks.mean(torch.ones_like(samples).sum() if valid is None else valid.sum().to(samples.dtype))
    old, old_mean, old_variance = moments
    share = new / (old + new).clamp(min=1)
    between = share * (1 - share) * (mean - old_mean).square()
    variance = torch.lerp(old_variance, variance, share) + between
    return torch.stack([old + new, torch.lerp(old_mean, mean, share), variance])


def scale(moments: Tensor) -> Tensor:
    """The divisor of rewards, 0-dim: the standard deviation, at least SMALLEST_SHARE of the mean; 1 if both are 0."""
    size = torch.maximum(moments[2].sqrt(), SMALLEST_SHARE * moments[1].abs())
    return size.where(size > 0, 1)
