"""Gymnasium's vector environments as trainer environments. Needs the package `gymnasium`, an extra."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from metta_fastagent.environment import ProtocolError, Step, load_statistics, state_of
from metta_fastagent.runtime.install import missing

try:
    import gymnasium
    from gymnasium import spaces
    from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
    from gymnasium.wrappers.utils import RunningMeanStd
except ImportError as error:
    raise missing("gymnasium", error) from None

# Keys under which infos hold the last observations of ended episodes, in the new and the old version of SAME_STEP.
FINAL_OBSERVATIONS = ("final_obs", "final_observation")
# Running means in gymnasium's wrappers for a single environment.
RUNNING_MEANS = ("obs_rms", "return_rms")


def make_registered(name: str, num_envs: int, device: torch.device) -> GymnasiumEnvironment:
    """Rows of the registered environment `name`, such as CartPole-v1."""
    options = {"autoreset_mode": AutoresetMode.SAME_STEP}
    try:
        vector = gymnasium.make_vec(name, num_envs, vectorization_mode="sync", vector_kwargs=options)
    except gymnasium.error.Error as error:
        raise ValueError(f"env: got 'gym:{name}' ({error}), expected a registered environment") from error
    return GymnasiumEnvironment(vector, device)


class GymnasiumEnvironment:
    """A gymnasium.vector.VectorEnv with tensors on `device`.

    Actions: `Discrete(n)` is one type with n parameters; `MultiDiscrete([types, parameters])` takes (type, parameter)
    pairs as they are. Observations: `Box`; float64 becomes float32.

    All autoreset modes are converted to the trainer's steps. SAME_STEP has both observations of a row that ends;
    DISABLED rows are reset with a mask; in NEXT_STEP, the step after an end only restarts the row and is not `valid`.

    The running means of normalising wrappers are part of the state, whether or not `vector` has a `state_dict`;
    `load_statistics` copies them and keeps them fixed. Other attributes are those of `vector`.

    Masks of legal actions are read from `infos["action_mask"]`, or else from a method `action_masks` of `vector` or of
    its environments. For MultiDiscrete a row has one mask of types and one of parameters, in a tuple or concatenated.
    """

    def __init__(self, vector: VectorEnv, device: torch.device | str = "cpu") -> None:
        self._vector: Any = vector
        self._device = torch.device(device)
        self._mode = autoreset_mode(vector)
        if not isinstance(vector.single_observation_space, spaces.Box):
            raise TypeError(f"observation space: got {vector.single_observation_space}, expected Box")
        space = vector.single_action_space
        if isinstance(space, spaces.Discrete):
            self.max_action_args = [int(space.n) - 1]
        elif isinstance(space, spaces.MultiDiscrete) and space.nvec.shape == (2,):
            types, parameters = map(int, space.nvec)
            self.max_action_args = [parameters - 1] * types
        else:
            expected = "Discrete, or MultiDiscrete of two numbers, (types, parameters)"
            raise TypeError(f"action space: got {space}, expected {expected}")
        self._space = space
        self._restarting = np.zeros(vector.num_envs, dtype=bool)
        *self._wrappers, self._rows = layers_of(vector)
        self._masks: Any = None
        self._ask_masks = getattr(vector, "action_masks", None)
        if self._ask_masks is None and self._in_rows("action_masks"):
            self._ask_masks = lambda: self._rows.call("action_masks")

    def __getattr__(self, name: str) -> Any:
        if name == "_vector":
            raise AttributeError(name)
        return getattr(self._vector, name)

    def reset(self, seed: int) -> Tensor:
        """Reset all rows; each gets its own seed, derived from `seed`."""
        self._restarting[:] = False
        # Gymnasium seeds row i with seed + i: neighbouring seeds would share rows.
        first = np.random.SeedSequence(seed).generate_state(1).item()
        observations, infos = self._vector.reset(seed=first)
        self._take_masks(infos, np.ones_like(self._restarting))
        return self._tensor(observations)

    def action_masks(self) -> Any:
        """The masks for the current observations, see Step; None if there are none."""
        if self._masks is None:
            return None
        types, masks = len(self.max_action_args), self._tensor(self._masks)
        joined = isinstance(self._space, spaces.MultiDiscrete) and masks.shape[1] == types + self.max_action_args[0] + 1
        return (masks[:, :types], masks[:, types:]) if joined else masks

    def _take_masks(self, infos: dict[str, Any], rows: Any) -> None:
        """Keep the masks from `infos` or a method for these rows, bool [N]."""
        given = infos["action_mask"] if "action_mask" in infos else self._ask_masks and self._ask_masks()
        if given is None:
            self._masks = None
            return
        parts = [given[row] for row in rows.nonzero()[0]]
        masks = np.stack([np.hstack(each) if isinstance(each, tuple) else each for each in parts]).astype(bool)
        self._masks = np.zeros((len(rows), masks.shape[1]), bool) if self._masks is None else self._masks
        self._masks[rows] = masks

    def step(self, actions: Tensor) -> Step:
        """Apply (type, parameter) pairs, integer [N, 2]."""
        pairs = torch.as_tensor(actions).cpu().numpy()
        discrete = isinstance(self._space, spaces.Discrete)
        chosen = (pairs[:, 1] if discrete else pairs) + self._space.start
        observations, rewards, terminals, truncations, infos = self._vector.step(chosen.astype(self._space.dtype))
        self._take_masks(infos, np.ones_like(self._restarting))
        terminals, truncations = np.asarray(terminals, dtype=bool), np.asarray(truncations, dtype=bool)
        ended = terminals | truncations
        # Without final observations the trainer skips a forward pass.
        final, valid = np.array(observations) if (truncations & ~terminals).any() else None, None
        if ended.any():
            self._take_final_observations(final, observations, ended, infos)
        if self._mode == AutoresetMode.DISABLED and ended.any():
            observations, infos = self._vector.reset(options={"reset_mask": ended})
            self._take_masks(infos, ended)
        elif self._mode == AutoresetMode.NEXT_STEP:
            valid = torch.from_numpy(~self._restarting).to(self._device)
            # The step that restarts a row ends whatever came after the end of its episode.
            terminals = terminals | self._restarting
            self._restarting = ended
        arrays = (observations, np.asarray(rewards, dtype=np.float32), terminals, truncations)
        results = (self._tensor(array) for array in arrays)
        return Step(*results, final_observations=None if final is None else self._tensor(final), valid=valid)

    def _take_final_observations(self, final: Any, observations: Any, ended: Any, infos: dict[str, Any]) -> None:
        """Write the last observations of ended rows into `final`; check that infos match the autoreset mode."""
        key = next((key for key in FINAL_OBSERVATIONS if infos.get(key) is not None), None)
        last = [infos[key][row] for row in ended.nonzero()[0]] if key else []
        last = [each for each in last if each is not None]
        came = f"step: got autoreset mode {self._mode.name} and {key or 'no final_obs'} in the infos of a step"
        if self._mode != AutoresetMode.SAME_STEP:
            if last and not np.array_equal(np.stack(last), observations[ended]):
                raise ProtocolError(f"{came}, expected none other than the observations, or mode SAME_STEP")
        elif final is not None:
            if len(last) < ended.sum():
                raise ProtocolError(f"{came} that ends rows {ended.nonzero()[0].tolist()}, expected one for each")
            final[ended] = np.stack(last)

    def state_dict(self) -> dict[str, Any]:
        """The vector environment's own state, if it has one, and the running means of its wrappers."""
        episodes, means = state_of(self._vector), self._running_means()
        if episodes is None and not means:
            raise NotImplementedError("the vector environment has no state_dict and no running means")
        moments = {
            name: [(torch.tensor(m.mean), torch.tensor(m.var), float(m.count)) for m in means[name]] for name in means
        }
        return {"episodes": episodes, "restarting": torch.tensor(self._restarting), "running_means": moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state`. If it only has running means, restores them and raises NotImplementedError."""
        self._load_running_means(state["running_means"])
        if state["episodes"] is None:
            raise NotImplementedError("the vector environment has no state_dict")
        self._vector.load_state_dict(state["episodes"])
        self._restarting = state["restarting"].numpy().copy()

    def load_statistics(self, state: dict[str, Any]) -> None:
        """Copy the running means from `state`, which may have any number of rows, and stop updating them."""
        load_statistics(self._vector, state["episodes"])
        self._load_running_means(state["running_means"])
        for layer in self._wrappers:
            if hasattr(type(layer), "update_running_mean"):
                layer.update_running_mean = False
        if self._in_rows("update_running_mean"):
            self._rows.set_attr("update_running_mean", False)

    def _in_rows(self, name: str) -> bool:
        """Whether the single rows' environments have this attribute."""
        kinds = SyncVectorEnv, AsyncVectorEnv
        return isinstance(self._rows, kinds) and all(self._rows.call("has_wrapper_attr", name))

    def _running_means(self) -> dict[str, list[RunningMeanStd]]:
        """The running means of the vector's wrappers by layer and name, one each, and of the rows' wrappers by name."""
        layers = enumerate([*self._wrappers, self._rows])
        found = {f"{depth}.{name}": [value] for depth, layer in layers for name, value in vars(layer).items()}
        found = {name: value for name, value in found.items() if isinstance(value[0], RunningMeanStd)}
        return found | {name: list(self._rows.get_attr(name)) for name in RUNNING_MEANS if self._in_rows(name)}

    def _load_running_means(self, state: dict[str, list[tuple[Tensor, Tensor, float]]]) -> None:
        own = self._running_means()
        if own.keys() != state.keys():
            raise ProtocolError(f"running means: got {sorted(state)}, expected {sorted(own)} as in this environment")
        for name, means in own.items():
            saved = [(mean.numpy().copy(), var.numpy().copy(), count) for mean, var, count in state[name]]
            for row, each in enumerate(means):
                # if the number of rows differs, each row gets the samples of all
                (each.mean, each.var, each.count), *others = saved[row : row + 1] if len(saved) == len(means) else saved
                for moments in others:
                    each.update_from_moments(*moments)
            if name in RUNNING_MEANS:
                # rows in other processes returned copies
                self._rows.set_attr(name, means)

    def close(self) -> None:
        """Close the vector environment, or abandon it if its processes are gone."""
        try:
            self._vector.close()
        except (OSError, EOFError):
            # its destructor would try again
            self._rows.closed = True

    def _tensor(self, array: Any) -> Tensor:
        # a copy, because the vector environment may reuse its arrays
        tensor = torch.tensor(array)
        return tensor.to(self._device, torch.float32 if tensor.dtype == torch.float64 else tensor.dtype)


def autoreset_mode(vector: VectorEnv) -> AutoresetMode:
    """The mode in `vector.metadata`, given as a member of the enum, its value or its name. Raises ProtocolError."""
    given = vector.metadata.get("autoreset_mode")
    for mode in AutoresetMode:
        if given in (mode, mode.value, mode.name):
            return mode
    expected = ", ".join(f"AutoresetMode.{mode.name}" for mode in AutoresetMode)
    raise ProtocolError(f"metadata['autoreset_mode']: got {given!r} in {vector}, expected one of {expected}")


def layers_of(vector: VectorEnv) -> list[Any]:
    """`vector` and what it wraps, from outside to inside."""
    return [vector, *layers_of(vector.env)] if isinstance(vector, VectorWrapper) else [vector]
