"""A segment with resets computes what the LSTM module computes: of any class, with hooks and reparametrised weights."""

import logging

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.nn.utils import parametrizations, prune

from metta_fastagent import LSTMWrapper, recurrent, use_backend

ROWS, STEPS, SIZE = 3, 5, 8


class Tripled(nn.LSTM):
    """A subclass with a forward of its own."""

    def forward(self, sequence, state=None):
        return super().forward(3 * sequence, state)


class Cell(nn.Module):
    """The interface of nn.LSTM around an LSTMCell."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(SIZE, SIZE)

    def forward(self, sequence, state):
        h, c = state[0][0], state[1][0]
        outputs = []
        for step in sequence:
            h, c = self.cell(step, (h, c))
            outputs.append(h)
        return torch.stack(outputs), (h.unsqueeze(0), c.unsqueeze(0))


def hooked(lstm):
    lstm.register_forward_hook(lambda module, args, output: (2 * output[0], output[1]))
    return lstm


def pre_hooked(lstm):
    lstm.register_forward_pre_hook(lambda module, args: (-args[0], args[1]))
    return lstm


def patched(lstm):
    forward = lstm.forward
    lstm.forward = lambda sequence, state=None: forward(sequence + 1, state)
    return lstm


def pruned(lstm):
    return prune.l1_unstructured(lstm, "weight_hh_l0", 0.5)


def parametrized(lstm):
    return parametrizations.weight_norm(lstm, "weight_ih_l0")


MODULES = {
    "plain": lambda: nn.LSTM(SIZE, SIZE),
    "forward hook": lambda: hooked(nn.LSTM(SIZE, SIZE)),
    "forward pre-hook": lambda: pre_hooked(nn.LSTM(SIZE, SIZE)),
    "replaced forward": lambda: patched(nn.LSTM(SIZE, SIZE)),
    "prune": lambda: pruned(nn.LSTM(SIZE, SIZE)),
    "weight_norm": lambda: nn.utils.weight_norm(nn.LSTM(SIZE, SIZE), "weight_hh_l0"),
    "spectral_norm": lambda: nn.utils.spectral_norm(nn.LSTM(SIZE, SIZE), "weight_hh_l0"),
    "parametrization": lambda: parametrized(nn.LSTM(SIZE, SIZE)),
    "subclass": lambda: Tripled(SIZE, SIZE),
    "own module": Cell,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


def make_agent(make_lstm, num_envs=None):
    torch.manual_seed(0)
    agent = LSTMWrapper(None, nn.Identity(), SIZE, SIZE, 1)
    agent.lstm = make_lstm()
    if num_envs:
        agent.allocate_memory(num_envs)
    return agent.eval()


def make_td(dones):
    generator = torch.Generator().manual_seed(1)
    h, c = torch.randn(2, ROWS, 1, SIZE, generator=generator)
    return TensorDict({"lstm_h": h, "lstm_c": c, "dones": dones}, batch_size=[ROWS])


def reference(agent, td, hidden):
    """One call of the module for each step, with rows zeroed by hand."""
    h, c = td["lstm_h"].transpose(0, 1), td["lstm_c"].transpose(0, 1)
    outputs = []
    for t in range(STEPS):
        keep = ~td["dones"][:, t].view(1, -1, 1)
        output, (h, c) = agent.lstm(hidden.view(ROWS, STEPS, SIZE)[:, t].unsqueeze(0), (h * keep, c * keep))
        outputs.append(output[0])
    return torch.stack(outputs, dim=1).view(ROWS * STEPS, SIZE)


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("name", MODULES)
def test_a_segment_computes_what_the_module_does(name, backend):
    agent = make_agent(MODULES[name])
    hidden = torch.randn(ROWS * STEPS, SIZE)
    dones = torch.rand(ROWS, STEPS) < 0.3
    td = make_td(dones)
    with use_backend(backend):
        for _ in range(2):
            output = agent.run_lstm(td, hidden, ROWS, STEPS, training=True)
            torch.testing.assert_close(output, reference(agent, td, hidden))
            # A second round: weights that a hook recomputes are new in each update.
            output.square().sum().backward()
            with torch.no_grad():
                for param in agent.lstm.parameters():
                    assert param.grad is not None
                    param -= 0.1 * param.grad


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("num_envs", [None, ROWS])
def test_a_rollout_step_runs_and_the_agent_moves(name, num_envs):
    agent = make_agent(MODULES[name], num_envs)
    hidden = torch.randn(ROWS, SIZE)
    with torch.no_grad():
        first = agent.run_lstm(TensorDict({}, batch_size=[ROWS]), hidden, ROWS, 1, training=False)
        second = agent.run_lstm(TensorDict({}, batch_size=[ROWS]), hidden, ROWS, 1, training=False)
    assert not torch.equal(first, second)
    agent.to("cpu")


def test_a_quantised_lstm_acts():
    agent = make_agent(lambda: nn.LSTM(SIZE, SIZE))
    try:
        agent = torch.ao.quantization.quantize_dynamic(agent, {nn.LSTM}, dtype=torch.qint8)
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"no dynamic quantisation here: {error}")
    hidden = torch.randn(ROWS * STEPS, SIZE)
    td = make_td(torch.rand(ROWS, STEPS) < 0.3)
    with torch.no_grad():
        output = agent.run_lstm(td, hidden, ROWS, STEPS, training=True)
        torch.testing.assert_close(output, reference(agent, td, hidden))


def test_one_message_says_why_segments_go_step_by_step(caplog, monkeypatch):
    monkeypatch.setattr(recurrent, "_reported_reasons", set())
    agent = make_agent(MODULES["forward hook"])
    with caplog.at_level(logging.WARNING, logger="metta_fastagent"):
        for _ in range(2):
            agent.run_lstm(make_td(torch.zeros(ROWS, STEPS)), torch.randn(ROWS * STEPS, SIZE), ROWS, STEPS)
    assert [record.getMessage() for record in caplog.records] == [
        "LSTMWrapper: segments with resets call the LSTM step by step, as it has hooks"
    ]
