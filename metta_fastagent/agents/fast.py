"""Fast: the reference agent with a CNN encoder, an LSTM and an action-embedding actor, written with the mixin.

Its parameters have the names and shapes of Metta's own `Fast`, whose checkpoints load with `strict=True`.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.nn import functional as F

from metta_fastagent import ops
from metta_fastagent._shapes import require_tensordict
from metta_fastagent.mixin import PyTorchAgentMixin
from metta_fastagent.recurrent import LSTMWrapper, checked_sizes
from metta_fastagent.runtime.checks import describe, is_number, is_whole, own_computation

DEFAULT_NUM_FEATURES = 25
DEFAULT_WINDOW = 11
# cnn1 (5, stride 3) and cnn2 (3) have no output for a smaller window.
SMALLEST_WINDOW = 11
MAX_INITIAL_EMBEDDING = 0.1

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


class Fast(PyTorchAgentMixin, LSTMWrapper):
    """CNN + LSTM agent with a bilinear actor over action embeddings.

    Args:
        env: the environment; `obs_width`, `obs_height` (default 11) and `feature_normalizations` (feature id to
            the number that divides its values; default 25 features of 1) are read.
        policy: encoder and heads; None creates a `FastPolicy` for `env`.
        input_size: features of the encoded observation.
        hidden_size: features of the LSTM's state.
        num_layers: layers of the LSTM.
        max_actions: rows of the action embedding, the maximum number of actions.
        num_envs: rows of a preallocated rollout memory, or None; see `LSTMWrapper`.
        kwargs: the mixin's parameters, see `PyTorchAgentMixin.init_mixin`.

    Example:
        >>> from types import SimpleNamespace
        >>> from tensordict import TensorDict
        >>> agent = Fast(SimpleNamespace(obs_width=11, obs_height=11), num_envs=2)
        >>> agent.activate_actions(["noop", "move"], [0, 3])
        >>> td = TensorDict({"env_obs": torch.zeros(2, 40, 3, dtype=torch.uint8)}, batch_size=[2])
        >>> agent(td)["actions"].shape
        torch.Size([2, 2])
    """

    policy: "FastPolicy"

    def __init__(
        self,
        env: Any,
        policy: nn.Module | None = None,
        input_size: int = 128,
        hidden_size: int = 128,
        num_layers: int = 2,
        *,
        max_actions: int = 100,
        num_envs: int | None = None,
        **kwargs: Any,
    ) -> None:
        mixin_params = self.extract_mixin_params(kwargs)
        checked_sizes(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        if policy is None:
            policy = FastPolicy(env, input_size, hidden_size, max_actions)
        super().__init__(env, policy, input_size, hidden_size, num_layers=num_layers, num_envs=num_envs)
        self.init_mixin(**mixin_params)

    @torch._dynamo.disable
    def forward(self, td: TensorDictBase, state: Any = None, action: Tensor | None = None) -> TensorDictBase:
        """One rollout step without `action`; with it, the evaluation of a batch of segments.

        Args:
            td: `env_obs` uint8 [B, tokens, 3] in a TensorDict of batch size [B], or [B, T, tokens, 3] in one of [B, T]
                or [B]; optional entries as in `LSTMWrapper.run_lstm`. It receives `bptt` and `batch`.
            state: unused; part of the agents' common signature.
            action: integer (type, parameter) pairs [B, T, 2] or [B * T, 2], or None.

        Returns:
            The result of `handle_inference_mode` (`td` itself) or `handle_training_mode`.
        """
        require_tensordict(td)
        observations = td["env_obs"]
        B, TT = self.set_tensordict_fields(td, observations)
        hidden = self.policy.encode_observations(observations, state)
        hidden = self.run_lstm(td, hidden, B, TT)
        logits, value = self.policy.decode_actions(hidden, B * TT)
        if action is None:
            return self.handle_inference_mode(td, logits, value)
        return self.handle_training_mode(td, action, logits, value)

    def _apply_feature_remapping(self, remap_tensor: Tensor) -> None:
        """From now on, read feature id i of every token as `remap_tensor[i]` (uint8 [256])."""
        if not isinstance(remap_tensor, Tensor) or remap_tensor.dtype != torch.uint8 or remap_tensor.shape != (256,):
            raise ValueError(f"remap_tensor: got {describe(remap_tensor)}, expected a uint8 tensor of shape [256]")
        self.policy.feature_remap = remap_tensor.to(self.policy.max_vec.device)

    def update_normalization_factors(
        self, features: dict[str, dict], original_feature_mapping: dict[str, int] | None
    ) -> None:
        """Set the normalisation of each feature from `features[name]["normalization"]`, at its original id.

        A feature that is not in the mapping is ignored.
        """
        for name, properties in features.items():
            mapping = {name: properties["id"]} if original_feature_mapping is None else original_feature_mapping
            if "normalization" in properties and mapping.get(name, self.policy.num_features) < self.policy.num_features:
                self.policy.max_vec[0, mapping[name]] = properties["normalization"]


class FastPolicy(nn.Module):
    """Encoder and heads of `Fast`.

    Args:
        env: see `Fast`.
        input_size: features of the encoded observation.
        hidden_size: features that the heads take.
        max_actions: rows of the action embedding.

    Raises:
        ValueError: the window is too small, or `max_actions` is not positive.
    """

    def __init__(self, env: Any, input_size: int = 128, hidden_size: int = 128, max_actions: int = 100) -> None:
        super().__init__()
        checked_sizes(input_size=input_size, hidden_size=hidden_size, max_actions=max_actions)
        self.is_continuous = False
        self.out_width = _window_size(env, "obs_width")
        self.out_height = _window_size(env, "obs_height")
        normalizations = _normalizations(env)
        self.num_features = max(normalizations) + 1 if normalizations else DEFAULT_NUM_FEATURES

        self.cnn1 = _orthogonal(nn.Conv2d(self.num_features, 64, kernel_size=5, stride=3))
        self.cnn2 = _orthogonal(nn.Conv2d(64, 64, kernel_size=3))
        flattened_size = 64 * _encoded_size(self.out_width) * _encoded_size(self.out_height)
        self.fc1 = _orthogonal(nn.Linear(flattened_size, 128))
        self.encoded_obs = _orthogonal(nn.Linear(128, input_size))
        self.critic_1 = _orthogonal(nn.Linear(hidden_size, 1024), gain=math.sqrt(2))
        self.value_head = _orthogonal(nn.Linear(1024, 1))
        self.actor_1 = _orthogonal(nn.Linear(hidden_size, 512))
        self.action_embeddings = nn.Embedding(max_actions, 16)
        nn.init.orthogonal_(self.action_embeddings.weight)
        with torch.no_grad():
            self.action_embeddings.weight.mul_(MAX_INITIAL_EMBEDDING / self.action_embeddings.weight.abs().max())
        bound = 1 / math.sqrt(512)
        self.actor_W = nn.Parameter(torch.empty(1, 512, 16).uniform_(-bound, bound))
        self.actor_bias = nn.Parameter(torch.empty(1).uniform_(-bound, bound))
        self.num_active_actions = max_actions

        max_vec = torch.ones(1, self.num_features, 1, 1)
        for feature_id, normalization in normalizations.items():
            max_vec[0, feature_id] = normalization if normalization > 0 else 1.0
        self.max_vec: Tensor
        self.register_buffer("max_vec", max_vec)
        self.feature_remap: Tensor | None
        self.register_buffer("feature_remap", None, persistent=False)

    def activate_action_embeddings(
        self, full_action_names: list[str], device: torch.device | str | None = None
    ) -> None:
        """Use the first `len(full_action_names)` embeddings, one for each action.

        Raises:
            ValueError: there are more actions than embeddings.
        """
        rows = self.action_embeddings.num_embeddings
        if len(full_action_names) > rows:
            raise ValueError(
                f"full_action_names: got {len(full_action_names)} actions, expected at most {rows}, the rows of "
                f"action_embeddings; Fast(env, max_actions={len(full_action_names)}) makes more"
            )
        self.num_active_actions = len(full_action_names)

    def initialize_to_environment(self, full_action_names: list[str], device: torch.device | str | None = None) -> None:
        """Same as `activate_action_embeddings`; hosts since September 2025 call this method."""
        self.activate_action_embeddings(full_action_names, device)

    def encode_observations(self, observations: Tensor, state: Any = None) -> Tensor:
        """Encode observation tokens, uint8 [B, tokens, 3] or [B, T, tokens, 3], to [B * T, input_size]."""
        expected = f"uint8 [B, tokens, 3] or [B, T, tokens, 3] on {self.max_vec.device}"
        if not isinstance(observations, Tensor) or observations.dtype != torch.uint8:
            raise TypeError(f"env_obs: got {describe(observations)}, expected {expected}")
        if (
            observations.dim() not in (3, 4)
            or observations.shape[-1] != 3
            or observations.device != self.max_vec.device
        ):
            raise ValueError(f"env_obs: got {describe(observations)}, expected {expected}")
        tokens = observations.reshape(-1, *observations.shape[-2:])
        if self.feature_remap is not None:
            coordinate, feature, value = tokens.unbind(-1)
            tokens = torch.stack((coordinate, self.feature_remap[feature.long()], value), dim=-1)
        features = self._second_convolution(self._first_convolution(tokens)).flatten(1)
        return ops.linear_layer(self.encoded_obs, ops.linear_layer(self.fc1, features, "relu"), "relu")

    def _first_convolution(self, tokens: Tensor) -> Tensor:
        """relu(cnn1(grid of the tokens)), directly from the tokens if `cnn1` is a plain convolution."""
        conv, scale, window = self.cnn1, self.max_vec.view(-1), (self.out_width, self.out_height)
        if _is_plain_convolution(conv) and conv.in_channels == len(scale) and conv.stride[0] == conv.stride[1]:
            return ops.tokens_conv2d(tokens, conv.weight, conv.bias, scale, *window, conv.stride[0], relu=True)
        grid = ops.tokens_to_grid(tokens, self.num_features, *window, scale, conv.weight.dtype)
        if grid.device.type == "cpu":
            # On the CPU, these convolutions take a third less time in this layout.
            grid = grid.contiguous(memory_format=torch.channels_last)
        return F.relu(conv(grid))

    def _second_convolution(self, images: Tensor) -> Tensor:
        """relu(cnn2(images)); a linear layer, whose relu costs no launch, if the kernel covers the whole image."""
        conv = self.cnn2
        if images.shape[1:] != conv.weight.shape[1:] or not _is_plain_convolution(conv):
            return F.relu(conv(images))
        weight = conv.weight
        if not images.is_contiguous():
            # Channels last, the layout in which the C++ operators return images.
            images, weight = images.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1)
        return ops.linear(images.flatten(1), weight.flatten(1), conv.bias, "relu")

    def decode_actions(self, hidden: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        """(logits [batch_size, actions], value [batch_size, 1]) from the LSTM's output [batch_size, hidden_size].

        Logit of action a: tanh(actor @ actor_W) . embedding[a] + actor_bias. The projection does not depend on the
        action, so it is computed once per row.
        """
        value = self.value_head(ops.linear_layer(self.critic_1, hidden, "tanh"))
        actor = ops.linear_layer(self.actor_1, hidden, "relu")
        query = ops.linear(actor, self.actor_W.squeeze(0).t(), None, "tanh")
        embeddings = self.action_embeddings.weight[: self.num_active_actions]
        return query @ embeddings.t() + self.actor_bias, value


def _window_size(env: Any, name: str) -> int:
    size = getattr(env, name, DEFAULT_WINDOW)
    if not is_whole(size) or not SMALLEST_WINDOW <= int(size) <= 16:
        raise ValueError(f"env.{name}: got {size!r}, expected an integer {SMALLEST_WINDOW} to 16")
    return int(size)


def _normalizations(env: Any) -> dict[int, float]:
    """Feature id to the number that divides its values; empty if the environment defines none."""
    normalizations = getattr(env, "feature_normalizations", None) or {}
    if not isinstance(normalizations, Mapping):
        raise TypeError(
            f"env.feature_normalizations: got {describe(normalizations)}, expected a dict from id to number"
        )
    for feature_id, normalization in normalizations.items():
        name = f"env.feature_normalizations[{feature_id!r}]"
        if not is_whole(feature_id) or not 0 <= int(feature_id) <= 254:
            raise ValueError(f"{name}: got id {feature_id!r}, expected an integer 0 to 254")
        if not is_number(normalization) or not math.isfinite(normalization):
            raise ValueError(f"{name}: got {normalization!r}, expected a finite number")
    return {int(feature_id): float(normalization) for feature_id, normalization in normalizations.items()}


def _is_plain_convolution(conv: nn.Module) -> bool:
    """Whether `conv` is an unpadded Conv2d that computes exactly what its weight and bias define."""
    return (
        not own_computation(conv, nn.Conv2d)
        and type(conv.weight) in (Tensor, nn.Parameter)
        and (conv.padding, conv.dilation, conv.groups) == ((0, 0), (1, 1), 1)
    )


def _encoded_size(size: int) -> int:
    """Length of one side of the window after cnn1 and cnn2."""
    return (size - 5) // 3 + 1 - 2


def _orthogonal(layer: Layer, gain: float = 1.0) -> Layer:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
    return layer
