"""MettaAgent and DistributedMettaAgent: connect a policy to an environment.

This package's own small host. It builds the action tables, sets them on the policy, keeps feature ids stable when the
environment renumbers its features, and delegates everything else to the policy.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from metta_fastagent.action_space import ActionSpace
from metta_fastagent.runtime.checks import is_number, is_whole

logger = logging.getLogger(__name__)

UNKNOWN_FEATURE_ID = 255
# The host's own attributes; reads and writes of any other attribute that the policy has go to the policy.
OWN = {"action_space", "original_feature_mapping", "feature_normalizations", "feature_id_remap"}


def _delegated(
    name: str, description: str, default: Callable[[], Any] = lambda: None, answer: Callable[[Any], Any] | None = None
) -> Callable[..., Any]:
    """A host method that calls the policy's method `name`, if there is one, and converts its result."""

    def method(self: "MettaAgent", *args: Any, **kwargs: Any) -> Any:
        target = getattr(self.policy, name, None)
        found = default() if target is None else target(*args, **kwargs)
        return found if answer is None else answer(found)

    method.__name__, method.__doc__ = name, description
    return method


def _nothing(answer: Any) -> None:
    return None


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

    Example:
        >>> from types import SimpleNamespace
        >>> from metta_fastagent import Fast
        >>> env = SimpleNamespace(feature_normalizations={0: 1.0, 1: 10.0})
        >>> agent = MettaAgent(env, Fast(env))
        >>> features = {"wall": {"id": 0, "normalization": 1.0}, "ore": {"id": 1, "normalization": 10.0}}
        >>> agent.initialize_to_environment(features, ["noop", "move"], [0, 3], "cpu")
        >>> agent.action_space.num_actions
        5
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

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # copy and pickle must only find methods of the host itself
            if name == "policy" or name.startswith("__"):
                raise
            return getattr(self.policy, name)

    def __setattr__(self, name: str, value: Any) -> None:
        policy = self.__dict__.get("_modules", {}).get("policy")
        # the host's properties expose attributes of the policy
        own = name in OWN or not isinstance(getattr(type(self), name, property()), property)
        if policy is None or own or name in {"policy", "training", *self.__dict__} or not hasattr(policy, name):
            super().__setattr__(name, value)
        else:
            setattr(policy, name, value)

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
        """Adapt the policy to an environment: action tables and embeddings, feature ids and normalisation.

        The first call fixes the id of each feature name. A later call with different numbering builds a table from the
        new ids to the fixed ones, for the policy's `_apply_feature_remapping`. A new name gets a free id while the host
        is in training mode, and is unknown (255) in evaluation mode.

        Args:
            features: name to `{"id": 0..254, "normalization": number > 0 (optional)}`.
            action_names: name of each action type.
            action_max_params: largest legal parameter of each type.
            device: device of the tables; None means the device of the policy's parameters.

        Raises:
            TypeError, ValueError: an argument has a wrong value; then nothing is changed.
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
        """Build the action tables and set them on the policy, after activating its action embeddings.

        Raises:
            TypeError, ValueError: see `ActionSpace`; then nothing is changed.
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
        """Feature name to the id that the policy was trained with, for saving with a checkpoint."""
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

    # Methods of the policy; if it lacks one, the last argument gives the result.
    has_memory = _delegated("has_memory", "Whether the policy carries state from step to step.", answer=bool)
    get_memory = _delegated("get_memory", "The policy's memory; an empty dict if it has none.", dict)
    set_memory = _delegated("set_memory", "Replace the policy's memory.", answer=_nothing)
    reset_memory = _delegated("reset_memory", "Forget the state of every environment.", answer=_nothing)
    reset_env_memory = _delegated("reset_env_memory", "Forget the state of one environment id.", answer=_nothing)
    clip_weights = _delegated("clip_weights", "Clip the policy's weights by its configuration.", answer=_nothing)
    l2_init_loss = _delegated(
        "l2_init_loss", "The policy's L2-init loss, 0-dim float32; 0 if it has none.", lambda: torch.tensor(0.0)
    )
    update_l2_init_weight_copy = _delegated(
        "update_l2_init_weight_copy", "Make the current weights the reference of the L2-init loss.", answer=_nothing
    )
    compute_weight_metrics = _delegated(
        "compute_weight_metrics", "The policy's weight metrics; an empty list if it has none.", list
    )
    maybe_compute_weight_metrics = _delegated(
        "maybe_compute_weight_metrics", "The policy's weight metrics on epochs of its interval, None on the others."
    )
    _convert_action_to_logit_index = _delegated("_convert_action_to_logit_index", "Logit index of each pair.")
    _convert_logit_index_to_action = _delegated("_convert_logit_index_to_action", "Pair of each logit index.")


class DistributedMettaAgent(DistributedDataParallel):
    """`DistributedDataParallel` around a `MettaAgent`, which exposes the agent's own methods and attributes.

    Args:
        agent: the host; its BatchNorm layers become SyncBatchNorm (not on the CPU, for which PyTorch has none).
        device: the device of this rank.
        options: passed to `DistributedDataParallel`, such as `find_unused_parameters`.

    Example:
        Under torchrun, after `torch.distributed.init_process_group()`:

        learner = DistributedMettaAgent(agent, "cuda")
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
    """Name to id, after checking that ids are distinct integers 0 to 254 and normalisations numbers above 0."""
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
