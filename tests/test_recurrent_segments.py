"""Segments with resets inside, for every kind of LSTM that a subclass may put in place of the base class's."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from metta_fastagent import LSTMWrapper

INPUT, HIDDEN, B, T = 5, 4, 6, 7
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, on_gpu])]


@pytest.fixture(autouse=True)
def float32_in_cudnn(monkeypatch):
    """cuDNN's LSTM rounds to TF32 by default; segments with resets do not."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def make_agent(lstm):
    agent = LSTMWrapper(None, nn.Identity(), INPUT, HIDDEN, lstm.num_layers)
    agent.lstm = lstm
    return agent


def make_td(dones, layers, dtype=torch.float32):
    """Episode starts, and stored states that are not zero."""
    h, c = torch.randn(2, len(dones), layers, HIDDEN, dtype=dtype, device=dones.device)
    return TensorDict({"dones": dones, "lstm_h": h, "lstm_c": c}, batch_size=[len(dones)])


def random_dones(device="cpu"):
    dones = torch.rand(B, T, device=device) < 0.3
    dones[0], dones[1], dones[2, 0], dones[3, -1] = False, True, True, True
    return dones


def step_by_step(agent, td, inputs):
    """Outputs [B, T, HIDDEN] of the agent's own nn.LSTM on one step at a time, the state zeroed by hand."""
    h, c = (td[key].transpose(0, 1).contiguous() for key in ("lstm_h", "lstm_c"))
    outputs = []
    for t in range(inputs.shape[1]):
        fresh = td["dones"][:, t].view(1, -1, 1)
        output, (h, c) = agent.lstm(inputs[:, t].unsqueeze(0), (h.masked_fill(fresh, 0), c.masked_fill(fresh, 0)))
        outputs.append(output.squeeze(0))
    return torch.stack(outputs, dim=1)


def run(agent, td, inputs):
    rows, steps = inputs.shape[:2]
    return agent.run_lstm(td, inputs.reshape(rows * steps, -1), rows, steps).view(rows, steps, -1)


def gradients(output, upstream, inputs, agent):
    return torch.autograd.grad(output, [inputs, *agent.parameters()], upstream)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_lstm_step_by_step(device, layers, bias):
    torch.manual_seed(0)
    agent = make_agent(nn.LSTM(INPUT, HIDDEN, layers, bias=bias)).to(device)
    inputs = torch.randn(B, T, INPUT, device=device, requires_grad=True)
    td, upstream = make_td(random_dones(device), layers), torch.randn(B, T, HIDDEN, device=device)
    output, expected = run(agent, td, inputs), step_by_step(agent, td, inputs)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    wanted = gradients(expected, upstream, inputs, agent)
    for got, want in zip(gradients(output, upstream, inputs, agent), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [1, 3])
def test_dropout_draws_as_the_lstm_does(layers):
    torch.manual_seed(0)
    lstm = nn.LSTM(INPUT, HIDDEN, layers, dropout=0.5 if layers > 1 else 0.0)
    agent = make_agent(lstm)
    inputs = torch.randn(B, T, INPUT, requires_grad=True)
    td, upstream = make_td(torch.zeros(B, T, dtype=torch.bool), layers), torch.randn(B, T, HIDDEN)
    state = tuple(td[key].transpose(0, 1).contiguous() for key in ("lstm_h", "lstm_c"))
    torch.manual_seed(1)
    expected = lstm(inputs.transpose(0, 1), state)[0].transpose(0, 1)
    torch.manual_seed(1)
    output = run(agent, td, inputs)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    wanted = gradients(expected, upstream, inputs, agent)
    for got, want in zip(gradients(output, upstream, inputs, agent), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    different = run(agent, td, inputs) - output
    assert bool(different.any()) == (layers > 1)


def test_no_dropout_in_evaluation():
    torch.manual_seed(0)
    agent = make_agent(nn.LSTM(INPUT, HIDDEN, 2, dropout=0.5)).eval()
    inputs, td = torch.randn(B, T, INPUT), make_td(random_dones(), 2)
    torch.testing.assert_close(run(agent, td, inputs), step_by_step(agent, td, inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_autocast_is_that_of_the_lstm(device, dtype, bias):
    torch.manual_seed(0)
    agent = make_agent(nn.LSTM(INPUT, HIDDEN, 2, bias=bias)).to(device, dtype)
    inputs = torch.randn(B, T, INPUT, device=device, dtype=dtype, requires_grad=True)
    td = make_td(random_dones(device), 2, dtype)
    upstream = torch.randn(B, T, HIDDEN, device=device)
    # cuDNN's LSTM runs in float16 under autocast, for every autocast dtype.
    with torch.autocast(device, torch.bfloat16 if device == "cpu" else torch.float16):
        output, expected = run(agent, td, inputs), step_by_step(agent, td, inputs)
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-2)
    # Outside of autocast, as a training step's backward is.
    wanted = gradients(expected, upstream.to(expected.dtype), inputs, agent)
    for got, want in zip(gradients(output, upstream.to(output.dtype), inputs, agent), wanted, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=0, atol=3e-2 * max(1.0, want.abs().max().item()))


def test_without_flags_the_whole_sequence_is_one_call(monkeypatch):
    agent = make_agent(nn.LSTM(INPUT, HIDDEN, 2))
    calls = []
    forward = nn.LSTM.forward
    monkeypatch.setattr(nn.LSTM, "forward", lambda *arguments: calls.append(1) or forward(*arguments))
    inputs, td = torch.randn(B, T, INPUT), make_td(random_dones(), 2)
    run(agent, td, inputs)
    assert calls == []
    run(agent, td.exclude("dones"), inputs)
    assert calls == [1]


@pytest.mark.parametrize(
    ("option", "value"),
    [("batch_first", True), ("bidirectional", True), ("proj_size", 2)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("steps", [1, T])
@pytest.mark.parametrize("flags", [True, False])
def test_an_lstm_of_another_layout_is_refused(option, value, steps, flags):
    agent = make_agent(nn.LSTM(INPUT, HIDDEN, **{option: value}))
    td = TensorDict({"dones": torch.zeros(B, steps)} if flags else {}, batch_size=[B])
    with pytest.raises(ValueError, match=rf"^lstm: got {option}={value}, expected nn.LSTM's default"):
        agent.run_lstm(td, torch.randn(B * steps, INPUT), B, steps)
    assert agent.get_memory() == ({}, {})


def test_what_is_no_lstm_is_refused_where_rows_are_reset():
    agent = make_agent(nn.LSTM(INPUT, HIDDEN))
    agent.lstm = nn.GRU(INPUT, HIDDEN)
    with pytest.raises(TypeError, match=r"^lstm: got GRU, expected nn\.LSTM or a module with"):
        run(agent, make_td(random_dones(), 1), torch.randn(B, T, INPUT))
