"""VectorAgent: a small LSTM agent for vectors, the trainer's default where observations are not tokens."""

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from metta_fastagent.mixin import PyTorchAgentMixin
from metta_fastagent.recurrent import LSTMWrapper


class VectorPolicy(nn.Module):
    """Encoder, actor and critic of VectorAgent."""

    def __init__(self, encoder: nn.Module, hidden_size: int, num_actions: int) -> None:
        super().__init__()
        self.encoder, self.hidden_size = encoder, hidden_size
        self.actor, self.critic = nn.Linear(hidden_size, num_actions), nn.Linear(hidden_size, 1)


class VectorAgent(PyTorchAgentMixin, LSTMWrapper):
    """An LSTM agent for vectors and other small observations.

    Args:
        env: the environment, with `single_observation_space.shape` and `max_action_args`.
        encoder: module from float observations [rows, elements] to [rows, hidden_size]; None for one layer with tanh.
        hidden_size: features of the encoding and of the LSTM's state.
        kwargs: the mixin's parameters.
    """

    policy: VectorPolicy

    def __init__(self, env: Any, encoder: nn.Module | None = None, hidden_size: int = 64, **kwargs: Any) -> None:
        mixin_params = self.extract_mixin_params(kwargs)
        elements = int(torch.Size(env.single_observation_space.shape).numel())
        encoder = encoder or nn.Sequential(nn.Linear(elements, hidden_size), nn.Tanh())
        policy = VectorPolicy(encoder, hidden_size, sum(limit + 1 for limit in env.max_action_args))
        super().__init__(env, policy, hidden_size, hidden_size, num_layers=1)
        # The base class's biases of 1 and orthogonal weights suit large inputs; these are small.
        self.lstm.reset_parameters()
        self.init_mixin(**mixin_params)

    def forward(self, td: TensorDictBase, state: Any = None, action: Tensor | None = None) -> TensorDictBase:
        """A rollout step, observations [B, ...] of any dtype, or with `action` segments [B, T, ...]."""
        B, TT = self.set_tensordict_fields(td, td["env_obs"])
        hidden = self.policy.encoder(td["env_obs"].reshape(B * TT, -1).float())
        hidden = self.run_lstm(td, hidden, B, TT)
        logits, value = self.policy.actor(hidden), self.policy.critic(hidden)
        if action is None:
            return self.handle_inference_mode(td, logits, value)
        return self.handle_training_mode(td, action, logits, value)
