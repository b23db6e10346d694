"""Rollout memory: the LSTM state of each environment between steps.

`KeyedMemory` keeps a state for each environment id. `AllocatedMemory` keeps one state for `num_envs` environments in
tensors that are updated in place, so that a captured CUDA graph sees the changes. Both have the same methods:

    locate(env_id, rows)        where the state of a step's rows is; an error if it cannot be
    locate_each(ids, rows)      the same for rows that each have an id, in any order
    read(where, rows)           the state (h, c), each [layers, rows, hidden]; None if there is none
    lends(h, c)                 whether this state is the memory itself, which is updated in place
    write(where, h, c, dtype)   store the state
    replace(h, c, like)         store copies of whole memories with the device and dtype of `like`
    copy(), fit(like)           copies of (h, c), and a change of device and dtype
    clear(), forget(env_id)     forget all environments, or one; an unknown id is ignored
"""

import io
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metta_fastagent.runtime.checks import describe, is_whole
from metta_fastagent.runtime.dispatch import Operator

States = dict[int, Tensor]


class DeviceRows(NamedTuple):
    """Rows whose numbers are on the device."""

    index: Tensor  # int64 [rows], always within the memory
    valid: Tensor  # bool []; False if an id was out of range and the rows were clamped


class KeyedMemory:
    """A state per environment id, with as many rows as its steps; states are replaced, not changed in place."""

    num_envs: int | None = None

    def __init__(self, h: States | None = None, c: States | None = None) -> None:
        self.h: States = {} if h is None else h
        self.c: States = {} if c is None else c

    def locate(self, env_id: Any, rows: int) -> Any:
        return _whole_number(env_id)

    def locate_each(self, ids: Any, rows: int) -> tuple[int, ...]:
        """Reads the ids: a host sync on CUDA."""
        return _read_ids(_checked_ids(ids, rows))

    def read(self, where: Any, rows: int) -> tuple[Tensor, Tensor] | None:
        if isinstance(where, tuple):
            parts = [self.read(key, 1) for key in where]
            known = next((part for part in parts if part is not None), None)
            if known is None:
                return None
            zeros = torch.zeros_like(known[0]), torch.zeros_like(known[1])
            h, c = zip(*(zeros if part is None else part for part in parts), strict=True)
            return torch.cat(h, dim=1), torch.cat(c, dim=1)
        if where not in self.h or where not in self.c:
            return None
        h, c = self.h[where], self.c[where]
        if h.shape[1] != rows:
            raise ValueError(
                f"td: {rows} rows for environment id {where}, expected {h.shape[1]}, the rows in its memory; "
                "reset_env_memory() or reset_memory() forgets them"
            )
        return h, c

    def lends(self, h: Tensor, c: Tensor) -> bool:
        return False

    def write(self, where: Any, h: Tensor, c: Tensor, dtype: torch.dtype) -> None:
        # Keeps the state itself, detached: a caller may have kept the previous one.
        h, c = _kept(h, dtype), _kept(c, dtype)
        if isinstance(where, tuple):
            self.h.update(zip(where, h.split(1, dim=1), strict=True))
            self.c.update(zip(where, c.split(1, dim=1), strict=True))
        else:
            self.h[where], self.c[where] = h, c

    def replace(self, h: States, c: States, like: Tensor) -> None:
        self.h, self.c = ({key: _owned(state.to(like.device, like.dtype)) for key, state in m.items()} for m in (h, c))

    def clear(self) -> None:
        self.h.clear()
        self.c.clear()

    def forget(self, env_id: Any) -> None:
        key: Any = env_id.item() if isinstance(env_id, Tensor) else env_id
        self.h.pop(key, None)
        self.c.pop(key, None)

    def copy(self) -> tuple[States, States]:
        h, c = ({key: _owned(state) for key, state in memory.items()} for memory in (self.h, self.c))
        return h, c

    def fit(self, like: Tensor) -> None:
        for memory in (self.h, self.c):
            for key, state in memory.items():
                if state.device != like.device or state.dtype != like.dtype:
                    memory[key] = _moved(state, like)

    def __getstate__(self) -> dict[str, Any]:
        # By value, because torch's multiprocessing shares tensors that it pickles, and each worker needs its own
        # memory.
        return {**self.__dict__, "h": _as_bytes(self.h), "c": _as_bytes(self.c)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.h, self.c = _from_bytes(state["h"]), _from_bytes(state["c"])


class AllocatedMemory(KeyedMemory):
    """The state of `num_envs` environments under the single id 0, updated in place.

    The number of the first row locates the rows. A plain int is known to the host, and its rows are a narrow view. A
    tensor on the memory's device is never read back: rows are gathered and scattered by index, a captured graph uses
    its value at each replay, and rows out of range change nothing.
    """

    num_envs: int

    def __init__(self, num_envs: int, zeros: Tensor) -> None:
        """`zeros`: a state [layers, num_envs, hidden] of zeros."""
        super().__init__({0: zeros}, {0: zeros.clone()})
        self.num_envs = num_envs

    def locate(self, env_id: Any, rows: int) -> Any:
        return memory_rows(env_id, rows, self.num_envs, self.h[0].device)

    def locate_each(self, ids: Any, rows: int) -> DeviceRows:
        """Ids on a CUDA device are not read, so duplicates go unnoticed there."""
        ids, device = _checked_ids(ids, rows), self.h[0].device
        if ids.device == device:
            return DeviceRows(*_each_environment_row(ids, self.num_envs))
        if ids.device.type != "cpu":
            expected = f"integers on {device} or the CPU"
            raise ValueError(f"td['training_env_ids']: got {describe(ids)}, expected {expected}")
        return DeviceRows(*(part.to(device) for part in _each_environment_row(ids, self.num_envs)))

    def read(self, where: Any, rows: int) -> tuple[Tensor, Tensor]:
        return _read_rows(self.h[0], where, rows), _read_rows(self.c[0], where, rows)

    def lends(self, h: Tensor, c: Tensor) -> bool:
        return h._base is self.h[0] and c._base is self.c[0]

    def write(self, where: Any, h: Tensor, c: Tensor, dtype: torch.dtype) -> None:
        memories, states = [self.h[0], self.c[0]], [h.detach(), c.detach()]
        if not isinstance(where, DeviceRows):
            rows = [memory.narrow(1, where, states[0].shape[1]) for memory in memories]
            torch._foreach_copy_(rows, states)  # pyright: ignore[reportPrivateImportUsage]
            return
        for memory, state in zip(memories, states, strict=True):
            kept = torch.where(where.valid, state.to(memory.dtype), memory.index_select(1, where.index))
            memory.index_copy_(1, where.index, kept)

    def replace(self, h: States, c: States, like: Tensor) -> None:
        if not h:
            self.clear()
            return
        self.h[0].copy_(h[0].detach())
        self.c[0].copy_(c[0].detach())

    def clear(self) -> None:
        self.h[0].zero_()
        self.c[0].zero_()

    def forget(self, env_id: Any) -> None:
        if isinstance(env_id, Tensor) and env_id.device.type != "cpu":
            rows = torch.arange(self.num_envs, device=self.h[0].device)
            chosen = (rows == env_id.view(())).view(1, -1, 1)
            self.h[0].masked_fill_(chosen, 0)
            self.c[0].masked_fill_(chosen, 0)
            return
        key = env_id.item() if isinstance(env_id, Tensor) else env_id
        if key in range(self.num_envs):
            self.h[0][:, int(key)].zero_()
            self.c[0][:, int(key)].zero_()


def nan_if_out_of_range(state: Tensor, where: Any) -> Tensor:
    """`state`; all NaN if the id, which only the device knows, is out of range."""
    return torch.where(where.valid, state, torch.nan) if isinstance(where, DeviceRows) else state


def memory_rows(env_id: Any, rows: int, num_envs: int, device: torch.device) -> int | DeviceRows:
    """The rows from `env_id` on, which is an integer or a tensor whose first element is one; see `AllocatedMemory`.

    Raises:
        ValueError: not an integer, more rows than the memory has, another device, or rows out of range.
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


def _whole_number(env_id: Any) -> int:
    """`env_id` as an int; a ValueError if it is not a whole number."""
    number = env_id.item() if isinstance(env_id, Tensor) and env_id.numel() == 1 else env_id
    # Not via float, which rounds large integers.
    if isinstance(number, Integral):
        return int(number)
    if not isinstance(number, Real) or not float(number).is_integer():
        raise ValueError(f"td['training_env_id_start']: got {describe(env_id)}, expected an integer")
    return int(float(number))


def _checked_start(env_id: Any, rows: int, num_envs: int) -> int:
    start = _whole_number(env_id)
    if not 0 <= start <= num_envs - rows:
        raise ValueError(
            f"td['training_env_id_start']: got {start} for {rows} rows, expected 0 to {num_envs - rows}, "
            f"as the memory has num_envs={num_envs} rows"
        )
    return start


def _environment_rows_eager(env_id: Tensor, rows: int, num_envs: int) -> tuple[Tensor, Tensor]:
    """(index, valid) of `DeviceRows`, for the first element of `env_id`; on the CPU its value is checked."""
    start = env_id[(0,) * env_id.dim()]
    if start.device.type == "cpu":
        _checked_start(start, rows, num_envs)
    return clamped_rows(start, rows, num_envs)


def clamped_rows(start: Tensor, rows: int, num_envs: int) -> tuple[Tensor, Tensor]:
    """Row numbers from `start` (0-dim) on, clamped to the memory, and whether they were in range."""
    whole = start.long()
    first = whole.clamp(0, num_envs - rows)
    # Fractions are out of range too. Unsigned integers cannot be compared with int64.
    valid = first == (start if start.is_floating_point() else whole)
    return first + torch.arange(rows, device=start.device), valid


_environment_rows = Operator(
    "environment_rows(Tensor env_id, SymInt rows, SymInt num_envs) -> (Tensor, Tensor)",
    _environment_rows_eager,
    lambda env_id, rows, num_envs: (
        env_id.new_empty((rows,), dtype=torch.int64),
        env_id.new_empty((), dtype=torch.bool),
    ),
)


def _checked_ids(ids: Any, rows: int) -> Tensor:
    """The ids as a tensor [rows], after checking that there is one integer per row."""
    tensor: Any = torch.as_tensor(ids) if isinstance(ids, (list, tuple)) and all(map(is_whole, ids)) else ids
    whole = isinstance(tensor, Tensor) and not (tensor.is_floating_point() or tensor.is_complex())
    if not whole or tensor.dtype == torch.bool or tensor.numel() != rows:
        raise ValueError(f"td['training_env_ids']: got {describe(ids)}, expected {rows} integers, one for each row")
    return tensor.reshape(rows)


def _read_ids(ids: Tensor) -> tuple[int, ...]:
    """The ids as ints, after checking that they differ."""
    numbers = tuple(ids.tolist())
    if len(set(numbers)) != len(numbers):
        twice = next(number for number in numbers if numbers.count(number) > 1)
        raise ValueError(f"td['training_env_ids']: got {twice} more than once, expected each environment once")
    return numbers


def _each_environment_row_eager(ids: Tensor, num_envs: int) -> tuple[Tensor, Tensor]:
    """(index, valid) of `DeviceRows`, for rows with these ids; on the CPU the ids are checked."""
    if ids.device.type == "cpu":
        outside = [number for number in _read_ids(ids) if not 0 <= number < num_envs]
        if outside:
            expected = f"0 to {num_envs - 1}, as the memory has num_envs={num_envs} rows"
            raise ValueError(f"td['training_env_ids']: got {outside[0]}, expected {expected}")
    whole = ids.long()
    index = whole.clamp(0, num_envs - 1)
    return index, (index == whole).all()


_each_environment_row = Operator(
    "each_environment_row(Tensor ids, SymInt num_envs) -> (Tensor, Tensor)",
    _each_environment_row_eager,
    lambda ids, num_envs: (ids.new_empty(ids.shape, dtype=torch.int64), ids.new_empty((), dtype=torch.bool)),
)


def _read_rows(memory: Tensor, where: int | DeviceRows, rows: int) -> Tensor:
    if isinstance(where, DeviceRows):
        return memory.index_select(1, where.index)
    part = memory.narrow(1, where, rows)
    # The memory may change in place before the backward pass.
    return part.clone(memory_format=torch.contiguous_format) if torch.is_grad_enabled() else part.contiguous()


def state_dict_entries(memory: tuple[States, States], prefix: str) -> dict[str, Tensor]:
    """A memory's entries in a state dict: `rollout_memory.h.3` is h of environment 3."""
    return {
        f"{prefix}rollout_memory.{name}.{env_id}": state
        for name, states in zip("hc", memory, strict=True)
        for env_id, state in states.items()
    }


def taken_from_state_dict(state_dict: dict[str, Any], prefix: str) -> tuple[States, States] | None:
    """Remove the memory from a state dict and return it; None if there is none."""
    start, memory = f"{prefix}rollout_memory.", {"h": {}, "c": {}}
    found = [key for key in state_dict if key.startswith(start)]
    for key in found:
        name, env_id = key.removeprefix(start).split(".")
        memory[name][int(env_id)] = state_dict.pop(key)
    return (memory["h"], memory["c"]) if found else None


def _owned(state: Tensor) -> Tensor:
    """A detached copy, made outside inference mode so that it can be updated outside it."""
    with torch.inference_mode(False):
        return state.detach().clone()


def _kept(state: Tensor, dtype: torch.dtype) -> Tensor:
    """A state to keep: detached, in the weights' dtype, and usable outside inference mode."""
    state = state.detach()
    return _owned(state).to(dtype) if state.is_inference() else state.to(dtype)


def _moved(state: Tensor, like: Tensor) -> Tensor:
    """`state` with the device and dtype of `like`; zeros if it is on the meta device, which holds no values."""
    with torch.inference_mode(False):
        if state.is_meta and not like.is_meta:
            return torch.zeros_like(state, device=like.device, dtype=like.dtype)
        return state.to(like.device, like.dtype)


def _as_bytes(memory: States) -> bytes:
    buffer = io.BytesIO()
    torch.save({key: state if state.is_meta else state.cpu() for key, state in memory.items()}, buffer)
    return buffer.getvalue()


def _from_bytes(memory: bytes) -> States:
    with torch.inference_mode(False):
        return torch.load(io.BytesIO(memory), weights_only=True)
