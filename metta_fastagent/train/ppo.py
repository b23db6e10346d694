"""Recurrent PPO: one update over a rollout's segments. The loss is `ops.ppo_loss`."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metta_fastagent import DistributedMettaAgent, MettaAgent, ops
from metta_fastagent.train import ranks
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.experience import Experience
from metta_fastagent.train.timer import PhaseTimer

# averaged over minibatches by `update`, in this order
STATISTICS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "l2_init_loss", "grad_norm")
KL = STATISTICS.index("approx_kl")
# keeps normalized advantages finite if all advantages of a minibatch are equal
ADVANTAGE_EPSILON = 1e-8


def normalized(advantages: Tensor, valid: Tensor | None = None, floor: float = 0.0) -> Tensor:
    """`advantages`, float [minibatches, b, T], scaled to mean 0 and standard deviation 1 per minibatch, over all ranks.

    A standard deviation below `floor` counts as `floor`. Steps where `valid` (bool, same shape) is False do not count.
    """
    mean, variance = ranks.moments(advantages, (1, 2), valid)
    return (advantages - mean) / (variance.sqrt().clamp_min(floor) + ADVANTAGE_EPSILON)


def explained_variance(values: Tensor, returns: Tensor, valid: Tensor | None = None) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over all ranks, 0-dim; not finite if all returns are equal."""
    samples = torch.stack([returns - values, returns]).flatten(1)
    valid = None if valid is None else valid.flatten().expand_as(samples)
    residual, total = ranks.moments(samples, (1,), valid)[1].squeeze(1)
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
    """Up to `config.epochs` PPO passes over the rollout.

    A minibatch is a random set of whole segments, each of which starts from the LSTM state stored by the rollout. With
    `config.target_kl`, all ranks stop after a pass whose approximate KL exceeds it: the mean over minibatches and
    ranks, each computed before its optimizer step. That comparison is a host sync. A minibatch without a valid step on
    any rank is left out; finding out is another host sync if `experience` has invalid steps. `step` replaces
    `optimizer_step` and takes the tensors of a Minibatch.

    Returns:
        float [len(STATISTICS)] on the device, this rank's means over minibatches (0 if there are none); and the number
        of passes.
    """
    step = step or partial(optimizer_step, learner, optimizer, experience, config, timer)
    total, epochs = torch.zeros(len(STATISTICS), device=advantages.device), 0
    while epochs < config.epochs:
        order = torch.randperm(config.num_envs, device=advantages.device).view(config.minibatches, -1)
        valid = experience.valid_rows(order)
        scaled = normalized(advantages[order], valid, config.advantage_floor)
        minibatches = list(zip(order, scaled, returns[order], strict=True))
        if valid is not None:
            any_valid = ranks.mean(valid.float().sum((1, 2))).tolist()
            minibatches = [each for each, learns in zip(minibatches, any_valid, strict=True) if learns]
        statistics = [step(*minibatch) for minibatch in minibatches]
        statistics = torch.stack(statistics).mean(0) if statistics else torch.zeros_like(total)
        total, epochs = total + statistics, epochs + 1
        if config.target_kl and epochs < config.epochs and ranks.mean(statistics[KL]).item() > config.target_kl:
            break
    return total / epochs, epochs


class Minibatch(NamedTuple):
    """Segments for one optimizer step: row indices, int64 [b]; advantages and returns, float [b, T]."""

    rows: Tensor
    advantages: Tensor
    returns: Tensor


def optimizer_step(
    learner: MettaAgent | DistributedMettaAgent,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    config: TrainConfig,
    timer: Callable[[str], Any],
    *minibatch: Tensor,
) -> Tensor:
    """One optimizer step; returns float [len(STATISTICS)].

    The gradient is for the mean over the valid steps of all micro-batches and ranks.
    """
    with timer("learning"):
        optimizer.zero_grad()
        valid = experience.valid_rows(minibatch[0])
        count = None if valid is None else ranks.mean(valid.float().sum()) / config.accumulate
        *before, last = map(Minibatch, *(each.chunk(config.accumulate) for each in minibatch))
        with learner.no_sync() if isinstance(learner, DistributedMettaAgent) else nullcontext():
            losses = [_backward(learner, experience, part, count, config) for part in before]
        distance = learner.l2_init_loss() if config.l2_init_coef else None
        losses.append(_backward(learner, experience, last, count, config, distance))
        grad_norm = nn.utils.clip_grad_norm_(learner.parameters(), config.max_grad_norm)
        optimizer.step()
    with timer("clip"):
        learner.clip_weights()
    parts = torch.stack(losses).mean(0) if before else losses[0]
    distance = torch.zeros_like(grad_norm) if distance is None else distance.detach()
    return torch.stack([*parts, distance, grad_norm])


def _backward(
    learner: MettaAgent | DistributedMettaAgent,
    experience: Experience,
    part: Minibatch,
    count: Tensor | None,
    config: TrainConfig,
    distance: Tensor | None = None,
) -> Tensor:
    """Accumulate the gradients of a micro-batch's loss and the L2-init loss; returns `ops.ppo_loss`'s statistics."""
    rows = part.rows
    segments, actions = experience.segments(rows), experience.actions[rows]
    segments.set_non_tensor("return_logits", True)
    out = learner(segments, action=actions)
    old = experience.log_probs[rows], experience.values[rows], part.advantages, part.returns
    valid = experience.valid_rows(rows)
    names = ("clip_coef", "vf_clip_coef", "vf_coef", "ent_coef")
    coefficients = {name: getattr(config, name) for name in names}
    if "act_log_prob" in out.keys():
        # an agent that does not return logits
        own = out["act_log_prob"], out["entropy"], out["value"]
        total, parts = ops.ppo_loss_of_log_prob(*own, *old, valid=valid, count=count, **coefficients)
    else:
        logits, mask = out["logits"].flatten(0, 1), out.get("action_mask", None)
        options = {"valid": valid, "count": count, "mask": None if mask is None else mask.flatten(0, 1)}
        table = learner.cum_action_max_params
        total, parts = ops.ppo_loss(logits, actions, out["value"], *old, table, **options, **coefficients)
    total = total if config.accumulate == 1 else total / config.accumulate
    ranks.backward(learner, total if distance is None else total + config.l2_init_coef * distance)
    return parts
