"""The machine in words, for `explain` and for benchmark reports."""

import os
import platform
import re

import torch


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
