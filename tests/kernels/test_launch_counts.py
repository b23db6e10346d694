"""Kernels launched and compiled by each call, through Triton's own launcher on a machine without a GPU."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from metta_fastagent.runtime import triton as _triton

ROOT = Path(__file__).parents[2]
SIZES = [*range(1, 34), 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 500, 512, 999, 1000, 1001, 1024, 2048, 4097]
# An LSTM layer: few or many steps, and forward many rows.
LSTM, LSTM_BACKWARD = ["_lstm_layer_fwd_kernel"] * 3, ["_lstm_layer_bwd_kernel"] * 2
PPO_LOSS = ["_ppo_loss_fwd_kernel", "_ppo_loss_bwd_kernel"]
# Call: kernel launches at every size; kernels first needed by it, once for each time it is compiled for all sizes.
EXPECTED = {
    "advantages": (1, ["_advantages_kernel"]),
    "advantages with options": (1, ["_advantages_kernel"]),
    "ppo loss with gradient": (2, PPO_LOSS),
    "ppo loss of many actions with gradient": (2, PPO_LOSS),
    "ppo loss with options": (2, PPO_LOSS),
    "evaluate pairs": (1, ["_evaluate_actions_fwd_kernel"]),
    "evaluate indices": (1, ["_evaluate_actions_fwd_kernel"]),
    "evaluate with gradient": (2, ["_evaluate_actions_bwd_kernel"]),
    "sample": (1, ["_sample_actions_kernel"]),
    "sample pairs": (1, ["_sample_actions_kernel"]),
    "evaluate many actions with gradient": (
        2,
        ["_evaluate_actions_fwd_kernel", "_evaluate_actions_bwd_kernel"],
    ),
    "sample many actions": (1, ["_sample_actions_kernel"]),
    "pairs to indices": (1, ["_action_to_logit_index_kernel"]),
    "indices to pairs": (1, ["_logit_index_to_action_kernel"]),
    "clip": (1, ["_clip_weights_kernel"]),
    "clip other bounds": (1, []),
    "l2 with gradient": (2, ["_l2_init_loss_fwd_kernel", "_l2_init_loss_bwd_kernel"]),
    "tokens to grid": (1, ["_tokens_to_grid_kernel"]),
    "lstm": (1, LSTM),
    "lstm with gradient": (2, LSTM + LSTM_BACKWARD),
    "evaluate masked": (1, ["_evaluate_actions_fwd_kernel"]),
    "sample masked": (1, ["_sample_actions_kernel"]),
    "greedy": (1, ["_sample_actions_kernel"]),
    "evaluate a view": (1, ["_evaluate_actions_fwd_kernel"]),
}


@pytest.fixture(scope="module")
def counted():
    """The counts of tests/kernels/count_launches.py."""
    version = None if _triton.triton is None else _triton.triton.__version__
    if version is None or version.split(".")[:2] not in (["3", "6"], ["3", "7"]):
        pytest.skip(f"its driver stands in for that of Triton 3.6 and 3.7, here is {version}")
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "tests/kernels/count_launches.py", *map(str, SIZES)]
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("call", EXPECTED)
def test_launches_and_compiled_variants(counted, call):
    launches, kernels = EXPECTED[call]
    assert counted["calls"][call] == {"launches": [launches], "compiled": Counter(kernels)}


def test_every_kernel_is_launched(counted):
    assert set(counted["calls"]) == set(EXPECTED)
    assert [name for name, variants in counted["kernels"].items() if variants == 0] == []
