"""CUDA graphs: a step is captured once and replayed, so that it costs the host one launch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Calls before the capture: they compile kernels and build the optimizer's state and the tables for tensor lists.
WARM_UPS = 3


class Captured:
    """`function`, called WARM_UPS times and then replayed from a CUDA graph.

    Each call does the work of `function` once, on copies of its inputs at fixed addresses, and returns new tensors.

    Args:
        function: takes tensors, with the same shapes in each call, and returns a tensor or a tuple of tensors. A replay
            keeps the addresses, Python numbers and branches of the capture; nothing in it may read from the device.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._calls = function, 0

    def __call__(self, *inputs: Tensor) -> Any:
        if self._calls == 0:
            self._stream, self._graph = torch.cuda.Stream(inputs[0].device), torch.cuda.CUDAGraph()
            self._inputs = [torch.empty_like(each) for each in inputs]
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        self._calls += 1
        if self._calls <= WARM_UPS:
            current = torch.cuda.current_stream(self._stream.device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                results = self._function(*self._inputs)
            current.wait_stream(self._stream)
            return results
        if self._calls == WARM_UPS + 1:
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._results = self._function(*self._inputs)
        self._graph.replay()
        # the next replay overwrites the results
        return tuple(map(torch.clone, self._results)) if type(self._results) is tuple else self._results.clone()
