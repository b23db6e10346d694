"""The README's code runs and learns, the examples run, and the list of public names is complete."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import metta_fastagent

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# Fewer steps than by default.
SHORT = {"cartpole_positions": ("--steps", "98304"), "compare_states": ("--steps", "4096")}

# Mean returns well above those of random play, 23 and 0.5.
LEARNED = {"cartpole_positions": 32, "own_environment": 0.9}


def test_the_readme_runs_and_its_agent_learns():
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    names = {"__name__": "readme"}
    with torch.random.fork_rng():
        exec(compile("\n\n".join(blocks), "README.md", "exec"), names)
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
        assert float(re.search(r"learned ([\d.]+)", run.stdout)[1]) > LEARNED[example.stem]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_the_pages_work(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"
