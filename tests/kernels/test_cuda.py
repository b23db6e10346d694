"""Properties that need a CUDA device: CUDA graphs, no host synchronisation, launch counts, a context that survives."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torch.profiler import ProfilerActivity, profile

from metta_fastagent import Fast, ops, use_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ROWS, STEPS, TOKENS = 64, 8, 20
NAMES, MAX_PARAMS = ["noop", "move", "press"], [0, 3, 3]


def make_agent(num_envs=None):
    torch.manual_seed(0)
    env = SimpleNamespace(feature_normalizations=dict.fromkeys(range(6), 10.0))
    agent = Fast(env, clip_range=0.05, num_envs=num_envs).cuda()
    agent.activate_actions(NAMES, MAX_PARAMS)
    return agent


@pytest.fixture
def agent():
    return make_agent()


def make_observations(*shape):
    tokens = torch.randint(0, 11, (*shape, TOKENS, 3), dtype=torch.uint8, device="cuda")
    tokens[..., 0] = tokens[..., 0] * 16 + torch.randint(0, 11, (*shape, TOKENS), device="cuda")
    tokens[..., 1] %= 6
    return tokens


def rollout_step(agent, observations, dones, **entries):
    entries |= {"env_obs": observations, "dones": dones, "truncateds": torch.zeros_like(dones)}
    td = TensorDict(entries, batch_size=[ROWS])
    with torch.no_grad():
        return agent(td)


def make_segments(agent):
    return {
        "env_obs": make_observations(ROWS, STEPS),
        "dones": torch.rand(ROWS, STEPS, device="cuda") < 0.1,
        "lstm_h": 0.1 * torch.randn(ROWS, 2, 128, device="cuda"),
        "lstm_c": 0.1 * torch.randn(ROWS, 2, 128, device="cuda"),
    }, agent.action_index_tensor[torch.randint(9, (ROWS, STEPS), device="cuda")]


def update_step(agent, optimizer, entries, actions):
    out = agent(TensorDict(entries, batch_size=[ROWS]), action=actions)
    loss = out["value"].square().mean() - out["act_log_prob"].mean() - 0.01 * out["entropy"].mean()
    (loss + 1e-3 * agent.l2_init_loss()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    agent.clip_weights()
    return loss.detach()


def captured(function):
    """Run `function` on a side stream first, then capture it; returns the graph and the captured call's results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def test_a_rollout_step_replays_from_a_graph(agent):
    observations, dones = make_observations(ROWS), torch.zeros(ROWS, dtype=torch.bool, device="cuda")
    graph, results = captured(lambda: rollout_step(agent, observations, dones))
    other = copy.deepcopy(agent)
    drawn = []
    for step in range(4):
        observations.copy_(make_observations(ROWS))
        dones.copy_(torch.arange(ROWS, device="cuda") % 3 == 0 if step == 2 else torch.zeros_like(dones))
        expected = rollout_step(other, observations, dones)
        graph.replay()
        torch.testing.assert_close(results["values"], expected["values"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(results["full_log_probs"], expected["full_log_probs"], rtol=1e-4, atol=1e-5)
        drawn.append(results["actions"].clone())
    for state, expected in zip(agent.get_memory(), other.get_memory(), strict=True):
        torch.testing.assert_close(state[0], expected[0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(drawn[0], drawn[1])


def test_a_rollout_step_replays_with_other_environments_and_another_memory():
    agent = make_agent(num_envs=3 * ROWS)
    observations, dones = make_observations(ROWS), torch.zeros(ROWS, dtype=torch.bool, device="cuda")
    env_id = torch.zeros(ROWS, dtype=torch.int64, device="cuda")
    graph, results = captured(lambda: rollout_step(agent, observations, dones, training_env_id_start=env_id))
    other = copy.deepcopy(agent)
    saved = other.get_memory()
    for step, start in enumerate((0, 2 * ROWS, 70, 2 * ROWS, 1, 0)):
        observations.copy_(make_observations(ROWS))
        dones.copy_(torch.arange(ROWS, device="cuda") % 3 == step)
        env_id.fill_(start)
        for each in (agent, other):
            if step == 2:
                each.reset_env_memory(70)
            elif step == 4:
                each.set_memory(saved)
            elif step == 5:
                each.reset_memory()
        expected = rollout_step(other, observations, dones, training_env_id_start=start)
        graph.replay()
        torch.testing.assert_close(results["values"], expected["values"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(results["full_log_probs"], expected["full_log_probs"], rtol=1e-4, atol=1e-5)
        for state, wanted in zip(agent.get_memory(), other.get_memory(), strict=True):
            torch.testing.assert_close(state[0], wanted[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", [-1, 2 * ROWS + 1, 2**40])
def test_an_environment_out_of_range_shows_and_leaves_memory_and_device_usable(start):
    agent = make_agent(num_envs=3 * ROWS)
    observations, dones = make_observations(ROWS), torch.zeros(ROWS, dtype=torch.bool, device="cuda")
    rollout_step(agent, observations, dones, training_env_id_start=torch.full((ROWS,), ROWS, device="cuda"))
    before = agent.get_memory()
    env_id = torch.full((ROWS,), start, device="cuda")
    assert rollout_step(agent, observations, dones, training_env_id_start=env_id)["values"].isnan().all()
    for state, wanted in zip(agent.get_memory(), before, strict=True):
        assert torch.equal(state[0], wanted[0])
    assert rollout_step(agent, observations, dones)["values"].isfinite().all()


def test_an_update_step_replays_from_a_graph(agent):
    entries, actions = make_segments(agent)

    def optimizer_of(module):
        return torch.optim.Adam(module.parameters(), lr=1e-3, capturable=True)

    optimizer = optimizer_of(agent)
    graph, loss = captured(lambda: update_step(agent, optimizer, entries, actions))
    other = copy.deepcopy(agent)
    other_optimizer = optimizer_of(other)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param in other.parameters():
        param.grad = torch.zeros_like(param)
    for _ in range(3):
        fresh, fresh_actions = make_segments(agent)
        for name, entry in entries.items():
            entry.copy_(fresh[name])
        actions.copy_(fresh_actions)
        expected = update_step(other, other_optimizer, entries, actions)
        graph.replay()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for (name, got), want in zip(agent.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4, msg=name)


def test_a_changed_list_of_tensors_is_refused_under_capture(agent):
    agent.clip_weights()
    moved = torch.randn(17, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="run the step once before the capture"), torch.cuda.graph(graph):
        ops.clip_weights_([moved], [1.0])


def test_nothing_waits_for_the_device(agent):
    observations, dones = make_observations(ROWS), torch.zeros(ROWS, dtype=torch.bool, device="cuda")
    entries, actions = make_segments(agent)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3, fused=True)
    allocated, env_id = make_agent(num_envs=2 * ROWS), torch.full((ROWS,), 7, device="cuda")
    rollout_step(agent, observations, dones)
    rollout_step(allocated, observations, dones, training_env_id_start=env_id)
    update_step(agent, optimizer, entries, actions)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rollout_step(agent, observations, dones)
        rollout_step(allocated, observations, dones, training_env_id_start=env_id)
        update_step(agent, optimizer, entries, actions)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launches(function):
    """Number of kernels that one call of `function` launches, after a first call."""
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        function()
        torch.cuda.synchronize()
    names = [event.name for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in names if not name.startswith(("Memcpy", "Memset"))]


def test_launch_counts(agent):
    logits = torch.randn(ROWS, 9, device="cuda", requires_grad=True)
    table, cum = agent.action_index_tensor, agent.cum_action_max_params
    pairs = table[torch.randint(9, (ROWS,), device="cuda")]
    outputs = ops.evaluate_actions(logits, pairs, cum)
    upstream = [torch.ones_like(outputs[0]), torch.ones_like(outputs[1])]
    weights = [torch.randn(n, device="cuda") for n in (10, 5000, 70000)]
    starts = [torch.zeros_like(weight) for weight in weights]
    samples = logits, pairs, *torch.randn(5, ROWS, device="cuda"), cum
    coefficients = {"clip_coef": 0.2, "vf_clip_coef": 0.1, "vf_coef": 0.5, "ent_coef": 0.01}
    loss, one = ops.ppo_loss(*samples, **coefficients)[0], torch.ones((), device="cuda")
    tokens, steps = make_observations(ROWS), torch.randn(16, 16, device="cuda")
    counts = {
        "clip": (lambda: ops.clip_weights_(weights, [1.0] * 3), 1),
        "to index": (lambda: ops.action_to_logit_index(pairs, cum), 1),
        "to pair": (lambda: ops.logit_index_to_action(torch.arange(9, device="cuda"), table), 2),
        "evaluate": (lambda: ops.evaluate_actions(logits, pairs, cum), 1),
        "backward": (lambda: torch.autograd.grad(outputs[:2], logits, upstream, retain_graph=True), 1),
        "sample": (lambda: ops.sample_actions(logits.detach(), table), 2),
        "l2": (lambda: ops.l2_init_loss(weights, starts, 0.5), 1),
        "loss": (lambda: ops.ppo_loss(*samples, **coefficients), 1),
        "loss backward": (lambda: torch.autograd.grad(loss, logits, one, retain_graph=True), 1),
        "advantages": (lambda: ops.advantages(steps, steps, steps > 0, steps[0], steps, 0.9, 0.8), 2),
        "grid": (lambda: ops.tokens_to_grid(tokens, 6, 11, 11, torch.ones(6, device="cuda")), 2),
    }
    for name, (function, expected) in counts.items():
        assert len(launches(function)) == expected, name


def lstm_inputs(steps, rows, size, dtype=torch.float32):
    """projected, weight_hh, h, c that need gradients, and resets in a tenth of the places."""
    shapes = (steps, rows, 4 * size), (4 * size, size), (rows, size), (rows, size)
    inputs = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
    inputs[1] *= size**-0.5
    return [tensor.requires_grad_() for tensor in inputs], torch.rand(steps, rows, device="cuda") < 0.1


def lstm_step(inputs, resets, upstream):
    """Outputs and gradients of one LSTM layer."""
    output, last_h, last_c = ops.lstm_layer(*inputs, resets)
    return output, last_h, last_c, *torch.autograd.grad([output, last_c], inputs, [upstream, upstream[0]])


@pytest.mark.parametrize(("steps", "rows", "size"), [(64, 64, 128), (17, 100, 200), (5, 33, 77)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)], ids=str
)
def test_lstm_layer_equals_its_eager_twin(steps, rows, size, dtype, tolerance):
    inputs, resets = lstm_inputs(steps, rows, size, dtype)
    upstream = torch.randn(steps, rows, size, device="cuda").to(dtype)
    got = lstm_step(inputs, resets, upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    with use_backend("eager"):
        expected = lstm_step(exact, resets, upstream.double())
    for tensor, want in zip(got, expected, strict=True):
        scale = want.abs().amax().clamp(min=1)
        torch.testing.assert_close(tensor.double() / scale, want / scale, rtol=0, atol=tolerance)


def test_lstm_layer_replays_from_a_graph():
    inputs, resets = lstm_inputs(16, 48, 128)
    upstream = torch.randn(16, 48, 128, device="cuda")
    graph, results = captured(lambda: lstm_step(inputs, resets, upstream))
    for _ in range(2):
        fresh, fresh_resets = lstm_inputs(16, 48, 128)
        for tensor, new in zip((*inputs, resets), (*fresh, fresh_resets), strict=True):
            tensor.data.copy_(new.data)
        expected = lstm_step(fresh, fresh_resets, upstream)
        graph.replay()
        for got, want in zip(results, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_lstm_layer_is_one_launch_each_way():
    inputs, resets = lstm_inputs(16, 48, 128)
    # The gradient of weight_hh is a product after the kernel.
    inputs[1].requires_grad_(False)
    output = ops.lstm_layer(*inputs, resets)[0]
    upstream = torch.ones_like(output)
    assert len(launches(lambda: ops.lstm_layer(*inputs, resets))) == 1
    assert len(launches(lambda: torch.autograd.grad(output, inputs[0], upstream, retain_graph=True))) == 1


def test_a_bad_action_leaves_the_device_usable(agent):
    logits = torch.randn(ROWS, 9, device="cuda")
    pairs = agent.action_index_tensor[torch.randint(9, (ROWS,), device="cuda")]
    pairs[5] = torch.tensor([77, -3], device="cuda")
    log_prob, _, _ = ops.evaluate_actions(logits, pairs, agent.cum_action_max_params)
    assert log_prob.isnan().nonzero().tolist() == [[5]]
    with pytest.raises(ValueError, match=r"actions\[5\]: got action type 77, parameter -3, expected a type 0 to 2"):
        ops.raise_if_reported(agent.cum_action_max_params, synchronize=True)
    assert torch.ones(3, device="cuda").sum().item() == 3


@pytest.mark.parametrize("numel", [2**31 + 4097])
def test_clip_reaches_beyond_two_billion_elements(numel):
    if torch.cuda.mem_get_info()[0] < 3 * numel:
        pytest.skip("needs 6 GB of free GPU memory")
    weight = torch.zeros(numel, dtype=torch.float16, device="cuda")
    weight[-1], weight[0] = 3.0, -3.0
    ops.clip_weights_([weight], [1.0])
    assert (weight[-1].item(), weight[0].item()) == (1.0, -1.0)


def test_bfloat16(agent):
    logits = (3 * torch.randn(ROWS, 9, device="cuda")).bfloat16().requires_grad_()
    index = torch.randint(9, (ROWS,), device="cuda")
    log_prob, _, full = ops.evaluate_actions(logits, index)
    reference = logits.detach().double().log_softmax(-1)
    torch.testing.assert_close(full.double(), reference, rtol=1e-2, atol=1e-2)
    (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
    expected = torch.nn.functional.one_hot(index, 9) - reference.exp()
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-2, atol=1e-2)
    weight = torch.randn(5000, device="cuda").bfloat16()
    want = weight.clone().clamp(-0.3, 0.3)
    ops.clip_weights_([weight], [0.3])
    assert torch.equal(weight, want)
