"""The README's code runs and learns, the examples run, and the list of public names is complete."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

import metta_fastagent
from metta_fastagent.agents.vector import VectorAgent
from metta_fastagent.runtime.settings import process_settings_kept

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# Fewer steps than by default.
SHORT = {
    "cartpole_positions": ("--steps", "98304"),
    "compare_states": ("--steps", "4096"),
    "ppo_ops": ("--steps", "81920"),
}

# Printed numbers well above those of random play: 23, about 40 with masked moves, 0.5 and 22.
LEARNED = {
    "cartpole_positions": (r"learned ([\d.]+)", 32),
    "images": (r"([\d.]+) goals found in 100 episodes, 0 moves into a wall", 60),
    "own_environment": (r"learned ([\d.]+)", 0.9),
    "ppo_ops": (r".*mean return +([\d.]+)", 32),
}


def names_of_the_first_block():
    """The names that the block expects in a reader's agent."""
    T, B, inputs, hidden, actions = 3, 4, 5, 6, 7
    return {
        "lstm": torch.nn.LSTM(inputs, hidden),
        "inputs": torch.randn(T, B, inputs),
        "h": torch.zeros(1, B, hidden),
        "c": torch.zeros(1, B, hidden),
        "starts": torch.rand(T, B) < 0.3,
        "logits": torch.randn(B, actions),
        "allowed": torch.arange(actions) < torch.randint(1, actions, (B, 1)),
    }


def test_the_readme_is_short():
    assert README.count("\n") <= 170


def test_the_readme_runs_and_its_agent_learns():
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    operations, *program = blocks
    names = {"__name__": "readme"}
    with torch.random.fork_rng(), process_settings_kept(torch.device("cpu")):
        exec(operations, names_of_the_first_block())
        exec(compile("\n\n".join(program), "README.md", "exec"), names)
    assert names["score"] > 0.6
    assert names["agent"].policy.actor.weight.abs().max() <= 1.0


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_runs(example, tmp_path):
    if "gymnasium" in example.read_text() or "gym:" in example.read_text():
        pytest.importorskip("gymnasium", reason="gymnasium is an extra")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, example, *SHORT.get(example.stem, ())],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
    if example.stem in LEARNED:
        pattern, value = LEARNED[example.stem]
        assert float(re.search(pattern, run.stdout, flags=re.DOTALL)[1]) > value


def test_both_agents_of_the_comparison_compute_the_same():
    pytest.importorskip("gymnasium", reason="gymnasium is an extra")
    example = SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / "ppo_ops.py")))
    fused, plain = example.Agent(2, 3).double(), example.PlainAgent(2, 3).double()
    plain.load_state_dict(fused.state_dict())
    steps, rows = example.T, example.N
    observations, state = (
        torch.randn(steps, rows, 2).double(),
        torch.randn(2, 1, rows, example.HIDDEN).double().unbind(),
    )
    starts, actions = torch.rand(steps, rows) < 0.3, torch.randint(3, (steps * rows,))
    rollout = {"ends": starts, **dict(zip(("rewards", "values"), torch.randn(2, steps, rows).double(), strict=True))}
    numbers = torch.randn(4, steps * rows).double()
    batch = dict(zip(("log_probs", "values", "returns"), numbers, strict=False))
    batch |= {"log_probs": 0.2 * numbers[0] - 1.1, "actions": actions, "valid": torch.rand(steps * rows) < 0.9}
    results = []
    for agent in (fused, plain):
        logits, value, (h, c) = agent(observations, state, starts)
        loss = agent.loss(logits, value, batch, numbers[3])
        loss.backward()
        grads = [each.grad for each in agent.parameters()]
        results.append((logits, value, h, c, loss, agent.advantages(rollout, numbers[0][:rows]), *grads))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_an_own_environment_and_agent_take_twenty_lines():
    code = (ROOT / "examples" / "own_environment.py").read_text().split('"""', 2)[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20


def test_the_api_page_has_every_public_name():
    for name in metta_fastagent.__all__:
        if name != "__version__":
            assert f"`{name}`" in API, f"{name} is public and missing in docs/api.md"


def test_the_api_page_has_every_method_of_the_mixin():
    for name in vars(metta_fastagent.PyTorchAgentMixin):
        if not name.startswith("_"):
            assert re.search(rf"`{name}[`(]", API), f"{name} is a public method and missing in docs/api.md"


def test_the_loop_on_the_api_page_runs():
    (block,) = re.findall(r"^```python\n(advantages.*?)^```", API, flags=re.DOTALL | re.MULTILINE)
    B, T = 4, 6
    space = SimpleNamespace(shape=(3,))
    agent = VectorAgent(SimpleNamespace(single_observation_space=space, max_action_args=(1, 2)), clip_range=1.0)
    agent.activate_actions(["noop", "move"], [1, 2])
    names = {
        "torch": torch,
        "TensorDict": TensorDict,
        "ops": metta_fastagent.ops,
        "epochs": 2,
        "B": B,
        "T": T,
        "agent": agent,
        "optimizer": torch.optim.Adam(agent.parameters()),
        **{name: torch.randn(B, T) for name in ("rewards", "values", "bootstrap_values", "log_probs")},
        **{name: torch.zeros(B, T, dtype=torch.bool) for name in ("ends", "dones")},
        "next_value": torch.randn(B),
        "observations": torch.randn(B, T, 3),
        "actions": torch.ones(B, T, 2, dtype=torch.int32),
    }
    before = agent.policy.actor.weight.detach().clone()
    exec(compile(block, "docs/api.md", "exec"), names)
    assert names["statistics"].shape == (5,) and not torch.equal(agent.policy.actor.weight, before)


def test_the_single_test_of_the_contributing_page_exists():
    file, word = re.search(r"pytest (tests/\S+) -k (\w+)", (ROOT / "CONTRIBUTING.md").read_text()).groups()
    assert re.search(rf"^def test_\w*{word}", (ROOT / file).read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_the_pages_work(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"
