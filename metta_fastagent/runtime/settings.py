"""Settings of the process that belong to its caller: what a library call changes for itself, it puts back."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


def random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    """A context after which torch's default generators, those of the CPU and of `device`, are as before it."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def process_settings_kept(device: torch.device) -> Iterator[None]:
    """Leave the process as it was before: torch's threads, flushed subnormals, TF32 and default generators."""
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    # torch has no function that reads it
    flushed = bool(torch.tensor(1e-40, dtype=torch.float32) * 1 == 0)
    try:
        with random_state_kept(device):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushed)
        torch.backends.cudnn.allow_tf32 = tf32
