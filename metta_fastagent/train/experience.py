"""Experience: one rollout of every row, with the LSTM state that each row's segment started from."""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor


class Experience:
    """Preallocated storage of one rollout: B rows (environments) of one segment of T steps each.

    Attributes:
        observations: uint8 [B, T, M, 3], what step t acted on.
        actions: int32 [B, T, 2].
        log_probs, values, rewards: float32 [B, T].
        dones, truncateds: bool [B, T], True where observation t starts an episode, after a termination or at the very
            beginning (dones), or after a truncation (truncateds): what the agent is told.
        terminals, truncations: bool [B, T], True where step t ended an episode: what the advantages are cut by.
        cut_values: float32 [B, T], value of what would have followed where step t was truncated, 0 elsewhere.
        lstm_h, lstm_c: float32 [B, layers, hidden], the state before the first step, before any reset.
    """

    def __init__(self, rows: int, length: int, num_tokens: int, layers: int, hidden: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        self.observations = zeros(length, num_tokens, 3, dtype=torch.uint8)
        self.actions = zeros(length, 2, dtype=torch.int32)
        self.log_probs, self.values, self.rewards, self.cut_values = (zeros(length) for _ in range(4))
        self.dones, self.truncateds = (zeros(length, dtype=torch.bool) for _ in range(2))
        self.terminals, self.truncations = (zeros(length, dtype=torch.bool) for _ in range(2))
        self.lstm_h, self.lstm_c = (zeros(layers, hidden) for _ in range(2))

    @property
    def length(self) -> int:
        return self.actions.shape[1]

    def begin(self, state: tuple[Tensor, Tensor]) -> None:
        """Keep a copy of the LSTM state (h, c), each [layers, B, hidden], that the segment starts from."""
        self.lstm_h.copy_(state[0].transpose(0, 1))
        self.lstm_c.copy_(state[1].transpose(0, 1))

    def put(self, t: int, **step: Tensor) -> None:
        """Store the named tensors, each [B, ...], at time t; a name that is no attribute is an AttributeError."""
        for name, value in step.items():
            getattr(self, name)[:, t] = value

    def segments(self, rows: Tensor) -> TensorDict:
        """What the agent needs to run the segments of `rows` (int64 [b]) again: a TensorDict of batch size [b]."""
        names = ("dones", "truncateds", "lstm_h", "lstm_c")
        entries: dict[str, Any] = {name: getattr(self, name)[rows] for name in names}
        return TensorDict({"env_obs": self.observations[rows], **entries}, batch_size=[len(rows)])
