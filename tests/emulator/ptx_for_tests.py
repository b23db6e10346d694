"""Small kernels in PTX for the emulator's own tests."""

import shutil

import emulator
import numpy
import pytest
import torch

# A process that has loaded the emulator finds it in place of the driver.
needs_emulator = pytest.mark.skipif(
    torch.cuda.is_available() or not any(map(shutil.which, ("c++", "g++"))), reason="a CUDA device, or no C++ compiler"
)
PREFIXES = {1: "%h", 2: "%h", 4: "%r", 8: "%d"}


def kernel(body, parameters=2, threads=32):
    """A kernel k whose parameters are addresses %d90, %d91, ...; %r90 is the thread."""
    declared = ", ".join(f".param .u64 .ptr .global .align 1 k_param_{n}" for n in range(parameters))
    loads = "".join(f"ld.param.b64 %d{90 + n}, [k_param_{n}];\n" for n in range(parameters))
    registers = ".reg .pred %p<10>;\n.reg .b16 %h<20>;\n.reg .b32 %r<100>;\n.reg .b64 %d<120>;\n"
    return (
        f".visible .entry k({declared})\n.reqntid {threads}\n{{\n{registers}{loads}"
        f"mov.u32 %r90, %tid.x;\n{body}\nret;\n}}\n"
    )


def at(pointer, size):
    """Code that sets %d80 to the thread's element of this size in %d`pointer`."""
    return f"mad.wide.u32 %d80, %r90, {size}, %d{pointer};\n"


def on_lanes(code, inputs, dtype, vector=1):
    """What `code` leaves, from the k-th of the arrays [32] in register k + 1, in register 0, as an array of `dtype`.

    Registers are %h, %r or %d by their width, %p of predicates. With `vector`, registers 0 to vector - 1 are stored.
    """
    dtype = numpy.dtype(dtype)
    body = ""
    for k, x in enumerate(inputs):
        size = x.dtype.itemsize
        body += at(91 + k, size) + f"ld.global.b{8 * size} {PREFIXES[size]}{k + 1}, [%d80];\n"
    body += code + "\n"
    for k in range(vector):
        size = dtype.itemsize
        body += f"mad.wide.u32 %d80, %r90, {size * vector}, %d90;\n"
        body += f"st.global.b{8 * size} [%d80+{size * k}], {PREFIXES[size]}{k};\n"
    out = numpy.zeros((32, vector) if vector > 1 else 32, dtype)
    tensors = [torch.from_numpy(numpy.ascontiguousarray(x).view(numpy.uint8)) for x in (out, *inputs)]
    emulator.run(kernel(body, len(tensors)), *tensors, shared=4096)
    return out
