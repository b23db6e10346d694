"""The LSTM base class: initial weights, and segments with resets against its own LSTM called step by step."""

import logging

import pytest
import torch
from agents_for_tests import assert_equal, on_gpu, rollout_td
from tensordict import TensorDict
from torch import nn
from torch.nn.utils import parametrizations, prune

from metta_fastagent import LSTMWrapper, recurrent, use_backend

INPUT, HIDDEN, B, T = 5, 4, 6, 7
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, on_gpu])]


@pytest.fixture(autouse=True)
def float32_in_cudnn(monkeypatch):
    """cuDNN's LSTM rounds to TF32 by default; segments with resets do not."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def make_agent(layers=2, lstm=None):
    torch.manual_seed(0)
    agent = LSTMWrapper(None, nn.Identity(), INPUT, HIDDEN, layers)
    if lstm is not None:
        agent.lstm = lstm()
    return agent


def random_flags(rows=B, steps=T, share=0.3):
    """Episode starts of every kind: in the first column, in the last, none in row 0, throughout in row 1."""
    flags = torch.rand(rows, steps) < share
    flags[0], flags[1], flags[2, 0], flags[-1, -1] = False, True, True, True
    return flags


def make_td(layers=2, dtype=torch.float32, **flags):
    """Stored states that are not zero, and flags."""
    h, c = torch.randn(2, B, layers, HIDDEN, dtype=dtype)
    return TensorDict({"lstm_h": h, "lstm_c": c, **flags}, batch_size=[B])


def run(agent, td, inputs):
    rows, steps = inputs.shape[:2]
    return agent.run_lstm(td, inputs.reshape(rows * steps, -1), rows, steps).view(rows, steps, -1)


def step_by_step(agent, td, inputs):
    """Outputs [B, T, HIDDEN] of the agent's LSTM on one step at a time, the state zeroed by hand."""
    h, c = (td[key].transpose(0, 1).contiguous() for key in ("lstm_h", "lstm_c"))
    fresh = torch.zeros(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
    for key in {"dones", "truncateds"} & set(td.keys()):
        fresh = fresh | td[key].bool()
    outputs = []
    for step, first in zip(inputs.unbind(1), fresh.t().unsqueeze(-1), strict=True):
        output, (h, c) = agent.lstm(step.unsqueeze(0), (h.masked_fill(first, 0), c.masked_fill(first, 0)))
        outputs.append(output[0])
    return torch.stack(outputs, dim=1)


def assert_repeats(agent, td, inputs, expected, atol, rtol):
    """Outputs equal `expected` within `atol`; gradients for random upstream gradients within `rtol` and 10 * `atol`."""
    output, leaves = run(agent, td, inputs), [inputs, *agent.lstm.parameters()]
    upstream = torch.randn_like(output)
    torch.testing.assert_close(output, expected, rtol=0, atol=atol)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    for got, want in zip(torch.autograd.grad(output, leaves, upstream), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=rtol, atol=10 * atol)


# Construction


def test_construction_draws_what_initialising_an_lstm_by_hand_draws():
    torch.manual_seed(7)
    agent = LSTMWrapper(None, nn.Identity(), INPUT, HIDDEN, 3)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    lstm = nn.LSTM(INPUT, HIDDEN, 3)
    for name, param in lstm.named_parameters():
        if "bias" in name:
            nn.init.ones_(param)
        else:
            nn.init.orthogonal_(param)
    assert_equal(torch.get_rng_state(), after)
    assert_equal(dict(agent.lstm.state_dict()), dict(lstm.state_dict()))


def test_starts_without_tables_and_with_empty_memory():
    agent = make_agent()
    assert agent.action_index_tensor is None
    assert agent.cum_action_max_params is None
    assert agent.has_memory() is True
    assert agent.get_memory() == ({}, {})
    assert all(key.startswith("lstm.") for key in agent.state_dict())


# Segments


@pytest.mark.parametrize("layout", ["per row", "per step", "expanded", "flat"])
def test_a_segment_starts_from_the_stored_state(layout):
    agent, inputs = make_agent(), torch.randn(B, T, INPUT)
    td = make_td()
    entries, batch_size = {}, {"per row": [B], "flat": [B * T]}.get(layout, [B, T])
    for key, start in td.items():
        # NaN where nothing may be read.
        steps = torch.full((B, T, *start.shape[1:]), float("nan"))
        steps[:, 0] = start
        expanded = start.unsqueeze(1).expand(steps.shape)
        entries[key] = {"per row": start, "per step": steps, "expanded": expanded, "flat": steps.flatten(0, 1)}[layout]
    originals = {key: entry.clone() for key, entry in entries.items()}
    output = run(agent, TensorDict(entries, batch_size=batch_size), inputs)
    torch.testing.assert_close(output, step_by_step(agent, td, inputs), rtol=0, atol=1e-6)
    assert_equal(entries, originals)


@pytest.mark.parametrize("flags", [{}, {"dones": torch.zeros(B, T)}, {"truncateds": torch.zeros(B, T).bool()}])
@pytest.mark.parametrize("layers", [1, 3])
def test_without_state_and_resets_a_segment_is_one_sequence_from_zeros(layers, flags):
    agent, inputs = make_agent(layers), torch.randn(B, T, INPUT)
    expected = agent.lstm(inputs.transpose(0, 1))[0].transpose(0, 1)
    torch.testing.assert_close(run(agent, TensorDict(flags, batch_size=[B, T]), inputs), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("device", "layers", "bias", "dtype", "atol", "rtol"),
    [
        ("cpu", 2, True, torch.float64, 1e-12, 1e-12),
        *(
            pytest.param(device, layers, bias, torch.float32, 1e-5, 1e-4, marks=marks)
            for device, marks in (("cpu", ()), ("cuda", [pytest.mark.gpu, on_gpu]))
            for layers, bias in ((1, True), (2, True), (3, False))
        ),
    ],
)
def test_resets_in_a_segment(device, layers, bias, dtype, atol, rtol):
    agent = make_agent(layers, lambda: nn.LSTM(INPUT, HIDDEN, layers, bias=bias)).to(device, dtype)
    inputs = torch.randn(B, T, INPUT, dtype=dtype).to(device).requires_grad_()
    truncateds = torch.rand(B, T) < 0.1
    truncateds[0] = False
    td = make_td(layers, dtype, dones=random_flags(), truncateds=truncateds).to(device)
    assert_repeats(agent, td, inputs, step_by_step(agent, td, inputs), atol, rtol)
    # A state of zeros is as good as none.
    stateless = td.exclude("lstm_h", "lstm_c")
    td["lstm_h"], td["lstm_c"] = torch.zeros_like(td["lstm_h"]), torch.zeros_like(td["lstm_c"])
    assert_repeats(agent, stateless, inputs, step_by_step(agent, td, inputs), atol, rtol)


def test_a_segment_of_one_step_is_reset_too():
    agent, inputs = make_agent(), torch.randn(B, 1, INPUT)
    td = make_td(env_obs=torch.zeros(B, 1, 2, 3), dones=torch.arange(B).view(B, 1) % 2 == 0)
    torch.testing.assert_close(run(agent, td, inputs), step_by_step(agent, td, inputs), rtol=0, atol=1e-6)
    assert agent.get_memory() == ({}, {})


def test_no_gradient_flows_into_the_stored_state():
    agent, td = make_agent(), make_td()
    for state in td.values():
        state.requires_grad_()
    run(agent, td, torch.randn(B, T, INPUT)).sum().backward()
    assert agent.lstm.weight_hh_l0.grad.abs().sum() > 0
    assert all(state.grad is None for state in td.values())


@pytest.mark.parametrize("layers", [1, 2])
def test_gradcheck_with_resets(layers):
    torch.manual_seed(1)
    agent = LSTMWrapper(None, nn.Identity(), 2, 2, layers).double()
    dones = torch.tensor([[False, True, False], [True, False, True]])
    h, c = torch.randn(2, 2, layers, 2, dtype=torch.float64)
    td = TensorDict({"dones": dones, "lstm_h": h, "lstm_c": c}, batch_size=[2])
    hidden = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    # gradcheck moves the parameters in place, so the agent sees them without being given them.
    assert torch.autograd.gradcheck(
        lambda hidden, *_: agent.run_lstm(td, hidden, 2, 3), (hidden, *agent.lstm.parameters())
    )


@pytest.mark.parametrize("layers", [1, 3])
def test_training_on_stored_segments_repeats_the_rollout(layers):
    agent = make_agent(layers)
    inputs, dones, truncateds = torch.randn(B, 2 * T, INPUT), random_flags(B, 2 * T), random_flags(B, 2 * T, 0.05)
    with torch.no_grad():
        agent.run_lstm(rollout_td(B, 2), torch.randn(B, INPUT), B, 1)
        for segment in (slice(0, T), slice(T, 2 * T)):
            h, c = (memory[2].transpose(0, 1) for memory in agent.get_memory())
            flags = {"dones": dones[:, segment], "truncateds": truncateds[:, segment]}
            outputs = [
                agent.run_lstm(rollout_td(B, 2, **{key: flag[:, t] for key, flag in flags.items()}), step, B, 1)
                for t, step in enumerate(inputs[:, segment].unbind(1))
            ]
            again = run(agent, TensorDict({"lstm_h": h, "lstm_c": c, **flags}, batch_size=[B]), inputs[:, segment])
            torch.testing.assert_close(again, torch.stack(outputs, dim=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 3])
def test_dropout_draws_as_the_lstm_does(layers):
    agent = make_agent(layers, lambda: nn.LSTM(INPUT, HIDDEN, layers, dropout=0.5 if layers > 1 else 0.0))
    inputs = torch.randn(B, T, INPUT, requires_grad=True)
    td = make_td(layers, dones=torch.zeros(B, T, dtype=torch.bool))
    state = tuple(td[key].transpose(0, 1).contiguous() for key in ("lstm_h", "lstm_c"))
    torch.manual_seed(1)
    expected = agent.lstm(inputs.transpose(0, 1), state)[0].transpose(0, 1)
    torch.manual_seed(1)
    assert_repeats(agent, td, inputs, expected, 1e-6, 1e-5)
    different = run(agent, td, inputs) - expected
    assert bool((different.abs() > 1e-3).any()) == (layers > 1)


def test_no_dropout_in_evaluation():
    agent = make_agent(2, lambda: nn.LSTM(INPUT, HIDDEN, 2, dropout=0.5)).eval()
    inputs, td = torch.randn(B, T, INPUT), make_td(dones=random_flags())
    torch.testing.assert_close(run(agent, td, inputs), step_by_step(agent, td, inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, True), (torch.float32, False), (torch.float64, True)])
def test_autocast_is_that_of_the_lstm(device, dtype, bias):
    agent = make_agent(2, lambda: nn.LSTM(INPUT, HIDDEN, 2, bias=bias)).to(device, dtype)
    inputs = torch.randn(B, T, INPUT, dtype=dtype).to(device).requires_grad_()
    td, leaves = make_td(2, dtype, dones=random_flags()).to(device), [inputs, *agent.parameters()]
    # cuDNN's LSTM runs in float16 under autocast, for every autocast dtype.
    with torch.autocast(device, torch.bfloat16 if device == "cpu" else torch.float16):
        output, expected = run(agent, td, inputs), step_by_step(agent, td, inputs)
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-2)
    # Outside of autocast, as a training step's backward is.
    upstream = torch.randn_like(output)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    for got, want in zip(torch.autograd.grad(output, leaves, upstream), wanted, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=0, atol=3e-2 * max(1.0, want.abs().max().item()))


def test_without_flags_the_whole_sequence_is_one_call(monkeypatch):
    agent, inputs, td = make_agent(), torch.randn(B, T, INPUT), make_td(dones=random_flags())
    calls, forward = [], nn.LSTM.forward
    monkeypatch.setattr(nn.LSTM, "forward", lambda *arguments: calls.append(1) or forward(*arguments))
    run(agent, td, inputs)
    assert calls == []
    run(agent, td.exclude("dones"), inputs)
    assert calls == [1]


# Modules other than nn.LSTM


class Tripled(nn.LSTM):
    """A subclass with a forward of its own."""

    def forward(self, sequence, state=None):
        return super().forward(3 * sequence, state)


class Cell(nn.Module):
    """The interface of nn.LSTM around an LSTMCell."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(INPUT, HIDDEN)

    def forward(self, sequence, state):
        h, c = state[0][0], state[1][0]
        outputs = []
        for step in sequence:
            h, c = self.cell(step, (h, c))
            outputs.append(h)
        return torch.stack(outputs), (h.unsqueeze(0), c.unsqueeze(0))


def plain():
    return nn.LSTM(INPUT, HIDDEN)


def changed(change):
    lstm = plain()
    change(lstm)
    return lstm


def shifted(forward):
    return lambda sequence, state=None: forward(sequence + 1, state)


MODULES = {
    "plain": plain,
    "forward hook": lambda: changed(lambda lstm: lstm.register_forward_hook(lambda m, args, out: (2 * out[0], out[1]))),
    "forward pre-hook": lambda: changed(lambda lstm: lstm.register_forward_pre_hook(lambda m, a: (-a[0], a[1]))),
    "replaced forward": lambda: changed(lambda lstm: setattr(lstm, "forward", shifted(lstm.forward))),
    "prune": lambda: prune.l1_unstructured(plain(), "weight_hh_l0", 0.5),
    "weight_norm": lambda: nn.utils.weight_norm(plain(), "weight_hh_l0"),
    "spectral_norm": lambda: nn.utils.spectral_norm(plain(), "weight_hh_l0"),
    "parametrization": lambda: parametrizations.weight_norm(plain(), "weight_ih_l0"),
    "subclass": lambda: Tripled(INPUT, HIDDEN),
    "own module": Cell,
}
every_module = pytest.mark.parametrize("name", MODULES)
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


@every_module
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_segment_computes_what_the_module_does(name, backend):
    agent = make_agent(1, MODULES[name]).eval()
    inputs, td = torch.randn(B, T, INPUT), make_td(1, dones=random_flags())
    with use_backend(backend):
        for _ in range(2):
            output = run(agent, td, inputs)
            torch.testing.assert_close(output, step_by_step(agent, td, inputs))
            # A second round: weights that a hook recomputes are new in each update.
            output.square().sum().backward()
            with torch.no_grad():
                for param in agent.lstm.parameters():
                    assert param.grad is not None
                    param -= 0.1 * param.grad


@every_module
@pytest.mark.parametrize("num_envs", [None, B])
def test_a_rollout_step_runs_and_the_agent_moves(name, num_envs):
    agent = make_agent(1, MODULES[name]).eval()
    if num_envs:
        agent.allocate_memory(num_envs)
    hidden = torch.randn(B, INPUT)
    with torch.no_grad():
        first, second = (agent.run_lstm(rollout_td(B), hidden, B, 1, training=False) for _ in range(2))
    assert not torch.equal(first, second)
    agent.to("cpu")


def test_a_quantised_lstm_acts():
    agent = make_agent(1, plain).eval()
    try:
        agent = torch.ao.quantization.quantize_dynamic(agent, {nn.LSTM}, dtype=torch.qint8)
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"no dynamic quantisation here: {error}")
    inputs, td = torch.randn(B, T, INPUT), make_td(1, dones=random_flags())
    with torch.no_grad():
        torch.testing.assert_close(run(agent, td, inputs), step_by_step(agent, td, inputs))


def test_one_message_says_why_segments_go_step_by_step(caplog, monkeypatch):
    monkeypatch.setattr(recurrent, "_reported_reasons", set())
    agent = make_agent(1, MODULES["forward hook"])
    with caplog.at_level(logging.WARNING, logger="metta_fastagent"):
        for _ in range(2):
            run(agent, make_td(1, dones=random_flags()), torch.randn(B, T, INPUT))
    assert [record.getMessage() for record in caplog.records] == [
        "LSTMWrapper: segments with resets call the LSTM step by step, as it has hooks"
    ]
