"""Train your own agent on your own environment, in 20 lines.

    python examples/own_environment.py

An episode has three steps. The first shows one of four cues; naming it at the third gives reward 1. Without memory the
mean return is at most 1/4.
"""

import torch

from metta_fastagent.train import TrainConfig, VectorAgent, train


class Cue:
    max_action_args = (3,)  # one action type, with parameters 0 to 3

    def __init__(self, num_envs, device):
        self.rows = num_envs

    def observe(self):
        return torch.eye(6)[self.cue if self.t == 0 else torch.full_like(self.cue, 3 + self.t)]

    def reset(self, seed=None):
        self.t, self.cue = 0, torch.randint(4, (self.rows,))
        return self.observe()

    def step(self, actions):  # (type, parameter) pairs; the episodes of all rows end together
        self.t, ended = self.t + 1, self.t == 2
        rewards = (actions[:, 1] == self.cue).float() * ended
        observations = self.reset() if ended else self.observe()
        return observations, rewards, torch.full((self.rows,), ended)


class MyAgent(VectorAgent):
    def __init__(self, env, **kwargs):
        super().__init__(env, torch.nn.Linear(6, 32), hidden_size=32, **kwargs)


train(TrainConfig(steps=40_000, lr=3e-3), make_env=Cue, make_agent=MyAgent)
