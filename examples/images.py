"""Images from gymnasium, a custom CNN, action masks, greedy evaluation, and acting in plain gymnasium.

    python examples/images.py [--steps 30000]

A walker in a room with pillars looks for the goal. Moves into a wall are masked; the mask is computed from the image,
so it is the same in rollout, update and deployment.
"""

import argparse

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tensordict import TensorDict
from torch import nn

from metta_fastagent.train import TrainConfig, VectorAgent, load_agent, train

SIZE, PIXELS = 8, 3  # cells per side, walls included; pixels per cell
LIMIT = 30  # steps per episode
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
WALKER, WALL, GOAL = range(3)  # channels of the image


class Room(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(0, 255, (SIZE * PIXELS, SIZE * PIXELS, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(len(MOVES))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cells, self.steps = np.zeros((SIZE, SIZE, 3), np.uint8), 0
        self.cells[[0, -1], :, WALL] = self.cells[:, [0, -1], WALL] = self.cells[2:-2:3, 2:-2:3, WALL] = 255
        free = np.argwhere(self.cells[:, :, WALL] == 0)
        self.place, self.goal = map(tuple, self.np_random.choice(free, 2, replace=False))
        self.cells[(*self.goal, GOAL)] = 255
        return self.image(), {}

    def image(self):
        cells = self.cells.copy()
        cells[(*self.place, WALKER)] = 255
        return cells.repeat(PIXELS, 0).repeat(PIXELS, 1)

    def step(self, action):
        place, self.steps = tuple(np.add(self.place, MOVES[action])), self.steps + 1
        bumped, found = bool(self.cells[(*place, WALL)]), place == self.goal
        self.place = self.place if bumped else place
        return self.image(), float(found), found, self.steps >= LIMIT, {"bumped": bumped}


def allowed_moves(images):
    """bool [..., 4]: which moves from the walker's cell do not end in a wall."""
    cells = images[..., ::PIXELS, ::PIXELS, :] > 0
    walker, wall = cells[..., WALKER], cells[..., WALL]
    blocked = [(walker & wall.roll((-down, -right), (-2, -1))).any(-1).any(-1) for down, right in MOVES]
    return ~torch.stack(blocked, dim=-1)


class Encoder(nn.Sequential):
    """Images [rows, height, width, 3] from 0 to 1, as VectorAgent passes them, to features [rows, 64]."""

    def __init__(self):
        layers = nn.Conv2d(3, 16, PIXELS, stride=PIXELS), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten()
        super().__init__(*layers, nn.Linear(32 * (SIZE - 2) ** 2, 64), nn.ReLU())

    def forward(self, images):
        return super().forward(images.permute(0, 3, 1, 2))


class Agent(VectorAgent):
    def __init__(self, env, **kwargs):
        super().__init__(env, Encoder(), hidden_size=64, **kwargs)

    def forward(self, td, state=None, action=None):
        td["action_mask"] = allowed_moves(td["env_obs"])
        return super().forward(td, state, action)


def make_env(num_envs, device):
    return SyncVectorEnv([Room] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


def play_greedily(agent, episodes):
    """Play in plain, non-vectorized gymnasium; return the number of goals found and of moves into a wall."""
    env, found, bumps = Room(), 0, 0
    for seed in range(episodes):
        image, _ = env.reset(seed=seed)
        start, over = True, False
        while not over:
            entries = {"env_obs": torch.from_numpy(image).unsqueeze(0), "dones": torch.tensor([start])}
            with torch.no_grad(), agent.greedy():
                actions = agent(TensorDict(entries, batch_size=[1]))["actions"]
            # (type, parameter) pairs [1, 2]: a Discrete action is the parameter
            image, _, terminated, truncated, info = env.step(actions[0, 1].item())
            start, over = False, terminated or truncated
            found, bumps = found + terminated, bumps + info["bumped"]
    return found, bumps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30_000)
    config = TrainConfig(steps=parser.parse_args().steps, num_envs=64, epochs=4, lr=1e-3, ent_coef=0.01)
    run = train(config, make_env=make_env, make_agent=Agent)
    torch.set_num_threads(1)  # several threads would wait for each other in steps this small
    # a checkpoint only holds names, which another program cannot import from a script
    agent, _, _ = load_agent(run.folder / "best.pt", make_env=make_env, make_agent=Agent)
    found, bumps = play_greedily(agent, 100)
    print(f"greedy, in plain gymnasium: {found} goals found in 100 episodes, {bumps} moves into a wall")
