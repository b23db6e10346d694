"""LSTM over segments with resets inside: what `run_lstm` costs beside `nn.LSTM`, which knows no resets.

`upstream` is the base class's LSTM over whole segments without flags: nn.LSTM in one call, TF32 and all where cuDNN has
it. What it computes is wrong where rows are reset, so all results are compared with those of nn.LSTM in float64, called
for one step at a time with the state zeroed by hand. `steps` does so in float32; `step loop` projects a layer's whole
input at once and loops over the rest under autograd. The last size is how many of a hundred steps start an episode:
with 0 all flags are given, and none is set. Peer: TorchRL's LSTMModule, its Triton backend on CUDA.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarks.categorical import peer
from benchmarks.harness import Provider, Shape, Skipped, Suite, package_providers
from metta_fastagent import LSTMWrapper

NAMES = ("upstream", "steps", "step loop", "eager", "triton", "native", "torchrl")
WIDTH, LAYERS = 128, 2
SHAPES = [
    Shape("quick", {"segments": 64, "time": 64, "resets": 0}),
    Shape("quick", {"segments": 64, "time": 64, "resets": 3}),
    Shape("full", {"segments": 256, "time": 16, "resets": 3}),
    Shape("gpu", {"segments": 512, "time": 64, "resets": 3}),
    Shape("gpu", {"segments": 4096, "time": 16, "resets": 3}),
]


class Inputs(NamedTuple):
    """Segments as `run_lstm` takes them, and an upstream gradient."""

    agent: LSTMWrapper
    hidden: Tensor  # [segments * time, WIDTH], time varying fastest
    dones: Tensor  # bool [segments, time]
    h: Tensor  # [segments, LAYERS, WIDTH]
    c: Tensor  # [segments, LAYERS, WIDTH]
    grad: Tensor  # [segments * time, WIDTH]


# Outputs [segments * time, WIDTH] of the inputs' LSTM.
Run = Callable[[Inputs], Tensor]


def make_inputs(size: Mapping[str, int], device: torch.device) -> Inputs:
    """nn.LSTM's own initial weights: the base class's biases of 1 would keep every gate open."""
    segments, steps = size["segments"], size["time"]
    torch.manual_seed(0)
    agent = LSTMWrapper(None, nn.Identity(), WIDTH, WIDTH, LAYERS)
    agent.lstm = nn.LSTM(WIDTH, WIDTH, LAYERS)
    hidden = torch.randn(segments * steps, WIDTH).to(device).requires_grad_()
    dones = 100 * torch.rand(segments, steps) < size["resets"]
    h, c = 0.1 * torch.randn(2, segments, LAYERS, WIDTH)
    # The loss is a mean over steps.
    grad = torch.randn(segments * steps, WIDTH) / (segments * steps) ** 0.5
    return Inputs(agent.to(device), hidden, *(tensor.to(device) for tensor in (dones, h, c, grad)))


def run_lstm(inputs: Inputs, **flags: Tensor) -> Tensor:
    """The package's `run_lstm`."""
    segments, steps = inputs.dones.shape
    td = TensorDict({"lstm_h": inputs.h, "lstm_c": inputs.c, **flags}, batch_size=[segments])
    return inputs.agent.run_lstm(td, inputs.hidden, segments, steps)


def by_step(inputs: Inputs) -> Tensor:
    """nn.LSTM on one step at a time."""
    segments, steps = inputs.dones.shape
    sequence = inputs.hidden.view(segments, steps, -1).transpose(0, 1)
    h, c = inputs.h.transpose(0, 1), inputs.c.transpose(0, 1)
    outputs = []
    for x, fresh in zip(sequence.split(1), inputs.dones.t().unsqueeze(-1), strict=True):
        output, (h, c) = inputs.agent.lstm(x, (h.masked_fill(fresh, 0), c.masked_fill(fresh, 0)))
        outputs.append(output)
    return torch.cat(outputs).transpose(0, 1).reshape(segments * steps, -1)


def step_loop(inputs: Inputs) -> Tensor:
    """One projection for each layer, then a loop over time."""
    segments, steps = inputs.dones.shape
    sequence = inputs.hidden.view(segments, steps, -1).transpose(0, 1)
    keep = (~inputs.dones).to(sequence.dtype).t().unsqueeze(-1)
    for layer, (weight_ih, weight_hh, bias_ih, bias_hh) in enumerate(inputs.agent.lstm.all_weights):
        h, c, outputs = inputs.h[:, layer], inputs.c[:, layer], []
        projected = nn.functional.linear(sequence, weight_ih, bias_ih + bias_hh)
        for gates, kept in zip(projected.unbind(), keep.unbind(), strict=True):
            gate_i, gate_f, gate_g, gate_o = torch.addmm(gates, h * kept, weight_hh.t()).chunk(4, dim=1)
            c = gate_f.sigmoid() * (c * kept) + gate_i.sigmoid() * gate_g.tanh()
            h = gate_o.sigmoid() * c.tanh()
            outputs.append(h)
        sequence = torch.stack(outputs)
    return sequence.transpose(0, 1).reshape(segments * steps, -1)


def with_torchrl(modules: Any, inputs: Inputs) -> Run:
    """TorchRL's module, which takes the state before every step and reads it where `is_init` is set."""
    lstm = nn.LSTM(WIDTH, WIDTH, LAYERS, batch_first=True, device=inputs.hidden.device)
    # The same parameters, so that their gradients are compared too.
    for name, param in inputs.agent.lstm.named_parameters():
        setattr(lstm, name, param)
    module = modules.LSTMModule(
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


def with_backward(run: Run, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """A function that returns the outputs, and the gradients of the encoded observations and of all weights."""
    leaves = [inputs.hidden, *inputs.agent.lstm.parameters()]

    def call() -> tuple[Tensor, ...]:
        output = run(inputs)
        return output, *torch.autograd.grad(output, leaves, inputs.grad)

    return call


def forward_only(run: Run, inputs: Inputs) -> Callable[[], Tensor]:
    """A function that returns the outputs, without a graph."""
    return torch.no_grad()(lambda: run(inputs))


def exactly(inputs: Inputs) -> Inputs:
    """The inputs in float64."""
    hidden = inputs.hidden.detach().double().requires_grad_()
    agent = copy.deepcopy(inputs.agent).double()
    return Inputs(agent, hidden, inputs.dones, inputs.h.double(), inputs.c.double(), inputs.grad.double())


def make_providers(
    bind: Callable[[Run, Inputs], Callable], size: Mapping[str, int], device: torch.device, compiled: bool
) -> list[Provider | Skipped]:
    """upstream, its two ways to reset rows, the package and TorchRL, each bound to the inputs by `bind`."""
    inputs = make_inputs(size, device)
    return [
        Provider("upstream", bind(run_lstm, inputs), compared=lambda _: bind(by_step, exactly(inputs))()),
        Provider("steps", bind(by_step, inputs)),
        Provider("step loop", bind(step_loop, inputs)),
        *package_providers(device, bind(lambda given: run_lstm(given, dones=given.dones), inputs)),
        peer("torchrl", "torchrl.modules", lambda m: Provider("torchrl", bind(with_torchrl(m, inputs), inputs))),
    ]


SUITES = [
    Suite("run_lstm forward", NAMES, SHAPES, lambda *arguments: make_providers(forward_only, *arguments)),
    Suite("run_lstm forward + backward", NAMES, SHAPES, lambda *arguments: make_providers(with_backward, *arguments)),
]


def test_providers(case, run_case):
    run_case(case)
