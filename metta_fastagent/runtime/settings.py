"""Process settings that belong to the caller: a library call restores what it changes for itself."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


def random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    """A context that restores torch's default generators of the CPU and of `device` on exit."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def process_settings_kept(device: torch.device) -> Iterator[None]:
    """Restore the process on exit: torch's threads, flushed subnormals, TF32 and default generators."""
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    # torch has no function to read this setting
    flushed = bool(torch.tensor(1e-40, dtype=torch.float32) * 1 == 0)
    try:
        with random_state_kept(device):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushed)
        torch.backends.cudnn.allow_tf32 = tf32
