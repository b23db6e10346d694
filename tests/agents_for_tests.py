"""Shared by several test modules: small agents, TensorDicts, and the guide's formulas as the reference."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from metta_fastagent import Fast, LSTMWrapper, PyTorchAgentMixin

TOKENS, HIDDEN, LAYERS = 4, 6, 2
ACTION_NAMES = ["noop", "move", "turn"]
MAX_PARAMS = [0, 3, 1]
# Written out by hand: type t owns max_params[t] + 1 logits.
CUM_ACTION_MAX_PARAMS = [0, 0, 3, 4]
PAIRS = [[0, 0], [1, 0], [1, 1], [1, 2], [1, 3], [2, 0], [2, 1]]
NUM_ACTIONS = len(PAIRS)


def make_env(**changes):
    attributes = {"max_action_args": MAX_PARAMS, "feature_normalizations": {0: 1.0, 2: 10.0, 5: 255.0}}
    return SimpleNamespace(**(attributes | changes))


class SmallPolicy(nn.Module):
    is_continuous = False

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(TOKENS * 3, HIDDEN)
        self.actor = nn.Linear(HIDDEN, NUM_ACTIONS)
        self.value_head = nn.Linear(HIDDEN, 1)

    def encode_observations(self, observations, state=None):
        return torch.tanh(self.encoder(observations.reshape(-1, TOKENS * 3).float() / 64))

    def decode_actions(self, hidden, batch_size):
        return self.actor(hidden), self.value_head(hidden)


class MyAgent(PyTorchAgentMixin, LSTMWrapper):
    """Steps 1 to 4 of the guide as printed, with the encoding and the LSTM filled in as Metta's agents do."""

    def __init__(self, env, policy=None, input_size=128, hidden_size=128, num_layers=2, **kwargs):
        # Extract mixin parameters
        mixin_params = self.extract_mixin_params(kwargs)

        # Initialize parent classes
        super().__init__(env, policy, input_size, hidden_size, num_layers=num_layers)

        # Initialize mixin
        self.init_mixin(**mixin_params)

    @torch._dynamo.disable
    def forward(self, td: TensorDict, state=None, action=None):
        observations = td["env_obs"]

        # Use mixin to set TensorDict fields
        B, TT = self.set_tensordict_fields(td, observations)

        hidden = self.policy.encode_observations(observations, state)
        lstm_h, lstm_c, env_id = self._manage_lstm_state(td, B, TT, observations.device)
        hidden = hidden.view(B, TT, -1).transpose(0, 1)
        hidden, (new_lstm_h, new_lstm_c) = self.lstm(hidden, (lstm_h, lstm_c))
        self._store_lstm_state(new_lstm_h, new_lstm_c, env_id)
        flat_hidden = hidden.transpose(0, 1).reshape(B * TT, -1)

        logits_list, value = self.policy.decode_actions(flat_hidden, B * TT)

        # Use mixin for mode-specific processing
        if action is None:
            td = self.handle_inference_mode(td, logits_list, value)
        else:
            td = self.handle_training_mode(td, action, logits_list, value)

        return td


def make_agent(cls=MyAgent, seed=1, active=True, **kwargs):
    torch.manual_seed(seed)
    agent = cls(make_env(), SmallPolicy(), HIDDEN, HIDDEN, LAYERS, **kwargs)
    if active:
        set_tables(agent)
    return agent


def make_fast(num_envs=None, seed=0, **kwargs):
    torch.manual_seed(seed)
    agent = Fast(make_env(), num_envs=num_envs, **kwargs)
    agent.activate_actions(ACTION_NAMES, MAX_PARAMS)
    return agent


class Net(PyTorchAgentMixin, nn.Module):
    """The mixin over a bare module that holds the given layers."""

    def __init__(self, layers=(), **kwargs):
        mixin_params = self.extract_mixin_params(kwargs)
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.init_mixin(**mixin_params)


class Doubled(nn.Module):
    """A parametrization: the layer computes with twice its parameter."""

    def forward(self, weight):
        return weight * 2


def set_tables(agent):
    """Set the action tables as a host does, as plain attributes."""
    agent.cum_action_max_params = torch.tensor(CUM_ACTION_MAX_PARAMS)
    agent.action_index_tensor = torch.tensor(PAIRS, dtype=torch.int32)
    return agent


def make_actions(*shape, seed=3, dtype=torch.int64):
    index = torch.randint(NUM_ACTIONS, shape, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(PAIRS)[index].to(dtype)


def make_observations(*shape, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 255, (*shape, TOKENS, 3), generator=generator).to(torch.uint8)


def rollout_td(rows, env_id=None, **entries):
    """A TensorDict of `rows` rows with this environment id; a tensor of as many rows becomes an ordinary entry."""
    td = TensorDict(entries, batch_size=[rows])
    if isinstance(env_id, torch.Tensor) and env_id.shape[:1] == (rows,):
        td["training_env_id_start"] = env_id
    elif env_id is not None:
        td.set_non_tensor("training_env_id_start", env_id)
    return td


def parameters_of(module):
    """Copies of the parameters by name."""
    return {name: param.detach().clone() for name, param in module.named_parameters()}


def upstream_training(action, logits, value):
    """The guide's formulas on flat rows: action type + cumulative sum + parameter, log_softmax, exp."""
    kind, param = action.reshape(-1, 2).long().unbind(-1)
    index = kind + torch.tensor(CUM_ACTION_MAX_PARAMS)[kind] + param
    full_log_probs = torch.log_softmax(logits, dim=-1)
    return {
        "act_log_prob": full_log_probs[torch.arange(len(index)), index],
        "entropy": -(full_log_probs.exp() * full_log_probs).sum(-1),
        "full_log_probs": full_log_probs,
        "value": value,
    }


def upstream_inference(logits, value):
    """The guide's formulas on rows [B]: draws from torch's default generator as multinomial does."""
    full_log_probs = torch.log_softmax(logits, dim=-1)
    index = torch.multinomial(full_log_probs.exp(), num_samples=1).view(-1)
    return {
        "actions": torch.tensor(PAIRS, dtype=torch.int32)[index],
        "act_log_prob": full_log_probs[torch.arange(len(index)), index],
        "full_log_probs": full_log_probs,
        "values": value.flatten(),
    }


def assert_equal(actual, expected):
    """Equal in dtype, shape and every value; NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def pickled(agent):
    return pickle.loads(pickle.dumps(agent))


on_copies = pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
