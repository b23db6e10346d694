"""That an evaluation plays with a rollout memory of its own."""

from functools import partial

import pytest
import torch

from metta_fastagent.train.agents import one_step_segments
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.environments import make_environment
from metta_fastagent.train.environments.memory import MemoryEnvironment
from metta_fastagent.train.evaluate import ROWS, Evaluation, evaluate, learned_policy
from metta_fastagent.train.trainer import Trainer

SMALL_ROOM = partial(MemoryEnvironment, room_size=2, delay=1, time_limit=4)


def make_trainer(num_envs: int) -> Trainer:
    config = TrainConfig.for_environment("memory", num_envs=num_envs, segment_length=4, minibatches=1)
    return Trainer(config, SMALL_ROOM)


def evaluated(trainer: Trainer) -> Evaluation:
    return evaluate(trainer.agent, make_environment(SMALL_ROOM, ROWS, trainer.device), trainer.config, worlds=2)


@pytest.mark.parametrize("num_envs", [2, ROWS, 2 * ROWS])
def test_an_evaluation_leaves_memory_and_random_state_as_they_were(num_envs):
    trainer = make_trainer(num_envs)
    trainer.collect()
    h, c = trainer.memory()
    before, random_state = (h.clone(), c.clone()), torch.get_rng_state()
    evaluation = evaluated(trainer)
    assert len(evaluation.learned) == 2 and evaluation.scripted == (1.0, 1.0)
    now = trainer.memory()
    assert (now[0].data_ptr(), now[1].data_ptr()) == (h.data_ptr(), c.data_ptr())
    assert torch.equal(now[0], before[0]) and torch.equal(now[1], before[1])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert trainer.agent.policy.num_envs == num_envs


def test_the_result_depends_neither_on_the_memory_nor_on_the_number_of_rows_in_training():
    few, many = make_trainer(2), make_trainer(2 * ROWS)
    many.collect()
    many.agent.policy.load_state_dict(few.agent.policy.state_dict())
    results = [evaluated(trainer) for trainer in (few, many)]
    assert results[0] == results[1]


def test_greedy_takes_the_likeliest_action():
    trainer = make_trainer(2 * ROWS)
    agent, starts, cut = trainer.agent.policy, trainer.dones, trainer.truncateds
    segments = one_step_segments(trainer.observations, trainer.memory(), {"dones": starts, "truncateds": cut})
    with torch.no_grad():
        log_probs = agent(segments, action=torch.zeros(2 * ROWS, 1, 2, dtype=torch.int32))["full_log_probs"].flatten(
            0, 1
        )
        actions = learned_policy(agent, trainer.env, greedy=True)(trainer.observations, starts, cut)
    index = agent._convert_action_to_logit_index(actions)
    assert torch.equal(log_probs.gather(1, index.long().view(-1, 1)).squeeze(1), log_probs.max(1).values)
