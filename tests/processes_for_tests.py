"""What tests of killed processes share."""

import time
from pathlib import Path


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
