"""The adapter of gymnasium's vector environments: actions, observations, seeds and each autoreset mode."""

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is an extra: pip install metta-fastagent[gymnasium]")

from gymnasium import spaces  # noqa: E402
from gymnasium.vector import AutoresetMode, SyncVectorEnv  # noqa: E402

from metta_fastagent.train import TrainConfig, cli  # noqa: E402
from metta_fastagent.train.environments import make_environment  # noqa: E402
from metta_fastagent.train.environments.gym import GymnasiumEnvironment  # noqa: E402
from metta_fastagent.train.trainer import Trainer  # noqa: E402

CPU = torch.device("cpu")
MODES = list(AutoresetMode)
SIZES = {"num_envs": 2, "segment_length": 8, "minibatches": 1}
pytestmark = pytest.mark.usefixtures("one_thread")


class Count(gymnasium.Env):
    """Observes episode and step; row 0 terminates after 2 steps, row 1 is truncated after 3. Pays the action."""

    observation_space = spaces.Box(0, 100, (2,), np.float64)

    def __init__(self, row, action_space=None):
        self.row, self.episode, self.action_space = row, 0, action_space or spaces.Discrete(4, start=2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t, self.drawn = self.episode + 1, 0, self.np_random.random()
        return self.observe(), {}

    def observe(self):
        return np.array([self.episode, self.t], dtype=np.float64)

    def step(self, action):
        self.t += 1
        end = self.t == self.row + 2
        return self.observe(), float(np.sum(action)), end and self.row == 0, end and self.row == 1, {}


def vector(mode, action_space=None):
    return SyncVectorEnv([lambda row=row: Count(row, action_space) for row in (0, 1)], autoreset_mode=mode)


def actions_of(parameter):
    return torch.tensor([[0, parameter]] * 2, dtype=torch.int32)


def first_steps(mode, number):
    env = make_environment(lambda num_envs, device: vector(mode), 2, CPU)
    env.source._vector.envs[0].episode = env.source._vector.envs[1].episode = 0
    first = env.reset(0)
    assert first.dtype == torch.float32 and first.tolist() == [[1, 0], [1, 0]]
    return [env.step(actions_of(1)) for _ in range(number)]


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_an_ended_row_has_both_observations(mode):
    _, second, third = first_steps(mode, 3)
    assert second.observations.tolist() == [[2, 0], [1, 2]] and second.final_observations is None
    assert (second.terminals.tolist(), second.truncations.tolist()) == ([True, False], [False, False])
    assert third.observations.tolist() == [[2, 1], [2, 0]] and third.final_observations.tolist() == [[2, 1], [1, 3]]
    assert (third.terminals.tolist(), third.truncations.tolist()) == ([False, False], [False, True])
    assert third.valid is None and third.rewards.tolist() == [3, 3]


def test_in_next_step_mode_the_step_that_restarts_is_not_valid():
    steps = first_steps(AutoresetMode.NEXT_STEP, 4)
    assert [step.observations.tolist() for step in steps[1:]] == [[[1, 2], [1, 2]], [[2, 0], [1, 3]], [[2, 1], [2, 0]]]
    assert steps[2].final_observations.tolist() == [[2, 0], [1, 3]]
    assert [step.valid.tolist() for step in steps] == [[True, True], [True, True], [False, True], [True, False]]
    # the end of what came after the first episode's end, so that the next observation starts an episode
    assert [step.terminals.tolist() for step in steps[1:]] == [[True, False], [True, False], [False, True]]
    assert [step.truncations.tolist() for step in steps[1:]] == [[False, False], [False, True], [False, False]]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_counts_the_same_episodes_and_learns_from_the_same_steps(mode):
    trainer = Trainer(TrainConfig(**SIZES, gamma=0.5), lambda num_envs, device: vector(mode))
    finished, returns = trainer.collect().tolist()
    experience = trainer.experience
    length = {0: 2, 1: 3}
    valid = torch.ones(2, 8, dtype=torch.bool) if experience.valid is None else experience.valid
    # a step in an episode starts from an observation that is not the episode's last one
    for row, last in length.items():
        assert (experience.observations[row, :, 1] < last)[valid[row]].all()
        assert (experience.observations[row, :, 1] == last)[~valid[row]].all()
    in_next_step_mode = mode == AutoresetMode.NEXT_STEP
    assert finished == (3 + 2 if in_next_step_mode else 4 + 2)
    starts = experience.dones | experience.truncateds
    assert torch.equal(starts & valid, (experience.observations[..., 1] == 0) & valid)
    # only truncated episodes are worth something at their end
    ends = experience.bootstrap_values != 0
    assert torch.equal(ends, experience.truncations) and not ends[0].any() and ends[1].sum() == 2
    assert returns == experience.rewards.sum() - trainer.episode_returns.sum()


def test_steps_that_only_restart_do_not_change_the_update():
    made = [Trainer(TrainConfig(**SIZES), lambda num_envs, device: vector(AutoresetMode.NEXT_STEP)) for _ in range(2)]
    for trainer, noise in zip(made, (0.0, 5.0), strict=True):
        torch.manual_seed(3)
        collect = trainer.collect

        def disturbed(collect=collect, trainer=trainer, noise=noise):
            finished = collect()
            # what a restarting step holds is not learned from
            trainer.experience.rewards[~trainer.experience.valid] += noise
            trainer.experience.log_probs[~trainer.experience.valid] -= noise
            return finished

        trainer.collect = disturbed
        trainer.train_update()
    for ours, theirs in zip(made[0].agent.parameters(), made[1].agent.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_discrete_actions_start_where_the_space_does():
    env = GymnasiumEnvironment(vector(AutoresetMode.SAME_STEP))
    assert env.max_action_args == [3]
    env.reset(0)
    assert env.step(actions_of(3)).rewards.tolist() == [5, 5]


def test_pairs_are_passed_on():
    env = GymnasiumEnvironment(vector(AutoresetMode.SAME_STEP, spaces.MultiDiscrete([3, 4])))
    assert env.max_action_args == [3, 3, 3]
    env.reset(0)
    assert env.step(torch.tensor([[2, 3], [1, 0]], dtype=torch.int32)).rewards.tolist() == [5, 1]


def test_rows_of_neighbouring_seeds_differ():
    env = GymnasiumEnvironment(vector(AutoresetMode.SAME_STEP))
    drawn = []
    for seed in (7, 8, 7):
        env.reset(seed)
        drawn.append([each.drawn for each in env._vector.envs])
    assert drawn[0] == drawn[2] and not set(drawn[0]) & set(drawn[1])


@pytest.mark.parametrize(
    ("spaces_of", "message"),
    [
        (
            {"action_space": spaces.Box(-1, 1, (2,))},
            r"action space: got Box\(.*\), expected Discrete, or MultiDiscrete of",
        ),
        ({"action_space": spaces.MultiDiscrete([2, 2, 2])}, r"action space: got MultiDiscrete\(\[2 2 2\]\), expected"),
    ],
    ids=["floats", "triples"],
)
def test_other_actions_are_refused(spaces_of, message):
    with pytest.raises(TypeError, match=message):
        GymnasiumEnvironment(vector(AutoresetMode.SAME_STEP, **spaces_of))


def test_the_command_trains_on_a_registered_environment(tmp_path, capsys):
    sizes = ["--num-envs", "4", "--segment-length", "8", "--minibatches", "2", "--steps", "64"]
    out = ["--quiet", "--out", str(tmp_path)]
    assert cli.main(["--env", "gym:CartPole-v1", *sizes, *out]) == 0
    assert "learned " in capsys.readouterr().out
    assert cli.main(["evaluate", str(tmp_path / "best.pt"), "--greedy"]) == 0
    assert capsys.readouterr().out.startswith("mean return ")
    assert cli.main(["--env", "gym:Nothing-v1", "--quiet"]) == 2
    err = capsys.readouterr().err
    assert "error: env: got 'gym:Nothing-v1' (" in err and err.count("\n") == 1


def test_a_vector_environment_with_its_own_way_of_stepping():
    # this one steps all rows with NumPy, in NEXT_STEP mode
    made = Trainer(TrainConfig(num_envs=4, minibatches=1), lambda n, device: gymnasium.make_vec("CartPole-v1", n))
    row = made.train_update()
    assert made.experience.valid is not None and row["episodes"] > 0
