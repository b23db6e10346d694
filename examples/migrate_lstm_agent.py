"""Migrate a plain PyTorch LSTM agent to the mixin, and check that it computes the same.

python examples/migrate_lstm_agent.py
"""

import torch
from tensordict import TensorDict
from torch import nn

from metta_fastagent import LSTMWrapper, PyTorchAgentMixin
from metta_fastagent.testing import compare_agents

TOKENS, ACTIONS, HIDDEN, LAYERS = 8, 9, 32, 2


class OldAgent(nn.Module):
    """Everything by hand."""

    def __init__(self, clip_range=0.0):
        super().__init__()
        self.encoder = nn.Linear(TOKENS * 3, HIDDEN)
        self.lstm = nn.LSTM(HIDDEN, HIDDEN, LAYERS)
        self.actor = nn.Linear(HIDDEN, ACTIONS)
        self.critic = nn.Linear(HIDDEN, 1)
        self.clip_range = clip_range
        self.state = None

    def reset_memory(self):
        self.state = None

    def clip_weights(self):
        if self.clip_range > 0:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    module.weight.data.clamp_(-self.clip_range, self.clip_range)
                    module.bias.data.clamp_(-self.clip_range, self.clip_range)

    def forward(self, td, state=None, action=None):
        observations = td["env_obs"]
        training = observations.dim() == 4
        B, T = observations.shape[0], observations.shape[1] if training else 1
        hidden = torch.relu(self.encoder(observations.flatten(-2).float() / 255))
        output, state = self.lstm(hidden.view(B, T, HIDDEN).transpose(0, 1), None if training else self.state)
        if not training:
            self.state = state
        output = output.transpose(0, 1).reshape(B * T, HIDDEN)
        full_log_probs, value = torch.log_softmax(self.actor(output), dim=-1), self.critic(output)
        rows = torch.arange(B * T)
        if not training:
            index = torch.multinomial(full_log_probs.exp(), num_samples=1).view(-1)
            td["actions"], td["values"] = self.action_index_tensor[index], value.flatten()
            td["act_log_prob"], td["full_log_probs"] = full_log_probs[rows, index], full_log_probs
            return td
        pairs = action.reshape(B * T, 2).long()
        index = pairs[:, 0] + self.cum_action_max_params[pairs[:, 0]] + pairs[:, 1]
        entropy = -(full_log_probs.exp() * full_log_probs).sum(dim=-1)
        results = {"act_log_prob": full_log_probs[rows, index], "entropy": entropy, "value": value}
        results |= {"full_log_probs": full_log_probs, "bptt": torch.full((B * T,), T), "batch": torch.full((B * T,), B)}
        return TensorDict(results, batch_size=[B * T]).reshape(B, T)


class Policy(nn.Module):
    """Encoder and heads of the old agent."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(TOKENS * 3, HIDDEN)
        self.actor = nn.Linear(HIDDEN, ACTIONS)
        self.critic = nn.Linear(HIDDEN, 1)

    def encode_observations(self, observations, state=None):
        return torch.relu(self.encoder(observations.flatten(-2).float() / 255)).view(-1, HIDDEN)

    def decode_actions(self, hidden, batch_size):
        return self.actor(hidden), self.critic(hidden)


class NewAgent(PyTorchAgentMixin, LSTMWrapper):
    """The same agent with the mixin: encoder and heads have moved into `policy`."""

    def __init__(self, env=None, **kwargs):
        mixin_params = self.extract_mixin_params(kwargs)
        super().__init__(env, Policy(), HIDDEN, HIDDEN, num_layers=LAYERS)
        self.init_mixin(**mixin_params)

    def forward(self, td, state=None, action=None):
        observations = td["env_obs"]
        B, T = self.set_tensordict_fields(td, observations)
        hidden = self.run_lstm(td, self.policy.encode_observations(observations), B, T)
        logits, value = self.policy.decode_actions(hidden, B * T)
        if action is None:
            return self.handle_inference_mode(td, logits, value)
        return self.handle_training_mode(td, action, logits, value)


def main():
    torch.manual_seed(0)
    old, new = OldAgent(clip_range=0.1), NewAgent(clip_range=0.1)
    moved = {name: f"policy.{name}" for name in ("encoder", "actor", "critic")}
    weights = old.state_dict().items()
    new.load_state_dict({key if key.startswith("lstm.") else f"policy.{key}": weight for key, weight in weights})
    new.activate_actions(["noop", "move", "press"], [0, 3, 3])
    old.action_index_tensor, old.cum_action_max_params = new.action_index_tensor, new.cum_action_max_params
    observations = torch.randint(256, (4, 16, TOKENS, 3), dtype=torch.uint8)
    compare_agents(old, new, TensorDict({"env_obs": observations}, batch_size=[4, 16]), rename=moved)
    print("same weights, outputs, gradients and clipping")


if __name__ == "__main__":
    main()
