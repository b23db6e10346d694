"""pytest's side of the benchmarks: options, the selection and order of shapes, the fixture `measure`, and the JSON."""

import os
import time

import pytest
import torch

from benchmarks import cuda, harness, machine


def pytest_addoption(parser):
    group = parser.getgroup("metta_fastagent benchmarks")
    group.addoption("--quick", action="store_true", help="few shapes: under a minute")
    group.addoption("--device", help="cpu or cuda; default: cuda if there is a device")
    group.addoption("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile; auto: on CUDA")
    group.addoption("--seconds", type=float, default=float("inf"), help="skip shapes that have not begun by then")
    group.addoption("--threads", type=int, default=1, help="threads of CPU operations")


def pytest_configure(config):
    config.benchmarks_started = time.monotonic()
    config.benchmarks_skipped = {}
    if options_of(config).device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device: got cuda, expected cpu, as there is no CUDA device")


def options_of(config):
    """The harness's options from pytest's."""
    device = torch.device(config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    wanted = config.getoption("--compile")
    compiled = wanted == "on" or (wanted == "auto" and device.type == "cuda")
    return harness.Options(device, compiled, float(config.getoption("benchmark_max_time")))


def pytest_collection_modifyitems(config, items):
    """Keep the selected shapes, small ones first, torch.compile last, so that --seconds skips the least important."""
    device = options_of(config).device
    levels = harness.LEVELS[: 1 if config.getoption("--quick") else 2 if device.type == "cpu" else 3]

    def rank(item):
        params = item.callspec.params
        return (params["provider"] == "torch.compile", harness.LEVELS.index(params["shape"].level))

    left_out = [item for item in items if item.callspec.params["shape"].level not in levels]
    config.hook.pytest_deselected(items=left_out)
    items[:] = sorted((item for item in items if item not in left_out), key=rank)
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=cuda.clock_of(device)))


@pytest.fixture
def measure(benchmark, request, provider, shape):
    """measure(make_case): compare and time this test's provider on this test's shape, or skip it."""
    config, options = request.config, options_of(request.config)

    def run(make_case):
        reason = harness.unavailable(provider, shape, options)
        if time.monotonic() - config.benchmarks_started > config.getoption("--seconds"):
            reason = "not begun within --seconds"
        if reason:
            config.benchmarks_skipped[reason] = config.benchmarks_skipped.get(reason, 0) + 1
            pytest.skip(reason)
        torch.set_num_threads(config.getoption("--threads"))
        harness.measure(benchmark, make_case(shape.size, options.device), provider, shape, options)

    return run


def pytest_benchmark_generate_machine_info(config):
    return machine.description(options_of(config).device) | {"threads": config.getoption("--threads")}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["conditions"] = {
        "load_average": os.getloadavg(),
        "cores": os.cpu_count(),
        "quick": config.getoption("--quick"),
        "skipped": config.benchmarks_skipped,
    }
    for entry in output_json["benchmarks"]:
        # Parameters are objects, and there are many single rounds.
        entry["params"] = {"case": entry["param"]}
        entry["stats"].pop("data", None)
