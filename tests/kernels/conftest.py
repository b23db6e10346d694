"""Where the kernels run: on a CUDA device, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1)."""

import pytest
import torch

from metta_fastagent import use_backend
from metta_fastagent.runtime import triton as _triton

interpreted = pytest.mark.skipif(not _triton.INTERPRETED, reason="the interpreter needs TRITON_INTERPRET=1 and Triton")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=[pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=[pytest.mark.gpu, on_gpu])])
def device(request):
    """The device of the test's tensors, with backend "triton" chosen."""
    with use_backend("triton"):
        yield torch.device(request.param)
