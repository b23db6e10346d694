"""What a figure has to name: the processor or GPU that it was taken on, and the versions.

python -m benchmarks.machine prints that as one line of JSON.
"""

import json
import os
import platform
from importlib import metadata
from typing import Any

import torch

import metta_fastagent

PEERS = ("torchrl", "pufferlib-core")


def processor_name() -> str:
    """The CPU's model."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def description(device: torch.device) -> dict[str, str]:
    """Processor, GPU, versions and the package's backend on `device`."""
    return {
        "name": name(device),
        "device": device.type,
        "processor_name": f"{processor_name()}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none used",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "tensordict": _version("tensordict"),
        "peers": ", ".join(f"{name} {_version(name)}" for name in PEERS if _version(name) != "none") or "none",
        "python_version": platform.python_version(),
        "backend": metta_fastagent.backend(device),
    }


def name(device: torch.device) -> str:
    """The machine in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {os.cpu_count()} cores"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def facts() -> dict[str, Any]:
    """The description of the GPU where there is one, else of the processor; `cuda` says which, `why` why not."""
    if torch.cuda.is_available():
        device = torch.device("cuda", 0)
        properties = torch.cuda.get_device_properties(device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        gpu = {
            "multiprocessors": properties.multi_processor_count,
            "memory": memory,
            "cuda_version": torch.version.cuda,
        }
        return {"cuda": True, **description(device), **gpu}
    why = "no device" if torch.backends.cuda.is_built() else "PyTorch was built without CUDA"
    return {"cuda": False, "why": why, **description(torch.device("cpu"))}


if __name__ == "__main__":
    print(json.dumps(facts()))
