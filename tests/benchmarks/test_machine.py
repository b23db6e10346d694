"""The description of the machine that every figure is shown with."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import machine


def test_the_command_prints_one_line_of_json():
    command = [sys.executable, "-m", "benchmarks.machine"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    facts = json.loads(line)
    assert facts["cuda"] is torch.cuda.is_available()
    assert facts["torch"] == torch.__version__
    assert facts["cuda"] or facts["why"]
    assert facts["name"] and facts["backend"] in ("triton", "native", "eager")


def test_a_machine_without_a_gpu_is_named_by_its_processor():
    described = machine.description(torch.device("cpu"))
    assert described["name"] == described["processor_name"] and described["gpu"] == "none used"
    assert " cores" in described["name"]
