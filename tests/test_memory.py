"""Rollout memory in preallocated tensors: equal to the memory keyed by id, in place, safe where ids are wrong."""

import copy
import pickle
from types import SimpleNamespace

import agents_for_tests as small
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch._subclasses import FakeTensorMode

from metta_fastagent import Fast, LSTMWrapper, PyTorchAgentMixin, _rollout_memory
from metta_fastagent.testing import check_agent, compare_agents

INPUT, HIDDEN, LAYERS, ENVS = 5, 4, 2, 6
KEY = r"td\['training_env_id_start'\]"


def make_agent(num_envs: int | None = ENVS):
    torch.manual_seed(0)
    return LSTMWrapper(None, nn.Identity(), INPUT, HIDDEN, LAYERS, num_envs=num_envs)


def step(agent, hidden, env_id=None, **entries):
    rows = hidden.shape[0]
    td = TensorDict(entries, batch_size=[rows])
    if isinstance(env_id, torch.Tensor) and env_id.shape[:1] == (rows,):
        td["training_env_id_start"] = env_id
    elif env_id is not None:
        td.set_non_tensor("training_env_id_start", env_id)
    return agent.run_lstm(td, hidden, rows, 1)


def filled(num_envs=ENVS):
    """An agent whose memory holds distinct numbers."""
    agent = make_agent(num_envs)
    with torch.no_grad():
        step(agent, torch.randn(num_envs, INPUT))
        step(agent, torch.randn(num_envs, INPUT))
    return agent


def addresses(agent):
    return agent.lstm_h[0].data_ptr(), agent.lstm_c[0].data_ptr()


def assert_memory(agent, expected):
    for memory, wanted in zip(agent.get_memory(), expected, strict=True):
        assert memory.keys() == wanted.keys()
        assert all(torch.equal(memory[key], wanted[key]) for key in wanted)


# Construction


@pytest.mark.parametrize("num_envs", [0, -1, True, 2.0, "2"])
def test_a_number_of_environments_that_is_no_positive_integer_is_refused(num_envs):
    with pytest.raises(ValueError, match=r"num_envs: got .* expected a positive integer"):
        make_agent(num_envs)
    agent = filled()
    before = agent.get_memory()
    with pytest.raises(ValueError, match=r"num_envs: got .* expected a positive integer"):
        agent.allocate_memory(num_envs)
    assert_memory(agent, before)


def test_starts_with_zeros_and_adds_nothing_to_the_state_dict_or_to_the_random_stream():
    agent = make_agent()
    after = torch.get_rng_state()
    zeros = torch.zeros(LAYERS, ENVS, HIDDEN)
    assert_memory(agent, ({0: zeros}, {0: zeros}))
    other = make_agent(None)
    assert torch.equal(torch.get_rng_state(), after)
    assert agent.state_dict().keys() == other.state_dict().keys()
    assert not list(agent.buffers())
    agent.load_state_dict(other.state_dict(), strict=True)


# Steps


@pytest.mark.parametrize("kind", ["int", "0-dim", "rows", "column", "int32", "uint64", "float"])
def test_a_random_rollout_equals_the_memory_keyed_by_id(kind):
    agent, other = make_agent(), make_agent(None)
    generator = torch.Generator().manual_seed(1)
    kept = addresses(agent)
    with torch.no_grad():
        for t in range(40):
            if t % 8 == 0:
                # One partition of the environments for eight steps, as ids of the other memory may not overlap.
                ranges = [[(0, 6)], [(0, 2), (2, 3), (5, 1)], [(1, 2), (3, 3)]][t // 8 % 3]
                other.reset_memory()
                agent.reset_memory()
            start, rows = ranges[int(torch.randint(len(ranges), (), generator=generator))]
            shape = {"0-dim": (), "column": (rows, 1)}.get(kind, (rows,))
            dtype = {"int32": torch.int32, "uint64": torch.uint64, "float": torch.float32}.get(kind, torch.int64)
            env_id = start if kind == "int" else torch.full(shape, start, dtype=dtype)
            hidden = torch.randn(rows, INPUT, generator=generator)
            flags = {key: torch.rand(rows, generator=generator) < 0.2 for key in ("dones", "truncateds")}
            assert torch.equal(step(agent, hidden, env_id, **flags), step(other, hidden, start, **flags))
    for memory, wanted in zip(agent.get_memory(), other.get_memory(), strict=True):
        for start, state in wanted.items():
            assert torch.equal(memory[0][:, start : start + state.shape[1]], state)
    assert addresses(agent) == kept


@pytest.mark.parametrize("env_id", [2, torch.tensor(2), torch.tensor([2, 7, 7])])
def test_a_step_changes_its_own_rows_only(env_id):
    agent = filled()
    before = agent.get_memory()
    with torch.no_grad():
        step(agent, torch.randn(3, INPUT), env_id)
    for memory, old in zip(agent.get_memory(), before, strict=True):
        changed = (memory[0] != old[0]).any(dim=2).any(dim=0)
        assert changed.tolist() == [False, False, True, True, True, False]


def test_without_an_id_the_first_rows_are_meant():
    agent = filled()
    before = agent.get_memory()
    with torch.no_grad():
        step(agent, torch.randn(2, INPUT))
    for memory, old in zip(agent.get_memory(), before, strict=True):
        assert torch.equal(memory[0][:, 2:], old[0][:, 2:])
        assert not torch.equal(memory[0][:, :2], old[0][:, :2])


@pytest.mark.parametrize("first", [2, torch.tensor(2)], ids=["int", "tensor"])
def test_manage_returns_the_rows_and_store_takes_them(first):
    agent = filled()
    td = TensorDict({}, batch_size=[3]).set_non_tensor("training_env_id_start", first)
    with torch.no_grad():
        h, c, env_id = agent._manage_lstm_state(td, 3, 1, torch.device("cpu"))
        assert h.is_contiguous() and c.is_contiguous()
        assert torch.equal(h, agent.lstm_h[0][:, 2:5])
        assert torch.equal(c, agent.lstm_c[0][:, 2:5])
        agent._store_lstm_state(h.clone().fill_(7), c.clone().fill_(8), env_id)
    assert agent.lstm_h[0].eq(7).all(dim=2).all(dim=0).tolist() == [False, False, True, True, True, False]
    assert agent.lstm_c[0].eq(8).all(dim=2).all(dim=0).tolist() == [False, False, True, True, True, False]


def test_training_neither_reads_nor_changes_the_memory():
    agent = filled()
    before = agent.get_memory()
    td = TensorDict({"env_obs": torch.zeros(9, 4, 2, 3, dtype=torch.uint8)}, batch_size=[9])
    td.set_non_tensor("training_env_id_start", 99)
    hidden = torch.randn(36, INPUT)
    expected = make_agent(None).run_lstm(td, hidden, 9, 4)
    assert torch.equal(agent.run_lstm(td, hidden, 9, 4), expected)
    assert_memory(agent, before)


# Wrong ids


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["int", "tensor", "list"])
@pytest.mark.parametrize("env_id", [-1, -6, ENVS, 10**12])
def test_an_id_out_of_range_is_an_error_that_changes_nothing(rows, kind, env_id):
    agent = filled()
    before = agent.get_memory()
    given = {"int": env_id, "tensor": torch.tensor([env_id]), "list": [env_id]}[kind]
    message = rf"{KEY}: got {env_id} for {rows} rows, expected 0 to {ENVS - rows}, .* num_envs={ENVS} rows"
    with pytest.raises(ValueError, match=message):
        step(agent, torch.randn(rows, INPUT), given)
    assert_memory(agent, before)


@pytest.mark.parametrize("env_id", [4, torch.tensor(4)], ids=["int", "tensor"])
def test_rows_that_reach_beyond_the_memory_are_an_error(env_id):
    agent = filled()
    before = agent.get_memory()
    step(agent, torch.randn(2, INPUT), env_id)
    agent.set_memory(before)
    with pytest.raises(ValueError, match=rf"{KEY}: got 4 for 3 rows, expected 0 to 3"):
        step(agent, torch.randn(3, INPUT), env_id)
    assert_memory(agent, before)


@pytest.mark.parametrize("env_id", [None, 0, 3, torch.tensor(0)])
def test_more_rows_than_environments_are_an_error(env_id):
    agent = filled()
    before = agent.get_memory()
    with pytest.raises(ValueError, match=rf"{KEY}: names the first of 7 rows, expected at most num_envs=6"):
        step(agent, torch.randn(7, INPUT), env_id)
    assert_memory(agent, before)


@pytest.mark.parametrize(
    "env_id", [1.5, torch.tensor(1.5), torch.tensor(float("nan")), "2", torch.tensor(1j), torch.tensor([])], ids=repr
)
def test_an_id_that_is_no_integer_is_an_error(env_id):
    agent = filled()
    before = agent.get_memory()
    with pytest.raises(ValueError, match=rf"{KEY}: got .* expected an integer"):
        step(agent, torch.randn(2, INPUT), env_id)
    assert_memory(agent, before)


def test_an_id_on_a_third_device_is_an_error():
    with pytest.raises(ValueError, match=rf"{KEY}: got an int64 tensor .* on meta, expected .* on cpu or the CPU"):
        step(filled(), torch.randn(2, INPUT), torch.tensor(1, device="meta"))


def test_an_id_on_the_cpu_serves_a_memory_elsewhere():
    device = torch.device("meta")
    assert _rollout_memory.memory_rows(torch.tensor([3, 9]), 2, ENVS, device) == 3
    with pytest.raises(ValueError, match=rf"{KEY}: got 5 for 2 rows, expected 0 to 4"):
        _rollout_memory.memory_rows(torch.tensor([5]), 2, ENVS, device)


@pytest.fixture
def unchecked(monkeypatch):
    """The CPU as a device whose values nobody looks at."""

    def rows(env_id, rows, num_envs):
        return _rollout_memory.clamped_rows(env_id[(0,) * env_id.dim()], rows, num_envs)

    monkeypatch.setattr(_rollout_memory, "_environment_rows", rows)


@pytest.mark.parametrize("env_id", [-1, 4, 2**40, -(2**62), 1.5, float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("entries", [{}, {"dones": torch.ones(3, dtype=torch.bool)}])
@pytest.mark.usefixtures("unchecked")
def test_out_of_range_on_a_device_shows_as_nan_and_leaves_the_memory(env_id, entries):
    agent = filled()
    before = agent.get_memory()
    with torch.no_grad():
        output = step(agent, torch.randn(3, INPUT), torch.tensor(env_id), **entries)
    assert output.isnan().all()
    assert_memory(agent, before)


@pytest.mark.parametrize("env_id", [0, 3, 2.0])
@pytest.mark.usefixtures("unchecked")
def test_in_range_on_a_device_is_as_on_the_cpu(env_id):
    agent, other = filled(), filled()
    hidden = torch.randn(3, INPUT)
    with torch.no_grad():
        assert torch.equal(step(agent, hidden, torch.tensor(env_id)), step(other, hidden, int(env_id)))
    assert_memory(agent, other.get_memory())


# No read of the device


def test_the_operator_passes_opcheck():
    operator = torch.ops.metta_fastagent.environment_rows.default
    for env_id in (torch.tensor(3), torch.tensor([[2], [9]], dtype=torch.int32)):
        torch.library.opcheck(operator, (env_id, 3, ENVS))


@pytest.mark.parametrize("shape", [(), (3,), (3, 1)])
@pytest.mark.parametrize("grad", [True, False])
def test_a_tensor_is_not_read(shape, grad):
    with FakeTensorMode(), torch.set_grad_enabled(grad):
        agent = make_agent()
        dones = torch.zeros(3, dtype=torch.bool)
        output = step(agent, torch.zeros(3, INPUT), torch.zeros(shape, dtype=torch.int64), dones=dones)
        assert output.shape == (3, HIDDEN)
        assert agent.lstm_h[0].shape == (LAYERS, ENVS, HIDDEN)


def test_a_rollout_step_of_fast_reads_nothing():
    with FakeTensorMode():
        agent = Fast(SimpleNamespace(), num_envs=ENVS)
        agent.activate_actions(["noop", "move"], [0, 3])
        entries = {"env_obs": torch.zeros(3, 8, 3, dtype=torch.uint8), "dones": torch.zeros(3)}
        td = TensorDict(entries | {"training_env_id_start": torch.zeros(3, dtype=torch.int64)}, batch_size=[3])
        with torch.no_grad():
            assert agent(td)["actions"].shape == (3, 2)


# Gradients and inference mode


@pytest.mark.parametrize("env_id", [None, 1, torch.tensor(1)], ids=["all", "int", "tensor"])
def test_backward_through_earlier_steps_works_while_the_rollout_goes_on(env_id):
    agent = make_agent()
    rows = ENVS if env_id is None else 3
    inputs = torch.randn(3, rows, INPUT)
    outputs = [step(agent, hidden, env_id) for hidden in inputs]
    assert not agent.lstm_h[0].requires_grad and not agent.lstm_c[0].requires_grad
    with torch.no_grad():
        step(agent, torch.randn(rows, INPUT), env_id)
    agent.reset_memory()
    for output in outputs:
        output.square().sum().backward()
    gradient = agent.lstm.weight_hh_l1.grad.clone()

    agent.zero_grad()
    state = None
    for hidden in inputs:
        output, state = agent.lstm(hidden.unsqueeze(0), state)
        state = tuple(s.detach() for s in state)
        output.square().sum().backward()
    torch.testing.assert_close(gradient, agent.lstm.weight_hh_l1.grad)


@pytest.mark.parametrize("built", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("later", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("env_id", [2, torch.tensor(2)], ids=["int", "tensor"])
def test_a_rollout_in_inference_mode_may_go_on_outside_of_it(built, later, env_id):
    agent = make_agent()
    inputs = torch.randn(3, 2, INPUT)
    with built():
        agent.allocate_memory(ENVS)
    with torch.inference_mode():
        step(agent, inputs[0], env_id)
    with later():
        outputs = [step(agent, hidden, env_id) for hidden in inputs[1:]]
        expected = agent.lstm(inputs)[0][1:]
    torch.testing.assert_close(torch.stack(outputs), expected, rtol=0, atol=1e-6)


# The memory as a whole


def test_get_and_set_memory_copy_in_place():
    agent = filled()
    kept, saved = addresses(agent), agent.get_memory()
    hidden = torch.randn(ENVS, INPUT)
    with torch.no_grad():
        expected = step(agent, hidden)
        agent.set_memory(saved)
        assert torch.equal(step(agent, hidden), expected)
        agent.set_memory(saved)
    saved_h = saved[0][0].clone()
    saved[0][0].fill_(7)
    agent.get_memory()[0][0].fill_(7)
    assert torch.equal(agent.lstm_h[0], saved_h)
    assert addresses(agent) == kept


def test_an_empty_pair_is_a_memory_of_zeros():
    agent = filled()
    kept = addresses(agent)
    agent.set_memory(({}, {}))
    assert_memory(agent, make_agent().get_memory())
    assert addresses(agent) == kept


@pytest.mark.parametrize(
    ("h_of", "c_of"),
    [
        ({0: 5}, {0: 5}),
        ({0: 7}, {0: 7}),
        ({1: 6}, {1: 6}),
        ({0: 3, 3: 3}, {0: 3, 3: 3}),
        ({0: 6}, {0: 5}),
        ({0: 6}, {}),
    ],
)
def test_set_memory_refuses_other_ids_or_rows_and_keeps_the_old_one(h_of, c_of):
    agent = filled()
    before = agent.get_memory()
    memory = tuple({key: torch.ones(LAYERS, rows, HIDDEN) for key, rows in part.items()} for part in (h_of, c_of))
    with pytest.raises(ValueError, match=r"memory: .*expected"):
        agent.set_memory(memory)
    assert_memory(agent, before)


def test_resets_zero_in_place():
    agent = filled()
    kept, before = addresses(agent), agent.get_memory()
    for unknown in (-1, ENVS, 99, None, "4"):
        agent.reset_env_memory(unknown)
    assert_memory(agent, before)
    agent.reset_env_memory(4)
    for memory, old in zip(agent.get_memory(), before, strict=True):
        assert memory[0][:, 4].eq(0).all()
        others = [0, 1, 2, 3, 5]
        assert torch.equal(memory[0][:, others], old[0][:, others]) and old[0][:, 4].ne(0).all()
    agent.reset_memory()
    assert_memory(agent, make_agent().get_memory())
    assert addresses(agent) == kept


def test_allocate_memory_starts_anew_and_leaves_a_shallow_copy_alone():
    agent = filled()
    before = agent.get_memory()
    player = copy.copy(agent)
    player.allocate_memory(9)
    with torch.no_grad():
        step(player, torch.randn(9, INPUT))
    assert player.get_memory()[0][0].shape == (LAYERS, 9, HIDDEN)
    assert player.lstm is agent.lstm
    assert agent.num_envs == ENVS
    assert_memory(agent, before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda agent: pickle.loads(pickle.dumps(agent))])
def test_copies_keep_the_memory_and_share_none_of_it(duplicate):
    agent = filled()
    before, hidden = agent.get_memory(), torch.randn(3, INPUT)
    with torch.no_grad():
        other = duplicate(agent)
        assert_memory(other, before)
        assert torch.equal(step(other, hidden, 2), step(copy.deepcopy(agent), hidden, 2))
        step(other, hidden, torch.tensor(1))
    assert_memory(agent, before)


@pytest.mark.parametrize("target", [torch.float64, torch.bfloat16])
def test_memory_follows_the_dtype(target):
    agent = filled()
    before = agent.get_memory()
    nn.ModuleDict({"agent": agent}).to(target)
    assert_memory(agent, tuple({0: memory[0].to(target)} for memory in before))
    with torch.no_grad():
        for env_id in (2, torch.tensor(2)):
            assert step(agent, torch.randn(2, INPUT, dtype=target), env_id).dtype == target
    assert agent.lstm_h[0].dtype == target


def test_a_memory_from_the_meta_device_is_zeros():
    with torch.device("meta"):
        agent = LSTMWrapper(None, nn.Identity(), INPUT, HIDDEN, LAYERS, num_envs=ENVS)
    assert agent.lstm_h[0].is_meta
    agent.to_empty(device="cpu")
    zeros = torch.zeros(LAYERS, ENVS, HIDDEN)
    assert_memory(agent, ({0: zeros}, {0: zeros}))


# Agents written with the mixin


class Guided(small.MyAgent):
    """The guide's agent with a preallocated memory."""

    def __init__(self, env, policy, num_envs=None, **kwargs):
        mixin_params = self.extract_mixin_params(kwargs)
        LSTMWrapper.__init__(self, env, policy, small.HIDDEN, small.HIDDEN, small.LAYERS, num_envs=num_envs)
        self.init_mixin(**mixin_params)


def guided(num_envs):
    torch.manual_seed(1)
    return small.set_tables(Guided(small.make_env(), small.SmallPolicy(), num_envs=num_envs))


def fast(num_envs):
    torch.manual_seed(1)
    agent = Fast(small.make_env(), num_envs=num_envs)
    agent.activate_actions(small.ACTION_NAMES, small.MAX_PARAMS)
    return agent


@pytest.mark.parametrize("make", [guided, fast])
@pytest.mark.parametrize("num_envs", [2, 16])
def test_check_agent_leaves_the_memory_alone(make, num_envs):
    agent = make(num_envs)
    assert issubclass(type(agent), PyTorchAgentMixin)
    env = SimpleNamespace(num_tokens=small.TOKENS, action_names=small.ACTION_NAMES, max_action_args=small.MAX_PARAMS)
    before = agent.get_memory()
    report = check_agent(agent, env, updates=3)
    # The guide's printed forward() resets no row inside a segment.
    assert [check.name for check in report.failures] == (["recurrent replay"] if make is guided else [])
    assert agent.num_envs == num_envs
    assert_memory(agent, before)


@pytest.mark.parametrize("make", [guided, fast])
@pytest.mark.parametrize("entries", [{}, {"training_env_id_start": torch.full((3,), 2)}], ids=["no id", "tensor"])
def test_compare_agents_finds_both_memories_equal(make, entries):
    td = TensorDict({"env_obs": small.make_observations(3), **entries}, batch_size=[3])
    compare_agents(make(None), make(8), td)


@pytest.mark.parametrize("env_id", [7, torch.full((3,), 7)], ids=["int", "tensor"])
def test_a_bad_id_leaves_the_tensordict_of_fast_unchanged(env_id):
    agent = fast(8)
    td = TensorDict({"env_obs": small.make_observations(3)}, batch_size=[3])
    if isinstance(env_id, int):
        td.set_non_tensor("training_env_id_start", env_id)
    else:
        td["training_env_id_start"] = env_id
    before = agent.get_memory()
    with torch.no_grad(), pytest.raises(ValueError, match=rf"{KEY}: got 7 for 3 rows, expected 0 to 5"):
        agent(td)
    assert set(td.keys()) == {"env_obs", "training_env_id_start"}
    assert_memory(agent, before)


def test_large_ids_have_memories_of_their_own():
    agent = make_agent(num_envs=None)
    for env_id in (2**60, 2**60 + 1):
        td = TensorDict({}, batch_size=[2])
        td.set_non_tensor("training_env_id_start", env_id)
        with torch.no_grad():
            agent.run_lstm(td, torch.randn(2, INPUT), 2, 1)
    assert sorted(agent.lstm_h) == [2**60, 2**60 + 1]
