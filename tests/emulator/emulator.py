"""Run the compiled kernels on a machine without a GPU: a libcuda that executes the PTX which Triton emits.

`EMULATE=sm_90 pytest tests/kernels` (or sm_80) runs the kernel tests on CPU tensors through Triton's own compiler,
binder and launcher. Each instruction is executed for the 32 lanes of a warp, a warp until its next barrier, programs
one after the other. These are errors of the launch, and of the test that makes it:

- an access outside of the launch's tensors (of kernels with tables of addresses, of all storages), or to shared memory
  beyond its size; a misaligned access; a read of memory that nothing has written
- in shared and in global memory, a read or a changing write of what another warp has touched since the last barrier, or
  another program in this launch, but for atomic operations in between
- lanes of one store that write different values to one address, but for reports of bad rows
- an asynchronous copy whose target is touched, or whose source changes, before its wait
- a barrier that part of a warp or of the program reaches; an instruction that is not known

`option` has modes: approximate instructions off by their documented error, matrix units that truncate their sums,
programs from the last to the first.

What it cannot show: scheduling, registers, spills, speed, programs that run at the same time, lanes of a warp that need
bar.warp.sync between them, streams, graphs, what ptxas makes of the PTX, and cuBLAS and cuDNN. PTX leaves the order of
a matrix unit's sums open; here they are rounded once.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
TARGET = os.environ.get("EMULATE", "")
FLAGS = ["-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fwrapv"]
# Largest shared memory of a block.
SHARED_BYTES = {"sm_80": 166912, "sm_90": 232448}
# Their addresses come from tables in memory.
KERNELS_WITH_TABLES = ("_clip_weights_kernel", "_l2_init_loss_fwd_kernel", "_l2_init_loss_bwd_kernel")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metta_fastagent-emulator"


def _build() -> Path:
    """The library, compiled if its sources have changed."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    sources = b"".join(path.read_bytes() for path in [*sorted(HERE.glob("*.h")), HERE / "libcuda.cpp"])
    key = hashlib.sha256(b"\0".join([sources, torch.__version__.encode(), *map(str.encode, [compiler, *FLAGS])]))
    library = _cache() / key.hexdigest()[:16] / "libcuda.so.1"
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.parent / "lock", "w") as lock:
        # Another process that needs it waits.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            root, unfinished = Path(torch.__file__).parent, library.with_suffix(".unfinished")
            compiled = ["-shared", "-fPIC", f"-I{root}/include", HERE / "libcuda.cpp", "-o", unfinished]
            linked = ["-Wl,-soname,libcuda.so.1", f"-L{root}/lib", "-lc10", f"-Wl,-rpath,{root}/lib"]
            subprocess.run([compiler, *FLAGS, *compiled, *linked], check=True)
            unfinished.rename(library)
    return library


@functools.cache
def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(_build()), mode=ctypes.RTLD_GLOBAL)
    for name in ("message", "faults", "counts"):
        getattr(lib, f"emulator_{name}").restype = ctypes.c_char_p
    lib.emulator_option.argtypes, lib.emulator_option.restype = [ctypes.c_char_p, ctypes.c_int64], ctypes.c_int64
    lib.emulator_allow.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return lib


@contextmanager
def option(**values: int):
    """Options for the block: `approximate` 1 to 3, `seed`, `truncate`, `extra_bits`, `backwards`; see machine.h."""
    before = {name: library().emulator_option(name.encode(), value) for name, value in values.items()}
    try:
        yield
    finally:
        for name, value in before.items():
            library().emulator_option(name.encode(), value)


def faults() -> list[str]:
    """Faults since the last call."""
    return library().emulator_faults().decode().splitlines()


# Of a kernel's launches; instructions are those of warps, for the others see machine.h.
Counts = namedtuple("Counts", "launches programs instructions barriers loaded loaded_least stored stored_least")


def counts() -> dict[str, Counts]:
    """Counts of each kernel since the last call."""
    rows = (line.split() for line in library().emulator_counts().decode().splitlines())
    return {name: Counts(*map(int, numbers)) for name, *numbers in rows}


def install() -> None:
    """Make the emulator Triton's driver, and let the package take CPU tensors to its kernels."""
    lib = library()
    lib.emulator_install()
    lib.emulator_option(b"shared_limit", SHARED_BYTES[TARGET])
    os.environ["TRITON_LIBCUDA_PATH"] = str(_build().parent)
    # Apart from other caches: what is kept as machine code is PTX here.
    os.environ["TRITON_CACHE_DIR"] = str(_cache() / "triton")
    os.environ.pop("TRITON_INTERPRET", None)

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import compiler
    from triton.backends.nvidia import driver as nvidia

    capability = int(TARGET.removeprefix("sm_"))

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device=0: 0
            self.get_device_capability = lambda device=0: divmod(capability, 10)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

    compiler.CUDABackend.make_cubin = lambda self, source, metadata, options, target: source.encode()
    triton.runtime.driver.set_active(Driver())

    from metta_fastagent.runtime import launch
    from metta_fastagent.runtime import triton as package_triton

    package_triton.INTERPRETED = True
    launch_with = launch.launch_with

    def launch_within(constants, kernel, programs, tensors, numbers) -> None:
        with within(tensors, kernel.__name__ in KERNELS_WITH_TABLES):
            launch_with(constants, kernel, programs, tensors, numbers)

    for name, module in list(sys.modules.items()):
        if name.startswith("metta_fastagent.") and getattr(module, "launch_with", None) is launch_with:
            module.launch_with = launch_within


@contextmanager
def within(tensors, has_tables: bool = False):
    """The block's launches may access these tensors' elements only, and with tables all storages."""
    spans = []
    for tensor in tensors:
        if tensor.numel() > 0:
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            spans += [tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()]
    lib = library()
    lib.emulator_allow((ctypes.c_uint64 * len(spans))(*spans), len(spans) // 2)
    if has_tables:
        lib.emulator_allow_storages()
    try:
        yield
    finally:
        lib.emulator_allow(None, -1)


@contextmanager
def mutated(kernel, edit):
    """The block runs `edit(ptx)` in place of each PTX compiled for a Triton kernel; it has to change one."""
    from metta_fastagent.runtime import scratch

    compiled = [each for caches in kernel.device_caches.values() for each in caches[0].values() if each.function]
    texts = {each.function: each.asm["ptx"] for each in compiled}
    changed = {function: edit(text) for function, text in texts.items()}
    assert changed != texts, f"{kernel.__name__}: nothing to change in {len(texts)} texts"

    def replace(by_function):
        for function, text in by_function.items():
            if library().emulator_replace(ctypes.c_void_p(function), text.encode()):
                raise RuntimeError(library().emulator_message().decode())

    try:
        replace(changed)
        yield
    finally:
        replace(texts)
        faults()
        # A launch that stopped has left its counter behind.
        scratch._scratch.clear()


def run(ptx: str, *tensors: torch.Tensor, shared: int = 0, programs: int = 1) -> None:
    """Run the only kernel of a PTX text, whose parameters are these tensors' addresses.

    Raises:
        RuntimeError: it cannot be loaded, or a fault.
    """
    lib, module = library(), ctypes.c_void_p()

    def check(status: int) -> None:
        if status:
            faults()
            raise RuntimeError(lib.emulator_message().decode())

    check(lib.cuModuleLoadData(ctypes.byref(module), ptx.encode()))
    threads = int(ptx.partition(".reqntid")[2].split()[0])
    config = (ctypes.c_uint32 * 16)(programs, 1, 1, threads, 1, 1, shared)
    addresses = [ctypes.c_uint64(tensor.data_ptr()) for tensor in tensors]
    arguments = (ctypes.c_void_p * len(addresses))(*map(ctypes.addressof, addresses))
    with within(tensors):
        check(lib.cuLaunchKernelEx(config, module, arguments, None))
