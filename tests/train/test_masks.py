"""Masks of legal actions in the trainer: the same ones in rollout, update, evaluation and load_agent."""

import copy

import pytest
import torch
from tensordict import TensorDict
from test_ratio import built

from metta_fastagent import use_backend
from metta_fastagent.agents.vector import VectorAgent
from metta_fastagent.environment import Environment
from metta_fastagent.train import TrainConfig, load_agent, train
from metta_fastagent.train.environments import ProtocolError, make_environment
from metta_fastagent.train.evaluate import ROWS, play, random_policy
from metta_fastagent.train.trainer import Trainer, TrainingDiverged

CPU = torch.device("cpu")
LIMITS = (0, 3, 1)
NUM_ACTIONS = 7
# the first logit of each type
OFFSETS = torch.tensor([0, 1, 5])
SIZES = {"num_envs": 8, "segment_length": 4, "minibatches": 2, "steps": 6 * 32, "evaluation_interval": 3}
pytestmark = pytest.mark.usefixtures("one_thread")


class Doors:
    """Two of seven actions are legal, others at each step; the one that pays is shown. Illegal ones are counted."""

    max_action_args = LIMITS
    illegal, steps = 0, 0

    def __init__(self, num_envs, device):
        self.rows, self.generator = num_envs, torch.Generator()

    def mask(self):
        return self.legal

    def observe(self):
        self.legal = torch.zeros(self.rows, NUM_ACTIONS, dtype=torch.bool)
        self.pays, other = torch.rand(self.rows, NUM_ACTIONS, generator=self.generator).topk(2).indices.unbind(1)
        self.legal[torch.arange(self.rows), self.pays] = self.legal[torch.arange(self.rows), other] = True
        return torch.nn.functional.one_hot(self.pays, NUM_ACTIONS).float()

    def reset(self, seed):
        self.generator.manual_seed(seed)
        self.time = 0
        return self.observe(), self.mask()

    def step(self, actions):
        index = OFFSETS[actions[:, 0].long()] + actions[:, 1]
        type(self).illegal += int((~self.legal[torch.arange(self.rows), index]).sum())
        type(self).steps += self.rows
        self.time += 1
        rewards, ends = (index == self.pays).float(), torch.full((self.rows,), self.time % 5 == 0)
        return self.observe(), rewards, ends, None, None, None, self.mask()

    def state_dict(self):
        kept = {"legal": self.legal.clone(), "pays": self.pays.clone(), "generator": self.generator.get_state()}
        return {"time": self.time, **kept}

    def load_state_dict(self, state):
        self.time, self.legal, self.pays = state["time"], state["legal"].clone(), state["pays"].clone()
        self.generator.set_state(state["generator"])


class Asked(Doors):
    """Gives its masks by a method, on request only."""

    def reset(self, seed):
        return super().reset(seed)[0]

    def step(self, actions):
        return super().step(actions)[:3]

    def action_masks(self):
        return self.legal


def agent(env, **kwargs):
    return VectorAgent(env, hidden_size=16, **kwargs)


@pytest.fixture(params=[Doors, Asked], ids=["by step", "by method"])
def doors(request):
    """An environment class of its own, whose counts start at 0."""
    return type("Doors", (request.param,), {})


def test_no_illegal_action_is_played_in_training_or_evaluation(doors, tmp_path):
    run = train(TrainConfig(**SIZES), make_env=doors, make_agent=agent, out=tmp_path, quiet=True)
    # 6 updates of 32 steps, two evaluations during training, and 16 worlds of two policies at the end, best.pt aside
    assert doors.steps >= 6 * 32 + 2 * 4 * 5 * ROWS + 16 * 2 * 5 * ROWS
    assert doors.illegal == 0 and run.trainer.experience.action_mask.sum(2).eq(2).all()
    loaded, env, _ = load_agent(tmp_path / "checkpoint.pt", 4, make_env=doors, make_agent=agent)
    td = {"env_obs": env.reset(0), "action_mask": env.action_mask}
    log_probs = loaded(TensorDict(td, [4]))["full_log_probs"]
    assert torch.equal(log_probs > -torch.inf, env.action_mask)


@pytest.mark.parametrize("backend", ["eager", pytest.param("native", marks=built)])
def test_the_ratio_is_one_with_masks_that_change_at_every_step(doors, backend):
    with use_backend(backend):
        trainer = Trainer(TrainConfig(**SIZES), doors, agent)
        with torch.no_grad():
            for parameter in trainer.agent.parameters():
                parameter.mul_(4)
        trainer.collect()
        trainer.collect()
        masks, rows = trainer.experience.action_mask, torch.arange(8)
        assert (masks[:, 1:] != masks[:, :-1]).any(2).float().mean() > 0.8
        segments, actions = trainer.experience.segments(rows), trainer.experience.actions
        ratios = {
            name: (trainer.agent(given, action=actions)["act_log_prob"] - trainer.experience.log_probs).exp()
            for name, given in (("stored", segments), ("none", segments.exclude("action_mask")))
        }
        assert (ratios["stored"] - 1).abs().max().item() <= 1e-5
        assert (ratios["none"] - 1).abs().min().item() > 1e-3


def test_a_resumed_run_equals_the_whole_run(doors):
    first = Trainer(TrainConfig(**SIZES), doors, agent)
    for _ in range(3):
        first.train_update()
    state = copy.deepcopy(first.state_dict())
    first.run(lambda row: None)
    second = Trainer(TrainConfig(**SIZES), doors, agent)
    second.load_state_dict(state)
    second.run(lambda row: None)
    for name, value in second.agent.state_dict().items():
        assert torch.equal(value, first.agent.state_dict()[name]), name


def test_random_play_is_uniform_over_the_legal_actions():
    env, counts = make_environment(Doors, 1000, CPU), torch.zeros(NUM_ACTIONS)
    act = random_policy(env, torch.Generator().manual_seed(0))
    for _ in range(10):
        actions = act(*[torch.zeros(1000)] * 3)
        counts += torch.bincount(OFFSETS[actions[:, 0].long()] + actions[:, 1], minlength=NUM_ACTIONS)
        env.step(actions)
    # 10,000 draws of a binomial with probability 1/7 have a deviation of 35
    assert (counts - 10_000 / 7).abs().max() < 5 * 35
    assert play(env, act, 0, 5).mean().item() == pytest.approx(2.5, abs=0.2)


def test_a_pair_masks_types_and_parameters():
    class Pairs(Doors):
        types = torch.tensor([[True, True, False]] * 2)
        parameters = torch.tensor([[True, False, True, False], [False, True, True, True]])

        def mask(self):
            return self.types, self.parameters

    env = make_environment(Pairs, 2, CPU)
    # type 0 has one parameter, type 1 four, type 2 two
    expected = [[1, 1, 0, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0]]
    assert env.action_mask.int().tolist() == expected
    env.step(torch.zeros(2, 2, dtype=torch.int32))
    assert env.action_mask.int().tolist() == expected


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([torch.ones(2, 7)], "reset: action_mask: got a float32 tensor of shape [2, 7] on cpu, expected a bool tensor"),
        ([torch.ones(2, 6).bool()], "reset: action_mask: got a bool tensor of shape [2, 6] on cpu, expected"),
        ([(torch.ones(2, 3).bool(), torch.ones(2, 3).bool())], "reset: action_mask: parameters: got a bool tensor of"),
        ([(torch.ones(2, 7).bool(), torch.ones(2, 4).bool())], "reset: action_mask: types: got a bool tensor of"),
        ([torch.ones(2, 7).bool(), None], "step: action_mask: got none, expected one as with the first observations"),
        ([None, torch.ones(2, 7).bool()], "step: action_mask: got one, expected none as with the first observations"),
        ([torch.ones(2, 7).bool(), [1, 2, 3]], "step: action_mask: got a list of length 3, expected a bool tensor"),
    ],
)
def test_a_wrong_mask_is_named(masks, message):
    class Wrong(Doors):
        given = iter(masks)

        def mask(self):
            return next(self.given)

    with pytest.raises(ProtocolError) as raised:
        Environment(Wrong(2, CPU), 2, CPU).step(torch.zeros(2, 2, dtype=torch.int32))
    assert str(raised.value).startswith(message)


def test_a_row_without_a_legal_action_is_named():
    class Closed(Doors):
        def mask(self):
            return self.legal & (torch.arange(self.rows) != 5).unsqueeze(1)

    trainer = Trainer(TrainConfig(**SIZES), Closed, agent)
    with pytest.raises((ProtocolError, TrainingDiverged)) as raised:
        trainer.train_update()
    assert str(raised.value) == "step: action_mask: got no legal action in row 5, expected at least one"
