"""LSTM over segments with resets inside: `run_lstm` against the usual loop.

`upstream` is the loop that CleanRL-style agents run: `nn.LSTM` on one step at a time, with a row's state zeroed by hand
where an episode starts. `nn.LSTM without resets` is one call over the whole segment, which is wrong if a row is reset;
it is compared only if none is. `torchrl` is TorchRL's LSTMModule in recurrent mode. The last size is the percentage of
steps that start an episode: with 0, flags are given but none is set.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarks.harness import Case, Size, parametrized, shapes
from metta_fastagent import LSTMWrapper

WITHOUT_RESETS = "nn.LSTM without resets"
# By backend; "pad" if none is named.
TORCHRL = ("torchrl", "torchrl scan", "torchrl triton")
PROVIDERS = ("upstream", WITHOUT_RESETS, "eager", "native", "triton", *TORCHRL)
MODES = ("forward", "forward + backward")
WIDTH, LAYERS = 128, 2
SHAPES = shapes(
    "segments time resets",
    quick=[(32, 16, 0), (32, 16, 3)],
    full=[(64, 64, 3), (256, 16, 3)],
    gpu=[(512, 64, 3), (4096, 16, 3)],
)


class Inputs(NamedTuple):
    """Segments as `run_lstm` takes them."""

    agent: LSTMWrapper
    hidden: Tensor  # [segments * time, WIDTH], time varying fastest
    dones: Tensor  # bool [segments, time]
    h: Tensor  # [segments, LAYERS, WIDTH]
    c: Tensor  # [segments, LAYERS, WIDTH]


def make_inputs(size: Size, device: torch.device) -> Inputs:
    """nn.LSTM's own initial weights: the base class's biases of 1 would keep every gate open."""
    segments, steps = size["segments"], size["time"]
    torch.manual_seed(0)
    agent = LSTMWrapper(None, nn.Identity(), WIDTH, WIDTH, LAYERS)
    agent.lstm = nn.LSTM(WIDTH, WIDTH, LAYERS)
    hidden = torch.randn(segments * steps, WIDTH).to(device).requires_grad_()
    dones = 100 * torch.rand(segments, steps) < size["resets"]
    h, c = 0.1 * torch.randn(2, segments, LAYERS, WIDTH)
    return Inputs(agent.to(device), hidden, *(tensor.to(device) for tensor in (dones, h, c)))


def upstream(inputs: Inputs) -> Tensor:
    """nn.LSTM on one step at a time."""
    segments, steps = inputs.dones.shape
    sequence = inputs.hidden.view(segments, steps, -1).transpose(0, 1)
    h, c = inputs.h.transpose(0, 1), inputs.c.transpose(0, 1)
    outputs = []
    for x, starts in zip(sequence.split(1), inputs.dones.t().unsqueeze(-1), strict=True):
        output, (h, c) = inputs.agent.lstm(x, (h.masked_fill(starts, 0), c.masked_fill(starts, 0)))
        outputs.append(output)
    return torch.cat(outputs).transpose(0, 1).reshape(segments * steps, -1)


def package(inputs: Inputs, **flags: Tensor) -> Tensor:
    """`run_lstm`; without flags it is one call of nn.LSTM."""
    segments, steps = inputs.dones.shape
    td = TensorDict({"lstm_h": inputs.h, "lstm_c": inputs.c, **flags}, batch_size=[segments])
    return inputs.agent.run_lstm(td, inputs.hidden, segments, steps)


def with_torchrl(inputs: Inputs, provider: str) -> Callable[[Inputs], Tensor]:
    """LSTMModule around the agent's LSTM; it reads the state at each episode's first step, where it is zero."""
    from torchrl.modules import LSTMModule, set_recurrent_mode

    backend = provider.partition(" ")[2] or "pad"
    options: Any = {"in_key": "hidden", "out_key": "output", "recurrent_backend": backend}
    module = LSTMModule(WIDTH, WIDTH, num_layers=LAYERS, **options).to(inputs.dones.device)
    # Copies the parameters, because its `lstm` has its own class.
    for name, parameter in inputs.agent.lstm.named_parameters():
        setattr(module.lstm, name, parameter)
    segments, steps = inputs.dones.shape
    goes_on = ~inputs.dones.view(segments, steps, 1, 1)
    state = {
        f"recurrent_state_{name}": part.unsqueeze(1) * goes_on for name, part in (("h", inputs.h), ("c", inputs.c))
    }

    def run(inputs: Inputs) -> Tensor:
        hidden = inputs.hidden.view(segments, steps, -1)
        td = TensorDict(
            {"hidden": hidden, "is_init": inputs.dones.unsqueeze(-1), **state}, batch_size=[segments, steps]
        )
        with set_recurrent_mode(True):
            return module(td)["output"].reshape(segments * steps, -1)

    return run


def make_case(mode: str, size: Size, device: torch.device) -> Case:
    inputs = make_inputs(size, device)
    leaves = [inputs.hidden, *inputs.agent.lstm.parameters()]
    # The loss is a mean over steps.
    grad = torch.randn_like(inputs.hidden) / len(inputs.hidden) ** 0.5

    def call_of(provider: str) -> Callable[[], Any]:
        ours = functools.partial(package, dones=inputs.dones)
        run = {"upstream": upstream, WITHOUT_RESETS: package}.get(provider, ours)
        if provider in TORCHRL:
            run = with_torchrl(inputs, provider)

        def with_backward() -> tuple[Tensor, ...]:
            output = run(inputs)
            return output, *torch.autograd.grad(output, leaves, grad)

        return with_backward if mode != "forward" else torch.no_grad()(lambda: run(inputs))

    uncompared = (WITHOUT_RESETS,) if size["resets"] else ()
    return Case(f"run_lstm {mode}", call_of, uncompared=uncompared)


@pytest.mark.parametrize("mode", MODES)
@parametrized(PROVIDERS, SHAPES)
def test_run_lstm(measure, mode):
    measure(functools.partial(make_case, mode))
