"""Experience: storage of one rollout, with the LSTM state at the start of each segment."""

from types import SimpleNamespace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor


class Experience:
    """Preallocated storage for one rollout: one segment of `length` = T steps for each of B rows (environments).

    Args:
        observations: a batch of observations [B, ...], which determines dtype, shape and device.
        state: the LSTM state (h, c), each [layers, B, hidden].
        action_mask: a mask of actions, bool [B, A], or None if all are legal at every step.

    Attributes:
        observations: [B, T, ...], before step t.
        actions: int32 [B, T, 2], (type, parameter) pairs.
        action_mask: bool [B, T, A], the actions that were legal at step t; None if all were legal at every step.
        log_probs, values, rewards: float32 [B, T].
        dones, truncateds: bool [B, T], episode starts, an input of the agent: True if observation t starts an episode
            after a termination or a reset of the environment (dones), or after a truncation (truncateds).
        terminals, truncations: bool [B, T], episode ends, an input of the advantages: True if step t ended an episode.
        bootstrap_values: float32 [B, T], value of the final observation if step t truncated an episode, else 0.
        valid: bool [B, T], False for steps excluded from learning; None if there are none.
        lstm_h, lstm_c: float32 [B, layers, hidden], the LSTM state before the first step and before any reset.
    """

    def __init__(
        self, observations: Tensor, length: int, state: tuple[Tensor, Tensor], action_mask: Tensor | None = None
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(len(observations), *shape, dtype=dtype, device=observations.device)

        self.observations = zeros(length, *observations.shape[1:], dtype=observations.dtype)
        self.action_mask = None if action_mask is None else zeros(length, *action_mask.shape[1:], dtype=torch.bool)
        self.actions = zeros(length, 2, dtype=torch.int32)
        self.log_probs, self.values, self.rewards, self.bootstrap_values = (zeros(length) for _ in range(4))
        self.dones, self.truncateds = (zeros(length, dtype=torch.bool) for _ in range(2))
        self.terminals, self.truncations = (zeros(length, dtype=torch.bool) for _ in range(2))
        self.valid: Tensor | None = None
        # Views of each tensor by time step: creating them costs as much as copying a step.
        stored = {name: each for name, each in vars(self).items() if each is not None}
        self._times = SimpleNamespace(**{name: [each[:, t] for t in range(length)] for name, each in stored.items()})
        self.lstm_h, self.lstm_c = (zeros(part.shape[0], part.shape[2]) for part in state)

    @property
    def length(self) -> int:
        return self.actions.shape[1]

    def store_initial_state(self, state: tuple[Tensor, Tensor]) -> None:
        """Copy the LSTM state (h, c) at the start of the segments, each [layers, B, hidden]."""
        self.lstm_h.copy_(state[0].transpose(0, 1))
        self.lstm_c.copy_(state[1].transpose(0, 1))

    def store(self, t: int, **step: Tensor) -> None:
        """Store the named tensors, each [B, ...], at time t. Raises AttributeError for an unknown name."""
        torch._foreach_copy_([getattr(self._times, name)[t] for name in step], list(step.values()))  # pyright: ignore[reportPrivateImportUsage]

    def store_valid(self, t: int, valid: Tensor | None) -> None:
        """Store `valid`, bool [B], at time t; None counts every row."""
        if valid is not None:
            self.mark_invalid()
        if self.valid is not None:
            self.valid[:, t] = True if valid is None else valid

    def mark_invalid(self) -> None:
        """Create `valid`, in which every step so far counts."""
        if self.valid is None:
            self.valid = torch.ones_like(self.terminals)

    def valid_rows(self, rows: Tensor) -> Tensor | None:
        """`valid` of `rows`."""
        return None if self.valid is None else self.valid[rows]

    def segments(self, rows: Tensor) -> TensorDict:
        """The agent's inputs for the segments of `rows` (int64 [b]), a TensorDict of batch size [b]."""
        names = ("dones", "truncateds", "lstm_h", "lstm_c") + ("action_mask",) * (self.action_mask is not None)
        entries: dict[str, Any] = {name: getattr(self, name)[rows] for name in names}
        return TensorDict({"env_obs": self.observations[rows], **entries}, batch_size=[len(rows)])
