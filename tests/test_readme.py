"""The README's Python blocks run, in order, as one program, and its table of public names is complete."""

import re
from pathlib import Path

import metta_fastagent

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_code_blocks_run():
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 4
    program = "\n\n".join(blocks)
    exec(compile(program, "README.md", "exec"), {"__name__": "readme"})


def test_table_names_every_public_name():
    for name in metta_fastagent.__all__:
        if name != "__version__":
            assert f"`{name}`" in README, f"{name} is public and missing in the README"


def test_table_names_every_method_of_the_mixin():
    for name in vars(metta_fastagent.PyTorchAgentMixin):
        if not name.startswith("_"):
            assert re.search(rf"`{name}[`(]", README), f"{name} is a public method and missing in the README"
