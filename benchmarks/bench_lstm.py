"""LSTM over segments with resets inside: `run_lstm` against the usual loop.

`upstream` is the loop that CleanRL-style agents run: `nn.LSTM` on one step at a time, with the state of a row zeroed by
hand where an episode starts. `nn.LSTM without resets` is one call over the whole segment, which is wrong if a row is
reset; it is compared only if no row is. The last size is the share of steps, in percent, that start an episode: with 0,
flags are given and none is set. `torchrl` is TorchRL's LSTMModule, on CUDA with its Triton backend.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarks.harness import Case, Shape, Size, parametrized
from metta_fastagent import LSTMWrapper

WITHOUT_RESETS = "nn.LSTM without resets"
PROVIDERS = ("upstream", WITHOUT_RESETS, "eager", "native", "triton", "torchrl")
MODES = ("forward", "forward + backward")
WIDTH, LAYERS = 128, 2
SHAPES = [
    Shape("quick", {"segments": 32, "time": 16, "resets": 0}),
    Shape("quick", {"segments": 32, "time": 16, "resets": 3}),
    Shape("full", {"segments": 64, "time": 64, "resets": 3}),
    Shape("full", {"segments": 256, "time": 16, "resets": 3}),
    Shape("gpu", {"segments": 512, "time": 64, "resets": 3}),
    Shape("gpu", {"segments": 4096, "time": 16, "resets": 3}),
]


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


def with_torchrl(inputs: Inputs) -> Callable[[Inputs], Tensor]:
    """TorchRL's module, which takes the state before every step and reads it where `is_init` is set."""
    from torchrl.modules import LSTMModule

    lstm = nn.LSTM(WIDTH, WIDTH, LAYERS, batch_first=True, device=inputs.hidden.device)
    # The same parameters, so that their gradients are compared too.
    for name, param in inputs.agent.lstm.named_parameters():
        setattr(lstm, name, param)
    module = LSTMModule(
        lstm=lstm,
        in_keys=["hidden", "h", "c"],
        out_keys=["output", ("next", "h"), ("next", "c")],
        recurrent_backend="triton" if inputs.hidden.is_cuda else "pad",
        default_recurrent_mode=True,
    )
    segments, steps = inputs.dones.shape
    states = {}
    for key, start in (("h", inputs.h), ("c", inputs.c)):
        states[key] = torch.zeros(segments, steps, LAYERS, WIDTH, device=start.device)
        states[key][:, 0] = start.masked_fill(inputs.dones[:, 0].view(-1, 1, 1), 0)

    def run(inputs: Inputs) -> Tensor:
        entries = {"hidden": inputs.hidden.view(segments, steps, -1), "is_init": inputs.dones.unsqueeze(-1), **states}
        return module(TensorDict(entries, batch_size=[segments, steps]))["output"].reshape(segments * steps, -1)

    return run


def make_case(mode: str, size: Size, device: torch.device) -> Case:
    inputs = make_inputs(size, device)
    leaves = [inputs.hidden, *inputs.agent.lstm.parameters()]
    # The loss is a mean over steps.
    grad = torch.randn_like(inputs.hidden) / len(inputs.hidden) ** 0.5

    def call_of(provider: str) -> Callable[[], Any]:
        if provider == "torchrl":
            run = with_torchrl(inputs)
        else:
            ours = functools.partial(package, dones=inputs.dones)
            run = {"upstream": upstream, WITHOUT_RESETS: package}.get(provider, ours)

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
