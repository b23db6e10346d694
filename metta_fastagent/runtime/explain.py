"""Text that says which implementation runs on this machine and why, for users and for benchmark reports."""

import os
import platform
import re

import torch

from metta_fastagent.runtime import native, triton
from metta_fastagent.runtime.dispatch import BACKENDS, ENVIRONMENT_VARIABLE, OPERATORS, requested, uses_triton


def explain() -> str:
    """A few lines of text: which implementation runs on each device and why, with versions.

    Example:
        >>> explain().startswith("metta_fastagent on PyTorch")
        True
    """
    installed = triton.triton
    version = f"no Triton ({triton.import_error})" if installed is None else f"Triton {installed.__version__}"
    without_kernel = [name for name, operator in sorted(OPERATORS.items()) if operator.cuda is None]
    without_cpp = [name for name, operator in sorted(OPERATORS.items()) if operator.native is None]
    lines = [
        f"metta_fastagent on PyTorch {torch.__version__}, {version}, Python {platform.python_version()}",
        f"requested: {requested()} (by {ENVIRONMENT_VARIABLE} or use_backend; one of {', '.join(BACKENDS)})",
        f"processor: {describe_cpu()}",
        f"cpu: {_explain_cpu()}",
        *_explain_cuda(),
        "other devices: eager, because there are no kernels for them",
        "operations: " + ", ".join(sorted(OPERATORS)),
        "without a Triton kernel: " + (", ".join(without_kernel) or "none"),
        "without a C++ operator: " + (", ".join(without_cpp) or "none"),
    ]
    return "\n".join(lines)


def processor_name() -> str:
    """Model name of the CPU, such as "AMD EPYC"."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe_cpu() -> str:
    """Model, vector width and BLAS that PyTorch uses, threads, and whether subnormal numbers are flushed to zero."""
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    subnormal = torch.full((), torch.finfo(torch.float32).smallest_normal / 2)
    flushed = bool(subnormal * 1.0 == 0)
    return (
        f"{processor_name()}, vectors {torch.backends.cpu.get_cpu_capability()}, "
        f"BLAS {blas.group(1) if blas else 'unknown'}, {torch.get_num_threads()} of {os.cpu_count()} threads, "
        f"subnormal numbers {'flushed to zero' if flushed else 'kept'}"
    )


def _explain_cpu() -> str:
    if uses_triton(torch.device("cpu")):
        return "triton in its interpreter, because TRITON_INTERPRET=1 and backend triton are set; slow, for tests"
    if requested() in ("eager", "triton"):
        return f"eager, because backend {requested()} was requested"
    if native.load():
        return f"native, {native.reason()}"
    if requested() == "native":
        return f"an error, because backend native was requested and does not work: {native.reason()}"
    return f"eager; native operators {native.reason()}"


def _explain_cuda() -> list[str]:
    if not torch.cuda.is_available():
        reason = "no device" if torch.backends.cuda.is_built() else "PyTorch was built without it"
        return [f"cuda: not available here, {reason}"]
    lines = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        if requested() == "eager":
            chosen = "eager, as requested"
        elif triton.works_on(device):
            chosen = "triton"
        else:
            chosen = "eager, because Triton does not work here"
        lines.append(f"{device} ({torch.cuda.get_device_name(index)}): {chosen}")
    return lines
