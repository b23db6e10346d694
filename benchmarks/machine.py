"""What a figure has to name: the processor or GPU that it was taken on, and the versions."""

import os
import platform
import re
from importlib import metadata

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


def folder(machine_name: str) -> str:
    """The machine's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", machine_name.lower())).strip("-")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
