"""pytest's side of the harness: options, one test for each provider of each shape, and what goes into the JSON.

pytest-benchmark times one test after the other, which the harness must not do: so the first test of a shape has the
harness measure all its providers in turn, and each test hands its own rounds to pytest-benchmark through a clock that
replays them. Statistics, JSON, comparison and `--benchmark-compare-fail` are pytest-benchmark's own.
"""

import os
import time

import pytest
import torch

from benchmarks import harness, machine

# Of the shape that is under way; the suites' memory goes with it.
_measured: dict[tuple[str, str], harness.Measurement] = {}
# Provider to the reason why it does not run here.
_skipped: dict[str, str] = {}
# Shapes that were not begun any more, and since when the time runs: about the process's start, as imports keep it busy.
_left_out: dict[tuple[str, str], None] = {}
_started = time.monotonic() - time.process_time()
# Of the time: what is compiled later would take it from shapes to come.
COMPILING_SHARE = 0.5


def pytest_addoption(parser):
    group = parser.getgroup("metta_fastagent benchmarks")
    group.addoption("--quick", action="store_true", help="few shapes and rounds: under a minute")
    group.addoption("--device", default=None, help="cpu or cuda; default: cuda where there is one")
    group.addoption("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile; auto: on CUDA")
    group.addoption("--seconds", type=float, help="shapes that have not begun after so many seconds are left out")
    group.addoption("--threads", type=int, default=1, help="threads of the CPU's operations")


def options_of(config):
    """The harness's options from pytest's."""
    device = torch.device(config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    wanted = config.getoption("--compile")
    compiled = wanted == "on" or (wanted == "auto" and device.type == "cuda")
    return harness.Options(device, config.getoption("--quick"), compiled)


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    cases, ids = [], []
    for suite in metafunc.module.SUITES:
        names = [*suite.provider_names, *([harness.COPY] if suite.count_bytes else [])]
        for shape in harness.selected_shapes(suite, options_of(metafunc.config)):
            cases += [(suite, shape, name) for name in names]
            ids += [f"{suite.operation}-{shape.label}-{name}".replace(" ", "_") for name in names]
    metafunc.parametrize("case", cases, ids=ids)


@pytest.fixture
def run_case(benchmark, request):
    """A function that measures (once for each shape) and records one provider."""

    def run(case):
        suite, shape, name = case
        options = options_of(request.config)
        key = (suite.operation, shape.label)
        if key not in _measured:
            left = _share_left(request.config.getoption("--seconds"))
            if left <= 0:
                _left_out[key] = None
                pytest.skip("left out: the time of this run is used up")
            options = options._replace(compiled=options.compiled and left > 1 - COMPILING_SHARE)
            torch.set_num_threads(request.config.getoption("--threads"))
            _measured.clear()
            _measured[key] = harness.measure(suite, shape, options)
        measurement = _measured[key]
        if name in measurement.refused:
            raise harness.Disagreement(measurement.refused[name])
        if name in measurement.skipped:
            _skipped[name] = measurement.skipped[name]
            pytest.skip(measurement.skipped[name])
        benchmark.group = f"{suite.operation} {shape.label}"
        size = {"operation": suite.operation, "shape": shape.label, "size": dict(shape.size)}
        benchmark.extra_info.update(size | harness.summary(measurement, name))
        seconds = measurement.timings[name].seconds
        harness.CLOCK.load(seconds)
        benchmark.pedantic(harness.CLOCK.round, rounds=len(seconds))

    return run


def _share_left(seconds):
    """Of the seconds that were given for measuring, from 1 at the start down to 0 and below; 1 without a limit."""
    return 1.0 if seconds is None else 1 - (time.monotonic() - _started) / seconds


def pytest_collection_modifyitems(items):
    for item in items:
        if "run_case" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=harness.CLOCK.now))


def pytest_benchmark_generate_machine_info(config):
    return machine.description(options_of(config).device) | {"threads": config.getoption("--threads")}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["conditions"] = {
        "load_average": os.getloadavg(),
        "cores": os.cpu_count(),
        "quick": config.getoption("--quick"),
        "skipped": _skipped,
        "left_out": [f"{operation} {shape}" for operation, shape in _left_out],
    }
    # Folder and branch say nothing of the code; parameters hold addresses; single rounds would fill the repository.
    for key in ("project", "branch"):
        output_json["commit_info"].pop(key, None)
    for entry in output_json["benchmarks"]:
        entry["params"] = {"case": entry["param"]}
        entry["stats"].pop("data", None)
