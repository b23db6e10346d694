"""The hyperbolic tangent of each element."""

import pytest
import torch
from references import DTYPES, assert_close, without

from metta_fastagent.ops import tanh

# It has no Triton kernel.
pytestmark = without("triton-cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype, device):
    edges = torch.tensor([0.0, 1e-30, 1e-7, 0.1, 1.0, 9.0, 20.0, 1e4, torch.inf, torch.nan], dtype=torch.float64)
    x = torch.cat((edges, -edges, torch.linspace(-12, 12, 1001, dtype=torch.float64))).to(dtype)
    assert_close(tanh(x.to(device)), x.double().tanh(), dtype)
    # Small numbers are exact, not only near.
    small = torch.tensor([1e-30, -1e-7, 0.0], dtype=dtype)
    assert_close(tanh(small.to(device)) * 1e7, small.double().tanh() * 1e7, dtype)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 0, 2), (5, 9), (2, 3, 4, 5, 6)], ids=str)
def test_shapes(shape, device):
    x = torch.randn(shape)
    assert_close(tanh(x.to(device)), x.double().tanh(), torch.float32)


def test_non_contiguous(device):
    x = torch.randn(9, 14)
    assert_close(tanh(x.to(device)[::2, ::3].t()), x.double().tanh()[::2, ::3].t(), torch.float32)
