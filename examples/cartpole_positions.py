"""Gymnasium's CartPole without velocities: float vector observations and a custom agent in the package's trainer.

    python examples/cartpole_positions.py [--steps 640000] [--seed 1] [--forget]

The agent sees only the cart's position and the pole's angle, so it needs memory to infer velocities: with its state
zeroed at each step (`--forget`) it learns much less.
"""

import argparse

import gymnasium
import numpy as np
import torch
from gymnasium.wrappers import TransformObservation
from torch import nn

from metta_fastagent import LSTMWrapper, PyTorchAgentMixin
from metta_fastagent.train import TrainConfig, train

HIDDEN = 64


def without_velocities(env):
    space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    return TransformObservation(env, lambda state: state[[0, 2]] * np.float32([1, 10]), space)


def make_env(num_envs, device):
    options = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    return gymnasium.make_vec(
        "CartPole-v1", num_envs, vectorization_mode="sync", vector_kwargs=options, wrappers=[without_velocities]
    )


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.actor, self.critic = nn.Linear(2, HIDDEN), nn.Linear(HIDDEN, 2), nn.Linear(HIDDEN, 1)

    def encode_observations(self, observations, state=None):
        return torch.tanh(self.encoder(observations)).view(-1, HIDDEN)

    def decode_actions(self, hidden, batch_size):
        return self.actor(hidden), self.critic(hidden)


class Agent(PyTorchAgentMixin, LSTMWrapper):
    def __init__(self, env, **kwargs):
        mixin_params = self.extract_mixin_params(kwargs)
        super().__init__(env, Policy(), HIDDEN, HIDDEN, num_layers=1)
        # The base class's biases of 1 and orthogonal weights suit large inputs; these are small.
        self.lstm.reset_parameters()
        self.init_mixin(**mixin_params)

    def forward(self, td, state=None, action=None):
        observations = td["env_obs"]
        B, TT = self.set_tensordict_fields(td, observations)
        hidden = self.run_lstm(td, self.policy.encode_observations(observations), B, TT)
        logits, value = self.policy.decode_actions(hidden, B * TT)
        if action is None:
            return self.handle_inference_mode(td, logits, value)
        return self.handle_training_mode(td, action, logits, value)


def configuration(steps, seed, forget):
    return TrainConfig(
        steps=steps,
        seed=seed,
        num_envs=64,
        segment_length=32,
        epochs=4,
        lr=2.5e-3,
        anneal_lr=1.0,
        gamma=0.98,
        ent_coef=0.01,
        evaluation_interval=0,
        reset_state_every_step=forget,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=640_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out")
    parser.add_argument("--forget", action="store_true", help="zero the LSTM's state at each step")
    options = parser.parse_args()
    train(
        configuration(options.steps, options.seed, options.forget), make_env=make_env, make_agent=Agent, out=options.out
    )
