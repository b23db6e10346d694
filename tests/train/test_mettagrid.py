"""The adapter of the real simulator: shapes, the mapping of actions, rewards, resets and seeds."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from metta_fastagent.train.environments import Environment, Step, VectorEnvironment

pytest.importorskip("mettagrid", reason="the simulator is an extra")

from metta_fastagent.train.environments.mettagrid import MettagridEnvironment

NOOP, MOVE = 0, 1
LEGAL_PAIRS = torch.tensor([(NOOP, 0), (MOVE, 0), (MOVE, 1), (MOVE, 2), (MOVE, 3)])
# (high bits, low bits) of a coordinate byte that a step in each direction goes to: high is the simulator's row.
TOWARDS = {0: (-1, 0), 1: (1, 0), 2: (0, -1), 3: (0, 1)}


@pytest.fixture
def environment():
    """Builds environments and closes them all."""
    built = []

    def build(num_envs=8, seed=0, **options):
        built.append(MettagridEnvironment(num_envs, "cpu", seed, **options))
        return built[-1]

    yield build
    for env in built:
        env.close()


def random_actions(num_envs, generator):
    return LEGAL_PAIRS[torch.randint(len(LEGAL_PAIRS), (num_envs,), generator=generator)]


def places(observation, feature, value=None):
    """The places (row, column), relative to the agent, of an observation's tokens of a feature."""
    return {
        ((coordinate >> 4) - 5, (coordinate & 15) - 5)
        for coordinate, feature_id, token_value in observation.tolist()
        if feature_id == feature and coordinate < 254 and value in (None, token_value)
    }


def mines_around(env, observation):
    return places(observation, env.features["inv:ore"]["id"]) - {(0, 0)}


class TestProtocol:
    def test_attributes(self, environment):
        env = environment()
        assert isinstance(env, VectorEnvironment)
        assert (env.name, env.num_envs, env.device) == ("mettagrid", 8, torch.device("cpu"))
        assert (env.obs_width, env.obs_height, env.num_tokens) == (11, 11, 128)
        assert env.action_names == ["noop", "move"]
        assert env.max_action_args == [0, 3]
        assert {"tag", "last_action", "inv:ore"} <= set(env.features)
        by_id = {entry["id"]: entry["normalization"] for entry in env.features.values()}
        assert env.feature_normalizations == by_id
        assert sorted(by_id) == list(range(len(by_id)))

    def test_a_few_hundred_random_steps(self, environment):
        env = environment(8, max_steps=64)
        generator = torch.Generator().manual_seed(0)
        known = torch.tensor([*env.feature_normalizations, 255])
        first = env.reset()
        assert first.dtype == torch.uint8
        assert first.shape == (8, 128, 3)
        collected = 0.0
        for index in range(1, 301):
            step = env.step(random_actions(8, generator))
            assert step.observations.dtype == torch.uint8
            assert step.observations.shape == (8, 128, 3)
            assert (step.final_observations is None) == (index % 64 != 0)
            assert torch.isin(step.observations[..., 1].long(), known).all()
            empty = step.observations[..., 0] == 255
            assert (step.observations[empty] == 255).all()
            assert step.rewards.dtype == torch.float32
            assert step.rewards.shape == (8,)
            assert torch.isin(step.rewards.round(decimals=4), torch.tensor([0.0, 1.0])).all()
            assert step.terminals.dtype == step.truncations.dtype == torch.bool
            assert not step.terminals.any()
            assert step.truncations.tolist() == [index % 64 == 0] * 8
            collected += step.rewards.sum().item()
        assert collected > 0

    def test_results_are_copies(self, environment):
        env = environment(4)
        step = env.step(env.scripted_actions())
        before = Step(*(part.clone() for part in step[:4]))
        for _ in range(5):
            env.step(env.scripted_actions())
        assert all(torch.equal(one, other) for one, other in zip(step[:4], before[:4], strict=True))


class TestActions:
    def test_table_has_the_simulators_names_in_this_order(self, environment):
        env = environment(4)
        names = [["noop"], ["move_north", "move_south", "move_west", "move_east"]]
        ids = env._simulations[0].action_ids
        for action_type, of_type in enumerate(names):
            for parameter, name in enumerate(of_type):
                assert env._action_ids[action_type, parameter] == ids[name]
        assert sorted(ids) == sorted(name for of_type in names for name in of_type)

    @pytest.mark.parametrize("direction", sorted(TOWARDS))
    def test_moving_shifts_the_view(self, environment, direction):
        # One agent and a single mine: unless it is blocked, what it sees (a disc) moves the other way.
        env = environment(16, num_agents=1, num_mines=1, map_size=9, seed=3)
        before = env.reset()
        after = env.step(torch.tensor([[MOVE, direction]] * 16)).observations
        down, right = TOWARDS[direction]
        tag = env.features["tag"]["id"]
        wall = env._config.game.id_map().tag_names().index("type:wall")
        seen = 0
        for row in range(16):
            old = places(before[row], tag, wall)
            if (down, right) in old | mines_around(env, before[row]):
                continue
            shifted = {(y - down, x - right) for y, x in old}
            visible = {(y, x) for y, x in shifted if y * y + x * x <= 25}
            assert visible <= places(after[row], tag, wall)
            seen += len(visible)
        assert seen > 0

    @pytest.mark.parametrize("direction", sorted(TOWARDS))
    def test_walking_into_a_mine_is_the_reward(self, environment, direction):
        env = environment(16, num_agents=1, num_mines=20, map_size=9, seed=3)
        observations = env.reset()
        expected = [float(TOWARDS[direction] in mines_around(env, observation)) for observation in observations]
        assert 0 < sum(expected) < 16
        step = env.step(torch.tensor([[MOVE, direction]] * 16))
        assert step.rewards.tolist() == pytest.approx(expected)
        # The same walk again finds the mine gone.
        again = env.step(torch.tensor([[MOVE, direction]] * 16)).rewards
        assert again[torch.tensor(expected) == 1].tolist() == pytest.approx([0.0] * int(sum(expected)))

    def test_noop_stays(self, environment):
        env = environment(4, num_agents=1)
        before = env.reset()
        after = env.step(torch.zeros(4, 2, dtype=torch.int64)).observations
        assert all(mines_around(env, before[row]) == mines_around(env, after[row]) for row in range(4))


class TestEpisodes:
    def test_auto_reset(self, environment):
        env = environment(8, max_steps=10)
        completion = env.features["episode_completion_pct"]["id"]

        def completed(observations):
            return [tokens[tokens[:, 1] == completion][0, 2].item() for tokens in observations]

        for _ in range(9):
            step = env.step(env.scripted_actions())
            assert step.final_observations is None
        step = env.step(env.scripted_actions())
        assert step.truncations.all()
        assert completed(step.observations) == [0] * 8
        assert min(completed(step.final_observations)) > 200
        # Nothing is carried over: nobody holds ore at the start.
        ore = env.features["inv:ore"]["id"]
        assert all((0, 0) not in places(tokens, ore) for tokens in step.observations)

    def test_every_episode_has_its_own_map(self, environment):
        env = environment(8, num_agents=4, max_steps=3)
        first = env.reset()
        assert not torch.equal(first[:4], first[4:])
        for _ in range(3):
            step = env.step(torch.zeros(8, 2, dtype=torch.int64))
        assert not torch.equal(first, step.observations)

    def test_same_seed_same_run(self, environment):
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        one, other = environment(8, seed=7, max_steps=20), environment(8, seed=7, max_steps=20)
        for _ in range(50):
            ours = one.step(random_actions(8, generators[0]))
            theirs = other.step(random_actions(8, generators[1]))
            assert all(torch.equal(a, b) for a, b in zip(ours[:4], theirs[:4], strict=True))

    def test_reset_restarts_the_stream_with_a_seed_and_continues_it_without(self, environment):
        env = environment(4, seed=1)
        first = env.reset(9)
        assert not torch.equal(first, env.reset())
        assert torch.equal(first, env.reset(9))

    def test_walking_to_the_nearest_mine_beats_chance(self, environment):
        generator = torch.Generator().manual_seed(0)
        env = environment(32)
        returns = {}
        for name in ("random", "scripted"):
            env.reset(5)
            total = torch.zeros(32)
            for _ in range(64):
                actions = random_actions(32, generator) if name == "random" else env.scripted_actions()
                step = env.step(actions)
                total += step.rewards
            assert step.truncations.all()
            returns[name] = total.mean().item()
        assert returns["scripted"] > returns["random"] + 2


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"num_envs": 6}, ValueError, "num_envs: got 6, expected a multiple of num_agents (4)"),
            ({"num_agents": 0}, ValueError, "num_agents: got 0, expected an integer of at least 1"),
            ({"map_size": 4}, ValueError, "map_size: got 4, expected an integer of at least 5"),
            ({"map_size": 5, "num_mines": 6}, ValueError, "num_mines: got 6, expected an integer from 1 to 5"),
            ({"max_steps": 0}, ValueError, "max_steps: got 0, expected an integer of at least 1"),
            ({"num_tokens": "many"}, TypeError, "num_tokens: got 'many' (str), expected an integer"),
            ({"seed": -3}, ValueError, "seed: got -3, expected an integer from 0"),
        ],
    )
    def test_construction(self, arguments, error, message):
        with pytest.raises(error) as caught:
            MettagridEnvironment(**{"num_envs": 8, "device": "cpu", "seed": 0, **arguments})
        assert message in str(caught.value)

    def test_state_cannot_be_saved(self, environment):
        assert Environment(environment(4), 4, torch.device("cpu")).state_dict() is None

    def test_closed(self, environment):
        env = environment(4)
        env.close()
        with pytest.raises(RuntimeError, match="closed"):
            env.step(torch.zeros(4, 2, dtype=torch.int32))
        env.close()


def test_the_root_logger_is_left_alone():
    code = "import logging as l, metta_fastagent.train.environments.mettagrid; print(l.root.level, l.root.handlers)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout == "30 []\n"
