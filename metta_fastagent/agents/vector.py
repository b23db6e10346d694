"""VectorAgent: a small LSTM agent for vectors, the trainer's default for observations other than tokens."""

from typing import Any, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from metta_fastagent import ops
from metta_fastagent.mixin import PyTorchAgentMixin
from metta_fastagent.recurrent import LSTMWrapper
from metta_fastagent.runtime.checks import describe


class TanhLayer(nn.Sequential):
    """`nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh())` with the package's operations."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Linear(inputs, outputs), nn.Tanh())

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear_layer(cast(nn.Linear, self[0]), input, "tanh")


class VectorPolicy(nn.Module):
    """Encoder, actor and critic of VectorAgent."""

    def __init__(self, encoder: nn.Module, hidden_size: int, num_actions: int) -> None:
        super().__init__()
        self.encoder, self.hidden_size = encoder, hidden_size
        self.actor, self.critic = nn.Linear(hidden_size, num_actions), nn.Linear(hidden_size, 1)


class VectorAgent(PyTorchAgentMixin, LSTMWrapper):
    """An LSTM agent for vectors, images and other small observations.

    Observations are converted to the weights' dtype. uint8 observations with two or more dimensions are images and are
    divided by 255.

    Args:
        env: the environment, with `single_observation_space.shape` and `max_action_args`.
        encoder: module from observations [rows, *single_observation_space.shape] to [rows, hidden_size]; None for a
            single tanh layer over all elements.
        hidden_size: features of the encoding and of the LSTM's state.
        kwargs: the mixin's parameters.

    Raises:
        ValueError: observations whose shape differs from the space's.

    Example:
        >>> from types import SimpleNamespace
        >>> env = SimpleNamespace(single_observation_space=SimpleNamespace(shape=(4,)), max_action_args=[1])
        >>> agent = VectorAgent(env, nn.Sequential(nn.Linear(4, 32), nn.ReLU()), hidden_size=32)
    """

    policy: VectorPolicy

    def __init__(self, env: Any, encoder: nn.Module | None = None, hidden_size: int = 64, **kwargs: Any) -> None:
        mixin_params = self.extract_mixin_params(kwargs)
        shape = tuple(env.single_observation_space.shape)
        self.images = len(shape) > 1
        if encoder is None:
            elements = torch.Size(shape).numel()
            encoder, shape = TanhLayer(elements, hidden_size), (elements,)
        policy = VectorPolicy(encoder, hidden_size, sum(limit + 1 for limit in env.max_action_args))
        super().__init__(env, policy, hidden_size, hidden_size, num_layers=1)
        self.encoded_shape = shape
        # The base class's biases of 1 and orthogonal weights suit large inputs; these are small.
        self.lstm.reset_parameters()
        self.init_mixin(**mixin_params)

    def forward(self, td: TensorDictBase, state: Any = None, action: Tensor | None = None) -> TensorDictBase:
        """A rollout step with observations [B, ...] of any dtype or, with `action`, segments [B, T, ...]."""
        given = td["env_obs"]
        shape = tuple(self.obs_shape or ())
        if given.shape[max(0, given.dim() - len(shape)) :] != shape:
            expected = f"[{', '.join(['...', *map(str, shape)])}] as env.single_observation_space"
            raise ValueError(f"env_obs: got {describe(given)}, expected {expected}")
        B, TT = self.set_tensordict_fields(td, given)
        observations = given.reshape(B * TT, *self.encoded_shape).to(self.policy.critic.weight.dtype)
        if self.images and given.dtype == torch.uint8:
            observations = observations / 255
        hidden = self.policy.encoder(observations)
        hidden = self.run_lstm(td, hidden, B, TT)
        logits, value = ops.linear_layer(self.policy.actor, hidden), ops.linear_layer(self.policy.critic, hidden)
        if action is None:
            return self.handle_inference_mode(td, logits, value)
        return self.handle_training_mode(td, action, logits, value)
