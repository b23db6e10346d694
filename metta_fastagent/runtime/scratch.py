"""Memory for sums over the programs of a launch: partial sums, and the counter that identifies the last program."""

import torch
from torch import Tensor

# Partial sums and counter per device and stream; launches on one stream run one after the other.
_scratch: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def scratch_for(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Partial sums, float64 [>= count], and a counter that is 0, for one launch on the current stream.

    The launch leaves the counter at 0. During capture both are in the graph's memory, and the graph sets the counter.
    """
    if capturing(device):
        return _new_scratch(count, device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    kept = _scratch.get((device, stream))
    if kept is None or kept[0].numel() < count:
        kept = _scratch[device, stream] = _new_scratch(count, device)
    return kept


def _new_scratch(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # Scratch made in inference mode could not be used outside it.
    with torch.inference_mode(False):
        partials = torch.empty(count, dtype=torch.float64, device=device)
        return partials, torch.zeros(1, dtype=torch.int32, device=device)
