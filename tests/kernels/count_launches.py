"""Print, as JSON, what calls of the operations launch and compile through Triton's own launcher, without a GPU.

Triton compiles for sm_90, binds arguments and launches, over a libcuda that does nothing; tensors are on the CPU and
results are whatever their memory held. Run in a process of its own: Triton's driver is that of the process.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Functions of which Triton only looks at the status.
SILENT = (
    "cuCtxGetLimit cuCtxSetCurrent cuCtxSetLimit cuFuncSetAttribute cuFuncSetCacheConfig cuTensorMapEncodeTiled"
    " cuGetErrorString cuDriverGetVersion"
)
LIBCUDA = """
static char thing[64];
long launches = 0;
int cuCtxGetCurrent(void **out) { *out = thing; return 0; }
int cuDeviceGet(int *out, int ordinal) { *out = ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void **out, int device) { *out = thing; return 0; }
int cuDeviceGetAttribute(int *out, int attribute, int device) { *out = attribute == 10 ? 32 : 1 << 18; return 0; }
int cuFuncGetAttribute(int *out, int attribute, void *function) { *out = attribute == 0 ? 1024 : 0; return 0; }
int cuModuleLoadData(void **out, const void *image) { *out = thing; return 0; }
int cuModuleGetFunction(void **out, void *module, const char *name) { *out = thing; return 0; }
int cuOccupancyMaxActiveClusters(int *out, void *function, const void *config) { *out = 1; return 0; }
int cuPointerGetAttribute(void **out, int attribute, void *address) { *out = address; return 0; }
int cuLaunchKernelEx(const void *config, void *function, void **args, void **extra) { launches++; return 0; }
"""


def install_driver(folder: Path) -> Callable[[], int]:
    """Make a driver over the library Triton's own; returns a function that counts launches."""
    source, library = folder / "libcuda.c", folder / "libcuda.so.1"
    source.write_text(LIBCUDA + "".join(f"int {name}() {{ return 0; }}\n" for name in SILENT.split()))
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", source, "-o", library], check=True)
    os.environ |= {"TRITON_LIBCUDA_PATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache")}
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device: (9, 0)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Driver())
    # The package takes CPU tensors to its kernels if it believes in the interpreter; Triton does not.
    triton.knobs.runtime.interpret = False
    os.environ["TRITON_INTERPRET"] = "1"
    return lambda: ctypes.c_long.in_dll(loaded, "launches").value


def calls() -> dict[str, Callable[[int], Any]]:
    """Calls by name, each for a given number of rows."""
    import torch

    from metta_fastagent import ops
    from metta_fastagent.ops.lstm import kernels as _lstm_layer

    _lstm_layer.INTERPRETED = False
    table, pairs = torch.tensor([0, 0, 7]), torch.zeros(9, 2, dtype=torch.int32)
    weight = torch.zeros(4 * 32, 32)
    params = [torch.nn.Parameter(torch.zeros(size)) for size in (1, 7, 4096, 5000)]
    start = [param.detach().clone() for param in params]

    def logits(rows: int, actions: int = 9, **options: Any) -> torch.Tensor:
        return torch.zeros(rows, actions, **options)

    def actions(rows: int) -> torch.Tensor:
        return torch.zeros(rows, 2, dtype=torch.int64)

    def gradient(outputs: tuple[torch.Tensor, ...], inputs: Any) -> Any:
        return torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])

    def differentiated_evaluation(rows: int, num_actions: int = 9) -> None:
        leaf = logits(rows, num_actions, requires_grad=True)
        gradient(ops.evaluate_actions(leaf, actions(rows), table)[:2], leaf)

    def differentiated_ppo_loss(rows: int, num_actions: int = 9, **options: Any) -> None:
        leaf, numbers = logits(rows, num_actions, requires_grad=True), torch.zeros(rows)
        coefficients = {"clip_coef": 0.2 + rows / 1e5, "vf_clip_coef": 0.0, "vf_coef": 0.5, "ent_coef": 0.01}
        value = torch.zeros(rows, requires_grad=True)
        given = leaf, actions(rows), value, numbers, numbers, numbers, numbers, table
        loss, _ = ops.ppo_loss(*given, **options, **coefficients)
        gradient((loss,), [leaf, value])

    def differentiated_l2(rows: int) -> None:
        gradient((ops.l2_init_loss(params, start, 0.5),), params)

    def lstm(rows: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        projected, state = torch.zeros(rows % 5 + 1, rows, 4 * 32, **options), torch.zeros(rows, 32)
        return projected, ops.lstm_layer(projected, weight, state, state)[0]

    def differentiated_lstm(rows: int) -> None:
        projected, output = lstm(rows, requires_grad=True)
        gradient((output,), projected)

    def advantages(rows: int, **options: Any) -> None:
        steps = torch.zeros(rows, 16)
        ops.advantages(steps, steps, steps > 0, steps[:, 0].contiguous(), steps, 0.99, 0.95 - rows / 1e5, **options)

    return {
        "advantages": advantages,
        "advantages with options": lambda rows: advantages(
            rows, valid=torch.ones(rows, 16, dtype=torch.bool), ratios=torch.ones(rows, 16)
        ),
        "ppo loss with gradient": differentiated_ppo_loss,
        "ppo loss of many actions with gradient": lambda rows: differentiated_ppo_loss(rows, 70),
        "ppo loss with options": lambda rows: differentiated_ppo_loss(
            rows,
            valid=torch.ones(rows, dtype=torch.bool),
            count=torch.ones(()),
            mask=logits(rows) == 0,
            temperature=torch.ones(()),
        ),
        "evaluate pairs": lambda rows: ops.evaluate_actions(logits(rows), actions(rows), table),
        "evaluate indices": lambda rows: ops.evaluate_actions(logits(rows), actions(rows)[:, 0]),
        "evaluate with gradient": differentiated_evaluation,
        "sample": lambda rows: ops.sample_actions(logits(rows)),
        "sample pairs": lambda rows: ops.sample_actions(logits(rows), pairs),
        "evaluate many actions with gradient": lambda rows: differentiated_evaluation(rows, 70),
        "sample many actions": lambda rows: ops.sample_actions(logits(rows, 70)),
        "pairs to indices": lambda rows: ops.action_to_logit_index(actions(rows), table),
        "indices to pairs": lambda rows: ops.logit_index_to_action(actions(rows)[:, 0].contiguous(), pairs),
        "clip": lambda rows: ops.clip_weights_(params, [0.5] * len(params)),
        "clip other bounds": lambda rows: ops.clip_weights_(params, [float(rows)] * len(params)),
        "l2 with gradient": differentiated_l2,
        "tokens to grid": lambda rows: ops.tokens_to_grid(
            torch.zeros(rows, rows % 7 + 1, 3, dtype=torch.uint8), 5, 3, 3, torch.ones(5)
        ),
        "lstm": lstm,
        "lstm with gradient": differentiated_lstm,
        # Rows of nine numbers from the second on: not on a 16-byte address.
        "evaluate masked": lambda rows: ops.evaluate_actions(
            logits(rows), actions(rows), table, mask=logits(rows) == 0, temperature=1 + rows / 7, strict=True
        ),
        "sample masked": lambda rows: ops.sample_actions(
            logits(rows), pairs, mask=logits(rows) == 0, temperature=torch.ones(())
        ),
        "greedy": lambda rows: ops.sample_actions(logits(rows), pairs, temperature=1 + rows / 7, greedy=True),
        "evaluate a view": lambda rows: ops.evaluate_actions(logits(rows + 1)[1:], actions(rows), table),
    }


def main(sizes: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        launches = install_driver(Path(folder))
        from benchmarks.launch_kernels import kernels
        from metta_fastagent import use_backend

        jitted = {name: vars(modules[0])[name] for name, modules in kernels().items()}

        def variants() -> dict[str, int]:
            return {
                name: sum(len(each[0]) for each in kernel.device_caches.values()) for name, kernel in jitted.items()
            }

        found, before = {}, variants()
        with use_backend("triton"):
            for name, call in calls().items():
                counts = set()
                for rows in sizes:
                    first = launches()
                    call(rows)
                    counts.add(launches() - first)
                now = variants()
                compiled = {kernel: now[kernel] - before[kernel] for kernel in now if now[kernel] != before[kernel]}
                found[name], before = {"launches": sorted(counts), "compiled": compiled}, now
        json.dump({"calls": found, "kernels": now}, sys.stdout)


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]])
