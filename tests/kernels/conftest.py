"""Where the kernels run: on a CUDA device, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1)."""

import pytest
import torch

from metta_fastagent import _triton, use_backend

interpreted = pytest.mark.skipif(not _triton.INTERPRETED, reason="the interpreter needs TRITON_INTERPRET=1 and Triton")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=[pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=[pytest.mark.gpu, on_gpu])])
def device(request):
    """The device of the test's tensors, with backend "triton" chosen."""
    with use_backend("triton"):
        yield torch.device(request.param)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh memory holds NaN (or -7), so that a kernel that leaves a part of its output unwritten is caught."""

    def poison(tensor):
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -7)

    for name in ("empty", "empty_like"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, _original=original, **kwargs: poison(_original(*args, **kwargs)))
    original_new = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poison(original_new(*args, **kwargs)))
