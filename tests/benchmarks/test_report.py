"""The report of a result: its machine, every figure, those in which the package loses too, and plots."""

import json
import sys

import pytest

from benchmarks import report
from benchmarks.__main__ import main


def entry(operation, provider, rows, ratio, **figures):
    extra = {
        "operation": operation,
        "shape": f"rows{rows}",
        "size": {"rows": rows},
        "provider": provider,
        "reference": "upstream",
        "ratio": ratio,
        "ratio_q1": ratio * 0.9,
        "ratio_q3": ratio * 1.1,
        "cpu_ratio": ratio,
        "gpu_seconds": None,
        "note": "",
        **figures,
    }
    median = 1e-5 * rows * ratio
    return {"extra_info": extra, "stats": {"q1": median * 0.9, "median": median, "q3": median * 1.1}}


def result(load=0.5):
    return {
        "datetime": "2026-01-02T03:04:05",
        "machine_info": {
            "name": "Some Processor(R) 9, 2 cores",
            "device": "cpu",
            "processor_name": "Some Processor(R) 9, 2 cores",
            "gpu": "none used",
            "torch": "2.13.0",
            "triton": "3.7.1",
            "tensordict": "0.10",
            "peers": "torchrl 0.14",
            "python_version": "3.12.1",
            "backend": "eager",
            "threads": 1,
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "conditions": {"load_average": [load] * 3, "cores": 2, "quick": True, "skipped": {"triton": "no CUDA device"}},
        "benchmarks": [
            entry("clip", "upstream", 10, 1.0),
            entry("clip", "eager", 10, 2.0),
            entry("clip", "upstream", 100, 1.0),
            entry("clip", "eager", 100, 0.5),
            entry("metrics", "upstream", 10, 1.0),
            entry("metrics", "eager", 10, 0.25, launches=3.0),
        ],
    }


@pytest.fixture
def written(tmp_path):
    def write(content):
        path = tmp_path / "run.json"
        path.write_text(json.dumps(content))
        return path

    return write


def test_markdown_and_plots(written, tmp_path, capsys):
    path = written(result())
    assert main(["report", str(path), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "run.md").read_text()
    for fact in (
        "Some Processor(R) 9, 2 cores",
        "torch 2.13.0",
        "torchrl 0.14",
        "commit 012345678",
        "no triton: no CUDA device",
    ):
        assert fact in text
    assert "| rows 10 | eager | 200 µs | 180 µs - 220 µs | 2.00 (1.80 - 2.20) | 2.00 |" in text
    assert "| rows 100 | eager | 500 µs | 450 µs - 550 µs | 0.50 (0.45 - 0.55) | 0.50 |" in text
    assert "busy" not in text
    plots = sorted(plot.name for plot in (tmp_path / "out").glob("*.png"))
    assert plots == ["run-ratios.png", "run-scaling.png"]
    assert all(plot in text for plot in plots)
    assert "run.md" in capsys.readouterr().out


def test_a_column_shows_only_where_it_has_figures(written, tmp_path):
    report.write(written(result()), tmp_path)
    clip, metrics = (tmp_path / "run.md").read_text().split("## ")[1:]
    assert "launches" not in clip
    assert "GPU time" not in metrics
    assert "launches" in metrics


def test_a_busy_machine_is_told(written, tmp_path):
    report.write(written(result(load=5.0)), tmp_path)
    assert "busy with other work" in (tmp_path / "run.md").read_text()


def test_what_there_was_no_time_for_is_told(written, tmp_path):
    content = result()
    content["conditions"] |= {"left_out": ["clip rows100", "clip rows1000"], "killed": ["sample"]}
    report.write(written(content), tmp_path)
    text = (tmp_path / "run.md").read_text()
    assert "- left out, as the time was used up: clip rows100, clip rows1000\n" in text
    assert "- no results of sample: it was stopped, its time was used up\n" in text


def test_a_result_without_the_suites_is_refused(written, tmp_path):
    path = written({**result(), "benchmarks": []})
    with pytest.raises(ValueError, match=r"run\.json: holds no benchmark"):
        report.write(path, tmp_path)


def test_folder_of_a_machine():
    assert report.folder_of(result()) == "some-processor-9-2-cores"


def test_without_matplotlib_there_are_no_plots(written, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert [path.name for path in report.write(written(result()), tmp_path)] == ["run.md"]
    assert ".png" not in (tmp_path / "run.md").read_text()
