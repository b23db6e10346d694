"""The TensorDict fields `bptt` and `batch`: two constants for each row, made together.

fields[0] = bptt        fields[1] = batch
"""

# pyright: reportInvalidTypeForm=false

from collections.abc import Sequence

import torch
from torch import Tensor

from metta_fastagent._dispatch import register
from metta_fastagent._triton import cdiv, device_guard, jit, tl

# 8 bytes for each of 128 threads, eight times over; a rollout's fields are one or a few programs.
BLOCK = 1024


@jit
def _segment_fields_kernel(
    fields,  # [2, N] int64
    bptt,
    batch,
    N,
    BLOCK: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.where(position < N, bptt, batch).to(tl.int64)
    tl.store(fields + position, value, mask=position < 2 * N)


def _segment_fields_cuda(observations: Tensor, shape: Sequence[int], bptt: int, batch: int) -> Tensor:
    fields = observations.new_empty((2, *shape), dtype=torch.int64)
    if fields.numel() > 0:
        with device_guard(observations):
            _segment_fields_kernel[(cdiv(fields.numel(), BLOCK),)](
                fields, bptt, batch, fields.numel() // 2, BLOCK=BLOCK, num_warps=4
            )
    return fields


def segment_fields_eager(observations: Tensor, shape: Sequence[int], bptt: int, batch: int) -> Tensor:
    """`segment_fields` in plain PyTorch: the reference, and what runs where there is no kernel."""
    fields = observations.new_empty((2, *shape), dtype=torch.int64)
    fields[0].fill_(bptt)
    fields[1].fill_(batch)
    return fields


_segment_fields = register(
    "segment_fields(Tensor observations, SymInt[] shape, SymInt bptt, SymInt batch) -> Tensor",
    segment_fields_eager,
    lambda observations, shape, bptt, batch: observations.new_empty((2, *shape), dtype=torch.int64),
    _segment_fields_cuda,
)


def segment_fields(observations: Tensor, shape: Sequence[int], bptt: int, batch: int) -> tuple[Tensor, Tensor]:
    """The fields `bptt` and `batch` for some rows.

    Args:
        observations: any tensor on the device where the fields shall be.
        shape: shape of each field.
        bptt: number of time steps.
        batch: number of segments or environments.

    Returns:
        (bptt, batch): two fresh int64 tensors of that shape.
    """
    fields = _segment_fields(observations, list(shape), bptt, batch)
    return fields[0], fields[1]
