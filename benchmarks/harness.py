"""The shared body of all benchmarks: a provider must agree with `upstream` on the same inputs, then it is timed.

pytest-benchmark times the provider. Its ratio to `upstream` comes from `interleaved_ratios`, which alternates the two,
so that other work on the machine affects both equally.
"""

import importlib.util
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

import metta_fastagent
from benchmarks import cuda
from metta_fastagent.ops import products

UPSTREAM = "upstream"
# A shape belongs to the smallest selection that contains it.
LEVELS = ("quick", "full", "gpu")
# Each half of a round lasts at least this long: well above the granularity of clock and scheduler.
ROUND_SECONDS = 1e-3
MIN_ROUNDS = 5
# Tracing unrolls lists of tensors: thousands of tensors take minutes.
MAX_COMPILED_TENSORS = 200
# Other packages' providers, and the module that each needs.
PEERS = {
    "torch.distributions": "torch.distributions",
    "torchrl": "torchrl",
    "torchrl scan": "hoptorch",
    "torchrl triton": "torchrl",
    "pufferlib": "pufferlib",
}
# Compared replays of a captured step, each with different inputs.
COMPARED_REPLAYS = 3

Call = Callable[[], Any]
Size = Mapping[str, int]


class Disagreement(AssertionError):
    """A provider's result differs from upstream's."""


class Shape(NamedTuple):
    """Sizes of a benchmark's inputs, and the smallest selection they belong to: quick, full or gpu."""

    level: str
    size: Size


class Options(NamedTuple):
    """The device, whether torch.compile takes part, and the seconds for measuring each ratio."""

    device: torch.device
    compiled: bool
    seconds: float


class Case(NamedTuple):
    """One operation on one set of inputs."""

    operation: str
    # Provider name -> the function to time; "upstream" is the reference.
    call_of: Callable[[str], Call]
    # Result of a call -> the part to compare; for operations that work in place or draw at random.
    compared: Callable[[Any], Any] = lambda result: result
    # Restores the inputs before a compared call.
    reset: Call = lambda: None
    # Providers timed without a comparison.
    uncompared: Sequence[str] = ()
    # The minimum number of bytes to read and write.
    moved_bytes: int | None = None
    # Floating-point operations of its matrix product.
    operations: int | None = None
    rtol: float = 1e-4
    atol: float = 1e-5


class Provider(NamedTuple):
    """A named implementation: the function to time."""

    name: str
    call: Call

    @property
    def backend(self) -> str:
        """The package's backend while it runs."""
        return self.name if self.name in ("eager", "triton", "native") else "auto"

    def seconds(self, count: int, clock: Callable[[], float]) -> float:
        """Mean over `count` calls."""
        with metta_fastagent.use_backend(self.backend):
            started = clock()
            for _ in range(count):
                self.call()
            return (clock() - started) / count


def size_text(size: Size) -> str:
    """A size as tables show it."""
    return ", ".join(f"{key} {value}" for key, value in size.items())


def shapes(
    names: str, quick: Sequence[tuple[int, ...]], full: Sequence[tuple[int, ...]], gpu: Sequence[tuple[int, ...]] = ()
) -> list[Shape]:
    """Shapes for each selection; `names` name the numbers, and the last numbers may be missing."""
    levels = zip(LEVELS, (quick, full, gpu), strict=True)
    return [Shape(level, dict(zip(names.split(), each, strict=False))) for level, own in levels for each in own]


def choose(provider: str, formulas: Mapping[str, Callable], package: Callable) -> Callable:
    """A provider's function: its own formula, which imports a peer, upstream's compiled, or the package's."""
    if provider == "torch.compile":
        return torch.compile(formulas[UPSTREAM], dynamic=False)
    if provider in PEERS:
        return formulas[provider](provider)
    return formulas.get(provider, package)


def parametrized(providers: Sequence[str], shapes: Sequence[Shape]) -> Callable[[Callable], Callable]:
    """A decorator that runs a benchmark for each provider and shape."""
    by_provider = pytest.mark.parametrize("provider", providers)
    by_shape = pytest.mark.parametrize("shape", shapes, ids=[size_text(shape.size) for shape in shapes])
    return lambda test: by_shape(by_provider(test))


def unavailable(provider: str, shape: Shape, options: Options) -> str | None:
    """Why a provider cannot run here, or None."""
    if provider == "torch.compile" and not options.compiled:
        return "torch.compile: off, --compile on turns it on"
    if provider == "torch.compile" and shape.size.get("tensors", 0) > MAX_COMPILED_TENSORS:
        return f"torch.compile: compiling takes minutes above {MAX_COMPILED_TENSORS} tensors"
    if provider in ("captured", "torchrl triton") and options.device.type != "cuda":
        return f"{provider}: needs a CUDA device"
    if provider in ("triton", "native") and provider != metta_fastagent.backend(options.device):
        return f"{provider}: the package runs {metta_fastagent.backend(options.device)} on {options.device}"
    if provider == "onednn" and (options.device.type == "cuda" or products._operator() is None):
        return "onednn: needs a CPU, and a PyTorch with oneDNN's linear layer"
    if provider in PEERS and importlib.util.find_spec(PEERS[provider]) is None:
        return f"{provider}: {PEERS[provider]} is not installed"
    return None


def measure(benchmark: Any, case: Case, name: str, shape: Shape, options: Options) -> None:
    """Compare one provider with upstream, time it, and store ratio and device figures in `benchmark.extra_info`.

    Raises:
        Disagreement: the provider's result differs.
    """
    reference = Provider(UPSTREAM, case.call_of(UPSTREAM))
    provider = reference if name == UPSTREAM else Provider(name, case.call_of(name))
    if name != UPSTREAM and name not in case.uncompared:
        require_agreement(case, reference, provider)
    benchmark.group = f"{case.operation}: {size_text(shape.size)}"
    info: dict[str, Any] = {"operation": case.operation, "shape": size_text(shape.size), "provider": name}
    if case.operations:
        info["operations"] = case.operations
    with metta_fastagent.use_backend(provider.backend):
        benchmark(provider.call)
        info |= cuda.device_figures(provider.call, case.moved_bytes, options.device, name == "captured")
    ratios = (1.0, 1.0, 1.0)
    if name != UPSTREAM:
        ratios = interleaved_ratios(reference, provider, options.seconds, cuda.clock_of(options.device))
    benchmark.extra_info.update(info, **dict(zip(("ratio_q1", "ratio", "ratio_q3"), ratios, strict=True)))


def require_agreement(case: Case, reference: Provider, provider: Provider) -> None:
    """Raise Disagreement if the provider's result on the case's inputs differs from the reference's."""
    with full_precision():
        expected, actual = _result(case, reference), _result(case, provider)
    require_close(provider.name, expected, actual, case)


def _result(case: Case, provider: Provider) -> Any:
    case.reset()
    torch.manual_seed(0)
    with metta_fastagent.use_backend(provider.backend):
        result = case.compared(provider.call())
    # The next provider may overwrite the same memory.
    return _pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, result)


def require_close(name: str, expected: Any, actual: Any, case: Case) -> None:
    """Raise Disagreement, which gives the first difference between two nested results, its place and its size."""
    try:
        torch.testing.assert_close(actual, expected, rtol=case.rtol, atol=case.atol, equal_nan=True, check_dtype=False)
    except AssertionError as error:
        raise Disagreement(f"{name}: {' '.join(str(error).split())}") from None


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products and convolutions on CUDA without TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def interleaved_ratios(
    reference: Provider, provider: Provider, seconds: float, clock: Callable[[], float]
) -> tuple[float, float, float]:
    """Quartiles of the provider's time divided by the reference's, taken within rounds that run both.

    The order alternates between rounds; rounds run for `seconds`, at least MIN_ROUNDS of them.
    """
    pair = (reference, provider)
    # The first call warms up.
    once = [min(each.seconds(1, clock) for _ in range(2)) for each in pair]
    counts = [max(1, round(ROUND_SECONDS / max(each, 1e-9))) for each in once]
    ratios: list[float] = []
    until = clock() + seconds
    for number in itertools.count():
        if number >= MIN_ROUNDS and clock() >= until:
            break
        times = [0.0, 0.0]
        for i in (0, 1) if number % 2 == 0 else (1, 0):
            times[i] = pair[i].seconds(counts[i], clock)
        ratios.append(times[1] / max(times[0], 1e-9))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return low, middle, high


def captured(step: Call, twin: Call, change_inputs: Call, case: Case, device: torch.device) -> Call:
    """Replays of a CUDA graph of `step`, compared with calls of its `twin` over COMPARED_REPLAYS changes of the inputs.

    Raises:
        Disagreement: a replay differs.
    """
    graph, result = cuda.capture(step, device)
    for _ in range(cuda.WARM_UP_CALLS):
        twin()
    for number in range(COMPARED_REPLAYS):
        change_inputs()
        expected = case.compared(twin())
        graph.replay()
        require_close(f"captured: replay {number + 1}", expected, case.compared(result), case)

    def replay() -> Any:
        graph.replay()
        return result

    return replay
