"""The one decision between a rollout step and training segments."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from metta_fastagent.ops._checks import describe


class Fields(NamedTuple):
    """The decision of `set_tensordict_fields` for a TensorDict, which is recognised by its `bptt` entry."""

    bptt: Tensor
    rows: int
    steps: int
    training: bool


def is_training(observations: Tensor, obs_shape: Sequence[int] | None, training: bool | None = None) -> bool:
    """Whether observations are segments [B, T, ...] rather than a rollout step [B, ...].

    Args:
        observations: the observations.
        obs_shape: shape of one observation (`env.single_observation_space.shape`); None if unknown.
        training: the answer, if the caller knows it.

    Raises:
        ValueError: the number of dimensions fits neither.
    """
    if training is None:
        if obs_shape is None:
            # Tokens [B, T, M, 3]; other observations need `obs_shape` or `training`.
            return observations.dim() == 4
        rank = len(obs_shape)
        if observations.dim() not in (rank + 1, rank + 2):
            raise ValueError(
                f"observations: got {describe(observations)}, expected {rank + 1} dimensions [B, ...] in rollout or "
                f"{rank + 2} dimensions [B, T, ...] in training, for observations of shape {list(obs_shape)}"
            )
        return observations.dim() == rank + 2
    if training and observations.dim() < 2:
        raise ValueError(f"observations: got {describe(observations)}, expected [B, T, ...] for training=True")
    return bool(training)
