"""Shell commands that name this Python: they work as printed, however the package was installed."""

import importlib.util
import sys
from pathlib import Path

from metta_fastagent.runtime.output import shell_command

# The packages of the extras in pyproject.toml, in pip's format.
REQUIREMENTS = {
    "gymnasium": "gymnasium>=1.1",
    "matplotlib": "matplotlib>=3.8",
    "mettagrid": "mettagrid>=0.26,<0.27",
    "tensorboard": "tensorboard>=2.16",
}


def this_python() -> str:
    """The path of this Python, relative if it is below the current folder."""
    python = Path(sys.executable or "python")
    if python.is_relative_to(Path.cwd()) and python.parent != Path.cwd():
        python = python.relative_to(Path.cwd())
    return str(python)


def how_to_install(name: str) -> str:
    """The command that installs the package `name` for this Python: pip, or uv in an environment without pip."""
    pip = [this_python(), "-m", "pip", "install"]
    uv = ["uv", "pip", "install", "--python", this_python()]
    return shell_command([*(pip if importlib.util.find_spec("pip") else uv), REQUIREMENTS[name]])


def missing(name: str, error: ImportError) -> ImportError:
    """The error for a package whose import failed with `error`, with the command that installs it."""
    return ImportError(f"{name}: {error}; install it with:\n{how_to_install(name)}")
