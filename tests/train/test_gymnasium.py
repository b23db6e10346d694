"""The adapter of gymnasium's vector environments: actions, observations, seeds and each autoreset mode."""

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is an extra")

from gymnasium import spaces  # noqa: E402
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv  # noqa: E402
from gymnasium.vector.utils import batch_space  # noqa: E402
from gymnasium.wrappers import NormalizeObservation as NormalizeRow  # noqa: E402
from gymnasium.wrappers import NormalizeReward as NormalizeRowReward  # noqa: E402
from gymnasium.wrappers.utils import RunningMeanStd  # noqa: E402
from gymnasium.wrappers.vector import NormalizeObservation, NormalizeReward  # noqa: E402

from metta_fastagent.train import TrainConfig, cli, load_agent  # noqa: E402
from metta_fastagent.train.environments import ProtocolError, make_environment  # noqa: E402
from metta_fastagent.train.environments.gym import GymnasiumEnvironment  # noqa: E402
from metta_fastagent.train.evaluate import ROWS  # noqa: E402
from metta_fastagent.train.run import keep_best, prepare, run_updates  # noqa: E402
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
    finished, returns, lengths = trainer.collect().tolist()
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
    assert lengths == valid.sum() - trainer.episode_lengths.sum()


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


class Clock(VectorEnv):
    """Observes the step, 1 to 3, then is truncated or terminal; with the given autoreset mode and key for infos."""

    def __init__(self, mode, said, key, terminal=False):
        self.num_envs, self.mode, self.key, self.terminal = 2, mode, key, terminal
        self.metadata = {} if said is None else {"autoreset_mode": said}
        self.single_observation_space, self.single_action_space = spaces.Box(0, 9, (1,)), spaces.Discrete(2)
        self.observation_space, self.action_space = (
            batch_space(space, 2) for space in (self.single_observation_space, self.single_action_space)
        )

    def observe(self):
        return np.full((2, 1), self.t, np.float32)

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return self.observe(), {}

    def step(self, actions):
        self.t = 0 if self.t == 3 else self.t + 1
        observations, ended = self.observe(), np.full(2, self.t == 3)
        infos = {self.key: observations, f"_{self.key}": ended} if self.key and self.t == 3 else {}
        if self.mode == AutoresetMode.SAME_STEP and self.t == 3:
            observations, _ = self.reset()
        terminals = ended & self.terminal
        return observations, np.zeros(2), terminals, ended, infos


def clock_steps(*arguments):
    env = make_environment(lambda num_envs, device: Clock(*arguments), 2, CPU)
    env.reset(0)
    return [env.step(actions_of(0)) for _ in range(4)]


@pytest.mark.parametrize("key", ["final_obs", "final_observation", None])
@pytest.mark.parametrize(
    "form", [lambda mode: mode, lambda mode: mode.value, lambda mode: mode.name, lambda mode: None]
)
@pytest.mark.parametrize("mode", MODES)
def test_the_last_observation_of_a_truncated_episode_is_its_own_or_the_step_is_refused(mode, form, key):
    same_step = mode == AutoresetMode.SAME_STEP
    if form(mode) is None:
        with pytest.raises(
            ProtocolError, match=r"autoreset_mode.*: got None in .*, expected one of AutoresetMode\.NEXT"
        ):
            clock_steps(mode, None, key)
    elif same_step and key is None:
        with pytest.raises(ProtocolError, match=r"mode SAME_STEP and no final_obs in .* that ends rows \[0, 1\]"):
            clock_steps(mode, form(mode), key)
    else:
        steps = clock_steps(mode, form(mode), key)
        assert steps[2].truncations.all() and steps[2].final_observations.tolist() == [[3], [3]]
        assert steps[2].observations.tolist() == [[3 * (mode == AutoresetMode.NEXT_STEP)]] * 2
        assert [step.valid is None or step.valid.all().item() for step in steps] == [
            *[True] * 3,
            mode != AutoresetMode.NEXT_STEP,
        ]


@pytest.mark.parametrize("said", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
@pytest.mark.parametrize("key", ["final_obs", "final_observation"])
def test_a_mode_that_the_infos_contradict_is_refused(said, key):
    with pytest.raises(
        ProtocolError, match=f"got autoreset mode {said.name} and {key} in the infos.*or mode SAME_STEP"
    ):
        clock_steps(AutoresetMode.SAME_STEP, said, key)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_is_terminal_and_truncated_is_terminal(mode):
    step = clock_steps(mode, mode, None, True)[2]
    assert step.terminals.all() and not step.truncations.any()


class Hooks(NormalizeObservation):
    """Has hooks of its own; the state is that of its rows alone."""

    action_names = ("push",)

    def scripted_actions(self):
        return np.zeros((self.num_envs, 2), np.int32)

    def state_dict(self):
        return {"rows": torch.arange(self.num_envs)}

    def load_state_dict(self, state):
        self.loaded = state["rows"].tolist()


class OwnMean(gymnasium.vector.VectorObservationWrapper):
    """Normalises by a mean of its own, which its state has."""

    mean, count = 0.0, 0

    def observations(self, observations):
        self.mean, self.count = self.mean + observations.mean() / 8, self.count + 1
        return observations - np.float32(self.mean)

    def state_dict(self):
        return {"mean": float(self.mean), "count": self.count}

    def load_state_dict(self, state):
        self.mean, self.count = state["mean"], state["count"]


def carts(num_envs, wrap=lambda env: env, kind=SyncVectorEnv):
    return kind([lambda: wrap(gymnasium.make("CartPole-v1"))] * num_envs)


def by_row(rms):
    return np.average([each.mean for each in rms], axis=0, weights=[each.count for each in rms]).tolist()


NORMALIZED = {
    "vector": (lambda n, d: NormalizeObservation(carts(n)), lambda env: by_row([env.obs_rms])),
    "reward": (lambda n, d: NormalizeReward(NormalizeObservation(carts(n))), lambda env: by_row([env.return_rms])),
    "hooks": (lambda n, d: Hooks(carts(n)), lambda env: by_row([env.obs_rms])),
    "own": (lambda n, d: OwnMean(carts(n)), lambda env: env.mean),
    "rows": (lambda n, d: carts(n, NormalizeRow), lambda env: by_row(env.get_attr("obs_rms"))),
    "row rewards": (lambda n, d: carts(n, NormalizeRowReward), lambda env: by_row(env.get_attr("return_rms"))),
    "processes": (lambda n, d: carts(n, NormalizeRow, AsyncVectorEnv), lambda env: by_row(env.get_attr("obs_rms"))),
}


@pytest.mark.parametrize("name", NORMALIZED)
def test_statistics_of_training_reach_checkpoint_evaluation_and_load_agent(name, tmp_path):
    make_env, read = NORMALIZED[name]
    seen = []

    def recording(num_envs, device):
        seen.append(make_env(num_envs, device))
        return seen[-1]

    config = TrainConfig(steps=64, num_envs=4, segment_length=8, minibatches=2, evaluation_interval=0)
    # read before the environments are closed
    run = prepare(config.to_dict(), tmp_path, make_env=recording)
    with run.lock:
        run_updates(run, keep_best)
    trained = read(seen[0])
    assert run.trainer.env.state_dict() is not None
    evaluation = run.evaluation_env
    evaluation.load_statistics(run.trainer.env.state_dict())
    means = [trained, read(seen[1])]
    evaluation.step(torch.zeros(ROWS, 2, dtype=torch.int32))
    if name != "own":
        assert read(seen[1]) == means[1], "evaluation updates its statistics"
    assert read(seen[0]) == trained
    _, loaded, _ = load_agent(tmp_path / "checkpoint.pt", 3, make_env=recording)
    resumed = prepare({}, None, tmp_path / "checkpoint.pt", make_env=recording)
    means += [read(seen[2]), read(seen[3])]
    for mean, after_new_episodes in zip(means, (0, 0, 0, 0.2), strict=True):
        np.testing.assert_allclose(mean, trained, rtol=1e-5 + after_new_episodes, atol=1e-6 + after_new_episodes)
    for env in (run.trainer.env, evaluation, loaded, resumed.trainer.env, resumed.evaluation_env):
        env.close()


def test_hooks_of_a_vector_environment_are_used():
    env = make_environment(lambda num_envs, device: Hooks(carts(num_envs)), 2, CPU)
    assert env.action_names == ["push"]
    env.step(env.scripted_actions())
    env.load_state_dict(env.state_dict())
    assert env.source._vector.loaded == [0, 1]
    other = make_environment(lambda num_envs, device: Hooks(carts(num_envs)), 3, CPU)
    other.load_statistics(env.state_dict())
    assert not hasattr(other.source._vector, "loaded"), "rows of another number"


def test_rows_of_another_number_get_the_statistics_of_all_samples_together():
    samples = np.random.default_rng(0).normal(size=(3, 40, 4)) * [[[1.0]], [[3.0]], [[0.2]]] + [
        [[0.0]],
        [[4.0]],
        [[-2]],
    ]
    three, two = (GymnasiumEnvironment(carts(number, NormalizeRow)) for number in (3, 2))
    together = RunningMeanStd(shape=(4,), epsilon=0.0)
    for row, each in zip(three._vector.get_attr("obs_rms"), samples, strict=True):
        row.count = 0.0
        row.update(each)
    together.update(samples.reshape(-1, 4))
    two.load_statistics(three.state_dict())
    for each in two._vector.get_attr("obs_rms"):
        for name in ("mean", "var", "count"):
            np.testing.assert_allclose(getattr(each, name), getattr(together, name), rtol=1e-5)


def test_closing_after_the_processes_have_died_leaves_no_error_for_the_destructor():
    makers = [lambda row=row: Count(row) for row in (0, 1)]
    inner = AsyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    env = GymnasiumEnvironment(NormalizeReward(inner))
    env.reset(seed=0)
    inner.step_async(np.full(2, 2))
    for process in inner.processes:
        process.kill()
        process.join()
    for pipe in inner.parent_pipes:
        # the answers that were sent before
        while pipe.poll():
            try:
                pipe.recv()
            except (EOFError, OSError):
                break
    env.close()
    assert inner.closed


class Masked(Count):
    """Allows the actions of which the binary digits of episode and step say so, by infos or by a method."""

    def mask(self):
        digits = 1 + (5 * self.episode + self.t) % 14
        flat = np.array([digits >> bit & 1 for bit in range(4)], dtype=np.int8)
        return tuple(np.array([*part, 1], dtype=np.int8) for part in (flat[:2], flat[2:])) if self.pair else flat

    def observe(self):
        return np.array([self.episode, self.t], dtype=np.float64)

    def reset(self, **options):
        observation, _ = super().reset(**options)
        return observation, self.infos()

    def step(self, action):
        *step, _ = super().step(action)
        return (*step, self.infos())

    def infos(self):
        return {"action_mask": self.mask()} if self.by_infos else {}


def masked_vector(mode, by_infos, pair=False):
    class Kind(Masked):
        pass

    if not by_infos:
        Kind.action_masks = Masked.mask
    Kind.by_infos, Kind.pair = by_infos, pair
    space = spaces.MultiDiscrete([3, 3]) if pair else None
    return SyncVectorEnv([lambda row=row: Kind(row, space) for row in (0, 1)], autoreset_mode=mode)


@pytest.mark.parametrize("by_infos", [True, False], ids=["infos", "method"])
@pytest.mark.parametrize("mode", MODES)
def test_masks_are_those_of_the_observations(mode, by_infos):
    env = make_environment(lambda num_envs, device: masked_vector(mode, by_infos), 2, CPU)
    observations = env.reset(0)
    for _ in range(9):
        digits = 1 + (5 * observations[:, 0] + observations[:, 1]).long() % 14
        expected = digits.unsqueeze(1) >> torch.arange(4) & 1
        assert env.action_mask.tolist() == expected.bool().tolist()
        observations = env.step(actions_of(1)).observations


@pytest.mark.parametrize("by_infos", [True, False], ids=["infos", "method"])
def test_masks_of_types_and_parameters_are_joined(by_infos):
    vector = masked_vector(AutoresetMode.SAME_STEP, by_infos, pair=True)
    env = make_environment(lambda num_envs, device: vector, 2, CPU)
    for actions in (1, 2):
        types, parameters = (torch.tensor(np.stack(part)).bool() for part in zip(*vector.call("mask"), strict=True))
        assert torch.equal(env.action_mask, (types.unsqueeze(2) & parameters.unsqueeze(1)).flatten(1))
        env.step(actions_of(actions))
