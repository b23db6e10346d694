"""PPO with an LSTM on CartPole without velocities: float vectors in, a loop of your own, nothing but PyTorch.

    python examples/cartpole_positions.py [--updates 120] [--seed 0]

The agent sees the cart's position and the pole's angle, so it has to remember to know velocities: with a state that is
zeroed at each step (`--forget`) it learns much less. Prints the mean length of the first and of the last episodes.
"""

import argparse
import math
from types import SimpleNamespace

import torch
from tensordict import TensorDict
from torch import nn

from metta_fastagent import LSTMWrapper, PyTorchAgentMixin

ENVS, STEPS, HIDDEN = 64, 32, 64
GAMMA, LAMBDA, CLIP, EPOCHS, MINIBATCHES = 0.98, 0.9, 0.2, 4, 4


class CartPole:
    """Barto, Sutton and Anderson (1983), with the constants of Gymnasium's CartPole-v1; rows restart by themselves."""

    single_observation_space = SimpleNamespace(shape=(2,))
    LIMIT = 500

    def __init__(self):
        self.state, self.steps = self.start(ENVS), torch.zeros(ENVS)

    def start(self, rows):
        return torch.empty(rows, 4).uniform_(-0.05, 0.05)

    def observe(self):
        return self.state[:, [0, 2]] * torch.tensor([1.0, 10.0])

    def step(self, push):
        """Rewards and flags [ENVS] of pushing to the right (1) or left (0): fallen, and out of time."""
        _, speed, angle, turn = self.state.unbind(1)
        force = torch.where(push == 1, 10.0, -10.0)
        sin, cos = angle.sin(), angle.cos()
        pull = (force + 0.05 * turn.square() * sin) / 1.1
        turning = (9.8 * sin - cos * pull) / (0.5 * (4 / 3 - 0.1 * cos.square() / 1.1))
        speeding = pull - 0.05 * turning * cos / 1.1
        change = torch.stack((speed, speeding, turn, turning), dim=1)
        self.state, self.steps = self.state + 0.02 * change, self.steps + 1
        fallen = (self.state[:, 0].abs() > 2.4) | (self.state[:, 2].abs() > math.radians(12))
        cut = ~fallen & (self.steps >= self.LIMIT)
        ended = fallen | cut
        lengths = self.steps[ended]
        self.state = torch.where(ended.unsqueeze(1), self.start(ENVS), self.state)
        self.steps = self.steps * ~ended
        return torch.ones(ENVS), fallen, cut, lengths


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
        super().__init__(env, Policy(), HIDDEN, HIDDEN, num_layers=1, num_envs=ENVS)
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


def advantages_of(rollout, last_value):
    """GAE (Schulman et al. 2016) over [ENVS, STEPS]; an episode's end, by fall or limit, is worth 0."""
    following, running = last_value, torch.zeros(ENVS)
    advantages = torch.zeros(ENVS, STEPS)
    for t in reversed(range(STEPS)):
        keep = (~rollout["ended"][:, t]).float()
        delta = rollout["reward"][:, t] + GAMMA * keep * following - rollout["values"][:, t]
        running = delta + GAMMA * LAMBDA * keep * running
        advantages[:, t], following = running, rollout["values"][:, t]
    return advantages


def train(updates, seed, forget=False):
    """Mean length of the episodes that ended in the first and in the last tenth of the updates."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    env = CartPole()
    agent = Agent(env, clip_range=5.0)
    agent.activate_actions(["push"], [1])
    optimizer = torch.optim.Adam(agent.parameters(), lr=2.5e-3)
    dones, lengths = torch.ones(ENVS, dtype=torch.bool), []
    for update in range(updates):
        h, c = (memory[0].transpose(0, 1) for memory in agent.get_memory())
        steps = []
        for _ in range(STEPS):
            td = TensorDict({"env_obs": env.observe(), "dones": dones | forget}, batch_size=[ENVS])
            with torch.no_grad():
                agent(td)
            td["reward"], fallen, cut, ended = env.step(td["actions"][:, 1])
            dones = td["ended"] = fallen | cut
            lengths += [(update, float(length)) for length in ended]
            steps.append(td)
        rollout = torch.stack(steps, dim=1)
        memory = agent.get_memory()
        with torch.no_grad():
            last = agent(TensorDict({"env_obs": env.observe(), "dones": dones | forget}, batch_size=[ENVS]))["values"]
        agent.set_memory(memory)
        advantages = advantages_of(rollout, last)
        returns = advantages + rollout["values"]
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        segments = TensorDict({**rollout.select("env_obs", "dones"), "lstm_h": h, "lstm_c": c}, batch_size=[ENVS])
        for rows in (chunk for _ in range(EPOCHS) for chunk in torch.randperm(ENVS).chunk(MINIBATCHES)):
            result = agent(segments[rows], action=rollout["actions"][rows])
            ratio = (result["act_log_prob"] - rollout["act_log_prob"][rows]).exp()
            surrogate = torch.minimum(ratio * advantages[rows], ratio.clamp(1 - CLIP, 1 + CLIP) * advantages[rows])
            error = (result["value"].squeeze(-1) - returns[rows]).square()
            optimizer.zero_grad()
            (0.5 * error - surrogate - 0.01 * result["entropy"]).mean().backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()
            agent.clip_weights()
    tenth = max(1, updates // 10)
    first = [length for update, length in lengths if update < tenth]
    final = [length for update, length in lengths if update >= updates - tenth] or [CartPole.LIMIT]
    return sum(first) / len(first), sum(final) / len(final)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forget", action="store_true", help="zero the LSTM's state at each step")
    options = parser.parse_args()
    first, final = train(options.updates, options.seed, options.forget)
    print(f"mean episode length: {first:.0f} at first, {final:.0f} at last")
