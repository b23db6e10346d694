"""Gymnasium's vector environments as environments of the trainer. Needs the package `gymnasium`, an extra."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metta_fastagent.train.environments import Step

try:
    import gymnasium
    from gymnasium import spaces
    from gymnasium.vector import AutoresetMode, VectorEnv
except ImportError as error:
    raise ImportError(f"gymnasium: {error}; pip install 'metta-fastagent[gymnasium]'") from None


def maker(name: str) -> Callable[[int, torch.device], GymnasiumEnvironment]:
    """A function that makes rows of the registered environment `name`, such as CartPole-v1."""

    def make_env(num_envs: int, device: torch.device) -> GymnasiumEnvironment:
        options = {"autoreset_mode": AutoresetMode.SAME_STEP}
        try:
            vector = gymnasium.make_vec(name, num_envs, vectorization_mode="sync", vector_kwargs=options)
        except gymnasium.error.Error as error:
            raise ValueError(f"env: got 'gym:{name}' ({error}), expected a registered environment") from error
        return GymnasiumEnvironment(vector, device)

    return make_env


class GymnasiumEnvironment:
    """A gymnasium.vector.VectorEnv with tensors on `device`.

    Actions: `Discrete(n)` is one type with n parameters; `MultiDiscrete([types, parameters])` takes (type, parameter)
    pairs as they are. Observations: `Box`; float64 becomes float32.

    All autoreset modes give the trainer's steps. SAME_STEP has both observations of a row that ends; DISABLED rows are
    reset with a mask; in NEXT_STEP, the step after an end only restarts the row and is marked as not valid.
    """

    def __init__(self, vector: VectorEnv, device: torch.device | str = "cpu") -> None:
        self._vector, self._device = vector, torch.device(device)
        self._mode = vector.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
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

    def reset(self, seed: int) -> Tensor:
        """Reset all rows; each gets its own seed, derived from `seed`."""
        self._restarting[:] = False
        # Gymnasium seeds row i with seed + i: rows of neighbouring seeds would be the same.
        first = np.random.SeedSequence(seed).generate_state(1).item()
        observations, _ = self._vector.reset(seed=first)
        return self._tensor(observations)

    def step(self, actions: Tensor) -> Step:
        """Apply (type, parameter) pairs, integer [N, 2]."""
        pairs = actions.cpu().numpy()
        discrete = isinstance(self._space, spaces.Discrete)
        chosen = (pairs[:, 1] if discrete else pairs) + self._space.start
        observations, rewards, terminals, truncations, infos = self._vector.step(chosen.astype(self._space.dtype))
        truncations = truncations & ~terminals
        ended = terminals | truncations
        # Without final observations the trainer skips a forward pass.
        final, valid = observations.copy() if truncations.any() else None, None
        if self._mode == AutoresetMode.SAME_STEP and final is not None:
            final[ended] = np.stack(infos["final_obs"][ended])
        elif self._mode == AutoresetMode.DISABLED and ended.any():
            observations, _ = self._vector.reset(options={"reset_mask": ended})
        elif self._mode == AutoresetMode.NEXT_STEP:
            valid = torch.from_numpy(~self._restarting).to(self._device)
            # The step that restarts a row ends what came after the end of its episode.
            terminals = terminals | self._restarting
            self._restarting = ended
        arrays = (observations, rewards.astype(np.float32), terminals, truncations)
        results = (self._tensor(array) for array in arrays)
        return Step(*results, final_observations=None if final is None else self._tensor(final), valid=valid)

    def close(self) -> None:
        """Close the vector environment."""
        self._vector.close()

    def _tensor(self, array: Any) -> Tensor:
        # a copy: the vector environment may reuse its arrays
        tensor = torch.tensor(array)
        return tensor.to(self._device, torch.float32 if tensor.dtype == torch.float64 else tensor.dtype)
