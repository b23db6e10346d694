"""Helpers of tests that start processes."""

import time
from pathlib import Path

import numpy
import pytest

from metta_fastagent.runtime import triton as _triton


def _version(text):
    return tuple(int(part) for part in text.split(".")[:2])


interpreter_in_a_process = pytest.mark.skipif(
    _triton.triton is None or (_version(_triton.triton.__version__) < (3, 7) and _version(numpy.__version__) >= (2, 4)),
    reason="Triton's interpreter before 3.7 does not run with NumPy 2.4 or newer",
)


def has_ended(pid, patience=10.0):
    """Whether a process ends within so many seconds: a kill takes a moment."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False
