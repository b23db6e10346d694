"""Train briefly on CartPole, load the best checkpoint, and act with it.

python examples/act_from_checkpoint.py
"""

import torch
from tensordict import TensorDict

from metta_fastagent.train import TrainConfig, load_agent, train

ROWS, STEPS = 4, 200

run = train(TrainConfig.for_environment("gym:CartPole-v1", steps=20_000, lr=2e-3))

torch.set_num_threads(1)  # several threads would wait for each other in steps this small
agent, env, _ = load_agent(run.folder / "best.pt", num_envs=ROWS)
observations, starts, episodes = env.reset(seed=0), torch.ones(ROWS, dtype=torch.bool), 0
for _ in range(STEPS):
    # `dones` marks first observations, where the agent forgets the previous episode.
    td = TensorDict({"env_obs": observations, "dones": starts}, batch_size=[ROWS])
    with torch.no_grad():
        actions = agent(td)["actions"]
    step = env.step(actions)
    observations, starts = step.observations, step.terminals | step.truncations
    episodes += int(starts.sum())
print(f"{ROWS * STEPS} steps, {episodes} episodes")
