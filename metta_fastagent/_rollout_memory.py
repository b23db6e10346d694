"""Rows of a preallocated rollout memory [layers, environments, hidden]: which ones a step means, read and written.

A plain int names the first row, and rows are narrow views. A tensor on the memory's device is never read back, so that
a captured graph follows it: rows are gathered and scattered by index.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metta_fastagent._dispatch import register
from metta_fastagent.ops._checks import describe


class DeviceRows(NamedTuple):
    """Rows that only the device knows."""

    index: Tensor  # int64 [rows], always within the memory
    valid: Tensor  # bool []: whether they are the rows that were asked for


MemoryRows = int | DeviceRows


def whole_number(env_id: Any) -> int:
    """`env_id` as an int; a ValueError where it is no number without a fraction."""
    if isinstance(env_id, Tensor) and env_id.numel() == 1:
        env_id = env_id.item()
    fraction = isinstance(env_id, float) and not env_id.is_integer()
    if not isinstance(env_id, (int, float)) or fraction:
        raise ValueError(f"td['training_env_id_start']: got {describe(env_id)}, expected an integer")
    return int(env_id)


def _checked_start(env_id: Any, rows: int, num_envs: int) -> int:
    start = whole_number(env_id)
    if not 0 <= start <= num_envs - rows:
        raise ValueError(
            f"td['training_env_id_start']: got {start} for {rows} rows, expected 0 to {num_envs - rows}, "
            f"as the memory has num_envs={num_envs} rows"
        )
    return start


def environment_rows_eager(env_id: Tensor, rows: int, num_envs: int) -> tuple[Tensor, Tensor]:
    """(index, valid) of `DeviceRows` for the first element of `env_id`; on the CPU its value is checked."""
    start = env_id[(0,) * env_id.dim()]
    if start.device.type == "cpu":
        _checked_start(start, rows, num_envs)
    return clamped_rows(start, rows, num_envs)


def clamped_rows(start: Tensor, rows: int, num_envs: int) -> tuple[Tensor, Tensor]:
    """`rows` row numbers from `start` (0-dim) on, moved into the memory, and whether they had not to be."""
    whole = start.long()
    first = whole.clamp(0, num_envs - rows)
    # a fraction is as wrong as a number out of range; unsigned integers do not compare with int64
    valid = first == (start if start.is_floating_point() else whole)
    return first + torch.arange(rows, device=start.device), valid


_environment_rows = register(
    "environment_rows(Tensor env_id, SymInt rows, SymInt num_envs) -> (Tensor, Tensor)",
    environment_rows_eager,
    lambda env_id, rows, num_envs: (
        env_id.new_empty((rows,), dtype=torch.int64),
        env_id.new_empty((), dtype=torch.bool),
    ),
)


def memory_rows(env_id: Any, rows: int, num_envs: int, device: torch.device) -> MemoryRows:
    """The rows `env_id` .. `env_id` + `rows` - 1 of a memory of `num_envs` rows on `device`.

    Args:
        env_id: an integer, or a tensor of any shape whose first element counts, on `device` or on the CPU.

    Returns:
        int where the number is known here, else `DeviceRows`.

    Raises:
        ValueError: no integer, more rows than the memory has, another device, or rows out of range; of a tensor on a
            device other than the CPU the value is not looked at.
    """
    if rows > num_envs:
        raise ValueError(
            f"td['training_env_id_start']: names the first of {rows} rows, expected at most num_envs={num_envs} rows"
        )
    if not isinstance(env_id, Tensor) or env_id.numel() == 0 or env_id.is_complex():
        return _checked_start(env_id, rows, num_envs)
    if env_id.device == device:
        return DeviceRows(*_environment_rows(env_id, rows, num_envs))
    if env_id.device.type != "cpu":
        expected = f"an integer, or a tensor on {device} or the CPU"
        raise ValueError(f"td['training_env_id_start']: got {describe(env_id)}, expected {expected}")
    return _checked_start(env_id[(0,) * env_id.dim()], rows, num_envs)


def read_rows(memory: Tensor, where: MemoryRows, rows: int) -> Tensor:
    """State [layers, rows, hidden], contiguous; the memory itself where that is safe and saves a copy."""
    if isinstance(where, DeviceRows):
        return memory.index_select(1, where.index)
    part = memory.narrow(1, where, rows)
    # A backward may come after the memory has changed in place.
    return part.clone(memory_format=torch.contiguous_format) if torch.is_grad_enabled() else part.contiguous()


def write_rows(memory: Tensor, where: MemoryRows, state: Tensor) -> None:
    """Copy `state` into the memory in place; nothing changes where `where` was out of range."""
    state = state.detach()
    if not isinstance(where, DeviceRows):
        memory.narrow(1, where, state.shape[1]).copy_(state)
        return
    kept = torch.where(where.valid, state.to(memory.dtype), memory.index_select(1, where.index))
    memory.index_copy_(1, where.index, kept)


def spoiled(state: Tensor, where: MemoryRows | None) -> Tensor:
    """`state`, or NaN where `where` turns out to be out of range on the device."""
    return torch.where(where.valid, state, torch.nan) if isinstance(where, DeviceRows) else state
