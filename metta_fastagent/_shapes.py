"""Layouts of a TensorDict, its observations and its actions: pure functions of types and shapes.

A rollout step has rows [B]; training has segments [B, T], or flat rows [B * T] in which time varies fastest.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase, is_non_tensor
from torch import Tensor

from metta_fastagent.runtime.checks import describe

# Hint for the usual first mistake with observations that are not tokens.
HOW_TO_TELL = (
    "where env.single_observation_space does not tell segments [B, T, ...] from a step [B, ...], "
    "pass training= to set_tensordict_fields"
)


class Fields(NamedTuple):
    """What `set_tensordict_fields` decided for a TensorDict, which is recognised by its `bptt` entry."""

    bptt: Tensor
    rows: int
    steps: int
    training: bool


def require_tensordict(td: Any) -> None:
    """Raise a TypeError that names `td` if it is not a TensorDict."""
    if not isinstance(td, TensorDictBase):
        raise TypeError(f"td: got {describe(td)}, expected a TensorDict")


def is_training(observations: Tensor, obs_shape: Sequence[int] | None, training: bool | None = None) -> bool:
    """Whether observations are segments [B, T, ...], not a rollout step [B, ...].

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


def layout_of(
    td: TensorDictBase,
    observations: Tensor,
    obs_shape: Sequence[int] | None,
    training: bool | None,
    known: Fields | None,
) -> tuple[int, int, bool]:
    """(B, T, training) of observations [B, ...], [B, T, ...] or flat [B * T, ...]; T is 1 in a rollout step.

    `known` is the last decision of `set_tensordict_fields`; the other arguments are as for `is_training`.

    Raises:
        ValueError: the number of dimensions fits neither, or fields set elsewhere do not match the rows.
    """
    segments = is_training(observations, obs_shape, training)
    rows = observations.shape[0]
    if training is not False and (training or not segments):
        flat = _given_segments(td, rows, known)
        if flat is not None and flat[0] * flat[1] == rows:
            return *flat, True
        if flat is not None and not segments:
            raise ValueError(
                f"td: holds batch x bptt = {flat[0]} x {flat[1]}, expected {rows} rows as in observations; a rollout "
                "step whose fields are left from training is td.exclude('bptt', 'batch'), or training=False"
            )
    return (rows, observations.shape[1], True) if segments else (rows, 1, False)


def _given_segments(td: TensorDictBase, rows: int, known: Fields | None) -> tuple[int, int] | None:
    """(B, T) from the fields of a flat TensorDict with this many rows; None without fields or for single steps."""
    bptt = td.get("bptt", None)
    if not isinstance(bptt, Tensor) or bptt.numel() != rows or rows == 0 or tuple(td.batch_size) != (rows,):
        return None
    if known is not None and bptt is known.bptt:
        return (known.rows, known.steps) if known.steps > 1 else None
    batch = td.get("batch", None)
    if not isinstance(batch, Tensor) or batch.numel() != rows:
        return None
    # Set elsewhere: the values must be read, a host sync on CUDA.
    segment = int(batch.flatten()[0]), int(bptt.flatten()[0])
    return segment if segment[1] > 1 else None


def field_shape(batch_size: tuple[int, ...], B: int, TT: int, training: bool) -> tuple[int, ...]:
    """Shape of `bptt` and `batch` in a TensorDict of this batch size."""
    if batch_size == (B, TT) or (batch_size == (B,) and training):
        return (B, TT)
    if batch_size in ((), (B * TT,)):
        return (B * TT,)
    expected = f"{[B, TT]}, {[B]} or {[B * TT]}"
    hint = f"; {HOW_TO_TELL}" if len(batch_size) == 2 and not training else ""
    raise ValueError(f"td: got batch size {list(batch_size)}, expected {expected} as in observations{hint}")


def require_hidden(hidden: Any, B: int, TT: int) -> None:
    """Raise a ValueError if `hidden` is not B * TT rows of features."""
    if not isinstance(hidden, Tensor) or hidden.dim() == 0 or hidden.numel() != B * TT * hidden.shape[-1]:
        expected = f"{B * TT} rows of features, for {B} x {TT} steps"
        raise ValueError(f"hidden: got {describe(hidden)}, expected {expected}; {HOW_TO_TELL}")


def require_rows(logits: Any, value: Any) -> int:
    """Number of rows of the logits, after checking that they are 2-D and the values have as many rows."""
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError(f"logits_list: got {describe(logits)}, expected a tensor of shape [rows, actions]")
    rows = logits.shape[0]
    fits = isinstance(value, Tensor) and value.shape in ((rows,), (rows, 1)) and value.is_floating_point()
    if not fits or value.device != logits.device:
        expected = f"floating-point numbers of shape {[rows, 1]} or {[rows]} on {logits.device}, as logits_list"
        raise ValueError(f"value: got {describe(value)}, expected {expected}")
    return rows


def require_step(td: TensorDictBase, rows: int, known: Fields | None) -> None:
    """Raise a ValueError unless `td` is a rollout step with this many rows; `known` is as in `segment_shape`."""
    if known is not None and known.training and known.steps > 1 and td.get("bptt", None) is known.bptt:
        raise ValueError(f"action: got None, expected pairs {[known.rows, known.steps, 2]} for segments")
    if td.batch_dims > 0 and tuple(td.batch_size) != (rows,):
        raise ValueError(f"td: got batch size {list(td.batch_size)}, expected {[rows]}, the rows of logits_list")


def flat_actions(action: Any, rows: int) -> Tensor:
    """Pairs [rows, 2] or logit indices [rows]."""
    expected = "pairs of shape [B, T, 2] or [B * T, 2], or logit indices of shape [B, T] or [B * T]"
    if not isinstance(action, Tensor) or not 1 <= action.dim() <= 3:
        raise ValueError(f"action: got {describe(action)}, expected {expected}")
    if action.dim() < 3 and action.numel() == rows:
        return action.reshape(rows)
    if action.dim() == 1 or action.shape[-1] != 2:
        raise ValueError(f"action: got {describe(action)}, expected {expected}, {rows} rows as in logits_list")
    if action.numel() != rows * 2:
        raise ValueError(f"action: got {describe(action)}, expected {rows} pairs as in logits_list")
    return action.reshape(rows, 2)


def segment_shape(td: TensorDictBase, action: Tensor, rows: int, known: Fields | None) -> tuple[int, int] | None:
    """(B, T) of a training call, without reading a tensor if possible; None if `td` lacks the fields.

    `known` is the last decision of `set_tensordict_fields`.
    """
    batch_size, bptt = tuple(td.batch_size), td.get("bptt", None)
    if bptt is None or "batch" not in td.keys():
        if batch_size and math.prod(batch_size) != rows:
            raise ValueError(
                f"td: got batch size {list(batch_size)}, expected {rows} rows as in logits_list; for segments, call "
                "set_tensordict_fields(td, observations) first"
            )
        return None
    if action.dim() == 3 or (action.dim() == 2 and action.numel() == rows):
        segment = (action.shape[0], action.shape[1])
    elif bptt.dim() >= 2:
        segment = (bptt.shape[0], bptt.shape[1])
    elif known is not None and bptt is known.bptt:
        segment = known.rows, known.steps
    else:
        # Fields of a flat TensorDict that were set elsewhere: their values must be read, a host sync on CUDA.
        segment = int(td.get("batch")[0]), int(bptt[0])
    if segment[0] * segment[1] != rows:
        raise ValueError(f"td: batch x bptt is {segment[0]} x {segment[1]}, expected {rows} rows as in logits_list")
    if batch_size not in ((rows,), segment, segment[:1]):
        expected = f"{list(segment)}, {[segment[0]]} or {[rows]}"
        raise ValueError(f"td: got batch size {list(batch_size)}, expected {expected}")
    return segment


def rows_of_call(td: TensorDictBase, action: Tensor, rows: int) -> Sequence[int]:
    """The layout of the rows in a training call without fields: (B, T) or (B * T,)."""
    if td.batch_dims == 2:
        return td.batch_size
    return action.shape[:2] if action.dim() == 3 or (action.dim() == 2 and action.numel() == rows) else (rows,)


def flat_mask(td: TensorDictBase, logits: Tensor, leading: Sequence[int]) -> Tensor | None:
    """The action mask as bool [rows, A]; None if `td` has none.

    Args:
        td: holds `action_mask`, bool [rows, A] or [*leading, A].
        logits: logits [rows, A].
        leading: the rows in the call's layout, such as (B, T).

    Raises:
        ValueError: wrong dtype or shape.
    """
    mask = td.get("action_mask", None)
    if mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == logits.shape):
        return mask
    shape = (*leading, logits.shape[1])
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
        shapes = " or ".join(str(list(each)) for each in dict.fromkeys((shape, tuple(logits.shape))))
        raise ValueError(f"action_mask: got {describe(mask)}, expected bool values of shape {shapes} as logits_list")
    return mask.reshape(logits.shape)


def as_segments(td: TensorDictBase, segment: tuple[int, int]) -> TensorDictBase:
    """A shallow copy of `td` with batch size [B, T]; entries with one row per segment are expanded over its steps."""
    if tuple(td.batch_size) == segment:
        return td.copy()
    B, TT = segment
    result = TensorDict({}, batch_size=segment, device=td.device)
    for key, entry in td.items():
        if isinstance(entry, TensorDictBase) and not is_non_tensor(entry):
            entry = as_segments(entry, segment)
        elif not isinstance(entry, NonTensorData) and tuple(entry.shape[:2]) != segment:
            entry = entry.unsqueeze(1).expand(B, TT, *entry.shape[1:])
        result.set(key, entry)
    return result


def experience_spec(
    like: Tensor, state_shape: Sequence[int], obs_shape: Sequence[int] | None, obs_dtype: Any
) -> TensorDict:
    """Zeros for the entries of one step that training reads, on the device of `like`; states have its dtype."""
    spec = TensorDict({}, batch_size=[])
    if obs_shape is not None:
        spec["env_obs"] = torch.from_numpy(np.zeros(tuple(obs_shape), obs_dtype or np.uint8)).to(like.device)
    for key in ("dones", "truncateds"):
        spec[key] = torch.zeros((), dtype=torch.bool, device=like.device)
    for key in ("lstm_h", "lstm_c"):
        spec[key] = like.new_zeros(state_shape)
    return spec
