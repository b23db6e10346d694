"""Recurrent PPO: advantages, loss and one update over a rollout's segments.

Schulman et al. 2016 (https://arxiv.org/abs/1506.02438) for the advantages, Schulman et al. 2017
(https://arxiv.org/abs/1707.06347) for the loss, http://joschu.net/blog/kl-approx.html for the KL estimator k3, PPO2
(https://github.com/openai/baselines/blob/master/baselines/ppo2/model.py) for the clip of the value.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from metta_fastagent import DistributedMettaAgent, MettaAgent
from metta_fastagent.train import ranks
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
KL = STATISTICS.index("approx_kl")
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


def normalized(advantages: Tensor) -> Tensor:
    """Each minibatch of `advantages`, float [minibatches, b, T], at mean 0 and deviation 1 over all ranks' shares."""
    mean, variance = ranks.moments(advantages, dim=(1, 2))
    return (advantages - mean) / (variance.sqrt() + ADVANTAGE_EPSILON)


def ppo_loss(
    log_prob: Tensor,
    entropy: Tensor,
    value: Tensor,
    old_log_prob: Tensor,
    old_value: Tensor,
    advantages: Tensor,
    returns: Tensor,
    *,
    clip_coef: float,
    vf_clip_coef: float,
    vf_coef: float,
    ent_coef: float,
) -> PpoLoss:
    """The clipped surrogate, half the squared value error and the entropy bonus, means over all arguments' [B, T].

    total = -mean(min(r A, clip(r, 1 - c, 1 + c) A)) + vf_coef / 2 * mean(E) - ent_coef * mean(H)
    with r = exp(log_prob - old_log_prob), A the advantages (see `normalized`), H the entropy, E = (value - returns)^2.
    With vf_clip_coef = v > 0, E is the larger one of that and (old_value + clip(value - old_value, -v, v) - returns)^2.
    KL is estimated by mean(r - 1 - log r), which is never negative.
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    policy_loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    error = (value - returns).square()
    if vf_clip_coef:
        near = old_value + (value - old_value).clamp(-vf_clip_coef, vf_clip_coef)
        error = torch.maximum(error, (near - returns).square())
    value_loss = 0.5 * error.mean()
    mean_entropy = entropy.mean()
    total = policy_loss + vf_coef * value_loss - ent_coef * mean_entropy
    with torch.no_grad():
        approx_kl = (torch.expm1(log_ratio) - log_ratio).mean()
        clip_fraction = ((ratio - 1).abs() > clip_coef).float().mean()
    return PpoLoss(total, policy_loss.detach(), value_loss.detach(), mean_entropy.detach(), approx_kl, clip_fraction)


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over all ranks, 0-dim: 1 is perfect, 0 a constant.

    Not finite where all returns are equal.
    """
    _, variances = ranks.moments(torch.stack([returns - values, returns]).flatten(1), dim=(1,))
    unexplained, all_of_it = variances.squeeze(1)
    return 1 - unexplained / all_of_it


def update(
    learner: MettaAgent | DistributedMettaAgent,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    advantages: Tensor,
    returns: Tensor,
    config: TrainConfig,
    stopwatch: Stopwatch,
) -> tuple[Tensor, int]:
    """Up to `config.epochs` passes of PPO over the rollout.

    A minibatch is a random set of whole segments, so that each LSTM state is where the rollout left it. With
    `config.target_kl`, no further pass begins after one whose approximate KL, the mean over its minibatches and all
    ranks, each taken before its own step, is above that: all ranks stop together. Only that is read back to the host.

    Returns:
        float [len(STATISTICS)] on the device, this rank's means over minibatches, and the passes done.
    """
    total, epochs = torch.zeros(len(STATISTICS), device=advantages.device), 0
    while epochs < config.epochs:
        order = torch.randperm(config.num_envs, device=advantages.device).view(config.minibatches, -1)
        minibatches = map(Minibatch, order, normalized(advantages[order]), returns[order])
        steps = [_step(learner, optimizer, experience, minibatch, config, stopwatch) for minibatch in minibatches]
        statistics = torch.stack(steps).mean(0)
        total, epochs = total + statistics, epochs + 1
        if config.target_kl and epochs < config.epochs and ranks.mean(statistics[KL]).item() > config.target_kl:
            break
    return total / epochs, epochs


class Minibatch(NamedTuple):
    """Segments of one optimizer step: which rows, int64 [b], with their advantages and returns, float [b, T]."""

    rows: Tensor
    advantages: Tensor
    returns: Tensor

    def parts(self, number: int) -> list["Minibatch"]:
        """`number` equal parts of it, which must divide b."""
        return list(map(Minibatch, *(each.chunk(number) for each in self)))


def _step(
    learner: MettaAgent | DistributedMettaAgent,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    minibatch: Minibatch,
    config: TrainConfig,
    stopwatch: Stopwatch,
) -> Tensor:
    """One optimizer step, its gradient the mean over the micro-batches of all ranks; float [len(STATISTICS)]."""
    with stopwatch("learning"):
        optimizer.zero_grad()
        *before, last = minibatch.parts(config.accumulate)
        with ranks.unsynchronized(learner):
            losses = [_backward(learner, experience, part, config, 0.0) for part in before]
        distance = learner.l2_init_loss() if config.l2_init_coef else torch.zeros((), device=last.returns.device)
        losses.append(_backward(learner, experience, last, config, config.l2_init_coef * distance))
        grad_norm = nn.utils.clip_grad_norm_(learner.parameters(), config.max_grad_norm)
        optimizer.step()
    with stopwatch("clip"):
        learner.clip_weights()
    return torch.stack([*torch.stack(losses).mean(0), distance.detach(), grad_norm])


def _backward(
    learner: MettaAgent | DistributedMettaAgent,
    experience: Experience,
    part: Minibatch,
    config: TrainConfig,
    regularization: Tensor | float,
) -> Tensor:
    """Add the gradients of a micro-batch's share of the loss and of `regularization`; PpoLoss's parts, float [5]."""
    rows = part.rows
    out = learner(experience.segments(rows), action=experience.actions[rows])
    loss = ppo_loss(
        out["act_log_prob"],
        out["entropy"],
        out["value"].squeeze(-1),
        experience.log_probs[rows],
        experience.values[rows],
        part.advantages,
        part.returns,
        clip_coef=config.clip_coef,
        vf_clip_coef=config.vf_clip_coef,
        vf_coef=config.vf_coef,
        ent_coef=config.ent_coef,
    )
    (loss.total / config.accumulate + regularization).backward()
    return torch.stack(loss[1:])
