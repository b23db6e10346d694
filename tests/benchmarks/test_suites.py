"""Every suite: its providers agree on its smallest shape, are the announced ones, and a changed result is refused."""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks import harness, machine
from benchmarks.__main__ import SUITES, main
from benchmarks.harness import Provider, Suite

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@dataclass
class Named:
    suite: Suite


def all_suites():
    modules = [importlib.import_module(f"benchmarks.bench_{name}") for name in SUITES]
    return [pytest.param(Named(suite), id=suite.operation) for module in modules for suite in module.SUITES]


def made_by(suite):
    entries = suite.make_providers(suite.shapes[0].size, CPU, False)
    return entries, [entry for entry in entries if isinstance(entry, Provider)]


@pytest.mark.parametrize("named", all_suites())
def test_providers_agree(named):
    entries, providers = made_by(named.suite)
    assert tuple(entry.name for entry in entries) == named.suite.provider_names
    assert [provider.name for provider in providers][:1] == ["upstream"]
    assert "eager" in [provider.name for provider in providers]
    assert harness.disagreements(providers, named.suite.rtol, named.suite.atol) == {}


def spoilt(result):
    """The result with its first tensor or number changed."""
    if isinstance(result, dict):
        key = next(iter(result))
        return {**result, key: spoilt(result[key])}
    if isinstance(result, (list, tuple)):
        return [spoilt(result[0]), *result[1:]]
    if isinstance(result, torch.Tensor):
        return (result.double() + 1).to(result.dtype)
    return result + 1


@pytest.mark.parametrize("named", all_suites())
def test_a_changed_result_is_refused(named):
    _, providers = made_by(named.suite)
    package = next(provider for provider in providers if provider.name == "eager")
    wrong = package._replace(compared=lambda result: spoilt(package.compared(result)))
    refused = harness.disagreements([providers[0], wrong], named.suite.rtol, named.suite.atol)
    assert refused.keys() == {"eager"}


@pytest.mark.parametrize("named", all_suites())
def test_shapes(named):
    labels = [shape.label for shape in named.suite.shapes]
    assert len(set(labels)) == len(labels)
    assert any(shape.level == "quick" for shape in named.suite.shapes)
    assert all(shape.level in harness.LEVELS for shape in named.suite.shapes)
    if named.suite.count_bytes:
        assert all(named.suite.count_bytes(shape.size) > 0 for shape in named.suite.shapes)


def test_an_unknown_suite_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--only", "clip,nonsense"])
    assert "nonsense" in capsys.readouterr().err


def test_without_pytest_benchmark_it_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["run", "--only", "clip"])
    assert "pytest-benchmark is not installed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_sorted_in_by_machine_and_reported(tmp_path):
    run = ["run", "--quick", "--only", "tensordict_fields", "--results", str(tmp_path), "--device", "cpu"]
    assert main([*run, "-k", "rows256"]) == 0
    (result,) = tmp_path.glob("*/*.json")
    content = json.loads(result.read_text())
    assert result.parent.name == machine.folder(content["machine_info"]["name"])
    assert content["machine_info"]["torch"] == torch.__version__
    entries = {entry["extra_info"]["provider"]: entry for entry in content["benchmarks"]}
    assert {"upstream", "eager"} <= entries.keys()
    assert all(entry["stats"]["rounds"] >= harness.MIN_ROUNDS for entry in entries.values())
    assert "native" in content["conditions"]["skipped"] or "native" in entries
    assert "rows 256, time 0 | eager" in result.with_suffix(".md").read_text()


@pytest.mark.slow
def test_a_run_without_a_benchmark_leaves_nothing(tmp_path):
    assert main(["run", "--only", "clip", "--results", str(tmp_path), "--device", "cpu", "-k", "nonsense"]) != 0
    assert list(tmp_path.iterdir()) == []
