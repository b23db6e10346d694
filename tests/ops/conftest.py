"""Runs each test of the operations on every implementation that this run of pytest asks for."""

import pytest
import torch
from references import IMPLEMENTATIONS, poison

from metta_fastagent import use_backend
from metta_fastagent.runtime import native


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def implementation(request):
    """(backend, device): the chosen backend, and the device that the test's tensors belong on."""
    name, device = request.param
    if name == "native" and not native.load():
        pytest.skip(f"native operators: {native.reason()}")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(7)
    with use_backend(name):
        yield name, torch.device(device)


@pytest.fixture
def backend(implementation):
    return implementation[0]


@pytest.fixture
def device(implementation):
    return implementation[1]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    poison(monkeypatch)


@pytest.fixture
def compile_fullgraph():
    """torch.compile into one graph, forward and backward, with PyTorch's own operators behind it."""
    torch._dynamo.reset()
    yield lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@pytest.fixture
def nondeterminism(device):
    """How much two gradients of one input may differ: cuDNN adds in any order."""
    return 1e-10 if device.type == "cuda" else 0.0
