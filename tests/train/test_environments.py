"""The environment protocol, and the embedded environment against situations computed by hand."""

from __future__ import annotations

import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from metta_fastagent.runtime.install import how_to_install
from metta_fastagent.train.environments import Step, VectorEnvironment, make_environment
from metta_fastagent.train.environments.memory import MemoryEnvironment

NOOP, MOVE, PRESS = 0, 1, 2
NORTH, SOUTH, WEST, EAST = 0, 1, 2, 3
FEATURES = ["wall", "switchboard", "cue_0", "cue_1", "cue_2", "cue_3"]
LEGAL_PAIRS = torch.tensor([(NOOP, 0), *((MOVE, d) for d in range(4)), *((PRESS, s) for s in range(4))])


def environment(num_envs=4, seed=0, **options):
    return MemoryEnvironment(num_envs, "cpu", seed, **options)


def placed(agent, board, cue, time, **options):
    """An environment whose rows are in the given states; cell (x, y) has the index y * room_size + x."""
    env = environment(len(agent), **options)
    state = env.state_dict()
    state |= {"agent": torch.tensor(agent), "board": torch.tensor(board)}
    state |= {"cue": torch.tensor(cue), "time": torch.tensor(time)}
    env.load_state_dict(state)
    return env


def random_actions(num_envs, generator):
    return LEGAL_PAIRS[torch.randint(len(LEGAL_PAIRS), (num_envs,), generator=generator)]


def mean_return(env, policy, steps):
    """Mean return of the episodes that end within `steps` steps; `policy(env, observations)` gives actions."""
    observations = env.reset(0)
    rewards = episodes = 0.0
    for _ in range(steps):
        step = env.step(policy(env, observations))
        observations = step.observations
        rewards += step.rewards.sum().item()
        episodes += (step.terminals | step.truncations).sum().item()
    return rewards / episodes


def assert_same_steps(ours, theirs):
    for name, one, other in zip(Step._fields[:5], ours[:5], theirs[:5], strict=True):
        assert torch.equal(one, other), name


class TestProtocol:
    def test_memory_follows_it(self):
        env = MemoryEnvironment(3, "cpu", 7)
        assert isinstance(env, VectorEnvironment)
        assert (env.name, env.num_envs, env.device) == ("memory", 3, torch.device("cpu"))
        assert (env.obs_width, env.obs_height) == (11, 11)
        assert env.action_names == ["noop", "move", "press"]
        assert env.max_action_args == [0, 3, 3]
        assert {name: entry["id"] for name, entry in env.features.items()} == {
            name: index for index, name in enumerate(FEATURES)
        }
        by_id = {entry["id"]: entry["normalization"] for entry in env.features.values()}
        assert env.feature_normalizations == by_id

    def test_shapes_and_dtypes(self):
        env = MemoryEnvironment(3, "cpu", 7)
        first = env.reset()
        assert first.dtype == torch.uint8
        assert first.shape == (3, env.num_tokens, 3)
        step = env.step(env.scripted_actions())
        assert step.observations.dtype == step.final_observations.dtype == torch.uint8
        assert step.observations.shape == step.final_observations.shape == (3, env.num_tokens, 3)
        assert step.rewards.dtype == torch.float32
        assert step.terminals.dtype == step.truncations.dtype == torch.bool
        assert step.rewards.shape == step.terminals.shape == step.truncations.shape == (3,)

    def test_options_reach_the_environment(self):
        env = environment(2, room_size=3, time_limit=9)
        assert env.num_tokens == 16 + 1 + 9

    def test_unknown_name_lists_the_known_ones(self):
        with pytest.raises(ValueError, match=r"env: got 'chess'.*, expected package.module:name"):
            make_environment("chess", 2, torch.device("cpu"))

    def test_missing_mettagrid_says_how_to_get_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "mettagrid", None)
        monkeypatch.setitem(sys.modules, "mettagrid.builder", None)
        monkeypatch.delitem(sys.modules, "metta_fastagent.train.environments.mettagrid", raising=False)
        with pytest.raises(ImportError, match=re.escape(how_to_install("mettagrid"))):
            make_environment("mettagrid", 4, torch.device("cpu"))


class TestMemoryObservations:
    def test_first_observation_by_hand(self):
        # Room of 2 x 2 cells: agent on (0, 0), which is window place 5, 5; board on (1, 1); cue 2.
        env = environment(256, room_size=2)
        observations = env.reset(0)
        state = env.state_dict()
        rows = (state["agent"] == 0) & (state["board"] == 3) & (state["cue"] == 2)
        assert rows.any()
        walls = [0x44, 0x54, 0x64, 0x74, 0x45, 0x75, 0x46, 0x76, 0x47, 0x57, 0x67, 0x77]
        cue = [0x44, 0x54, 0x64, 0x45, 0x55, 0x65, 0x46, 0x56, 0x66]
        tokens = [(coordinate, 0, 2) for coordinate in walls] + [(0x66, 1, 255)]
        tokens += [(coordinate, 2 + 2, 255) for coordinate in cue]
        expected = torch.tensor(tokens, dtype=torch.uint8)
        assert torch.equal(observations[rows], expected.expand(int(rows.sum()), -1, -1))

    def test_later_observation_by_hand(self):
        # Agent on (1, 0) walks west to (0, 0); board on (0, 1) is then one cell to the south.
        env = placed(agent=[1], board=[2], cue=[3], time=[2], room_size=2)
        observation = env.step(torch.tensor([[MOVE, WEST]])).observations[0]
        walls = [0x44, 0x54, 0x64, 0x74, 0x45, 0x75, 0x46, 0x76, 0x47, 0x57, 0x67, 0x77]
        tokens = [(coordinate, 0, 2) for coordinate in walls] + [(0x56, 1, 255)] + [(255, 255, 255)] * 9
        assert torch.equal(observation, torch.tensor(tokens, dtype=torch.uint8))

    def test_the_whole_largest_room_is_in_the_window(self):
        env = environment(2000, room_size=5)
        coordinates = env.reset(1)[:, :24, 0].int()
        assert (coordinates >> 4).max() == 10
        assert (coordinates & 15).max() == 10
        assert coordinates.min() == 0

    def test_the_cue_is_in_the_first_observation_only(self):
        env = environment(64, delay=3)
        shown = env.reset()[:, -9:, 1].long() - 2
        assert torch.equal(shown, env.state_dict()["cue"][:, None].expand(-1, 9))
        for _ in range(4):
            step = env.step(torch.zeros(64, 2, dtype=torch.int32))
            assert (step.observations[:, -9:] == 255).all()

    def test_after_the_cue_it_has_left_no_trace(self):
        # For every action while the cue is shown: same cells and later actions, same observations, for all four cues.
        generator = torch.Generator().manual_seed(0)
        env = placed(agent=[0] * 4, board=[15] * 4, cue=[0, 1, 2, 3], time=[0] * 4, delay=2, room_size=4)
        while_cue_is_shown = torch.tensor([(MOVE, SOUTH), (MOVE, EAST), (NOOP, 0), (PRESS, 1)])
        observations = env.step(while_cue_is_shown).observations
        for _ in range(12):
            assert torch.equal(observations, observations[:1].expand_as(observations))
            # Moves only: a press would end the episode and show a new cue.
            move = torch.randint(4, (1,), generator=generator).item()
            observations = env.step(torch.tensor([[MOVE, move]] * 4)).observations
        assert env.state_dict()["cue"].tolist() == [0, 1, 2, 3]


class TestMemoryRules:
    @pytest.mark.parametrize(
        ("direction", "start", "end"),
        [
            (NORTH, 4, 1),
            (SOUTH, 4, 7),
            (WEST, 4, 3),
            (EAST, 4, 5),
            (NORTH, 1, 1),
            (SOUTH, 7, 7),
            (WEST, 3, 3),
            (EAST, 5, 5),
        ],
    )
    def test_moves_and_walls(self, direction, start, end):
        env = placed(agent=[start], board=[0], cue=[0], time=[2], room_size=3, delay=2)
        env.step(torch.tensor([[MOVE, direction]]))
        assert env.state_dict()["agent"].tolist() == [end]

    def test_nothing_happens_during_the_delay(self):
        env = placed(agent=[4, 4], board=[4, 0], cue=[1, 1], time=[1, 1], room_size=3, delay=2)
        step = env.step(torch.tensor([(PRESS, 1), (MOVE, EAST)]))
        assert env.state_dict()["agent"].tolist() == [4, 4]
        assert not step.terminals.any()
        assert not step.rewards.any()

    def test_presses(self):
        # Columns: right switch on the board, next to it and diagonally; wrong switch; two cells away.
        env = placed(
            agent=[0, 1, 5, 0, 2], board=[0, 0, 0, 0, 0], cue=[3, 3, 3, 3, 3], time=[2] * 5, room_size=4, delay=2
        )
        step = env.step(torch.tensor([(PRESS, 3), (PRESS, 3), (PRESS, 3), (PRESS, 0), (PRESS, 3)]))
        assert step.rewards.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]
        assert step.terminals.tolist() == [True, True, True, True, False]
        assert step.truncations.tolist() == [False] * 5

    def test_time_limit_truncates_unless_a_press_ends_the_episode(self):
        env = placed(agent=[0] * 3, board=[1] * 3, cue=[2] * 3, time=[15, 15, 14], time_limit=16)
        step = env.step(torch.tensor([(NOOP, 0), (PRESS, 2), (NOOP, 0)]))
        assert step.terminals.tolist() == [False, True, False]
        assert step.truncations.tolist() == [True, False, False]
        assert step.rewards.tolist() == [0.0, 1.0, 0.0]

    def test_ended_rows_restart_and_keep_their_last_observation(self):
        env = placed(agent=[0, 0, 0], board=[1, 1, 1], cue=[2] * 3, time=[15, 9, 9], time_limit=16)
        step = env.step(torch.tensor([(MOVE, SOUTH), (PRESS, 2), (MOVE, SOUTH)]))
        # Ended rows show a cue again, the last row continues.
        assert (step.observations[:, -1, 0] == 0x66).tolist() == [True, True, False]
        assert env.state_dict()["time"].tolist() == [0, 0, 10]
        # The board of the ended episodes, seen from where the agent then stood: (1, 0) from (0, 1), from (0, 0).
        assert step.final_observations[:, -10, 0].tolist() == [0x64, 0x65, 0x64]
        assert (step.final_observations[:, -9:] == 255).all()
        assert torch.equal(step.observations[2], step.final_observations[2])

    def test_starts_are_spread_over_all_states(self):
        env = environment(20_000, room_size=2)
        env.reset(3)
        state = env.state_dict()
        assert (state["agent"] != state["board"]).all()
        counts = torch.bincount((state["agent"] * 4 + state["board"]) * 4 + state["cue"], minlength=64).float()
        possible = counts[counts > 0]
        assert len(possible) == 4 * 3 * 4
        chi_squared = ((possible - 20_000 / 48).square() / (20_000 / 48)).sum().item()
        # 47 degrees of freedom: 82.7 is the 99.9 % quantile.
        assert chi_squared < 82.7

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
    def test_any_integer_dtype(self, dtype):
        env = placed(agent=[0], board=[0], cue=[3], time=[2])
        assert env.step(torch.tensor([[PRESS, 3]], dtype=dtype)).rewards.tolist() == [1.0]


class TestMemoryPolicies:
    @pytest.mark.parametrize("options", [{}, {"room_size": 5, "delay": 4, "time_limit": 11}, {"room_size": 2}])
    def test_scripted_policy_always_wins(self, options):
        assert mean_return(environment(128, **options), lambda env, _: env.scripted_actions(), 200) == 1.0

    def test_random_policy_rarely_wins(self):
        generator = torch.Generator().manual_seed(0)
        score = mean_return(environment(256), lambda env, _: random_actions(256, generator), 200)
        assert 0.05 < score < 0.2

    def test_without_memory_the_expert_is_right_one_time_in_four(self):
        # The scripted walk with a switch chosen from the observation alone, which may show the cue.
        def forgetful(env, observations):
            actions = env.scripted_actions()
            weights = torch.arange(1, observations[0].numel() + 1)
            switch = (observations.flatten(1).long() * weights).sum(1) % 4
            presses = actions[:, 0] == PRESS
            actions[:, 1] = torch.where(presses, switch.int(), actions[:, 1])
            return actions

        env = environment(256)
        episodes = 256 * 200 / 3.1
        deviation = math.sqrt(0.25 * 0.75 / episodes)
        assert mean_return(env, forgetful, 200) == pytest.approx(0.25, abs=4 * deviation)


class TestMemoryReproducibility:
    def test_same_seed_same_run(self):
        generators = [torch.Generator().manual_seed(5) for _ in range(2)]
        one, other = environment(32, seed=11), environment(32, seed=11)
        for _ in range(100):
            actions = [random_actions(32, generator) for generator in generators]
            assert_same_steps(one.step(actions[0]), other.step(actions[1]))

    def test_other_seed_other_run(self):
        assert not torch.equal(environment(32, seed=1).reset(), environment(32, seed=2).reset())

    def test_reset_restarts_the_stream_with_a_seed_and_continues_it_without(self):
        env = environment(32, seed=1)
        first = env.reset(9)
        assert not torch.equal(first, env.reset())
        assert torch.equal(first, env.reset(9))

    def test_state_round_trip_continues_bit_for_bit(self, tmp_path):
        generator = torch.Generator().manual_seed(5)
        env = environment(32, seed=1)
        for _ in range(23):
            env.step(random_actions(32, generator))
        torch.save(env.state_dict(), tmp_path / "state.pt")
        copy = environment(32, seed=99)
        copy.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for _ in range(50):
            actions = random_actions(32, generator)
            assert_same_steps(env.step(actions), copy.step(actions))

    def test_the_state_is_a_copy(self):
        env = environment(8, delay=1)
        state = env.state_dict()
        before = {key: value.clone() for key, value in state.items() if isinstance(value, torch.Tensor)}
        for _ in range(20):
            env.step(env.scripted_actions())
        assert all(torch.equal(state[key], value) for key, value in before.items())

    def test_the_global_generator_is_not_touched(self):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        env = environment(8)
        env.reset()
        env.step(env.scripted_actions())
        assert torch.equal(before, torch.get_rng_state())


class TestMemoryErrors:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"num_envs": 0}, ValueError, "num_envs: got 0, expected an integer of at least 1"),
            ({"num_envs": 2.0}, TypeError, "num_envs: got 2.0 (float), expected an integer of at least 1"),
            ({"num_envs": True}, TypeError, "num_envs: got True (bool), expected an integer of at least 1"),
            ({"seed": -1}, ValueError, "seed: got -1, expected an integer from 0 to"),
            ({"seed": "7"}, TypeError, "seed: got '7' (str), expected an integer from 0 to"),
            ({"room_size": 1}, ValueError, "room_size: got 1, expected an integer from 2 to 5"),
            ({"room_size": 6}, ValueError, "room_size: got 6, expected an integer from 2 to 5"),
            ({"delay": 0}, ValueError, "delay: got 0, expected an integer of at least 1"),
            (
                {"room_size": 4, "delay": 2, "time_limit": 6},
                ValueError,
                "time_limit: got 6, expected an integer of at",
            ),
            ({"device": "nowhere"}, ValueError, "device: got 'nowhere', expected an available torch device"),
            ({"device": "meta"}, ValueError, "device: got 'meta', expected an available torch device"),
            ({"device": None}, TypeError, "device: got None (NoneType), expected a torch.device or its name"),
        ],
    )
    def test_construction(self, arguments, error, message):
        with pytest.raises(error) as caught:
            MemoryEnvironment(**{"num_envs": 2, "device": "cpu", "seed": 0, **arguments})
        assert message in str(caught.value)

    def test_the_state_of_another_room_changes_nothing(self):
        env = environment(2)
        before = env.state_dict()
        with pytest.raises(ValueError, match=r"state\['options'\]: got .*'room_size': 3, .*expected"):
            env.load_state_dict(environment(2, room_size=3).state_dict())
        assert all(torch.equal(before[key], env.state_dict()[key]) for key in ("agent", "board", "cue", "time"))


class RefuseHostReads(TorchDispatchMode):
    """Fails on operations that read a tensor's values on the host or have shapes that depend on them."""

    REFUSED = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in self.REFUSED, f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in args[1]), "mask as an index"
        return func(*args, **(kwargs or {}))


class TestNoHostReads:
    def test_the_guard_notices_a_read(self):
        with RefuseHostReads(), pytest.raises(AssertionError, match="waits for the device"):
            bool(torch.ones(()))

    def test_step_and_script(self):
        env = environment(8, delay=1)
        with RefuseHostReads():
            for _ in range(30):
                env.step(env.scripted_actions())

    def test_cost_does_not_grow_with_rows_in_python(self):
        counts = []
        for num_envs in (2, 500):
            env = environment(num_envs)
            with CountOperations() as counter:
                env.step(env.scripted_actions())
            counts.append(counter.state.calls)
        assert counts[0] == counts[1] > 0


class CountOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.state = SimpleNamespace(calls=0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.state.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestMemoryOnTheGpu:
    def test_runs_without_synchronising(self):
        env = MemoryEnvironment(64, "cuda", 0)
        env.step(env.scripted_actions())
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(30):
                step = env.step(env.scripted_actions())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert step.observations.device == env.device

    def test_scripted_policy_always_wins(self):
        env = MemoryEnvironment(128, "cuda", 0)
        assert mean_return(env, lambda env, _: env.scripted_actions(), 100) == 1.0

    def test_state_round_trip(self):
        env = MemoryEnvironment(32, "cuda", 0)
        for _ in range(10):
            env.step(env.scripted_actions())
        copy = MemoryEnvironment(32, "cuda", 9)
        copy.load_state_dict(env.state_dict())
        for _ in range(20):
            assert_same_steps(env.step(env.scripted_actions()), copy.step(copy.scripted_actions()))
