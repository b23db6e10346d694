"""Inputs, shapes and upstream's formulas shared by the benchmarks that evaluate and draw actions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Size, shapes
from metta_fastagent import ActionSpace

# Rows vary at 21 actions, actions at 4096 rows.
SHAPES = shapes(
    "rows actions",
    quick=[(256, 21), (4096, 21)],
    full=[(1, 5), (64, 21), (4096, 5), (4096, 128), (4096, 1024), (32768, 21)],
    gpu=[(4096, 37), (262144, 9), (262144, 21)],
)


class Inputs(NamedTuple):
    """Rows of logits, an action per row, and the action space's tables."""

    logits: Tensor  # [rows, actions]
    pairs: Tensor  # [rows, 2] int32
    cum_action_max_params: Tensor
    action_index_tensor: Tensor
    grad_log_prob: Tensor  # [rows]
    grad_entropy: Tensor  # [rows]


def make_inputs(size: Size, device: torch.device) -> Inputs:
    """Normal logits, uniform actions, two action types."""
    rows, actions = size["rows"], size["actions"]
    generator = torch.Generator(device).manual_seed(0)
    space = ActionSpace(["noop", "act"], [0, actions - 2], device)
    index = torch.randint(actions, (rows,), device=device, generator=generator)
    normal = torch.randn(rows, actions + 2, device=device, generator=generator)
    return Inputs(
        normal[:, :actions].contiguous() * 2,
        space.action_index_tensor[index],
        space.cum_action_max_params,
        space.action_index_tensor,
        normal[:, actions].contiguous(),
        normal[:, actions + 1].contiguous(),
    )


def upstream_index(pairs: Tensor, cum_action_max_params: Tensor) -> Tensor:
    """The guide's formula, one tensor operation after the other."""
    kind, param = pairs[:, 0].long(), pairs[:, 1].long()
    return kind + cum_action_max_params[kind] + param


def distribution_of(provider: str) -> Callable[[Tensor], Any]:
    """A peer's distribution class, constructed from logits; TorchRL's masked one allows every action."""
    if provider == "torch.distributions":
        return lambda logits: torch.distributions.Categorical(logits=logits, validate_args=False)
    from torchrl.modules import MaskedCategorical

    return lambda logits: MaskedCategorical(logits=logits, mask=torch.ones_like(logits, dtype=torch.bool))


def entropy_of(full_log_probs: Tensor) -> Tensor:
    """-sum p log p, as upstream writes it."""
    return -(full_log_probs.exp() * full_log_probs).sum(dim=-1)
