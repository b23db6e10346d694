"""The operations in place of the computations in Metta's components (January 2026).

from metta.agent.components import actor; from cortex.cells import lstm as cells; install(policy, actor, cells)

where `policy` is a FastPolicy. docs/metta.md says what is replaced. Run as a script, this file shows the importance
ratio before the first update, for segments trained without and with resets: python examples/metta_components.py
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from metta_fastagent import lstm as lstm_with_resets
from metta_fastagent import ops


def sample_actions(action_logits):
    return ops.sample_actions(action_logits, None)


def evaluate_actions(action_logits, actions):
    return ops.evaluate_actions(action_logits, actions, None)


def lstm_sequence(*, lstm, x_seq, h0_bf, c0_bf, resets=None):
    state = h0_bf.transpose(0, 1).contiguous(), c0_bf.transpose(0, 1).contiguous()
    output, (h, c) = lstm_with_resets(lstm, x_seq, state, None if resets is None else resets.bool())
    return output, h.transpose(0, 1), c.transpose(0, 1)


def leave_tokens(td):
    return td


def encode_tokens(shim, encoder, td):
    box, conv, scale = shim.token_to_box_shim, encoder.cnn1, shim.observation_normalizer.obs_norm.flatten()
    window = box.out_width, box.out_height
    tokens = td[shim.in_key]
    x = ops.tokens_conv2d(tokens, conv.weight, conv.bias, scale, *window, conv.stride[0], True, coordinates="yx")
    x = F.relu(encoder.fc1(F.relu(encoder.cnn2(x)).flatten(1)))
    td[encoder.config.out_key] = F.relu(encoder.encoded_obs(x))
    return td


def install(policy, actor, cells):
    actor.sample_actions, actor.evaluate_actions = sample_actions, evaluate_actions
    cells.lstm_sequence_pytorch = lstm_sequence
    policy.obs_shim.forward = leave_tokens
    policy.cnn_encoder.forward = partial(encode_tokens, policy.obs_shim, policy.cnn_encoder)


def importance_ratios(rows=256, steps=16, hidden=32, actions=5, share=0.1):
    """A rollout's ratios before an update: (without resets in training, with them), float64 [rows, steps] each."""
    torch.manual_seed(0)
    cell, head = nn.LSTM(hidden, hidden, batch_first=True).double(), nn.Linear(hidden, actions).double()
    inputs, dones = torch.randn(rows, steps, hidden, dtype=torch.float64), torch.rand(rows, steps) < share
    start = state = torch.randn(2, rows, 1, hidden, dtype=torch.float64)
    taken, log_probs = [], []
    with torch.no_grad():
        for t in range(steps):
            step = {"x_seq": inputs[:, t : t + 1], "h0_bf": state[0], "c0_bf": state[1], "resets": dones[:, t : t + 1]}
            output, *state = lstm_sequence(lstm=cell, **step)
            action, log_prob, _, _ = sample_actions(3 * head(output[:, 0]))
            taken.append(action)
            log_probs.append(log_prob)
        taken, log_probs = torch.stack(taken, 1), torch.stack(log_probs, 1)
        ratios = []
        for resets in (None, dones):
            output, _, _ = lstm_sequence(lstm=cell, x_seq=inputs, h0_bf=start[0], c0_bf=start[1], resets=resets)
            log_prob, _, _ = evaluate_actions(3 * head(output.flatten(0, 1)), taken.flatten())
            ratios.append((log_prob.view(rows, steps) - log_probs).exp())
    return ratios


if __name__ == "__main__":
    for name, ratio in zip(("without", "with"), importance_ratios(), strict=True):
        print(f"importance ratio {name} resets in training: {ratio.min():.6f} to {ratio.max():.6f}")
