"""The sweep of tuning constants, rehearsed in Triton's interpreter; what it replaces is put back."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metta_fastagent import _triton

if _triton.triton is None:
    pytest.skip("needs Triton", allow_module_level=True)

from benchmarks import sweep
from metta_fastagent.ops import (
    _action_index,
    _categorical,
    _chunk_table,
    _clip_weights,
    _evaluate_actions,
    _l2_init_loss,
    _lstm_layer,
    _tokens_to_grid,
)

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_every_variant_agrees_in_the_interpreter(tmp_path):
    command = [sys.executable, "-m", "benchmarks.sweep", "--device", "cpu", "--tiny", "--out", str(tmp_path / "s.json")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "s.json").read_text())
    rows = written["rows"]
    assert {row["experiment"] for row in rows} == {experiment.name for experiment in sweep.EXPERIMENTS}
    assert [row for row in rows if row["fault"] or row["gpu_us"] is not None or row["host_us"] <= 0] == []
    assert written["left_out"] == []
    for experiment in sweep.EXPERIMENTS:
        for size in experiment.tiny:
            labels = [row["variant"] for row in rows if (row["experiment"], row["size"]) == (experiment.name, size)]
            assert labels[0] == sweep.SHIPPED
            assert labels[-1] == sweep.SHIPPED_AGAIN
            assert len(set(labels)) == len(labels) > 2


def made_up(call, *variants):
    return sweep.Experiment("made up", [{}], [{}], lambda size, device: sweep.Made(call, variants))


def test_a_variant_that_computes_something_else_or_fails_is_not_timed(monkeypatch):
    monkeypatch.setattr(sweep, "use_backend", lambda name: sweep.patched([]))

    def fail():
        raise RuntimeError("out of resources: shared memory\nmore")

    wrong = sweep.Variant("wrong", lambda: torch.zeros(2))
    rows = sweep.run(made_up(lambda: torch.ones(2), wrong, sweep.Variant("fails", fail)), {}, CPU)
    assert [row.variant for row in rows] == [sweep.SHIPPED, "wrong", "fails", sweep.SHIPPED_AGAIN]
    assert rows[0].host_us is not None
    assert rows[0].fault == rows[3].fault == ""
    assert rows[1].host_us is rows[2].host_us is None
    assert rows[1].fault.startswith("computes something else: result: 100.0%")
    assert rows[2].fault == "RuntimeError: out of resources: shared memory"


def test_a_fault_is_told_and_changes_the_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(sweep, "use_backend", lambda name: sweep.patched([]))
    right, wrong = (sweep.Variant(str(value), lambda value=value: torch.full((2,), value)) for value in (1.0, 0.0))
    for variant, code in ((right, 0), (wrong, 1)):
        monkeypatch.setattr(sweep, "EXPERIMENTS", [made_up(lambda: torch.ones(2), variant)])
        assert sweep.main(["--device", "cpu", "--tiny"]) == code
    assert "| made up |  | 0.0 |  |  | computes something else" in capsys.readouterr().out


def test_sizes_are_left_out_when_the_time_is_used_up(capsys):
    assert sweep.main(["--device", "cpu", "--only", "conversion", "--seconds", "-1"]) == 0
    assert "left out, as the time was used up: 2 sizes" in capsys.readouterr().out


def test_an_unknown_experiment_is_named(capsys):
    with pytest.raises(SystemExit):
        sweep.main(["--only", "layout,nonsense"])
    assert "nonsense" in capsys.readouterr().err


def test_constants_are_replaced_where_they_are_read_and_put_back():
    before = (_chunk_table.CHUNK, _clip_weights.CHUNK, _chunk_table._tables, _tokens_to_grid.TOKEN_BLOCK)
    with sweep.patched([*sweep.chunk_patches(512, 2), *sweep._grid_patches(64, 8)]):
        assert (_chunk_table.CHUNK, _clip_weights.CHUNK, _clip_weights.CHUNK_WARPS) == (512, 512, 2)
        assert (_tokens_to_grid.ZERO_BLOCK, _tokens_to_grid.TOKEN_BLOCK) == (64, 8)
        assert _chunk_table._tables == {}
    assert before == (_chunk_table.CHUNK, _clip_weights.CHUNK, _chunk_table._tables, _tokens_to_grid.TOKEN_BLOCK)


@pytest.mark.parametrize(
    ("block", "kernel", "layout"),
    [(None, "columns", {"ROWS": 64, "num_warps": 2}), (32, "tile", {"ROWS": 64, "BLOCK_A": 32, "num_warps": 2})],
)
def test_a_layout_replaces_the_packages_choice(block, kernel, layout):
    with sweep.patched(sweep.layout_patches(64, 2, block)):
        assert _evaluate_actions.choose_kernel(130, 21, "columns", "tile") == ((3,), kernel, layout)
    assert _evaluate_actions.choose_kernel is _categorical.choose_kernel


class Kernel:
    """A kernel that notes how it was launched, and returns what Triton returns: the compiled kernel."""

    arg_names = ("example", "chunks", "COMPUTE", "CHUNK")

    def __init__(self):
        self.launches, self.compiled = [], self

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((grid, args, options)) or self.compiled


def test_a_kept_kernel_is_launched_with_all_arguments_in_order():
    kernel, compiled = Kernel(), Kernel()
    kernel.compiled = compiled
    launch = sweep.Launch(kernel)
    launch[(3,)]("e", "c", CHUNK=4096, COMPUTE="fp32", num_warps=8)
    launch.repeat()
    assert kernel.launches == [((3,), ("e", "c"), {"CHUNK": 4096, "COMPUTE": "fp32", "num_warps": 8})] * 2
    launch.kept()
    assert compiled.launches == [((3, 1, 1), ("e", "c", "fp32", 4096), {})]


def test_the_tuning_page_names_the_experiments_and_the_constants_as_they_are():
    text = (ROOT / "benchmarks" / "TUNING.md").read_text()
    _, _, experiments = text.partition("## Experiments")
    rows = [line.split(" | ") for line in experiments.splitlines() if line.startswith("| ") and " | ---" not in line]
    assert [row[0].removeprefix("| ") for row in rows[1:]] == [each.name for each in sweep.EXPERIMENTS]
    stated = dict(re.findall(r"`([A-Z_]+)` = (\d+)", experiments))
    modules = (_categorical, _chunk_table, _action_index, _l2_init_loss, _lstm_layer, _tokens_to_grid)
    actual = {name: str(vars(module)[name]) for name in stated for module in modules if name in vars(module)}
    assert stated == actual
    assert {"MAX_COLUMNS", "CHUNK", "PARTIALS_BLOCK", "TOKEN_BLOCK", "BLOCK"} <= stated.keys()


@pytest.mark.parametrize("page", ["README.md", "TUNING.md"])
def test_links_of_the_pages_lead_somewhere(page):
    folder = ROOT / "benchmarks"
    links = re.findall(r"\]\(([^)#]+)\)", (folder / page).read_text())
    assert [link for link in links if not (folder / link).exists()] == []
