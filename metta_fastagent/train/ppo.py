"""Recurrent PPO: advantages, loss and one update over a rollout's segments.

Schulman et al. 2016 (https://arxiv.org/abs/1506.02438) for the advantages, Schulman et al. 2017
(https://arxiv.org/abs/1707.06347) for the loss, http://joschu.net/blog/kl-approx.html for the KL estimator k3, PPO2
(https://github.com/openai/baselines/blob/master/baselines/ppo2/model.py) for the value clip.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metta_fastagent import DistributedMettaAgent, MettaAgent
from metta_fastagent.train import ranks
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.experience import Experience
from metta_fastagent.train.timer import PhaseTimer

# averaged over minibatches by `update`, in this order
STATISTICS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "l2_init_loss", "grad_norm")
KL = STATISTICS.index("approx_kl")
# keeps normalized advantages finite if all advantages of a minibatch are equal
ADVANTAGE_EPSILON = 1e-8


class PpoLoss(NamedTuple):
    """The loss to minimize and its parts, all 0-dim on the device; the parts are detached."""

    total: Tensor
    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    ends: Tensor,
    next_value: Tensor,
    bootstrap_values: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    """Generalized advantage estimates.

    delta[t] = rewards[t] + gamma * (bootstrap_values[t] if ends[t] else values[t + 1]) - values[t]
    advantage[t] = delta[t] + gamma * lam * (0 if ends[t] else advantage[t + 1])

    All are [B, T], except for the values [B] after the last step, `next_value`. `values[t]` is that of the observation
    before step t; `ends[t]` says that step t ended an episode, by termination or truncation. `bootstrap_values` are 0
    for terminations and the value of the episode's final observation for truncations.

    Returns:
        float [B, T]. The targets of the value function are these plus `values`.
    """
    following = torch.cat([values[:, 1:], next_value.unsqueeze(1)], dim=1)
    deltas = rewards + gamma * torch.where(ends, bootstrap_values, following) - values
    decay = gamma * lam * (~ends).to(values.dtype)
    advantages = torch.empty_like(values)
    running = torch.zeros_like(next_value)
    for t in reversed(range(values.shape[1])):
        running = deltas[:, t] + decay[:, t] * running
        advantages[:, t] = running
    return advantages


def normalized(advantages: Tensor, valid: Tensor | None = None) -> Tensor:
    """`advantages`, float [minibatches, b, T], scaled to mean 0 and deviation 1 per minibatch, over all ranks.

    Steps for which `valid` (bool, the same shape) is False do not count.
    """
    mean, variance = ranks.moments(advantages, (1, 2), valid)
    return (advantages - mean) / (variance.sqrt() + ADVANTAGE_EPSILON)


def mean_of(values: Tensor, valid: Tensor | None) -> Tensor:
    """The mean of `values`, of those where `valid` (bool, the same shape) is True, 0-dim."""
    return values.mean() if valid is None else torch.where(valid, values, 0).sum() / valid.sum().clamp(min=1)


def ppo_loss(
    log_prob: Tensor,
    entropy: Tensor,
    value: Tensor,
    old_log_prob: Tensor,
    old_value: Tensor,
    advantages: Tensor,
    returns: Tensor,
    valid: Tensor | None = None,
    *,
    clip_coef: float,
    vf_clip_coef: float,
    vf_coef: float,
    ent_coef: float,
) -> PpoLoss:
    """The clipped surrogate, half the squared value error and the entropy bonus, each a mean over [B, T].

    total = -mean(min(r A, clip(r, 1 - c, 1 + c) A)) + vf_coef / 2 * mean(E) - ent_coef * mean(H)
    with r = exp(log_prob - old_log_prob), A the advantages (see `normalized`), H the entropy, E = (value - returns)^2.
    With vf_clip_coef = v > 0, E is the larger of that and (old_value + clip(value - old_value, -v, v) - returns)^2.
    KL is estimated by mean(r - 1 - log r), which is never negative.
    `valid`, bool [B, T] or None, leaves steps out of all means.
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    policy_loss = -mean_of(torch.minimum(ratio * advantages, clipped * advantages), valid)
    error = (value - returns).square()
    if vf_clip_coef:
        clipped_value = old_value + (value - old_value).clamp(-vf_clip_coef, vf_clip_coef)
        error = torch.maximum(error, (clipped_value - returns).square())
    value_loss = 0.5 * mean_of(error, valid)
    mean_entropy = mean_of(entropy, valid)
    total = policy_loss + vf_coef * value_loss - ent_coef * mean_entropy
    with torch.no_grad():
        approx_kl = mean_of(torch.expm1(log_ratio) - log_ratio, valid)
        clip_fraction = mean_of(((ratio - 1).abs() > clip_coef).float(), valid)
    return PpoLoss(total, policy_loss.detach(), value_loss.detach(), mean_entropy.detach(), approx_kl, clip_fraction)


def explained_variance(values: Tensor, returns: Tensor, valid: Tensor | None = None) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over all ranks, 0-dim; not finite if all returns are equal."""
    samples = torch.stack([returns - values, returns])
    _, variances = ranks.moments(
        samples.flatten(1), (1,), None if valid is None else valid.expand_as(samples).flatten(1)
    )
    residual, total = variances.squeeze(1)
    return 1 - residual / total


def update(
    learner: MettaAgent | DistributedMettaAgent,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    advantages: Tensor,
    returns: Tensor,
    config: TrainConfig,
    timer: PhaseTimer,
    step: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, int]:
    """Up to `config.epochs` passes of PPO over the rollout.

    A minibatch is a random set of whole segments, each of which starts from the LSTM state that the rollout stored.
    With `config.target_kl`, all ranks stop after a pass whose approximate KL exceeds it: the mean over minibatches and
    ranks, each computed before its optimizer step. That comparison is the only host sync.
    `step` replaces `optimizer_step` and takes the tensors of a Minibatch.

    Returns:
        float [len(STATISTICS)] on the device, this rank's means over minibatches; and the number of passes.
    """
    step = step or partial(optimizer_step, learner, optimizer, experience, config, timer)
    total, epochs = torch.zeros(len(STATISTICS), device=advantages.device), 0
    while epochs < config.epochs:
        order = torch.randperm(config.num_envs, device=advantages.device).view(config.minibatches, -1)
        scaled = normalized(advantages[order], experience.valid_rows(order))
        statistics = torch.stack(list(map(step, order, scaled, returns[order]))).mean(0)
        total, epochs = total + statistics, epochs + 1
        if config.target_kl and epochs < config.epochs and ranks.mean(statistics[KL]).item() > config.target_kl:
            break
    return total / epochs, epochs


class Minibatch(NamedTuple):
    """Segments of one optimizer step: row indices, int64 [b]; advantages and returns, float [b, T]."""

    rows: Tensor
    advantages: Tensor
    returns: Tensor

    def parts(self, number: int) -> list["Minibatch"]:
        """Split into `number` equal parts; `number` must divide b."""
        return list(map(Minibatch, *(each.chunk(number) for each in self)))


def optimizer_step(
    learner: MettaAgent | DistributedMettaAgent,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    config: TrainConfig,
    timer: Callable[[str], Any],
    *minibatch: Tensor,
) -> Tensor:
    """One optimizer step on the mean gradient over micro-batches and ranks; returns float [len(STATISTICS)]."""
    with timer("learning"):
        optimizer.zero_grad()
        *before, last = Minibatch(*minibatch).parts(config.accumulate)
        with ranks.no_sync(learner):
            losses = [_backward(learner, experience, part, config, 0.0) for part in before]
        distance = learner.l2_init_loss() if config.l2_init_coef else torch.zeros((), device=last.returns.device)
        losses.append(_backward(learner, experience, last, config, config.l2_init_coef * distance))
        grad_norm = nn.utils.clip_grad_norm_(learner.parameters(), config.max_grad_norm)
        optimizer.step()
    with timer("clip"):
        learner.clip_weights()
    return torch.stack([*torch.stack(losses).mean(0), distance.detach(), grad_norm])


def _backward(
    learner: MettaAgent | DistributedMettaAgent,
    experience: Experience,
    part: Minibatch,
    config: TrainConfig,
    regularization: Tensor | float,
) -> Tensor:
    """Accumulate the gradients of a micro-batch's loss and of `regularization`; returns PpoLoss's parts, float [5]."""
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
        experience.valid_rows(rows),
        clip_coef=config.clip_coef,
        vf_clip_coef=config.vf_clip_coef,
        vf_coef=config.vf_coef,
        ent_coef=config.ent_coef,
    )
    (loss.total / config.accumulate + regularization).backward()
    return torch.stack(loss[1:])
