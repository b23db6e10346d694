"""State survives the mode in which it was made: inference, autocast, default dtype and device, meta, empty batches."""

import copy

import pytest
import torch
from agents_for_tests import (
    ACTION_NAMES,
    MAX_PARAMS,
    assert_equal,
    make_actions,
    make_agent,
    make_env,
    make_fast,
    make_observations,
)
from tensordict import TensorDict

from metta_fastagent import Fast, use_backend

ROWS, STEPS = 3, 4


@pytest.fixture(params=["eager", "auto"], autouse=True)
def chosen(request):
    with use_backend(request.param):
        yield


@pytest.fixture(params=[None, ROWS], ids=["keys", "preallocated"])
def agent(request):
    return make_fast(request.param, clip_range=0.5)


def step(agent, rows=ROWS):
    entries = {"env_obs": make_observations(rows), "dones": torch.zeros(rows, dtype=torch.bool)}
    return agent(TensorDict(entries, batch_size=[rows]))


def train(agent, rows=ROWS, steps=STEPS):
    entries = {"env_obs": make_observations(rows, steps), "dones": torch.zeros(rows, steps, dtype=torch.bool)}
    return agent(TensorDict(entries, batch_size=[rows, steps]), action=make_actions(rows, steps))


def states(agent):
    return [*agent.lstm_h.values(), *agent.lstm_c.values()]


def test_inference_mode_leaves_nothing_that_training_cannot_use(agent):
    with torch.inference_mode():
        step(agent)
        train(agent)
        agent.update_l2_init_weight_copy()
        agent.activate_actions(ACTION_NAMES, MAX_PARAMS)
        agent.clip_weights()
        agent.set_memory(agent.get_memory())
        agent.reset_env_memory(0)
        step(agent)
    assert not any(state.is_inference() for state in states(agent))
    step(agent)["act_log_prob"].sum().backward()
    train(agent)["entropy"].sum().backward()
    agent.l2_init_loss().backward()


def test_autocast_leaves_the_state_in_the_weights_dtype(agent):
    with torch.no_grad():
        step(agent)
        with torch.autocast("cpu", torch.bfloat16):
            step(agent)
        assert {state.dtype for state in states(agent)} == {torch.float32}
        step(agent)
    with torch.autocast("cpu", torch.bfloat16):
        train(agent)["act_log_prob"].sum().backward()
    train(agent)["act_log_prob"].sum().backward()


def test_another_default_dtype_changes_nothing(agent):
    torch.set_default_dtype(torch.float64)
    try:
        assert step(agent)["act_log_prob"].dtype == torch.float32
        train(agent)["act_log_prob"].sum().backward()
        assert agent.l2_init_loss().dtype == torch.float32
        double = make_fast()
        assert step(double)["act_log_prob"].dtype == torch.float64
        train(double)["act_log_prob"].sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)


def test_another_default_device_changes_nothing(agent):
    rollout = TensorDict({"env_obs": make_observations(ROWS)}, batch_size=[ROWS])
    segments = TensorDict(
        {"env_obs": make_observations(ROWS, STEPS), "dones": torch.zeros(ROWS, STEPS, dtype=torch.bool)},
        batch_size=[ROWS, STEPS],
    )
    actions = make_actions(ROWS, STEPS)
    with torch.device("meta"):
        agent(rollout)
        agent(segments, action=actions)["act_log_prob"].sum().backward()
        agent.clip_weights()
        agent.l2_init_loss().backward()
        agent.compute_weight_metrics()
        agent.set_memory(agent.get_memory())
        agent.reset_env_memory(0)
        copy.deepcopy(agent)(rollout)
        agent.reset_memory()
    assert {tensor.device.type for tensor in (*states(agent), rollout["actions"])} == {"cpu"}


@pytest.mark.parametrize("num_envs", [None, ROWS])
@pytest.mark.parametrize("assign", [False, True])
def test_an_agent_made_on_the_meta_device_is_brought_to_life(num_envs, assign):
    original = make_fast(num_envs)
    with torch.device("meta"):
        agent = Fast(make_env(), num_envs=num_envs, clip_range=0.5)
    if not assign:
        agent.to_empty(device="cpu")
    agent.load_state_dict(original.state_dict(), assign=assign)
    agent.activate_actions(ACTION_NAMES, MAX_PARAMS, "cpu")
    for _ in range(2):
        torch.manual_seed(1)
        expected = step(original)
        torch.manual_seed(1)
        torch.testing.assert_close(step(agent)["full_log_probs"], expected["full_log_probs"])
    with pytest.raises(RuntimeError, match=r"initial_weights\[.*\]: on the meta device.*update_l2_init_weight_copy"):
        agent.l2_init_loss()
    agent.update_l2_init_weight_copy()
    assert agent.l2_init_loss() == 0


def test_a_batch_without_rows_changes_no_memory(agent):
    with torch.no_grad():
        step(agent)
    before = agent.get_memory()
    out = step(agent, 0)
    assert out["actions"].shape == (0, 2)
    assert out["full_log_probs"].shape[0] == 0
    assert_equal(agent.get_memory(), before)
    assert train(agent, 0, STEPS)["act_log_prob"].shape == (0, STEPS)
    step(agent)


def test_segments_without_steps(agent):
    result = train(agent, ROWS, 0)
    assert result["act_log_prob"].shape == (ROWS, 0)
    assert result["value"].shape == (ROWS, 0, 1)
    result["act_log_prob"].sum().backward()


def test_hooks_of_later_hosts_forget_the_memory():
    for name in ("on_new_training_run", "on_rollout_start", "on_train_mb_start", "on_eval_start"):
        agent = make_agent()
        with torch.no_grad():
            step(agent)
        assert agent.lstm_h
        getattr(agent, name)()
        assert not agent.lstm_h and not agent.lstm_c


def test_a_host_that_only_initializes_the_policy_sets_the_number_of_actions():
    agent = Fast(make_env())
    agent.initialize_to_environment(["noop", "move_0", "move_1"], "cpu")
    logits, _ = agent.policy.decode_actions(torch.zeros(2, 128), 2)
    assert logits.shape == (2, 3)
