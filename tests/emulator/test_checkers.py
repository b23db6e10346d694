"""What the emulator refuses, each beside the same without the fault."""

import emulator
import pytest
import torch
from ptx_for_tests import at, kernel, needs_emulator

pytestmark = needs_emulator
# Of a thread: its word of shared memory, and its neighbour's of the next warp.
OWN = "shl.b32 %r5, %r90, 2;\n"
OTHER = "add.s32 %r6, %r90, 32;\nrem.u32 %r6, %r6, 64;\nshl.b32 %r6, %r6, 2;\n"


def run(body, *tensors, threads=64, shared=256, programs=1):
    emulator.run(kernel(body, len(tensors), threads), *tensors, shared=shared, programs=programs)


def refused(message, body, *tensors, **options):
    with pytest.raises(RuntimeError, match=message):
        run(body, *tensors, **options)


def test_accesses_outside_of_the_tensors():
    x = torch.zeros(64, dtype=torch.int32)
    store = at(90, 4) + "st.global.b32 [%d80{}], %r90;"
    run(store.format(""), x)
    assert x.tolist() == list(range(64))
    refused(r"warp 1, lane 31: 4 bytes at 0x\w+, outside of the launch's tensors", store.format("+4"), x)
    refused(r"warp 0, lane 0: .* outside of", store.format("+-4"), x)
    refused(r"outside of", store.format(""), x[:63])
    # Part of a larger tensor.
    run(store.format("+8"), torch.zeros(66, dtype=torch.int32))
    refused(r"lane 0: .* outside of", at(90, 4) + "ld.global.b32 %r1, [%d80];", x[:0])
    refused(r"4 bytes at 0x100 of 256 bytes of shared memory", OWN + "st.shared.b32 [%r5+4], %r90;")
    run(OWN + "st.shared.b32 [%r5], %r90;")


def test_misaligned_accesses():
    x = torch.zeros(160, dtype=torch.int32)
    load = at(90, 8) + "ld.global.v2.b32 {%r1, %r2}, [%d80+8];"
    run(load, x)
    refused("8 bytes at the misaligned address", load.replace("+8", "+4"), x)
    refused("8 bytes at the misaligned shared address 0x4", "mov.b32 %r5, 4;\nst.shared.v2.b32 [%r5], {%r90, %r90};")
    refused("copies 16 bytes from the misaligned", at(90, 8) + "cp.async.cg.shared.global [0], [%d80+8], 16;", x)


def test_memory_that_nothing_has_written():
    load = "ld.global.b{0} %{1}1, [%d90];"
    # As the allocator fills it.
    fresh = torch.full((4,), -0x005A005B, dtype=torch.int32)
    refused("reads memory that was never written", load.format(32, "r"), fresh)
    refused("reads memory that was never written", load.format(16, "h"), fresh)
    refused("reads memory that was never written", load.format(64, "d"), fresh)
    run(load.format(32, "r"), torch.full((4,), torch.nan))
    run("st.global.b32 [%d90], 7;\n" + load.format(32, "r"), fresh, threads=32)
    refused("reads shared memory that was never written", "mov.b32 %r5, 8;\nld.shared.b32 %r1, [%r5];")
    # Of an earlier program, too.
    written = "mov.u32 %r1, %ctaid.x;\nmov.b32 %r5, 8;\nsetp.eq.s32 %p1, %r1, 0;\n@%p1 st.shared.b32 [%r5], 1;\n"
    refused(r"program 1, .*never written", written + "ld.shared.b32 %r1, [%r5];", programs=2, threads=32)


@pytest.mark.parametrize("space", ["shared", "global"])
def test_warps_need_a_barrier_between_them(space):
    if space == "shared":
        first, second = OWN + OTHER + "st.shared.b32 [%r5], 0;\nbar.sync 0;\n", ("[%r5]", "[%r6]")
    else:
        first = OTHER + "cvt.u64.u32 %d1, %r6;\nadd.s64 %d1, %d1, %d90;\n" + at(90, 4) + "mov.b64 %d2, %d80;\n"
        second = ("[%d2]", "[%d1]")
    own, other = second
    write, read = f"st.{space}.b32 {own}, %r90;\n", f"ld.{space}.b32 %r1, {other};\n"
    x = torch.zeros(64, dtype=torch.int32)
    run(first + write + "bar.sync 0;\n" + read, x)
    refused(r"warp 1, lane 0: touches what warp 0 has (read|written) since the last barrier", first + write + read, x)
    # A write after a read.
    again = first + write + "bar.sync 0;\n" + read + "{}" + f"st.{space}.b32 {own}, 99;\n"
    run(again.format("bar.sync 0;\n"), x)
    refused(r"warp \d, .* has (read|written) since the last barrier", again.format(""), x)
    # One value from several warps is no conflict.
    same = f"st.{space}.b32 {'[%r5]' if space == 'shared' else '[%d90]'}, {{}};\n"
    zero = "mov.b32 %r5, 0;\n"
    run(zero + same.format(5), x)
    refused("has written since the last barrier", "shr.u32 %r7, %r90, 5;\n" + zero + same.format("%r7"), x)


def test_lanes_that_store_different_values_at_one_address():
    x = torch.zeros(1, dtype=torch.int32)
    run("st.global.b32 [%d90], 3;", x, threads=32)
    refused("lanes store different values at one address", "st.global.b32 [%d90], %r90;", x, threads=32)
    # A report of bad rows takes any of them.
    report = ".loc 1 5 0\nst.global.b32 [%d90], %r90;\n.loc 2 5 0"
    text = kernel(report, 1) + '.file 1 "reports.py"\n.file 2 "kernels.py"\n'
    emulator.run(text, x)
    with pytest.raises(RuntimeError, match="different values"):
        emulator.run(text.replace(".loc 1", ".loc 2"), x)


def test_programs_need_atomic_operations_between_them():
    x, counter = torch.zeros(8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    # Each program writes its own word; the second one reads the first one's.
    write = "mov.u32 %r1, %ctaid.x;\nmul.wide.u32 %d1, %r1, 4;\nadd.s64 %d1, %d1, %d90;\nst.global.b32 [%d1], 7;\n"
    count = "atom.global.gpu.acq_rel.add.u32 %r2, [%d91], 1;\n"
    read = "setp.eq.s32 %p1, %r1, 1;\n@%p1 ld.global.b32 %r3, [%d90];\n"
    run(write + count + read, x, counter, threads=32, programs=2)
    assert counter.item() == 64
    refused("touches what another program has written", write + read, x, counter, threads=32, programs=2)
    # It releases what came before, and acquires for what comes after.
    refused("another program", write + read + count, x.zero_(), counter, threads=32, programs=2)


COPY = "mul.lo.s32 %r5, %r90, 16;\n" + at(91, 16) + "cp.async.cg.shared.global [%r5], [%d80], 16;\n"
COPIED = "ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];\n"
COMMIT = "cp.async.commit_group;\n"


def test_asynchronous_copies_are_waited_for():
    out, x = torch.zeros(4), torch.ones(256)
    shared = {"threads": 32, "shared": 1024}
    run(COPY + COMMIT + "cp.async.wait_group 0;\n" + COPIED, out, x, **shared)
    run(COPY + "cp.async.wait_all;\n" + COPIED, out, x, **shared)
    run(COPY + COMMIT + COMMIT + "cp.async.wait_group 1;\n" + COPIED, out, x, **shared)
    too_early = "an asynchronous copy brings that was not waited for"
    refused(too_early, COPY + COMMIT + COPIED + "cp.async.wait_group 0;", out, x, **shared)
    refused(too_early, COPY + COMMIT + "cp.async.wait_group 1;\n" + COPIED, out, x, **shared)
    refused(too_early, COPY + "cp.async.wait_group 0;\n" + COPIED, out, x, **shared)
    write = "st.shared.b32 [%r5], 1;\n"
    refused("asynchronous copy was not waited for", COPY + COMMIT + write, out, x, **shared)
    refused("ends before an asynchronous copy was waited for", COPY + COMMIT, out, x, **shared)
    change = at(91, 16) + "st.global.b32 [%d80], 5;\n"
    refused(
        "source of an asynchronous copy changed", COPY + COMMIT + change + "cp.async.wait_group 0;", out, x, **shared
    )


def test_another_warp_needs_a_barrier_after_the_wait():
    out, x = torch.zeros(4), torch.ones(256)
    # Thread n reads what the copy of thread n +- 32 brings.
    filled = "mul.lo.s32 %r5, %r90, 16;\nmov.b32 %r1, 0;\nst.shared.v4.b32 [%r5], {%r1, %r1, %r1, %r1};\nbar.sync 0;\n"
    waited, read = filled + COPY + "cp.async.wait_all;\n", "xor.b32 %r6, %r5, 512;\nld.shared.b32 %r1, [%r6];"
    run(waited + "bar.sync 0;\n" + read, out, x, shared=1024)
    refused(r"warp 0 has (read|written) since", waited + read, out, x, shared=1024)


def test_barriers_that_part_of_the_threads_reach():
    part = "setp.lt.u32 %p1, %r90, {};\n@%p1 bra $skip;\nbar.sync 0;\n$skip:"
    run(part.format(0))
    refused("warp 0: taken by lanes 0xffffff00 only", part.format(8))
    refused("a barrier that another warp does not reach", part.format(32))
    two = "setp.lt.u32 %p1, %r90, 32;\n@%p1 bra $other;\nbar.sync 0;\nbra $end;\n$other:\nbar.sync 0;\n$end:"
    refused("another barrier than that of warp 0", two)
    refused("taken by lanes 0xff only", "setp.lt.u32 %p1, %r90, 8;\n@%p1 shfl.sync.bfly.b32 %r1, %r90, 1, 31, -1;")


def test_more_shared_memory_than_there_is():
    with emulator.option(shared_limit=1000), pytest.raises(RuntimeError, match="1024 bytes of shared memory"):
        emulator.run(kernel("", 0), shared=1024)


@pytest.mark.parametrize("backwards", [0, 1])
def test_programs_run_in_either_order(backwards):
    x = torch.zeros(1, dtype=torch.int32)
    store = "mov.u32 %r1, %ctaid.x;\nsetp.eq.s32 %p1, %r90, 0;\n@%p1 atom.global.gpu.acq_rel.exch.b32 %r2, [%d90], %r1;"
    with emulator.option(backwards=backwards):
        run(store, x, programs=3, threads=32)
    assert x.item() == (0 if backwards else 2)
