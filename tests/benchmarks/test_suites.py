"""Every suite: its providers agree on its smallest shape, are the announced ones, and a changed result is refused."""

import importlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from processes_for_tests import has_ended

from benchmarks import __main__ as entry
from benchmarks import conftest, harness, machine
from benchmarks.__main__ import SUITES, main, merged
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


def test_a_run_without_a_benchmark_leaves_nothing(tmp_path):
    assert main(["run", "--only", "clip", "--results", str(tmp_path), "--device", "cpu", "-k", "nonsense"]) != 0
    assert list(tmp_path.iterdir()) == []


def test_suites_share_the_time_and_are_merged(tmp_path):
    run = ["run", "--quick", "--only", "tensordict_fields,conversions,clip", "--results", str(tmp_path)]
    # No shape of the first suite is begun after its share.
    assert main([*run, "--device", "cpu", "--seconds", "60", "-k", "rows256"]) == 0
    (result,) = tmp_path.glob("*/*.json")
    content = json.loads(result.read_text())
    operations = {each["extra_info"]["operation"] for each in content["benchmarks"]}
    assert operations == {"set_tensordict_fields", "action_to_logit_index", "logit_index_to_action"}
    assert content["conditions"]["killed"] == content["conditions"]["left_out"] == []


def part_of(operation, **conditions):
    return {
        "machine_info": {"name": "some machine"},
        "benchmarks": [{"name": operation}],
        "conditions": {"load_average": [1.0], "skipped": {}, "left_out": [], **conditions},
    }


def test_merged_results_keep_what_was_left_out_and_why():
    first = part_of("clip", skipped={"triton": "no CUDA device"}, left_out=["clip rows1"], load_average=[2.0])
    whole = merged([first, part_of("sample", skipped={"torchrl": "does not import"})], ["l2_init"])
    assert [each["name"] for each in whole["benchmarks"]] == ["clip", "sample"]
    assert whole["conditions"] == {
        "load_average": [1.0],
        "skipped": {"triton": "no CUDA device", "torchrl": "does not import"},
        "left_out": ["clip rows1"],
        "killed": ["l2_init"],
    }


SUITE = """
import os, subprocess, sys, time

def test_sleeps():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open("child", "w").write(str(child.pid))
    time.sleep(float(os.environ["SLEEP"]))
    child.kill()
"""


@pytest.mark.parametrize(("sleep", "code"), [("0", 0), ("60", None)])
def test_a_suite_that_overruns_is_killed_with_its_children(tmp_path, monkeypatch, sleep, code):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "bench_made_up.py").write_text(SUITE)
    (folder / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--seconds')\n")
    monkeypatch.setattr(entry, "FOLDER", folder)
    monkeypatch.setattr(entry, "HARD_SHARES", 1.0)
    monkeypatch.setattr(entry, "HARD_SECONDS", 0.0)
    monkeypatch.setenv("SLEEP", sleep)
    deadline = time.monotonic() + 100
    assert entry.run_suites(["made_up"], tmp_path / "result.json", 8.0, deadline, ["-p", "no:importnb"]) == code
    assert time.monotonic() < deadline - 60
    assert has_ended(int((tmp_path / "child").read_text()))


def test_a_suite_without_time_left_is_not_begun(tmp_path):
    assert entry.run_suites(["clip"], tmp_path / "result.json", 1.0, time.monotonic() - 1, []) is None


def test_shapes_are_left_out_when_the_time_is_used_up(monkeypatch):
    monkeypatch.setattr(conftest, "_started", time.monotonic() - 60)
    assert conftest._share_left(None) == 1
    assert conftest._share_left(120) == pytest.approx(0.5, abs=0.05)
    assert conftest._share_left(30) < 0


def test_suites_run_for_their_shares_and_pass_on_what_is_left(monkeypatch, tmp_path, capsys):
    now, begun = [0.0], []

    def run_suites(names, result, share, deadline, options):
        begun.append((names, round(share), deadline))
        now[0] += 10.0
        return None if names == ["sample"] else 0

    monkeypatch.setattr(entry.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(entry, "run_suites", run_suites)
    assert main(["run", "--only", "clip,sample,train_step", "--seconds", "160", "--results", str(tmp_path)]) == 1
    # 2, 2 and 4 parts: of 160, of what is left after 10 seconds, and after 20.
    assert begun == [(["clip"], 40, 160), (["sample"], 50, 160), (["train_step"], 140, 160)]
    assert "sample was stopped, its time was used up" in capsys.readouterr().err
