"""The description of the machine that every figure is shown with."""

import json
import subprocess
import sys
from pathlib import Path

import torch


def test_the_command_prints_one_line_of_json():
    command = [sys.executable, "-m", "benchmarks.machine"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    facts = json.loads(line)
    assert facts["cuda"] is torch.cuda.is_available()
    assert facts["cuda"] or (facts["why"] and facts["name"] == facts["processor_name"] and facts["gpu"] == "none used")
    assert facts["torch"] == torch.__version__ and facts["backend"] in ("triton", "native", "eager")
