"""LSTMWrapper: the LSTM base class of agents, its rollout memory and its training-time state.

In rollout (3-d observations) the state lives in a memory, under the id in `training_env_id_start`. A row whose `dones`
or `truncateds` is set starts from zeros, because that observation is the first of an episode. In training (4-d
observations) the rollout memory is neither read nor changed: a segment starts from the state stored with it (`lstm_h`,
`lstm_c`; zeros if absent), and rows are reset inside the segment wherever `dones` or `truncateds` is set. A segment
without these flags is one call of nn.LSTM; one with them runs layer by layer through `ops.lstm_layer`.
"""

import io
import logging
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from metta_fastagent import ops
from metta_fastagent._diagnostics import profiled
from metta_fastagent._dispatch import uses_triton
from metta_fastagent._mode import is_training
from metta_fastagent._rollout_memory import (
    DeviceRows,
    memory_rows,
    nan_if_out_of_range,
    read_rows,
    whole_number,
    write_rows,
)
from metta_fastagent.ops._autograd import in_plain_pytorch
from metta_fastagent.ops._checks import describe, is_whole, under_autocast
from metta_fastagent.ops._lstm_layer import lstm_step_into

logger = logging.getLogger(__name__)

Memory = tuple[dict[int, Tensor], dict[int, Tensor]]
# Passed from `_manage_lstm_state` to `_store_lstm_state`: a key or a first row, rows on the device, or None.
MemoryId = int | DeviceRows | None
# Reasons of `own_computation` that have been logged.
_reported_reasons: set[str] = set()


class LSTMWrapper(nn.Module):
    """Base class of LSTM agents: owns `policy`, the LSTM and the memory of each environment.

    Args:
        env: the environment; only `single_observation_space.shape` is read, if present.
        policy: module with the agent's encoder and heads.
        input_size: features of the LSTM's input.
        hidden_size: features of the LSTM's state.
        num_layers: layers of the LSTM.
        num_envs: rows of a preallocated rollout memory on the device of the LSTM's weights, updated in place; None
            keeps one memory for each environment id instead.

    Without `num_envs`, `training_env_id_start` is a key: each id has a memory with as many rows as its steps.
    With it, `training_env_id_start` s in a step of B rows (0 if absent) means rows s .. s + B - 1 of the one memory.
    A number out of range is a ValueError, raised before anything is changed. A tensor on the device (any shape, its
    first element is the id) is not read back, so a captured CUDA graph uses the id and the memory of each replay; if it
    is out of range, that call returns NaN and no environment's memory changes.

    Attributes:
        lstm: `nn.LSTM(input_size, hidden_size, num_layers)`, weights orthogonal, biases 1.
        num_envs: rows of the memory, or None.
        lstm_h, lstm_c: the memory, dicts from environment id to a tensor [num_layers, rows, hidden_size]; with
            `num_envs` they have the one entry 0 of `num_envs` rows, which stays the same tensor until the agent is
            moved or cast.
        action_index_tensor, cum_action_max_params: tables that the host sets; None until then.

    Raises:
        TypeError, ValueError: `policy` is not a module, or a size is not a positive integer.
    """

    def __init__(
        self,
        env: Any,
        policy: nn.Module,
        input_size: int = 128,
        hidden_size: int = 128,
        num_layers: int = 2,
        *,
        num_envs: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(policy, nn.Module):
            raise TypeError(f"policy: got {policy!r}, expected the nn.Module that holds the agent's encoder and heads")
        input_size, hidden_size, num_layers = checked_sizes(
            input_size=input_size, hidden_size=hidden_size, num_layers=num_layers
        )
        if num_envs is not None:
            checked_sizes(num_envs=num_envs)
        self.obs_shape = getattr(getattr(env, "single_observation_space", None), "shape", None)
        self.policy = policy
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.is_continuous = getattr(policy, "is_continuous", False)
        self.lstm = nn.LSTM(input_size, hidden_size, num_layers=num_layers)
        for name, param in self.lstm.named_parameters():
            if "bias" in name:
                nn.init.constant_(param, 1)
            else:
                nn.init.orthogonal_(param, 1)
        self.action_index_tensor: Tensor | None = None
        self.cum_action_max_params: Tensor | None = None
        self.num_envs: int | None = None
        self.lstm_h: dict[int, Tensor] = {}
        self.lstm_c: dict[int, Tensor] = {}
        if num_envs is not None:
            self.allocate_memory(num_envs)

    def has_memory(self) -> bool:
        """True: the agent carries state from step to step."""
        return True

    def allocate_memory(self, num_envs: int) -> None:
        """Replace the memory by zeros for `num_envs` environments, in tensors that are updated in place from then on.

        A graph captured earlier keeps using the previous tensors.

        Raises:
            ValueError: `num_envs` is not a positive integer.
        """
        (self.num_envs,) = checked_sizes(num_envs=num_envs)
        # Tensors made in inference mode could not be updated outside of it.
        with torch.inference_mode(False):
            self.lstm_h, self.lstm_c = ({0: self._zero_state(self.num_envs)} for _ in range(2))

    def get_memory(self) -> Memory:
        """A copy of the memory: (h, c), each a dict from environment id to a tensor [num_layers, rows, hidden_size].

        With `num_envs` there is one id, 0, whose rows are the environments.
        """
        return _cloned(self.lstm_h), _cloned(self.lstm_c)

    def set_memory(self, memory: Memory) -> None:
        """Replace the memory by a copy of `memory`, a pair as `get_memory` returns it.

        With `num_envs` the values are copied into the existing tensors; an empty pair means zeros.

        Raises:
            TypeError, ValueError: not a pair of dicts with the same ids and tensors [num_layers, rows, hidden_size];
                with `num_envs`, another id than 0 or another number of rows. The memory is unchanged then.
        """
        h, c = self._checked_memory(memory)
        if self.num_envs is None:
            self.lstm_h, self.lstm_c = _cloned(h, self._weight()), _cloned(c, self._weight())
            return
        if not h:
            self.reset_memory()
            return
        for kept, given in ((self.lstm_h, h), (self.lstm_c, c)):
            kept[0].copy_(given[0].detach())

    def _checked_memory(self, memory: Any) -> Memory:
        expected = "a pair of dicts from environment id to a tensor [num_layers, rows, hidden_size]"
        if not isinstance(memory, (tuple, list)) or len(memory) != 2 or not all(isinstance(m, dict) for m in memory):
            raise TypeError(f"memory: got {type(memory).__name__}, expected {expected}")
        h, c = memory
        if h.keys() != c.keys():
            raise ValueError(f"memory: got ids {sorted(h)} for h and {sorted(c)} for c, expected the same ids")
        if self.num_envs is not None and not h.keys() <= {0}:
            raise ValueError(f"memory: got ids {sorted(h)}, expected id 0 alone, with num_envs={self.num_envs} rows")
        for name, states in (("h", h), ("c", c)):
            for env_id, state in states.items():
                rows = h[env_id].shape[1] if isinstance(h[env_id], Tensor) and h[env_id].dim() == 3 else "rows"
                layout = [self.num_layers, rows if self.num_envs is None else self.num_envs, self.hidden_size]
                got = list(state.shape) if isinstance(state, Tensor) else type(state).__name__
                if got != layout:
                    raise ValueError(f"memory: {name} of environment {env_id} is {got}, expected a tensor {layout}")
        return h, c

    def reset_memory(self) -> None:
        """Forget the state of every environment; with `num_envs`, zero it in place."""
        for memory in (self.lstm_h, self.lstm_c):
            if self.num_envs is None:
                memory.clear()
            else:
                memory[0].zero_()

    def reset_env_memory(self, env_id: int | Tensor) -> None:
        """Forget the state of one environment id; with `num_envs`, zero its row in place. An unknown id is ignored.

        Args:
            env_id: an integer, or a tensor of one element; with `num_envs`, one on a device is not read back.

        Raises:
            ValueError: a tensor of several elements.
        """
        key: Any = env_id
        if isinstance(env_id, Tensor):
            if env_id.numel() != 1:
                raise ValueError(f"env_id: got {describe(env_id)}, expected an integer or a tensor of one element")
            if self.num_envs is not None and env_id.device.type != "cpu":
                for memory in (self.lstm_h, self.lstm_c):
                    rows = torch.arange(self.num_envs, device=memory[0].device)
                    memory[0].masked_fill_((rows == env_id.view(())).view(1, -1, 1), 0)
                return
            key = env_id.item()
        for memory in (self.lstm_h, self.lstm_c):
            if self.num_envs is None:
                memory.pop(key, None)
            elif key in range(self.num_envs):
                memory[0][:, int(key)].zero_()

    def on_new_training_run(self) -> None:
        """Hook of Metta's trainer: forget the state of every environment."""
        self.reset_memory()

    def on_rollout_start(self) -> None:
        """Hook of Metta's trainer: forget the state of every environment."""
        self.reset_memory()

    def on_train_mb_start(self) -> None:
        """Hook of Metta's trainer: forget the state of every environment."""
        self.reset_memory()

    def on_eval_start(self) -> None:
        """Hook of Metta's trainer: forget the state of every environment."""
        self.reset_memory()

    @profiled
    def run_lstm(self, td: TensorDictBase, hidden: Tensor, B: int, TT: int, training: bool | None = None) -> Tensor:
        """Run the LSTM over encoded observations, with the state and the resets given in `td`.

        Args:
            td: holds `training_env_id_start`, `dones`, `truncateds`, `lstm_h`, `lstm_c`, all optional.
            hidden: encoded observations, B * TT rows of input_size features, time varying fastest.
            B: rows of the batch (environments or segments).
            TT: time steps; 1 in rollout.
            training: True for segments, False for a rollout step; None decides as `set_tensordict_fields` did for `td`,
                else by the rank of `td["env_obs"]`.

        Returns:
            Tensor [B * TT, hidden_size].
        """
        output, h, c, env_id = self._advance_lstm(td, hidden, B, TT, training)
        self._store_lstm_state(h, c, env_id)
        return output

    def _advance_lstm(
        self, td: TensorDictBase, hidden: Tensor, B: int, TT: int, training: bool | None = None
    ) -> tuple[Tensor, Tensor, Tensor, MemoryId]:
        """(output [B * TT, hidden_size], h, c, env_id): `run_lstm` before it stores the state."""
        if B * TT == 0:
            # nn.LSTM refuses an empty sequence; the memory stays as it is.
            state = self._zero_state(B, hidden.device)
            return hidden.new_zeros(0, self.hidden_size), state, state, None
        sequence = hidden.view(B, TT, hidden.shape[-1]).transpose(0, 1)
        if type(self)._manage_lstm_state is LSTMWrapper._manage_lstm_state:
            h, c, env_id = self._stored_state(td, B, TT, hidden.device, training)
            sequence = nan_if_out_of_range(sequence, env_id)
        else:
            h, c, env_id = self._manage_lstm_state(td, B, TT, hidden.device, training)
        _require_sequence_first(self.lstm)
        resets = _resets(td, B, TT, hidden.device)
        # A step on CUDA takes the segments' path: cuDNN rounds nn.LSTM's products to TF32 by default, and a segment has
        # to reproduce its rollout.
        as_segment = TT > 1 or sequence.is_cuda or uses_triton(sequence.device)
        if resets is None:
            output, (h, c) = self.lstm(sequence, (h, c))
        elif as_segment and self._is_plain_lstm(warn=TT > 1):
            # The memory of `num_envs` is a copy; any other one keeps the state itself, which the output must not share.
            output, (h, c) = _lstm_with_resets(self.lstm, sequence, h, c, resets, self.num_envs is not None)
        else:
            output, (h, c) = _step_by_step(self.lstm, sequence, h, c, resets)
        return output.transpose(0, 1).reshape(B * TT, -1), h, c, env_id

    def _is_plain_lstm(self, warn: bool) -> bool:
        """Whether `lstm` computes what nn.LSTM does with its parameters; if not, one message says why."""
        reason = own_computation(self.lstm, nn.LSTM)
        if reason and warn and reason not in _reported_reasons:
            _reported_reasons.add(reason)
            logger.warning("%s: segments with resets call the LSTM step by step, as %s", type(self).__name__, reason)
        return not reason

    def _manage_lstm_state(
        self, td: TensorDictBase, B: int, TT: int, device: torch.device, training: bool | None = None
    ) -> tuple[Tensor, Tensor, MemoryId]:
        """State before the first of TT steps, rows that start an episode there zeroed.

        Returns:
            (h, c, env_id): tensors [num_layers, B, hidden_size], and the id for `_store_lstm_state`: None in training,
            which leaves the rollout memory as it is.
        """
        h, c, env_id = self._stored_state(td, B, TT, device, training)
        resets = _resets(td, B, TT, device)
        if resets is not None:
            first = resets[0].view(1, B, 1)
            h, c = h.masked_fill(first, 0), c.masked_fill(first, 0)
        return nan_if_out_of_range(h, env_id), nan_if_out_of_range(c, env_id), env_id

    def _stored_state(
        self, td: TensorDictBase, B: int, TT: int, device: torch.device, training: bool | None = None
    ) -> tuple[Tensor, Tensor, MemoryId]:
        """`_manage_lstm_state` before resets."""
        self._fit_memory()
        env_id = None if self._is_segment(td, TT, training) else self._memory_id(td, B)
        if env_id is None:
            h, c = self._segment_start(td, "lstm_h", B, TT, device), self._segment_start(td, "lstm_c", B, TT, device)
        elif isinstance(env_id, DeviceRows) or self.num_envs is not None:
            h, c = read_rows(self.lstm_h[0], env_id, B), read_rows(self.lstm_c[0], env_id, B)
        elif env_id in self.lstm_h and env_id in self.lstm_c:
            h, c = self.lstm_h[env_id], self.lstm_c[env_id]
            if h.shape[1] != B:
                raise ValueError(
                    f"td: {B} rows for environment id {env_id}, expected {h.shape[1]}, the rows in its memory; "
                    "reset_env_memory() or reset_memory() forgets them"
                )
        else:
            h, c = self._zero_state(B, device), self._zero_state(B, device)
        return h, c, env_id

    def _memory_id(self, td: TensorDictBase, B: int) -> int | DeviceRows:
        env_id = _environment_id(td)
        if self.num_envs is None:
            return whole_number(env_id)
        return memory_rows(env_id, B, self.num_envs, self.lstm_h[0].device)

    def _store_lstm_state(self, lstm_h: Tensor, lstm_c: Tensor, env_id: MemoryId) -> None:
        """Store a detached copy of the state as the memory of `env_id`; None (training) stores nothing."""
        if env_id is None:
            return
        if isinstance(env_id, DeviceRows) or self.num_envs is not None:
            write_rows([self.lstm_h[0], self.lstm_c[0]], env_id, [lstm_h, lstm_c])
            return
        # New tensors: a caller may have kept the previous ones.
        dtype = self._weight().dtype
        self.lstm_h[env_id], self.lstm_c[env_id] = _kept(lstm_h, dtype), _kept(lstm_c, dtype)

    def _is_segment(self, td: TensorDictBase, TT: int, training: bool | None) -> bool:
        """Whether this is training, by `training`, else `set_tensordict_fields`, the rank of `env_obs` or TT."""
        if training is not None:
            return training
        known = self.__dict__.get("_fields")
        if known is not None and known.value is not None and td.get("bptt", None) is known.value.bptt:
            return known.value.training
        observations = td.get("env_obs", None)
        if TT == 1 and isinstance(observations, Tensor):
            return is_training(observations, self.obs_shape)
        return TT != 1

    def _weight(self) -> Tensor:
        """A floating-point weight of the LSTM, else of the agent: its device and dtype are those of the state."""
        # A module's own parameters first: the others need a walk.
        for params in (self.lstm._parameters.values(), self.lstm.parameters(), self.parameters()):
            for param in params:
                if param is not None and param.is_floating_point():
                    return param
        return torch.empty(0)

    def _zero_state(self, rows: int, device: torch.device | None = None) -> Tensor:
        like = self._weight()
        shape = (self.num_layers, rows, self.hidden_size)
        return torch.zeros(shape, device=like.device if device is None else device, dtype=like.dtype)

    def _fit_memory(self) -> None:
        """Bring the memory to the device and dtype of the weights, which `load_state_dict(assign=True)` may change."""
        like = self._weight()
        for memory in (self.lstm_h, self.lstm_c):
            for env_id, state in memory.items():
                if state.device != like.device or state.dtype != like.dtype:
                    memory[env_id] = _moved(state, like)

    def __getstate__(self) -> dict[str, Any]:
        # By value: torch's multiprocessing shares tensors that it pickles, and each worker needs a memory of its own.
        return {**self.__dict__, "lstm_h": _as_bytes(self.lstm_h), "lstm_c": _as_bytes(self.lstm_c)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lstm_h, self.lstm_c = _from_bytes(state["lstm_h"]), _from_bytes(state["lstm_c"])
        self._fit_memory()

    def _segment_start(self, td: TensorDictBase, key: str, B: int, TT: int, device: torch.device) -> Tensor:
        if key not in td.keys():
            other = "lstm_c" if key == "lstm_h" else "lstm_h"
            if other in td.keys():
                raise ValueError(f"td: holds {other} without {key}, expected both or neither")
            return self._zero_state(B, device)
        stored = _entry(td, key, device).detach()
        layout = (self.num_layers, self.hidden_size)
        if stored.shape == (B, *layout):
            start = stored
        elif stored.shape == (B, TT, *layout):
            start = stored[:, 0]
        elif stored.shape == (B * TT, *layout):
            start = stored[::TT]
        else:
            raise ValueError(
                f"td[{key!r}]: got shape {list(stored.shape)}, "
                f"expected {[B, *layout]} or {[B, TT, *layout]} (the state before each segment's first step)"
            )
        return start.transpose(0, 1).to(self._weight().dtype).contiguous()

    def _apply(self, fn: Callable, recurse: bool = True) -> "LSTMWrapper":
        super()._apply(fn, recurse)
        self._fit_memory()
        return self


def _cloned(memory: dict[int, Tensor], like: Tensor | None = None) -> dict[int, Tensor]:
    if like is None:
        return {env_id: _owned(state) for env_id, state in memory.items()}
    return {env_id: _owned(state.to(like.device, like.dtype)) for env_id, state in memory.items()}


def _as_bytes(memory: dict[int, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save({env_id: state if state.is_meta else state.cpu() for env_id, state in memory.items()}, buffer)
    return buffer.getvalue()


def _from_bytes(memory: bytes) -> dict[int, Tensor]:
    with torch.inference_mode(False):
        return torch.load(io.BytesIO(memory), weights_only=True)


def _owned(state: Tensor) -> Tensor:
    """A detached copy, made outside of inference mode so that it can be updated there."""
    with torch.inference_mode(False):
        return state.detach().clone()


def _moved(state: Tensor, like: Tensor) -> Tensor:
    """`state` with the device and dtype of `like`; zeros if it comes from the meta device, which holds no values."""
    with torch.inference_mode(False):
        if state.is_meta and not like.is_meta:
            return torch.zeros_like(state, device=like.device, dtype=like.dtype)
        return state.to(like.device, like.dtype)


def _kept(state: Tensor, dtype: torch.dtype) -> Tensor:
    """A state to keep: detached, of the weights' dtype, and usable outside of inference mode."""
    state = state.detach()
    return _owned(state).to(dtype) if state.is_inference() else state.to(dtype)


def checked_sizes(**sizes: Any) -> tuple[int, ...]:
    """The sizes as ints; a ValueError names the first one that is not a positive integer."""
    for name, size in sizes.items():
        if not is_whole(size) or int(size) < 1:
            raise ValueError(f"{name}: got {size!r}, expected a positive integer")
    return tuple(int(size) for size in sizes.values())


def _entry(td: TensorDictBase, key: str, device: torch.device) -> Tensor:
    entry = td.get(key)
    if not isinstance(entry, Tensor) or entry.device != device:
        raise ValueError(f"td[{key!r}]: got {describe(entry)}, expected a tensor on {device}")
    return entry


def _environment_id(td: TensorDictBase) -> Any:
    """The id in `training_env_id_start`: the first element of a tensor or list, 0 if absent or empty."""
    if "training_env_id_start" not in td.keys():
        return 0
    env_id = td["training_env_id_start"]
    if isinstance(env_id, Tensor) and env_id.numel() > 0:
        return env_id[(0,) * env_id.dim()]
    if isinstance(env_id, list) and env_id:
        env_id = env_id[0]
    return 0 if env_id is None else env_id


def _flag_keys(td: TensorDictBase) -> list[str]:
    """The entries of `td` that say where episodes start."""
    return [key for key in ("dones", "truncateds") if key in td.keys()]


def _resets(td: TensorDictBase, B: int, TT: int, device: torch.device) -> Tensor | None:
    """Rows to reset before each step, bool [TT, B]; None if `td` has neither `dones` nor `truncateds`."""
    resets = None
    for key in _flag_keys(td):
        flags = _entry(td, key, device)
        if flags.numel() != B * TT:
            expected = f"{B * TT} values, one for each step of each row"
            raise ValueError(f"td[{key!r}]: got {describe(flags)}, expected {expected}")
        flags = flags.bool().reshape(B, TT).transpose(0, 1)
        resets = flags if resets is None else resets | flags
    return resets


def _require_sequence_first(lstm: nn.Module) -> None:
    """Refuse an LSTM whose layout of input and state differs from ours, and other recurrent modules."""
    if isinstance(lstm, nn.RNNBase) and not isinstance(lstm, nn.LSTM):
        raise TypeError(f"lstm: got {type(lstm).__name__}, expected nn.LSTM or a module with its arguments and results")
    for name in ("batch_first", "bidirectional", "proj_size"):
        value = getattr(lstm, name, False)
        if value:
            raise ValueError(f"lstm: got {name}={value}, expected nn.LSTM's default: time first, one direction")


def _autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype nn.LSTM computes in: autocast's where that is on, except for float64 tensors."""
    cast = under_autocast(tensor.device) and tensor.dtype != torch.float64
    return torch.get_autocast_dtype(tensor.device.type) if cast else tensor.dtype


def own_computation(module: nn.Module, kind: type[nn.Module]) -> str:
    """Why `module` may compute something else than a `kind` does with its parameters; empty if it does not."""
    if type(module) is not kind:
        return f"it is a {type(module).__name__}"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    if nn.modules.module._has_any_global_hook():
        return "all modules have hooks"
    return ""


def _step_by_step(
    lstm: nn.Module, sequence: Tensor, h: Tensor, c: Tensor, resets: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """As `_lstm_with_resets`, by one call of the module for each step."""
    if len(sequence) == 1:
        return lstm(sequence, (h.masked_fill(resets.view(-1, 1), 0), c.masked_fill(resets.view(-1, 1), 0)))
    outputs = []
    for step, reset in zip(sequence.split(1), resets.unsqueeze(-1), strict=True):
        output, (h, c) = lstm(step, (h.masked_fill(reset, 0), c.masked_fill(reset, 0)))
        outputs.append(output)
    return torch.cat(outputs), (h, c)


def _lstm_with_resets(
    lstm: Any, sequence: Tensor, h: Tensor, c: Tensor, resets: Tensor, may_share: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`lstm(sequence, (h, c))` with the state of row b zeroed before step t where resets[t, b].

    One matrix product projects a layer's whole input; `lstm_layer` computes the recurrence. With `may_share`, the
    output of a single step may be a view of the new h.
    """
    dtype = _autocast_dtype(sequence)
    sequence, h, c = sequence.to(dtype), h.to(dtype), c.to(dtype)
    # The flags are a transposed view; one copy serves all layers.
    resets = resets.contiguous()
    new_state = None
    if may_share and len(sequence) == 1 and not torch.is_grad_enabled() and not in_plain_pytorch():
        new_state = sequence.new_empty(2, *h.shape)
    last_h, last_c = [], []
    for layer, (weight_ih, weight_hh, *biases) in enumerate(lstm.all_weights):
        if layer > 0:
            sequence = nn.functional.dropout(sequence, lstm.dropout, lstm.training)
        bias = biases[0].to(dtype) + biases[1].to(dtype) if biases else None
        projected = nn.functional.linear(sequence, weight_ih.to(dtype), bias)
        inputs = projected, weight_hh.to(dtype), h[layer], c[layer], resets
        if new_state is not None:
            sequence = lstm_step_into(*inputs, *new_state[:, layer])
            continue
        sequence, hidden, cell = ops.lstm_layer(*inputs)
        last_h.append(hidden)
        last_c.append(cell)
    if new_state is not None:
        return sequence, (new_state[0], new_state[1])
    return sequence, (torch.stack(last_h), torch.stack(last_c))
