"""The README's tables: what is in the results, no more and no less, and nothing else of the README changes."""

import importlib
import json
import re
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import readme

ROOT = Path(__file__).resolve().parents[2]


def result(device: str, entries: list[tuple], quick: bool = False) -> dict:
    """A run's JSON with (operation, size, provider, median seconds, ratio) entries."""
    info = {"name": "Some machine", "device": device, "threads": 2, "torch": "9.1", "triton": "8.2"}
    return {
        "machine_info": {**info, "python_version": "3.99"},
        "datetime": "2031-05-06T07:08:09",
        "conditions": {"quick": quick},
        "benchmarks": [
            {
                "stats": {"q1": seconds, "median": seconds, "q3": seconds},
                "extra_info": {
                    "operation": operation,
                    "shape": "",
                    "size": size,
                    "provider": provider,
                    "reference": "upstream",
                    "ratio": ratio,
                },
            }
            for operation, size, provider, seconds, ratio in entries
        ],
    }


DRAWS = {"rows": 4096, "actions": 21}
CPU = [
    ("sample_actions", DRAWS, "upstream", 2e-3, 1.0),
    ("sample_actions", DRAWS, "native", 1e-4, 0.054),
    ("sample_actions", DRAWS, "eager", 4e-3, 2.0),
    ("sample_actions", {"rows": 4096, "actions": 5}, "upstream", 7.0, 1.0),
    ("rollout step", {"rows": 512, "time": 0}, "upstream", 0.025, 1.0),
]
CUDA = [
    ("sample_actions", DRAWS, "upstream", 8e-5, 1.0),
    ("sample_actions", DRAWS, "triton", 2e-5, 0.25),
]


@pytest.fixture
def folder(tmp_path):
    """A README and three results: an old one, a newer one, and a quick one that is newer still."""
    runs = {
        "a/2030-01-01-000000-old": result("cpu", CPU[:1]),
        "a/2031-05-06-070809-new": result("cpu", CPU),
        "a/2032-01-01-000000-quick": result("cpu", CPU[:1], quick=True),
        "b/2029-01-01-000000-gpu": result("cuda:0", CUDA),
    }
    for name, content in runs.items():
        path = tmp_path / "results" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    (tmp_path / "README.md").write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    return tmp_path


def test_tables_of_the_newest_full_results(folder):
    readme.update(folder / "README.md", folder / "results")
    text = (folder / "README.md").read_text()
    assert text.startswith(f"before\n{readme.BEGIN}\n") and text.endswith(f"\n{readme.END}\nafter\n")
    assert "old" not in text and "quick" not in text
    cuda, cpu = text.index("2029-01-01-000000-gpu.md"), text.index("(results/a/2031-05-06-070809-new.md)")
    assert cuda < cpu
    assert "Some machine, 2 threads, PyTorch 9.1, Triton 8.2, Python 3.99, 2031-05-06 ([" in text
    assert "| sample actions, 4096 x 21 | 80 µs | - | - | 0.25 | - |" in text[:cpu]
    lines = [line for line in text[cpu:].splitlines() if line.startswith("| ")]
    assert lines[2:] == [
        "| rollout step of `Fast`, 512 rows | 25 ms | - | - |",
        "| sample actions, 4096 x 21 | 2 ms | 2.00 | 0.05 |",
    ]


def test_a_second_update_changes_nothing(folder):
    readme.update(folder / "README.md", folder / "results")
    first = (folder / "README.md").read_text()
    readme.update(folder / "README.md", folder / "results")
    assert (folder / "README.md").read_text() == first


def test_a_readme_without_the_marks_is_refused(folder):
    (folder / "README.md").write_text(f"{readme.END} {readme.BEGIN}")
    with pytest.raises(ValueError, match="expected the marks"):
        readme.update(folder / "README.md", folder / "results")
    assert (folder / "README.md").read_text() == f"{readme.END} {readme.BEGIN}"


def test_the_command(folder, monkeypatch):
    monkeypatch.setattr(command, "README", folder / "README.md")
    monkeypatch.setattr(command, "RESULTS", folder / "results")
    assert command.main(["readme"]) == 0
    assert "80 µs" in (folder / "README.md").read_text()


def test_every_line_is_in_a_suite():
    """A line of an operation or size that no suite measures would never show."""
    modules = [importlib.import_module(f"benchmarks.bench_{name}") for name in command.SUITES]
    suites = [suite for module in modules for suite in module.SUITES]
    measured = [(suite.operation, shape.size) for suite in suites for shape in suite.shapes]
    for line in readme.LINES:
        assert any(name == line.operation and readme._same(size, line.size) for name, size in measured), line


def test_this_readme_shows_what_its_results_hold():
    text = (ROOT / "README.md").read_text()
    shown = text.partition(readme.BEGIN)[2].partition(readme.END)[0].strip()
    linked = re.findall(r"\((benchmarks/results/\S+)\.md\)", shown)
    assert shown == readme.tables([ROOT / f"{path}.json" for path in linked], ROOT) and linked
