"""What the emulator counts of a launch."""

import emulator
import pytest
import torch
from ptx_for_tests import at, kernel, needs_emulator

pytestmark = needs_emulator
COPY = "mul.lo.s32 %r5, %r90, 16;\n{}cp.async.cg.shared.global [%r5], [%d80], 16;\ncp.async.wait_all;"


def counts(body, *tensors, threads=32, programs=1):
    emulator.counts()
    emulator.run(kernel(body, len(tensors), threads), *tensors, shared=1024, programs=programs)
    return emulator.counts()["k"]


@pytest.mark.parametrize(
    ("body", "loaded", "stored"),
    [
        (at(90, 4) + "ld.global.b32 %r1, [%d80];", (4, 4), (0, 0)),
        (at(90, 4) + "st.global.b32 [%d80], %r90;", (0, 0), (4, 4)),
        (at(90, 16) + "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d80];", (16, 16), (0, 0)),
        (at(90, 32) + "ld.global.b32 %r1, [%d80];", (32, 4), (0, 0)),
        (at(90, 4) + "ld.global.b32 %r1, [%d80+4];", (5, 4), (0, 0)),
        ("ld.global.b32 %r1, [%d90];", (1, 1), (0, 0)),
        (at(90, 8) + "setp.lt.s32 %p1, %r90, 8;\n@%p1 st.global.b32 [%d80], %r90;", (0, 0), (2, 1)),
        (COPY.format(at(90, 16)), (16, 16), (0, 0)),
        (COPY.format(at(90, 32)), (32, 16), (0, 0)),
        ("st.shared.b32 [0], 1;\nld.shared.b32 %r1, [0];", (0, 0), (0, 0)),
    ],
)
def test_sectors_of_one_warp(body, loaded, stored):
    # PyTorch's storages start on a sector.
    found = counts(body, torch.zeros(264))
    assert (found.loaded, found.loaded_least) == loaded
    assert (found.stored, found.stored_least) == stored


def test_instructions_and_barriers_of_warps_and_programs():
    alone = counts("bar.sync 0;\nbar.sync 0;")
    assert (alone.launches, alone.programs, alone.barriers) == (1, 1, 2)
    several = counts("bar.sync 0;\nbar.sync 0;", threads=64, programs=3)
    assert several == (1, 3, 6 * alone.instructions, 6, 0, 0, 0, 0)
    assert emulator.counts() == {}
