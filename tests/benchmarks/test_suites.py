"""Every suite: its providers agree on a tiny shape, and a changed result is refused. Then the command as a whole."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    bench_clip,
    bench_conversions,
    bench_evaluate,
    bench_l2_init,
    bench_lstm,
    bench_sample,
    bench_tensordict_fields,
    bench_tokens_to_grid,
    bench_train_step,
    bench_weight_metrics,
    harness,
)
from benchmarks.__main__ import SUITES, main
from benchmarks.harness import Options, Provider, Shape

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
BOTH = "forward + backward"
DEEP = {"rows": 2, "time": 3, "trunk": 8}
CASES = [
    (bench_clip, bench_clip.make_case, {"tensors": 4, "parameters": 128}),
    *[
        (bench_conversions, functools.partial(bench_conversions.make_case, o), {"rows": 5})
        for o in bench_conversions.OPERATIONS
    ],
    *[
        (bench_evaluate, functools.partial(bench_evaluate.make_case, m), {"rows": 5, "actions": 9})
        for m in ("forward", BOTH)
    ],
    *[
        (bench_l2_init, functools.partial(bench_l2_init.make_case, m), {"tensors": 3, "parameters": 48})
        for m in ("forward", BOTH)
    ],
    *[
        (bench_lstm, functools.partial(bench_lstm.make_case, m), {"segments": 3, "time": 4, "resets": 30})
        for m in ("forward", BOTH)
    ],
    (bench_lstm, functools.partial(bench_lstm.make_case, BOTH), {"segments": 3, "time": 4, "resets": 0}),
    (bench_sample, bench_sample.make_case, {"rows": 5, "actions": 9}),
    (bench_tensordict_fields, bench_tensordict_fields.make_case, {"rows": 3, "time": 0}),
    (bench_tensordict_fields, bench_tensordict_fields.make_case, {"rows": 3, "time": 2}),
    (bench_tokens_to_grid, bench_tokens_to_grid.make_case, {"rows": 2, "tokens": 40}),
    (bench_weight_metrics, bench_weight_metrics.make_case, {"weights": 2, "width": 12}),
    (bench_train_step, functools.partial(bench_train_step.make_case, "rollout"), {"rows": 4, "time": 0}),
    (bench_train_step, functools.partial(bench_train_step.make_case, "update"), {"rows": 2, "time": 3}),
    (bench_train_step, functools.partial(bench_train_step.make_case, "update"), DEEP),
]


def made(make_case, size):
    torch.manual_seed(0)
    case = make_case(size, CPU)
    return case, Provider("upstream", case.call_of("upstream"))


@pytest.mark.parametrize(("suite", "make_case", "size"), CASES)
def test_providers_agree(suite, make_case, size):
    case, reference = made(make_case, size)
    options = Options(CPU, compiled=False, seconds=0.0)
    available = [name for name in suite.PROVIDERS if not harness.unavailable(name, Shape("quick", size), options)]
    assert available[0] == "upstream" and "eager" in available
    for name in available[1:]:
        if name not in case.uncompared:
            harness.require_agreement(case, reference, Provider(name, case.call_of(name)))


def changed(result):
    """The result with its first tensor or number changed."""
    if isinstance(result, dict):
        key = next(iter(result))
        return {**result, key: changed(result[key])}
    if isinstance(result, (list, tuple)):
        return [changed(result[0]), *result[1:]]
    return (result.double() + 1).to(result.dtype) if isinstance(result, torch.Tensor) else result + 1


@pytest.mark.parametrize(("suite", "make_case", "size"), CASES)
def test_a_changed_result_is_refused(suite, make_case, size):
    case, reference = made(make_case, size)
    compared, turn = case.compared, iter((False, True))
    wrong = case._replace(compared=lambda result: changed(compared(result)) if next(turn) else compared(result))
    with pytest.raises(harness.Disagreement, match="^eager: "):
        harness.require_agreement(wrong, reference, Provider("eager", case.call_of("eager")))


@pytest.mark.parametrize("kind", ["rollout", "update"])
def test_encoder_and_heads_compile_and_agree(kind, monkeypatch):
    compiled = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiled)
    torch._dynamo.utils.counters.clear()
    size = {"rows": 2, "time": 3} if kind == "update" else {"rows": 4, "time": 0}
    case, reference = made(functools.partial(bench_train_step.make_case, kind), size)
    harness.require_agreement(case, reference, Provider("torch.compile", case.call_of("torch.compile")))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_the_deep_agent_has_200_tensors_of_30_million_parameters():
    (trunk,) = {
        shape.size["trunk"] for shape in bench_train_step.UPDATES if shape.level == "gpu" and "trunk" in shape.size
    }
    params = list(bench_train_step.make_agent({"trunk": trunk}, torch.device("meta")).parameters())
    assert len(params) == 200
    assert sum(param.numel() for param in params) == pytest.approx(30e6, rel=0.01)


@pytest.mark.parametrize("size", [{}, DEEP])
def test_all_agents_start_with_the_same_weights(size):
    ours, theirs, head = (
        bench_train_step.make_agent(size, CPU, name).state_dict()
        for name in ("eager", "upstream", bench_train_step.FAST_HEAD)
    )
    assert ours.keys() == theirs.keys() == head.keys()
    assert all(torch.equal(ours[name], theirs[name]) and torch.equal(ours[name], head[name]) for name in ours)


def test_an_unknown_suite_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "clip,nonsense"])
    assert "--only: got nonsense, expected some of clip, " in capsys.readouterr().err


def test_without_pytest_benchmark_it_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["--only", "clip"])
    assert "pytest-benchmark is not installed" in capsys.readouterr().err


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks", "--device", "cpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def git_status():
    return subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout


def test_a_run_writes_its_page_and_ends_with_the_ratios(tmp_path):
    before = git_status()
    done = run("--quick", "--only", "conversions", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert git_status() == before
    (written,) = tmp_path.glob("*.json")
    result = json.loads(written.read_text())
    entries = {e["extra_info"]["provider"]: e for e in result["benchmarks"] if e["group"].endswith("index: rows 4096")}
    assert {"upstream", "eager"} <= entries.keys()
    ratio = entries["eager"]["extra_info"]["ratio"]
    page = written.with_suffix(".md").read_text()
    assert "| rows 4096 | eager |" in page and f"| {ratio:.2f} (" in page
    assert f"torch {torch.__version__}" in page and "skipped 4: captured" not in page
    assert "- skipped 4: triton: the package runs" in page
    *_, head, _, last = done.stdout.splitlines()
    assert head.split()[:3] == ["logit_index_to_action", "upstream", "eager"]
    assert last.split()[:2] == ["rows", "4096"] and f" {ratio:.2f}" in done.stdout


def test_shapes_that_have_not_begun_in_time_are_skipped(tmp_path):
    done = run("--quick", "--only", "conversions", "--out", str(tmp_path), "--seconds", "0")
    assert "not begun within --seconds" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_provider_fails_its_benchmark_and_no_other(tmp_path):
    suite = tmp_path / "bench_made_up.py"
    suite.write_text(
        "import torch\nfrom benchmarks.harness import Case, parametrized, shapes\n\n\n"
        "@parametrized(('upstream', 'same', 'wrong'), shapes('rows', quick=[(2,)], full=[]))\n"
        "def test_made_up(measure):\n"
        "    measure(lambda size, device: Case('op', lambda name: lambda: torch.ones(2 + (name == 'wrong'))))\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.conftest", "-p", "no:importnb", "-p", "no:xdist"]
    done = subprocess.run([*command, "--device=cpu", str(suite)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "1 failed, 2 passed" in done.stdout
    assert "Disagreement: wrong: " in done.stdout


@pytest.mark.parametrize("name", SUITES)
def test_no_shape_is_listed_twice(name):
    suite = __import__(f"benchmarks.bench_{name}", fromlist=["bench"])
    lists = [
        value for value in vars(suite).values() if isinstance(value, list) and value and isinstance(value[0], Shape)
    ]
    shapes = [harness.size_text(shape.size) for shape in (lists or [bench_evaluate.categorical.SHAPES])[0]]
    assert len(set(shapes)) == len(shapes)
