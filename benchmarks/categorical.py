"""Inputs, shapes and upstream's formulas that the benchmarks of evaluating and drawing actions share."""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Shape, Size
from metta_fastagent import ActionSpace

# Rows vary at 21 actions, actions at 4096 rows.
SHAPES = [
    Shape("quick", {"rows": 256, "actions": 21}),
    Shape("quick", {"rows": 4096, "actions": 21}),
    Shape("full", {"rows": 1, "actions": 5}),
    Shape("full", {"rows": 64, "actions": 21}),
    Shape("full", {"rows": 4096, "actions": 5}),
    Shape("full", {"rows": 4096, "actions": 128}),
    Shape("full", {"rows": 4096, "actions": 1024}),
    Shape("full", {"rows": 32768, "actions": 21}),
    Shape("gpu", {"rows": 4096, "actions": 37}),
    Shape("gpu", {"rows": 262144, "actions": 9}),
    Shape("gpu", {"rows": 262144, "actions": 21}),
]


class Inputs(NamedTuple):
    """Rows of logits, an action for each, and the tables of the action space."""

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


def entropy_of(full_log_probs: Tensor) -> Tensor:
    """-sum p log p, as upstream writes it."""
    return -(full_log_probs.exp() * full_log_probs).sum(dim=-1)
