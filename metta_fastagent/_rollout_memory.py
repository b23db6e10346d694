"""Rows of a preallocated rollout memory [layers, environments, hidden]: find, read and write those of one step.

A plain int is the first row, and the rows are a narrow view. A tensor on the memory's device is never read back, so a
captured graph sees its value at each replay: rows are gathered and scattered by index.
"""

from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metta_fastagent._dispatch import register
from metta_fastagent.ops._checks import describe


class DeviceRows(NamedTuple):
    """Rows whose numbers are on the device."""

    index: Tensor  # int64 [rows], always within the memory
    valid: Tensor  # bool []: False if the id was out of range and the rows were clamped


MemoryRows = int | DeviceRows


def whole_number(env_id: Any) -> int:
    """`env_id` as an int; a ValueError if it is not a whole number."""
    number = env_id.item() if isinstance(env_id, Tensor) and env_id.numel() == 1 else env_id
    # Not through float, which rounds large integers.
    if isinstance(number, Integral):
        return int(number)
    if not isinstance(number, Real) or not float(number).is_integer():
        raise ValueError(f"td['training_env_id_start']: got {describe(env_id)}, expected an integer")
    return int(float(number))


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
    """Row numbers from `start` (0-dim) on, clamped to the memory, and whether they were in range."""
    whole = start.long()
    first = whole.clamp(0, num_envs - rows)
    # Fractions are out of range too. Unsigned integers do not compare with int64.
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
        env_id: an integer, or a tensor of any shape on `device` or the CPU; its first element is the id.

    Returns:
        int if the host knows the number, else `DeviceRows`.

    Raises:
        ValueError: not an integer, more rows than the memory has, another device, or rows out of range. The value of a
            tensor on a device other than the CPU is not checked.
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
    """State [layers, rows, hidden], contiguous; a view of the memory if a copy is not needed."""
    if isinstance(where, DeviceRows):
        return memory.index_select(1, where.index)
    part = memory.narrow(1, where, rows)
    # The memory may change in place before the backward.
    return part.clone(memory_format=torch.contiguous_format) if torch.is_grad_enabled() else part.contiguous()


def write_rows(memories: list[Tensor], where: MemoryRows, states: list[Tensor]) -> None:
    """Copy each state into its memory in place; rows out of range change nothing."""
    states = [state.detach() for state in states]
    if not isinstance(where, DeviceRows):
        rows = [memory.narrow(1, where, states[0].shape[1]) for memory in memories]
        torch._foreach_copy_(rows, states)  # pyright: ignore[reportPrivateImportUsage]
        return
    for memory, state in zip(memories, states, strict=True):
        kept = torch.where(where.valid, state.to(memory.dtype), memory.index_select(1, where.index))
        memory.index_copy_(1, where.index, kept)


def nan_if_out_of_range(state: Tensor, where: MemoryRows | None) -> Tensor:
    """`state`; NaN throughout if the id, known to the device only, is out of range."""
    return torch.where(where.valid, state, torch.nan) if isinstance(where, DeviceRows) else state
