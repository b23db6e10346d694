"""A rollout step of `run_lstm` through the LSTM kernel: its results, and what else it launches."""

import copy

import pytest
import torch
from operators_for_tests import FREE, Operators
from tensordict import TensorDict
from torch import nn

from metta_fastagent import LSTMWrapper, _memory, use_backend
from metta_fastagent._memory import DeviceRows, clamped_rows

ENVS, SIZE = 5, 6


def agent(device, num_envs=ENVS, layers=2):
    torch.manual_seed(0)
    return LSTMWrapper(None, nn.Identity(), SIZE, SIZE, layers, num_envs=num_envs).to(device)


def step_td(start, rows, device):
    flags = {key: torch.rand(rows, device=device) < 0.3 for key in ("dones", "truncateds")}
    return TensorDict({**flags, "training_env_id_start": start}, batch_size=[rows], device=device)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("first", "rows"), [(0, ENVS), (2, 3)])
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("num_envs", [ENVS, None])
@pytest.mark.parametrize("grad", [False, True])
def test_steps_are_those_of_the_lstm(device, layers, first, rows, on_device, num_envs, grad):
    subject = agent(device, num_envs, layers)
    reference = copy.deepcopy(subject)
    kept = []
    with torch.set_grad_enabled(grad):
        for _ in range(4):
            start = torch.full((rows,), first, device=device) if on_device else first
            td, inputs = step_td(torch.zeros(rows), rows, device), torch.randn(rows, SIZE, device=device)
            td["training_env_id_start"] = start if on_device else torch.full((rows,), first)
            output = subject.run_lstm(td, inputs, rows, 1, training=False)
            with use_backend("eager"):
                expected = reference.run_lstm(td, inputs, rows, 1, training=False)
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
            kept.append((output, output.detach().clone()))
    for memory, other in zip(subject.get_memory(), reference.get_memory(), strict=True):
        torch.testing.assert_close(memory, other, rtol=1e-5, atol=1e-6)
    # Later steps, and writes to the outputs, leave the others as they were.
    before = subject.get_memory()
    for output, value in kept:
        assert torch.equal(output, value)
        output.detach().zero_()
    for memory, other in zip(subject.get_memory(), before, strict=True):
        assert all(torch.equal(memory[key], other[key]) for key in memory)


def test_a_step_launches_a_product_and_a_kernel_for_each_layer(device):
    subject, inputs = agent(device), torch.randn(ENVS, SIZE, device=device)
    flags = {key: torch.rand(ENVS, device=device) < 0.3 for key in ("dones", "truncateds")}
    td = TensorDict(flags, batch_size=[ENVS])
    with torch.no_grad(), Operators() as operators:
        subject.run_lstm(td, inputs, ENVS, 1, training=False)
    launched = [name for name in operators.names if name not in FREE]
    assert launched == ["addmm", "lstm_step_"] * 2


@pytest.mark.parametrize("start", [-1, ENVS])
def test_an_id_out_of_range_gives_nan_even_for_rows_that_are_reset(device, start, monkeypatch):
    # On the CPU too, as if the host did not know the id.
    monkeypatch.setattr(_memory, "memory_rows", lambda ids, rows, *rest: DeviceRows(*clamped_rows(ids, rows, ENVS)))
    subject = agent(device)
    before = subject.get_memory()
    td = TensorDict({"dones": torch.ones(2, dtype=torch.bool, device=device)}, batch_size=[2])
    td["training_env_id_start"] = torch.full((2,), start, device=device)
    with torch.no_grad():
        assert subject.run_lstm(td, torch.randn(2, SIZE, device=device), 2, 1, training=False).isnan().all()
    for memory, other in zip(subject.get_memory(), before, strict=True):
        assert torch.equal(memory[0], other[0])
