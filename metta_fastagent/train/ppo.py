"""Recurrent PPO: advantages, loss and one update over a rollout's segments.

Schulman et al. 2016 (https://arxiv.org/abs/1506.02438) for the advantages, Schulman et al. 2017
(https://arxiv.org/abs/1707.06347) for the loss, http://joschu.net/blog/kl-approx.html for the KL estimator k3.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.experience import Experience
from metta_fastagent.train.stopwatch import Stopwatch

# what `update` averages over its minibatches, in this order
STATISTICS = (
    "policy_loss",
    "value_loss",
    "entropy",
    "approx_kl",
    "clip_fraction",
    "l2_init_loss",
    "grad_norm",
)
# keeps the normalised advantages finite where a minibatch has all advantages equal
ADVANTAGE_EPSILON = 1e-8


class PpoLoss(NamedTuple):
    """The loss to minimise and its parts, all 0-dim and on the device; the parts carry no graph."""

    total: Tensor
    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor


def generalized_advantages(
    rewards: Tensor, values: Tensor, ends: Tensor, next_value: Tensor, cut_values: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalized advantage estimates.

    delta[t] = rewards[t] + gamma * (cut_values[t] if ends[t] else values[t + 1]) - values[t]
    advantage[t] = delta[t] + gamma * lam * (0 if ends[t] else advantage[t + 1])

    Args:
        rewards: float [B, T], reward of step t.
        values: float [B, T], value of the observation that step t acts on.
        ends: bool [B, T], True where step t ends an episode, by termination or by truncation.
        next_value: float [B], value of the observation after the last step; read where that step ends nothing.
        cut_values: float [B, T], value of what would have come after an episode that step t ends: 0 for a
            termination, an estimate for a truncation. Read where `ends` is True.
        gamma: discount per step.
        lam: decay of the estimator.

    Returns:
        float [B, T]. The targets of the value function are these plus `values`.
    """
    following = torch.cat([values[:, 1:], next_value.unsqueeze(1)], dim=1)
    deltas = rewards + gamma * torch.where(ends, cut_values, following) - values
    decay = gamma * lam * (~ends).to(values.dtype)
    advantages = torch.empty_like(values)
    running = torch.zeros_like(next_value)
    for t in reversed(range(values.shape[1])):
        running = deltas[:, t] + decay[:, t] * running
        advantages[:, t] = running
    return advantages


def ppo_loss(
    log_prob: Tensor,
    entropy: Tensor,
    value: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    returns: Tensor,
    *,
    clip_coef: float,
    vf_coef: float,
    ent_coef: float,
) -> PpoLoss:
    """The clipped surrogate, half the squared value error and the entropy bonus over one minibatch.

    total = -mean(min(r A, clip(r, 1 - c, 1 + c) A)) + vf_coef / 2 * mean((value - returns)^2) - ent_coef * mean(H)
    with r = exp(log_prob - old_log_prob), H the entropy, A the advantages normalised over the minibatch to mean 0 and
    deviation 1.
    KL is estimated by mean(r - 1 - log r), which is never negative. All arguments are [B, T].
    """
    advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + ADVANTAGE_EPSILON)
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    policy_loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    value_loss = 0.5 * (value - returns).square().mean()
    mean_entropy = entropy.mean()
    total = policy_loss + vf_coef * value_loss - ent_coef * mean_entropy
    with torch.no_grad():
        approx_kl = (torch.expm1(log_ratio) - log_ratio).mean()
        clip_fraction = ((ratio - 1).abs() > clip_coef).float().mean()
    return PpoLoss(total, policy_loss.detach(), value_loss.detach(), mean_entropy.detach(), approx_kl, clip_fraction)


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns), 0-dim: 1 is perfect, 0 a constant; not finite for equal returns."""
    return 1 - (returns - values).var(correction=0) / returns.var(correction=0)


def update(
    agent: Any,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    advantages: Tensor,
    returns: Tensor,
    config: TrainConfig,
    stopwatch: Stopwatch,
) -> Tensor:
    """`config.epochs` passes of PPO over the rollout; float [len(STATISTICS)] on the device, means over minibatches.

    A minibatch is a random set of whole segments, so that each LSTM state is where the rollout left it. Nothing is
    read back to the host.
    """
    totals = torch.zeros(len(STATISTICS), device=advantages.device)
    for _ in range(config.epochs):
        order = torch.randperm(config.num_envs, device=advantages.device)
        for rows in order.view(config.minibatches, -1):
            totals += _step(agent, optimizer, experience, rows, advantages[rows], returns[rows], config, stopwatch)
    return totals / (config.epochs * config.minibatches)


def _step(
    agent: Any,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    rows: Tensor,
    advantages: Tensor,
    returns: Tensor,
    config: TrainConfig,
    stopwatch: Stopwatch,
) -> Tensor:
    with stopwatch("learning"):
        out = agent(experience.segments(rows), action=experience.actions[rows])
        loss = ppo_loss(
            out["act_log_prob"],
            out["entropy"],
            out["value"].squeeze(-1),
            experience.log_probs[rows],
            advantages,
            returns,
            clip_coef=config.clip_coef,
            vf_coef=config.vf_coef,
            ent_coef=config.ent_coef,
        )
        distance = agent.l2_init_loss() if config.l2_init_coef else torch.zeros_like(loss.total)
        optimizer.zero_grad()
        (loss.total + config.l2_init_coef * distance).backward()
        grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), config.max_grad_norm)
        optimizer.step()
    with stopwatch("clip"):
        agent.clip_weights()
    return torch.stack([*loss[1:], distance.detach(), grad_norm])
