"""MettaAgent and DistributedMettaAgent: tie a policy to an environment.

A small host of this package's own. It makes the action tables, sets them on the policy, keeps feature ids stable when
the environment renumbers its features, and delegates everything else to the policy.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from metta_fastagent.action_space import ActionSpace
from metta_fastagent.ops._checks import is_number, is_whole

logger = logging.getLogger(__name__)

UNKNOWN_FEATURE_ID = 255


class MettaAgent(nn.Module):
    """Host of a policy, normally an agent written with `PyTorchAgentMixin`.

    Args:
        env: the environment; `feature_normalizations` is read if present.
        policy: the agent.
        device: device that the policy is moved to; None does not move it.

    Attributes:
        policy: the agent.
        action_space: `ActionSpace` of the environment, None before `initialize_to_environment`.
        original_feature_mapping: feature name to the id that the policy was trained with, None before.

    Raises:
        TypeError: `policy` is not a module.
    """

    policy: Any

    def __init__(self, env: Any, policy: nn.Module, device: torch.device | str | None = None) -> None:
        super().__init__()
        if not isinstance(policy, nn.Module):
            raise TypeError(f"policy: got {policy!r}, expected an nn.Module such as Fast(env)")
        self.policy = policy if device is None else policy.to(device)
        normalizations = getattr(env, "feature_normalizations", None) or {}
        if not isinstance(normalizations, Mapping):
            raise TypeError(
                f"env.feature_normalizations: got {normalizations!r}, expected a dict from feature id to number"
            )
        self.feature_normalizations = dict(normalizations)
        self.action_space: ActionSpace | None = None
        self.original_feature_mapping: dict[str, int] | None = None
        self.feature_id_remap: dict[int, int] = {}

    def forward(self, td: TensorDictBase, state: Any = None, action: Tensor | None = None) -> TensorDictBase:
        """The policy's forward: inference without `action`, training with it."""
        return self.policy(td, state, action)

    def initialize_to_environment(
        self,
        features: Mapping[str, Mapping[str, Any]],
        action_names: Sequence[str],
        action_max_params: Sequence[int],
        device: torch.device | str | None = None,
    ) -> None:
        """Fit the policy to an environment: action tables and embeddings, feature ids and normalisation.

        The first call fixes the id of each feature name. A later call with another numbering makes a table from the new
        ids to the fixed ones, for the policy's `_apply_feature_remapping`. A name that is new gets a free id while the
        host is in training mode, and is unknown (255) in evaluation mode.

        Args:
            features: name to `{"id": 0..254, "normalization": number > 0 (optional)}`.
            action_names: name of each action type.
            action_max_params: largest legal parameter of each type.
            device: device of the tables; None means the device of the policy's parameters.

        Raises:
            TypeError, ValueError: an argument has a wrong value; nothing was changed then.
        """
        ids = _checked_feature_ids(features)
        self.activate_actions(action_names, action_max_params, device)
        self.feature_normalizations = {ids[n]: f["normalization"] for n, f in features.items() if "normalization" in f}
        if self.original_feature_mapping is None:
            self.original_feature_mapping = dict(ids)
        else:
            self._remap_features(features, ids)

    def activate_actions(
        self,
        action_names: Sequence[str],
        action_max_params: Sequence[int],
        device: torch.device | str | None = None,
    ) -> None:
        """Make the action tables and set them on the policy; its action embeddings are activated first.

        Raises:
            TypeError, ValueError: see `ActionSpace`; nothing was changed then.
        """
        device = self.device if device is None else torch.device(device)
        space = ActionSpace(action_names, action_max_params, device)
        activate_embeddings = getattr(self.policy, "activate_action_embeddings", None)
        if activate_embeddings is not None:
            activate_embeddings(space.full_action_names, device)
        initialize = getattr(self.policy, "initialize_to_environment", None)
        if initialize is not None:
            initialize(space.full_action_names, device)
        self.policy.action_index_tensor = space.action_index_tensor
        self.policy.cum_action_max_params = space.cum_action_max_params
        self.action_space = space

    @property
    def device(self) -> torch.device:
        """Device of the policy's parameters; the CPU if it has none."""
        return next((param.device for param in self.parameters()), torch.device("cpu"))

    @property
    def action_index_tensor(self) -> Tensor | None:
        """The policy's table of pairs, int32 [num_actions, 2]."""
        return getattr(self.policy, "action_index_tensor", None)

    @property
    def cum_action_max_params(self) -> Tensor | None:
        """The policy's table of offsets, int64 [action types + 1]."""
        return getattr(self.policy, "cum_action_max_params", None)

    @property
    def total_params(self) -> int:
        """Number of trainable parameters."""
        return sum(param.numel() for param in self.parameters() if param.requires_grad)

    @property
    def lstm(self) -> nn.Module | None:
        """The policy's LSTM, or None."""
        return getattr(self.policy, "lstm", None)

    # Features

    def get_original_feature_mapping(self) -> dict[str, int] | None:
        """Feature name to the id that the policy was trained with, to save with a checkpoint."""
        return None if self.original_feature_mapping is None else dict(self.original_feature_mapping)

    def restore_original_feature_mapping(self, mapping: Mapping[str, int]) -> None:
        """Restore a mapping from `get_original_feature_mapping`; call it before `initialize_to_environment`.

        Raises:
            TypeError, ValueError: not a mapping from names to distinct ids 0 to 254.
        """
        if not isinstance(mapping, Mapping):
            raise TypeError(f"mapping: got {mapping!r}, expected a dict from feature name to id")
        self.original_feature_mapping = _checked_feature_ids(
            {name: {"id": i} for name, i in mapping.items()}, "mapping"
        )

    def _remap_features(self, features: Mapping[str, Mapping[str, Any]], ids: dict[str, int]) -> None:
        known = dict(self.original_feature_mapping or {})
        unknown = [name for name in ids if name not in known]
        if self.training:
            for name in unknown:
                known[name] = _free_id(ids[name], set(known.values()))
        self.original_feature_mapping = known
        remap = torch.full((256,), UNKNOWN_FEATURE_ID, dtype=torch.uint8)
        for name, new_id in ids.items():
            remap[new_id] = known.get(name, UNKNOWN_FEATURE_ID)
        self.feature_id_remap = {i: int(remap[i]) for i in ids.values() if int(remap[i]) != i}
        if self.feature_id_remap:
            logger.info(
                "%d features renumbered, %d not known before: %s", len(self.feature_id_remap), len(unknown), unknown
            )
        if hasattr(self.policy, "_apply_feature_remapping"):
            self.policy._apply_feature_remapping(remap.to(self.device))
        if hasattr(self.policy, "update_normalization_factors"):
            self.policy.update_normalization_factors({n: dict(f) for n, f in features.items()}, dict(known))

    # Delegated to the policy

    def has_memory(self) -> bool:
        """Whether the policy carries state from step to step."""
        return bool(self._policy_call("has_memory", default=False))

    def get_memory(self) -> Any:
        """The policy's memory; an empty dict if it has none."""
        return self._policy_call("get_memory", default={})

    def set_memory(self, memory: Any) -> None:
        """Replace the policy's memory."""
        self._policy_call("set_memory", memory)

    def reset_memory(self) -> None:
        """Forget the state of every environment."""
        self._policy_call("reset_memory")

    def reset_env_memory(self, env_id: int) -> None:
        """Forget the state of one environment id."""
        self._policy_call("reset_env_memory", env_id)

    def clip_weights(self) -> None:
        """Clip the policy's weights by its configuration."""
        self._policy_call("clip_weights")

    def l2_init_loss(self) -> Tensor:
        """The policy's L2-init loss, 0-dim float32; 0 if it has none."""
        return self._policy_call("l2_init_loss", default=torch.tensor(0.0, dtype=torch.float32))

    def update_l2_init_weight_copy(self) -> None:
        """Make the current weights the reference of the L2-init loss."""
        self._policy_call("update_l2_init_weight_copy")

    def compute_weight_metrics(self, delta: float = 0.01) -> list[dict]:
        """The policy's weight metrics; an empty list if it has none."""
        return self._policy_call("compute_weight_metrics", delta, default=[])

    def maybe_compute_weight_metrics(self, epoch: int, delta: float = 0.01) -> list[dict] | None:
        """The policy's weight metrics on every `analyze_weights_interval`-th epoch, None on the others."""
        return self._policy_call("maybe_compute_weight_metrics", epoch, delta)

    def _convert_action_to_logit_index(self, flattened_action: Tensor) -> Tensor:
        return self.policy._convert_action_to_logit_index(flattened_action)

    def _convert_logit_index_to_action(self, action_logit_index: Tensor) -> Tensor:
        return self.policy._convert_logit_index_to_action(action_logit_index)

    def _policy_call(self, method: str, *args: Any, default: Any = None) -> Any:
        target = getattr(self.policy, method, None)
        return default if target is None else target(*args)


class DistributedMettaAgent(DistributedDataParallel):
    """`DistributedDataParallel` around a `MettaAgent`, with the agent's own methods and attributes reachable on it.

    Args:
        agent: the host; its BatchNorm layers become SyncBatchNorm (not on the CPU, for which PyTorch has none).
        device: the device of this rank.
        options: passed to `DistributedDataParallel`, such as `find_unused_parameters`.
    """

    module: MettaAgent

    def __init__(self, agent: MettaAgent, device: torch.device | str, **options: Any) -> None:
        if torch.device(device).type == "cpu":
            super().__init__(agent, **options)
        else:
            synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(agent)
            super().__init__(synchronized, **{"device_ids": [device], "output_device": device, **options})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)


def _checked_feature_ids(features: Mapping[str, Mapping[str, Any]], argument: str = "features") -> dict[str, int]:
    """Name to id, if every id is an integer 0 to 254 that occurs once and every normalisation a number above 0."""
    if not isinstance(features, Mapping):
        raise TypeError(f"{argument}: got {features!r}, expected a dict from feature name to its id and normalization")
    ids: dict[str, int] = {}
    for name, properties in features.items():
        feature_id = properties.get("id") if isinstance(properties, Mapping) else None
        if not is_whole(feature_id) or not 0 <= int(feature_id) < UNKNOWN_FEATURE_ID:
            raise ValueError(
                f"{argument}[{name!r}]: got id {feature_id!r}, expected an integer 0 to {UNKNOWN_FEATURE_ID - 1}"
            )
        if feature_id in ids.values():
            raise ValueError(
                f"{argument}[{name!r}]: got id {feature_id}, which another feature has, expected distinct ids"
            )
        normalization = properties.get("normalization", 1.0)
        if not is_number(normalization) or not 0 < float(normalization) < math.inf:
            raise ValueError(
                f"{argument}[{name!r}]: got normalization {properties['normalization']!r}, expected a number > 0"
            )
        ids[name] = int(feature_id)
    return ids


def _free_id(wanted: int, taken: set[int]) -> int:
    candidates = (wanted, *range(UNKNOWN_FEATURE_ID))
    return next((i for i in candidates if i not in taken), UNKNOWN_FEATURE_ID)
