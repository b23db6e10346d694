"""LSTMWrapper: the LSTM base class of agents, with its rollout memory and its state in training.

In rollout (3-d observations) the state lives in a memory, under the id in `training_env_id_start`. A row whose `dones`
or `truncateds` is set starts from zeros, because its observation is the first of an episode. In training (4-d
observations) the rollout memory is neither read nor changed: a segment starts from the state stored with it (`lstm_h`,
`lstm_c`; zeros if absent), and rows are reset inside the segment wherever `dones` or `truncateds` is set. A segment
without these flags is one call of nn.LSTM; with them it runs layer by layer through `ops.lstm_layer`.
"""

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from metta_fastagent import _memory, ops
from metta_fastagent._memory import AllocatedMemory, DeviceRows, KeyedMemory, States, nan_if_out_of_range
from metta_fastagent._shapes import experience_spec, is_training, require_hidden
from metta_fastagent.runtime.checks import describe, is_whole, own_computation
from metta_fastagent.runtime.profiling import profiler_range

logger = logging.getLogger(__name__)

# Passed from `_manage_lstm_state` to `_store_lstm_state`: a key or a first row, keys, rows on the device, or None.
MemoryId = int | tuple[int, ...] | DeviceRows | None
# Reasons from `own_computation` that have been logged.
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
            keeps one memory per environment id instead.

    Without `num_envs`, `training_env_id_start` is a key: each id has a memory with as many rows as its steps.
    With it, `training_env_id_start` s in a step of B rows (0 if absent) means rows s .. s + B - 1 of the one memory.
    A number out of range is a ValueError, raised before anything is changed. A tensor on the device (any shape, its
    first element is the id) is not read back, so a captured CUDA graph uses the id and the memory of each replay; if it
    is out of range, that call returns NaN and no environment's memory changes.

    Attributes:
        lstm: `nn.LSTM(input_size, hidden_size, num_layers)`, weights orthogonal, biases 1.
        num_envs: rows of the memory, or None.
        writes_state: whether a rollout step writes its initial state, before resets, as `lstm_h` and `lstm_c`,
            [B, num_layers, hidden_size], into its TensorDict, for the experience buffer. False by default.
        memory_in_state_dict: whether `state_dict` includes the memory. False by default. `load_state_dict` loads a
            memory if it finds one.
        lstm_h, lstm_c: the memory, dicts from environment id to a tensor [num_layers, rows, hidden_size]; with
            `num_envs` they have the single entry 0 of `num_envs` rows, which stays the same tensor until the agent is
            moved or cast.
        action_index_tensor, cum_action_max_params: tables that the host sets; None until then.

    Raises:
        TypeError, ValueError: `policy` is not a module, or a size is not a positive integer.

    Example:
        >>> from tensordict import TensorDict
        >>> wrapper = LSTMWrapper(None, nn.Identity(), 3, 5, num_layers=1, num_envs=2)
        >>> td = TensorDict({"env_obs": torch.randn(2, 3)}, batch_size=[2])
        >>> wrapper.run_lstm(td, td["env_obs"], B=2, TT=1).shape
        torch.Size([2, 5])
    """

    writes_state = False
    memory_in_state_dict = False

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
        sizes = checked_sizes(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        space = getattr(env, "single_observation_space", None)
        self.obs_shape = getattr(space, "shape", None)
        self._obs_dtype = getattr(space, "dtype", None)
        self.policy = policy
        self.input_size, self.hidden_size, self.num_layers = sizes
        self.is_continuous = getattr(policy, "is_continuous", False)
        self.lstm = nn.LSTM(self.input_size, self.hidden_size, num_layers=self.num_layers)
        for name, param in self.lstm.named_parameters():
            _ = nn.init.constant_(param, 1) if "bias" in name else nn.init.orthogonal_(param, 1)
        self.action_index_tensor: Tensor | None = None
        self.cum_action_max_params: Tensor | None = None
        self._memory = KeyedMemory()
        if num_envs is not None:
            self.allocate_memory(num_envs)

    @property
    def num_envs(self) -> int | None:
        """Rows of the preallocated memory; None without one."""
        return self._memory.num_envs

    # States [num_layers, rows, hidden_size] by environment id.
    lstm_h = property(lambda self: self._memory.h, lambda self, states: setattr(self._memory, "h", states))
    lstm_c = property(lambda self: self._memory.c, lambda self, states: setattr(self._memory, "c", states))

    def has_memory(self) -> bool:
        """True: the agent carries state from step to step."""
        return True

    def allocate_memory(self, num_envs: int) -> None:
        """Replace the memory by zeros for `num_envs` environments, in tensors that are then updated in place.

        A graph captured earlier keeps using the previous tensors.

        Raises:
            ValueError: `num_envs` is not a positive integer.
        """
        (num_envs,) = checked_sizes(num_envs=num_envs)
        # Tensors made in inference mode could not be updated outside it.
        with torch.inference_mode(False):
            self._memory = AllocatedMemory(num_envs, self._zero_state(num_envs, self._weight().device))

    def get_memory(self) -> tuple[States, States]:
        """A copy of the memory: (h, c), each a dict from environment id to a tensor [num_layers, rows, hidden_size].

        With `num_envs` there is one id, 0, whose rows are the environments.
        """
        return self._memory.copy()

    def set_memory(self, memory: tuple[States, States]) -> None:
        """Replace the memory by a copy of `memory`, a pair as returned by `get_memory`.

        With `num_envs` the values are copied into the existing tensors; an empty pair means zeros.

        Raises:
            TypeError, ValueError: not a pair of dicts with the same ids and tensors [num_layers, rows, hidden_size];
                with `num_envs`, an id other than 0 or a wrong number of rows. Then the memory is unchanged.
        """
        self._memory.replace(*self._checked_memory(memory), self._weight())

    def _checked_memory(self, memory: Any) -> tuple[States, States]:
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
        self._memory.clear()

    def reset_env_memory(self, env_id: int | Tensor) -> None:
        """Forget the state of one environment id; with `num_envs`, zero its row in place. An unknown id is ignored.

        Args:
            env_id: an integer, or a one-element tensor; with `num_envs`, a device tensor is not read back.

        Raises:
            ValueError: a tensor with several elements.
        """
        if isinstance(env_id, Tensor) and env_id.numel() != 1:
            raise ValueError(f"env_id: got {describe(env_id)}, expected an integer or a tensor of one element")
        self._memory.forget(env_id)

    def get_agent_experience_spec(self) -> TensorDict:
        """The entries of one step that training reads, as zeros: `spec.expand(B, T).clone()` is a buffer for them.

        Returns:
            TensorDict of batch size [] on the weights' device: `env_obs` if the environment has a
            `single_observation_space`, `dones` and `truncateds` (bool []), and `lstm_h` and `lstm_c` [num_layers,
            hidden_size], which a rollout writes if `writes_state` is set. The trainer adds the actions and the entries
            for its losses.
        """
        return experience_spec(self._weight(), (self.num_layers, self.hidden_size), self.obs_shape, self._obs_dtype)

    def on_new_training_run(self) -> None:
        """Hook of Metta's trainer: forget the state of every environment."""
        self.reset_memory()

    on_rollout_start = on_train_mb_start = on_eval_start = on_new_training_run

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
        with profiler_range("run_lstm"):
            return self._run_lstm(td, hidden, B, TT, training)

    def _run_lstm(self, td: TensorDictBase, hidden: Tensor, B: int, TT: int, training: bool | None) -> Tensor:
        if B * TT == 0:
            # nn.LSTM rejects an empty sequence; the memory stays as it is.
            return hidden.new_zeros(0, self.hidden_size)
        if getattr(self.lstm, "batch_first", False):
            raise ValueError("lstm: got batch_first=True, expected nn.LSTM's default: time first")
        require_hidden(hidden, B, TT)
        sequence = hidden.view(B, TT, hidden.shape[-1]).transpose(0, 1)
        if type(self)._manage_lstm_state is LSTMWrapper._manage_lstm_state:
            h, c, env_id = self._stored_state(td, B, TT, hidden.device, training)
            sequence = nan_if_out_of_range(sequence, env_id)
        else:
            h, c, env_id = self._manage_lstm_state(td, B, TT, hidden.device, training)
        resets = _resets(td, B, TT, hidden.device)
        if resets and TT > 1:
            self._report_own_computation()
        if self.writes_state and env_id is not None:
            # Copies, because the memory may change in place.
            for key, start in (("lstm_h", h), ("lstm_c", c)):
                td.set(key, start.detach().transpose(0, 1).clone(memory_format=torch.contiguous_format))
        own_store = type(self)._store_lstm_state is not LSTMWrapper._store_lstm_state
        with_state = own_store or env_id is not None
        in_place = with_state and not own_store and self._memory.lends(h, c)
        options = {"in_place": in_place, "with_state": with_state}
        output, (next_h, next_c) = ops.lstm_with_resets(self.lstm, sequence, (h, c), resets, **options)
        if with_state and not (in_place and next_h is h):
            self._store_lstm_state(next_h, next_c, env_id)
        return output.transpose(0, 1).reshape(B * TT, -1)

    def _report_own_computation(self) -> None:
        """Log once why segments with resets call the LSTM step by step, if they do."""
        reason = own_computation(self.lstm, nn.LSTM)
        if reason and reason not in _reported_reasons:
            _reported_reasons.add(reason)
            logger.warning("%s: segments with resets call the LSTM step by step, as %s", type(self).__name__, reason)

    def _manage_lstm_state(
        self, td: TensorDictBase, B: int, TT: int, device: torch.device, training: bool | None = None
    ) -> tuple[Tensor, Tensor, MemoryId]:
        """State before the first of TT steps, zeroed in rows that start an episode there.

        Returns:
            (h, c, env_id): tensors [num_layers, B, hidden_size], and the id for `_store_lstm_state`; None in training,
            which leaves the rollout memory unchanged.
        """
        h, c, env_id = self._stored_state(td, B, TT, device, training)
        for resets in _resets(td, B, TT, device):
            first = resets[0].view(1, B, 1)
            h, c = h.masked_fill(first, 0), c.masked_fill(first, 0)
        return nan_if_out_of_range(h, env_id), nan_if_out_of_range(c, env_id), env_id

    def _stored_state(
        self, td: TensorDictBase, B: int, TT: int, device: torch.device, training: bool | None = None
    ) -> tuple[Tensor, Tensor, MemoryId]:
        """`_manage_lstm_state` before resets."""
        self._memory.fit(self._weight())
        if self._is_segment(td, TT, training):
            h, c = self._segment_start(td, "lstm_h", B, TT, device), self._segment_start(td, "lstm_c", B, TT, device)
            return h, c, None
        ids = td["training_env_ids"] if "training_env_ids" in td.keys() else None
        env_id = self._memory.locate(_environment_id(td), B) if ids is None else self._memory.locate_each(ids, B)
        h, c = self._memory.read(env_id, B) or (self._zero_state(B, device), self._zero_state(B, device))
        return h, c, env_id

    def _store_lstm_state(self, lstm_h: Tensor, lstm_c: Tensor, env_id: MemoryId) -> None:
        """Store a detached copy of the state as the memory of `env_id`; None (training) stores nothing."""
        if env_id is not None:
            self._memory.write(env_id, lstm_h, lstm_c, self._weight().dtype)

    def _is_segment(self, td: TensorDictBase, TT: int, training: bool | None) -> bool:
        """Whether this is training: by `training`, or else `set_tensordict_fields`, the rank of `env_obs` or TT."""
        if training is not None:
            return training
        fields = getattr(self.__dict__.get("_agent_state"), "fields", None)
        if fields is not None and td.get("bptt", None) is fields.bptt:
            return fields.training
        observations = td.get("env_obs", None)
        if TT == 1 and isinstance(observations, Tensor):
            return is_training(observations, self.obs_shape)
        return TT != 1

    def _weight(self) -> Tensor:
        """A floating-point weight of the LSTM, or else of the agent: the state has its device and dtype."""
        # A module's own parameters come first: the others need a walk.
        for params in (self.lstm._parameters.values(), self.lstm.parameters(), self.parameters()):
            for param in params:
                if param is not None and param.is_floating_point():
                    return param
        return torch.empty(0)

    def _zero_state(self, rows: int, device: torch.device) -> Tensor:
        return torch.zeros(self.num_layers, rows, self.hidden_size, device=device, dtype=self._weight().dtype)

    def __getstate__(self) -> dict[str, Any]:
        # A shallow copy gets its own memory too.
        return {**self.__dict__, "_memory": copy.deepcopy(self._memory)}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.memory_in_state_dict:
            destination.update(_memory.state_dict_entries(self.get_memory(), prefix))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        memory = _memory.taken_from_state_dict(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if memory is not None:
            try:
                self.set_memory(memory)
            except (TypeError, ValueError) as error:
                args[-1].append(str(error))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._memory.fit(self._weight())

    def _segment_start(self, td: TensorDictBase, key: str, B: int, TT: int, device: torch.device) -> Tensor:
        if key not in td.keys():
            other = "lstm_c" if key == "lstm_h" else "lstm_h"
            if other in td.keys():
                raise ValueError(f"td: holds {other} without {key}, expected both or neither")
            return self._zero_state(B, device)
        stored = _entry(td, key, device).detach()
        layout = (self.num_layers, self.hidden_size)
        if stored.shape == (B, TT, *layout):
            start = stored[:, 0]
        elif stored.shape in ((B, *layout), (B * TT, *layout)):
            start = stored[:: len(stored) // B]
        else:
            raise ValueError(
                f"td[{key!r}]: got shape {list(stored.shape)}, "
                f"expected {[B, *layout]} or {[B, TT, *layout]} (the state before each segment's first step)"
            )
        return start.transpose(0, 1).to(self._weight().dtype).contiguous()

    def _apply(self, fn: Callable, recurse: bool = True) -> "LSTMWrapper":
        super()._apply(fn, recurse)
        self._memory.fit(self._weight())
        return self


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
    env_id = td["training_env_id_start"] if "training_env_id_start" in td.keys() else None
    if isinstance(env_id, Tensor) and env_id.numel() > 0:
        return env_id[(0,) * env_id.dim()]
    if isinstance(env_id, list) and env_id:
        env_id = env_id[0]
    return 0 if env_id is None else env_id


def _resets(td: TensorDictBase, B: int, TT: int, device: torch.device) -> list[Tensor]:
    """Rows to reset before each step: `dones` and `truncateds`, each bool [TT, B], if `td` has them."""
    resets, shape = [], (B,) if TT == 1 else (B, TT)
    for key in ("dones", "truncateds"):
        if key not in td.keys():
            continue
        flags = _entry(td, key, device)
        if flags.numel() != B * TT:
            expected = f"{B * TT} values, one for each step of each row"
            raise ValueError(f"td[{key!r}]: got {describe(flags)}, expected {expected}")
        if flags.dtype != torch.bool:
            flags = flags.bool()
        if flags.shape != shape:
            flags = flags.reshape(shape)
        resets.append(flags.view(1, B) if TT == 1 else flags.transpose(0, 1))
    return resets
