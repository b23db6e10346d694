"""Launch Triton kernels, with a fast path for a kernel that is already compiled.

`kernel[grid](...)` searches for the compiled kernel at every call, which takes several times as long as the launch
itself. `launch_with` looks it up by the properties it depends on, and passes it to Triton's launcher.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metta_fastagent.runtime.triton import triton

_address_of, _dtype_of = Tensor.data_ptr, operator.attrgetter("dtype")
# False once Triton's private interface has turned out to be different.
_knows_interface = True


class Constants:
    """Constants of a kernel launch, in the order of the kernel's parameters, and its options.

    A caller creates one per case and keeps it, because it holds the kernels that were compiled with it.
    """

    __slots__ = ("arguments", "compiled", "options", "values")

    def __init__(self, values: dict[str, Any], num_warps: int = 4, num_stages: int | None = None) -> None:
        self.values = values
        self.arguments = tuple(values.values())
        self.options = {"num_warps": num_warps} | ({} if num_stages is None else {"num_stages": num_stages})
        # (kernel, compiled kernel) by the kernel's id, the device and the tensors' dtypes.
        self.compiled: dict[tuple, tuple[Any, Any]] = {}


def launch_with(
    constants: Constants, kernel: Any, programs: int, tensors: Sequence[Tensor], numbers: Sequence[float]
) -> None:
    """Launch `kernel(*tensors, *numbers, **constants)` with the given number of programs on the tensors' device.

    A cached kernel only supports tensors at 16-byte aligned addresses and 32-bit numbers.
    """
    global _knows_interface
    device = tensors[0].get_device()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch_with(constants, kernel, programs, tensors, numbers)
    addresses = list(map(_address_of, tensors))
    keeps = (
        _knows_interface
        and functools.reduce(operator.or_, addresses) % 16 == 0
        and max(numbers, default=0) < 2**31
        # A profiler that watches launches needs their metadata.
        and not triton.knobs.runtime.launch_enter_hook.calls
    )
    # By identity, because a kernel's own hash is that of its source.
    key = (id(kernel), device, *map(_dtype_of, tensors))
    if keeps and key in constants.compiled:
        try:
            active, compiled = triton.runtime.driver.active, constants.compiled[key][1]
            stream = active.get_current_stream(active.get_current_device())
            # Tensors are passed as addresses, pinned memory included; launch metadata and two hooks are for profilers.
            compiled.run(
                programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
                *addresses, *numbers, *constants.arguments,
            )  # fmt: skip
            return
        except (TypeError, AttributeError):
            _knows_interface = False
    compiled = kernel[(programs,)](*tensors, *numbers, **constants.values, **constants.options)
    if keeps and hasattr(compiled, "packed_metadata"):
        constants.compiled[key] = kernel, compiled
