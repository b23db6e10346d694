"""Every suite: its providers agree on a tiny shape, and a changed result is refused. Then the command as a whole."""

import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_products, bench_tokens_to_grid, bench_train_step, harness, machine
from benchmarks.__main__ import SUITES, main
from benchmarks.harness import Options, Provider, Shape

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
BOTH = "forward + backward"
# Suite, first arguments of its make_case, and a size.
TINY = [
    ("advantages", (), {"rows": 5, "time": 6}),
    ("clip", (), {"tensors": 4, "parameters": 128}),
    ("conversions", ("action_to_logit_index",), {"rows": 5}),
    ("conversions", ("logit_index_to_action",), {"rows": 5}),
    ("evaluate", ("forward",), {"rows": 5, "actions": 9}),
    ("evaluate", (BOTH,), {"rows": 5, "actions": 9}),
    ("l2_init", ("forward",), {"tensors": 3, "parameters": 48}),
    ("l2_init", (BOTH,), {"tensors": 3, "parameters": 48}),
    ("lstm", ("forward",), {"segments": 3, "time": 4, "resets": 0}),
    ("lstm", (BOTH,), {"segments": 3, "time": 4, "resets": 30}),
    ("ppo_loss", ("forward",), {"rows": 5, "actions": 9}),
    ("ppo_loss", (BOTH,), {"rows": 5, "actions": 9}),
    *(("products", (kind,), {"rows": 5, "inputs": 6, "outputs": 7}) for kind in bench_products.KINDS),
    ("sample", (), {"rows": 5, "actions": 9}),
    ("tensordict_fields", (), {"rows": 3, "time": 0}),
    ("tensordict_fields", (), {"rows": 3, "time": 2}),
    *(("tokens_to_grid", (kind,), {"rows": 2, "tokens": 40}) for kind in bench_tokens_to_grid.KINDS),
    ("weight_metrics", (), {"weights": 2, "width": 12}),
    ("train_step", ("rollout",), {"rows": 4, "time": 0}),
    ("train_step", ("update",), {"rows": 2, "time": 3}),
    ("train_step", ("update",), {"rows": 2, "time": 3, "trunk": 8}),
]
every_suite = pytest.mark.parametrize(("name", "arguments", "size"), TINY)


def made(name, arguments, size):
    """A case on the tiny shape, and its reference."""
    torch.manual_seed(0)
    case = importlib.import_module(f"benchmarks.bench_{name}").make_case(*arguments, size, CPU)
    return case, Provider("upstream", case.call_of("upstream"))


def test_no_suite_is_missing_here():
    assert {name for name, _, _ in TINY} == set(SUITES)


@every_suite
def test_providers_agree(name, arguments, size):
    names = importlib.import_module(f"benchmarks.bench_{name}").PROVIDERS
    options = Options(CPU, compiled=False, seconds=0.0)
    available = [each for each in names if not harness.unavailable(each, Shape("quick", size), options)]
    assert available[0] == "upstream" and "eager" in available
    for provider in available[1:]:
        case, reference = made(name, arguments, size)
        if provider not in case.uncompared:
            harness.require_agreement(case, reference, Provider(provider, case.call_of(provider)))


def changed(result):
    """The result with its first tensor or number changed."""
    if isinstance(result, dict):
        key = next(iter(result))
        return {**result, key: changed(result[key])}
    if isinstance(result, (list, tuple)):
        return [changed(result[0]), *result[1:]]
    return (result.double() + 1).to(result.dtype) if isinstance(result, torch.Tensor) else result + 1


@every_suite
def test_a_changed_result_is_refused(name, arguments, size):
    case, reference = made(name, arguments, size)
    compared, turn = case.compared, iter((False, True))
    wrong = case._replace(compared=lambda result: changed(compared(result)) if next(turn) else compared(result))
    with pytest.raises(harness.Disagreement, match=r"^eager: "):
        harness.require_agreement(wrong, reference, Provider("eager", case.call_of("eager")))


@pytest.mark.parametrize("tiny", [each for each in TINY if each[0] == "train_step"][:2], ids=["rollout", "update"])
def test_encoder_and_heads_compile_and_agree(tiny, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()
    case, reference = made(*tiny)
    harness.require_agreement(case, reference, Provider("torch.compile", case.call_of("torch.compile")))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_the_deep_agent_has_200_tensors_of_30_million_parameters():
    trunk = max(shape.size.get("trunk", 0) for shape in bench_train_step.OPTIMIZER_STEPS)
    params = list(bench_train_step.make_agent({"trunk": trunk}, torch.device("meta")).parameters())
    assert len(params) == 200
    assert sum(param.numel() for param in params) == pytest.approx(30e6, rel=0.01)


@pytest.mark.parametrize("size", [{}, {"trunk": 8}])
def test_all_agents_start_with_the_same_weights(size):
    names = ("eager", "upstream", bench_train_step.FAST_HEAD)
    ours, *others = (bench_train_step.make_agent(size, CPU, name).state_dict() for name in names)
    for other in others:
        assert ours.keys() == other.keys()
        assert all(torch.equal(ours[key], other[key]) for key in ours)


def test_facts_of_the_machine():
    facts = json.loads(json.dumps(machine.facts()))
    assert facts["cuda"] is torch.cuda.is_available()
    assert facts["cuda"] or (facts["why"] and facts["name"] == facts["processor_name"] and facts["gpu"] == "none used")
    assert facts["torch"] == torch.__version__ and facts["backend"] in ("triton", "native", "eager")


def test_an_unknown_suite_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "clip,nonsense"])
    assert "--only: got nonsense, expected some of advantages, clip, " in capsys.readouterr().err


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
