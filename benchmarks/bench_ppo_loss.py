"""The PPO loss from logits and values: forward, and forward with backward.

`upstream` is the guide's head and the loss as PPO trainers write it, one tensor operation after the other, with the
statistics that they log. Providers agree on loss and gradients.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks import bench_evaluate, categorical
from benchmarks.harness import Case, Size, choose, parametrized
from metta_fastagent import ops

PROVIDERS = ("upstream", "torch.compile", "eager", "native", "triton", "torchrl", "pufferlib")
MODES = ("forward", "forward + backward")
CLIP, VALUE_COST, ENTROPY_COST = 0.2, 0.5, 0.01
COEFFICIENTS = {"clip_coef": CLIP, "vf_clip_coef": 0.0, "vf_coef": VALUE_COST, "ent_coef": ENTROPY_COST}


class Batch(NamedTuple):
    """Logits [rows, A], pairs [rows, 2], the table of action types, and otherwise one number per row."""

    logits: Tensor
    pairs: Tensor
    cum_action_max_params: Tensor
    value: Tensor
    old_log_prob: Tensor
    old_value: Tensor
    advantages: Tensor
    returns: Tensor


# Batch -> (loss, statistics or None)
Loss = Callable[[Batch], tuple[Tensor, Tensor | None]]


def make_inputs(size: Size, device: torch.device) -> Batch:
    """Ratios within and beyond the clip."""
    inputs = categorical.make_inputs(size, device)
    generator = torch.Generator(device).manual_seed(1)
    numbers = torch.randn(5, size["rows"], device=device, generator=generator)
    log_prob = bench_evaluate.upstream(inputs.logits, inputs.pairs, inputs.cum_action_max_params)[0]
    value, change, old_value, advantages, returns = (row.contiguous() for row in numbers)
    old_log_prob = log_prob + 0.2 * change
    tables = inputs.logits, inputs.pairs, inputs.cum_action_max_params
    return Batch(*tables, value, old_log_prob, old_value, advantages, returns)


def surrogate_and_value(batch: Batch, log_prob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    """The PPO loss and its statistics, given each row's log-probability and entropy."""
    log_ratio = log_prob - batch.old_log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    policy_loss = -torch.minimum(ratio * batch.advantages, clipped * batch.advantages).mean()
    value_loss = 0.5 * (batch.value - batch.returns).square().mean()
    mean_entropy = entropy.mean()
    with torch.no_grad():
        kl, clips = ((ratio - 1) - log_ratio).mean(), ((ratio - 1).abs() > CLIP).float().mean()
    loss = policy_loss + VALUE_COST * value_loss - ENTROPY_COST * mean_entropy
    return loss, torch.stack([policy_loss, value_loss, mean_entropy, kl, clips]).detach()


def upstream(batch: Batch) -> tuple[Tensor, Tensor]:
    """The guide's head, and the loss as trainers write it."""
    log_prob, entropy, _ = bench_evaluate.upstream(*batch[:3])
    return surrogate_and_value(batch, log_prob, entropy)


def with_pufferlib(provider: str) -> Loss:
    """pufferlib's head, which is given the action, and the loss of its trainer: the same formula."""
    from pufferlib.pytorch import sample_logits

    def loss(batch: Batch) -> tuple[Tensor, Tensor]:
        index = categorical.upstream_index(batch.pairs, batch.cum_action_max_params)
        return surrogate_and_value(batch, *sample_logits(batch.logits, action=index)[1:])

    return loss


def with_torchrl(provider: str) -> Loss:
    """TorchRL's ClipPPOLoss around modules that pass on logits and values."""
    from tensordict import TensorDict
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
    from torchrl.objectives import ClipPPOLoss

    categorical_module = ProbabilisticTensorDictModule(
        ["logits"], ["action"], distribution_class=torch.distributions.Categorical, return_log_prob=True
    )
    actor = ProbabilisticTensorDictSequential(TensorDictModule(nn.Identity(), ["head"], ["logits"]), categorical_module)
    module = ClipPPOLoss(
        actor,
        TensorDictModule(nn.Identity(), ["critic"], ["state_value"]),
        clip_epsilon=CLIP,
        entropy_coeff=ENTROPY_COST,
        # Its value error is not halved.
        critic_coeff=VALUE_COST / 2,
        loss_critic_type="l2",
    )
    module.set_keys(value_target="returns", sample_log_prob="old_log_prob")

    def loss(batch: Batch) -> tuple[Tensor, None]:
        numbers = {name: getattr(batch, name).unsqueeze(-1) for name in ("advantages", "returns", "value")}
        entries = {
            "head": batch.logits,
            "critic": numbers["value"],
            "action": categorical.upstream_index(batch.pairs, batch.cum_action_max_params),
            "old_log_prob": batch.old_log_prob,
            "advantage": numbers["advantages"],
            "returns": numbers["returns"],
        }
        found = module(TensorDict(entries, batch_size=[len(batch.logits)]))
        return found["loss_objective"] + found["loss_critic"] + found["loss_entropy"], None

    return loss


def package(batch: Batch) -> tuple[Tensor, Tensor]:
    """`ops.ppo_loss`."""
    logits, pairs, table, *numbers = batch
    return ops.ppo_loss(logits, pairs, *numbers, table, **COEFFICIENTS)


FORMULAS = {"upstream": upstream, "torchrl": with_torchrl, "pufferlib": with_pufferlib}


def make_case(mode: str, size: Size, device: torch.device) -> Case:
    batch = make_inputs(size, device)
    inputs = [tensor.requires_grad_(mode != "forward") for tensor in (batch.logits, batch.value)]

    def call_of(provider: str) -> Callable[[], Any]:
        loss = choose(provider, FORMULAS, package)

        def with_backward() -> tuple[Tensor, ...]:
            value = loss(batch)[0]
            return value, *torch.autograd.grad(value, inputs)

        return with_backward if mode != "forward" else torch.no_grad()(lambda: loss(batch)[:1])

    # Bytes forward: logits and 28 per row in, 16 for index and slopes out. Backward: these and logits in, gradients
    # out.
    per_row = 4 * size["actions"] + 44 if mode == "forward" else 12 * size["actions"] + 64
    return Case(f"ppo_loss {mode}", call_of, moved_bytes=size["rows"] * per_row)


@pytest.mark.parametrize("mode", MODES)
@parametrized(PROVIDERS, categorical.SHAPES)
def test_ppo_loss(measure, mode):
    measure(functools.partial(make_case, mode))
