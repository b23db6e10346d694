"""The machine on which a figure was measured: processor or GPU, and versions.

python -m benchmarks.machine prints it as one line of JSON.
"""

import json
import os
import platform
from importlib import metadata
from typing import Any

import torch

import metta_fastagent
from metta_fastagent.runtime.explain import processor_name

PEERS = ("torchrl", "pufferlib-core")


def description(device: torch.device) -> dict[str, Any]:
    """Processor, GPU, versions and the package's backend on `device`; `name` is the machine in words."""
    processor = f"{processor_name()}, {os.cpu_count()} cores"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "name": gpu or processor,
        "device": device.type,
        "processor_name": processor,
        "gpu": gpu or "none used",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "tensordict": _version("tensordict"),
        "peers": ", ".join(f"{name} {_version(name)}" for name in PEERS if _version(name) != "none") or "none",
        "python_version": platform.python_version(),
        "backend": metta_fastagent.backend(device),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def facts() -> dict[str, Any]:
    """The GPU's description if there is one, otherwise the processor's, with `why` there is no GPU."""
    if not torch.cuda.is_available():
        why = "no device" if torch.backends.cuda.is_built() else "PyTorch was built without CUDA"
        return {"cuda": False, "why": why, **description(torch.device("cpu"))}
    device = torch.device("cuda", 0)
    properties = torch.cuda.get_device_properties(device)
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    cores = {"multiprocessors": properties.multi_processor_count, "cuda_version": torch.version.cuda}
    return {"cuda": True, **description(device), "memory": memory, **cores}


if __name__ == "__main__":
    print(json.dumps(facts()))
