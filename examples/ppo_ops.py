"""Recurrent PPO in one file, with only the operations: no mixin, no TensorDict, no trainer.

    python examples/ppo_ops.py             train with metta_fastagent.ops
    python examples/ppo_ops.py --plain     the same with torch.distributions and a loop of nn.LSTM calls
    python examples/ppo_ops.py --compare   alternate both, and print environment steps per CPU second

The task is CartPole without velocities, so the agent needs memory. The two versions differ only in `Agent`.
"""

import argparse
import statistics
import time

import gymnasium
import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical

import metta_fastagent
from metta_fastagent import ops

N, T, HIDDEN = 64, 32, 64  # environments, steps in a segment, features
EPOCHS, MINIBATCHES = 4, 4
LR, GAMMA, LAMBDA, CLIP, ENTROPY, VALUE, GRAD_NORM = 2.5e-3, 0.98, 0.95, 0.2, 0.01, 0.01, 0.5
COEFFICIENTS = {"clip_coef": CLIP, "vf_clip_coef": 0.0, "vf_coef": VALUE, "ent_coef": ENTROPY}


class Agent(nn.Module):
    """An encoder, one LSTM layer and two heads. States are pairs [1, B, HIDDEN]; `starts` is bool [T, B]."""

    def __init__(self, inputs, actions):
        super().__init__()
        self.encoder = nn.Linear(inputs, HIDDEN)
        self.lstm = nn.LSTM(HIDDEN, HIDDEN)
        self.actor, self.critic = nn.Linear(HIDDEN, actions), nn.Linear(HIDDEN, 1)

    def forward(self, observations, state, starts):
        """Logits [T * B, A], values [T * B] and the state after [T, B] steps, reset where an episode starts."""
        hidden = torch.tanh(self.encoder(observations))
        output, state = self.recur(hidden, state, starts)
        output = output.flatten(0, 1)
        return self.actor(output), self.critic(output).squeeze(-1), state

    def recur(self, hidden, state, starts):
        return metta_fastagent.lstm(self.lstm, hidden, state, starts)

    def act(self, logits):
        action, log_prob, _, _ = ops.sample_actions(logits)
        return action, log_prob

    def advantages(self, rollout, following):
        """Generalized advantage estimates [T, N]; an end, by termination or time limit, has value 0."""
        rewards, values, ends = (rollout[name].t() for name in ("rewards", "values", "ends"))
        return ops.advantages(rewards, values, ends, following, torch.zeros_like(values), GAMMA, LAMBDA).t()

    def loss(self, logits, value, batch, advantages):
        old = batch["log_probs"], batch["values"], advantages, batch["returns"]
        return ops.ppo_loss(logits, batch["actions"], value, *old, valid=batch["valid"], **COEFFICIENTS)[0]


class PlainAgent(Agent):
    """The same in the style of CleanRL."""

    def recur(self, hidden, state, starts):
        outputs, keep = [], 1.0 - starts.float().unsqueeze(-1)
        for step, kept in zip(hidden.split(1), keep, strict=True):
            output, state = self.lstm(step, (kept * state[0], kept * state[1]))
            outputs.append(output)
        return torch.cat(outputs), state

    def act(self, logits):
        distribution = Categorical(logits=logits)
        action = distribution.sample()
        return action, distribution.log_prob(action)

    def advantages(self, rollout, following):
        values, keep = rollout["values"], (~rollout["ends"]).to(rollout["values"])
        following = torch.cat([values[1:], following.unsqueeze(0)])
        deltas = rollout["rewards"] + GAMMA * keep * following - values
        result, running = torch.empty_like(values), torch.zeros(N)
        for t in reversed(range(T)):
            running = result[t] = deltas[t] + GAMMA * LAMBDA * keep[t] * running
        return result

    def loss(self, logits, value, batch, advantages):
        distribution = Categorical(logits=logits)
        ratio = (distribution.log_prob(batch["actions"]) - batch["log_probs"]).exp()
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        value_error = 0.5 * (value - batch["returns"]).square()
        valid = batch["valid"].float()
        return (valid * (VALUE * value_error - surrogate - ENTROPY * distribution.entropy())).sum() / valid.sum()


class Positions:
    """N CartPoles that show position and angle. The step after an episode's end only restarts it and is not `valid`."""

    def __init__(self, seed):
        self.envs = gymnasium.make_vec("CartPole-v1", N, vectorization_mode="vector_entry_point")
        self.observations = self.tensor(self.envs.reset(seed=seed)[0])
        self.ended, self.starts = torch.zeros(N, dtype=torch.bool), torch.ones(N, dtype=torch.bool)
        self.running, self.returns = np.zeros(N), []

    def tensor(self, observations):
        return torch.from_numpy(observations[:, [0, 2]] * np.float32([1, 10]))

    def step(self, actions):
        """Reward, end and validity of this step, each [N]."""
        observations, rewards, terminated, truncated, _ = self.envs.step(actions.numpy())
        valid, ended = ~self.ended, torch.from_numpy(terminated | truncated)
        self.running += rewards
        self.returns += self.running[ended.numpy()].tolist()
        self.running[ended.numpy()] = 0
        self.observations, self.starts, self.ended = self.tensor(observations), self.ended, ended
        return torch.from_numpy(rewards), ended, valid


class PPO:
    """An agent, its environments and its optimizer; `update` collects a rollout of N * T steps and learns from it."""

    def __init__(self, plain=False, seed=1):
        torch.manual_seed(seed)
        self.env = Positions(seed)
        self.agent = (PlainAgent if plain else Agent)(2, 2)
        self.optimizer = torch.optim.Adam(self.agent.parameters(), lr=LR, eps=1e-5)
        self.state = torch.zeros(1, N, HIDDEN), torch.zeros(1, N, HIDDEN)

    @torch.no_grad()
    def rollout(self):
        """The rollout's tensors by name, each [T, N, ...], with the state before its first step."""
        first_state, steps = self.state, []
        for _ in range(T):
            observations, starts = self.env.observations, self.env.starts
            logits, value, self.state = self.agent(observations.unsqueeze(0), self.state, starts.unsqueeze(0))
            action, log_prob = self.agent.act(logits)
            steps.append((observations, starts, action, log_prob, value, *self.env.step(action)))
        names = ("observations", "starts", "actions", "log_probs", "values", "rewards", "ends", "valid")
        rollout = dict(zip(names, map(torch.stack, zip(*steps, strict=True)), strict=True))
        _, following, _ = self.agent(self.env.observations.unsqueeze(0), self.state, self.env.starts.unsqueeze(0))
        rollout["advantages"] = self.agent.advantages(rollout, following)
        rollout["returns"] = rollout["advantages"] + rollout["values"]
        return rollout, first_state

    def update(self):
        rollout, (h, c) = self.rollout()
        for _ in range(EPOCHS):
            # whole segments, which start from the state that the rollout had there
            for rows in torch.randperm(N).chunk(MINIBATCHES):
                batch = {name: tensor[:, rows] for name, tensor in rollout.items()}
                loss = self.loss(batch, (h[:, rows], c[:, rows]))
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.agent.parameters(), GRAD_NORM)
                self.optimizer.step()

    def loss(self, batch, state):
        logits, value, _ = self.agent(batch["observations"], state, batch["starts"])
        flat = {name: tensor.flatten(0, 1) for name, tensor in batch.items()}
        valid, advantages = flat["valid"].float(), flat["advantages"]
        valid = valid / valid.sum()
        mean = (valid * advantages).sum()
        deviation = (valid * (advantages - mean).square()).sum().sqrt()
        return self.agent.loss(logits, value, flat, (advantages - mean) / (deviation + 1e-8))


def train(plain, steps, seed):
    ppo, started = PPO(plain, seed), time.process_time()
    updates = -(-steps // (N * T))
    for update in range(1, updates + 1):
        for group in ppo.optimizer.param_groups:
            group["lr"] = LR * (1 - (update - 1) / updates)
        ppo.update()
        if update % 20 == 0 or update == updates:
            rate = update * N * T / (time.process_time() - started)
            mean = statistics.fmean(ppo.env.returns[-100:])
            print(f"{update * N * T:>9,} steps, mean return {mean:5.1f}, {rate:,.0f} steps per CPU second")


def compare(rounds=12):
    """Environment steps per CPU second of both, alternating. The best update counts, as it is disturbed least."""
    runs = {"ops": PPO(plain=False), "plain": PPO(plain=True)}
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, ppo in runs.items():
            started = time.process_time()
            ppo.update()
            seconds[name].append(time.process_time() - started)
    rates = {name: N * T / min(each) for name, each in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:6} {rate:7,.0f} steps per CPU second")
    print(f"ratio  {rates['ops'] / rates['plain']:7.2f}")
    return rates


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="torch.distributions and a loop of nn.LSTM calls")
    parser.add_argument("--compare", action="store_true", help="time both in turns instead of training")
    parser.add_argument("--steps", type=int, default=400_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="products this small run best on one (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.compare:
        compare()
    else:
        train(options.plain, options.steps, options.seed)
