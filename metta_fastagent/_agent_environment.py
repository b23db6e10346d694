"""AgentEnvironment: the part of the mixin that adapts an agent to its environment's actions and features."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from metta_fastagent.action_space import ActionSpace, checked_max_params

# For type checkers the class is a module; at run time it adds no base to the class it is mixed into.
Module = nn.Module if TYPE_CHECKING else object


class AgentEnvironment(Module):
    """Base class of `PyTorchAgentMixin`, which documents the attributes."""

    action_index_tensor: Tensor | None
    cum_action_max_params: Tensor | None

    def activate_actions(
        self,
        action_names: Sequence[str],
        action_max_params: Sequence[int],
        device: torch.device | str | None = None,
    ) -> None:
        """Set the action tables, for use without a host, and call the two policy methods below.

        Args:
            action_names: name of each action type.
            action_max_params: largest legal parameter of each type.
            device: device of the tables; None means the device of the agent's parameters.

        Raises:
            TypeError, ValueError: see `ActionSpace`; then nothing is changed.
        """
        if device is None:
            device = next((param.device for param in self.parameters()), None)
        space = ActionSpace(action_names, action_max_params, device)
        self.activate_action_embeddings(space.full_action_names, device)
        self.initialize_to_environment(space.full_action_names, device)
        self.action_index_tensor = space.action_index_tensor
        self.cum_action_max_params = space.cum_action_max_params

    def activate_action_embeddings(
        self, full_action_names: list[str], device: torch.device | str | None = None
    ) -> None:
        """Call the method of that name on `self.policy`, if it has one."""
        _pass_on(self, "activate_action_embeddings", full_action_names, device)

    def initialize_to_environment(self, full_action_names: list[str], device: torch.device | str | None = None) -> None:
        """Call the method of that name on `self.policy`, if it has one."""
        _pass_on(self, "initialize_to_environment", full_action_names, device)

    def create_action_heads(self, env: Any, input_size: int = 512 + 16) -> nn.ModuleList:
        """A ModuleList of one orthogonal Linear (gain 0.01) with sum(max_arg + 1) outputs for `env.max_action_args`."""
        max_action_args = checked_max_params("env.max_action_args", env.max_action_args)
        head = nn.Linear(input_size, sum(max_action_args) + len(max_action_args))
        nn.init.orthogonal_(head.weight, 0.01)
        nn.init.constant_(head.bias, 0)
        return nn.ModuleList([head])

    def _apply_feature_remapping(self, remap_tensor: Tensor) -> None:
        """Do nothing; an agent whose features can be renumbered overrides this method."""

    def update_normalization_factors(
        self, features: dict[str, dict], original_feature_mapping: dict[str, int] | None
    ) -> None:
        """Do nothing; an agent whose normalisation can be updated overrides this method."""


def _pass_on(agent: nn.Module, method: str, *args: Any) -> None:
    target = getattr(getattr(agent, "policy", None), method, None)
    if target is not None:
        target(*args)
