"""Resuming a run: what must match, which files are kept, and the shell command, or the reason why none works."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from metta_fastagent.runtime.checks import printable
from metta_fastagent.runtime.install import this_python
from metta_fastagent.runtime.output import shell_command
from metta_fastagent.train import ranks
from metta_fastagent.train.checkpoint import CheckpointError, load_checkpoint
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.environments import import_object
from metta_fastagent.train.folder import BEST, CHECKPOINT, UsageError, is_folder_of, replacing, set_aside
from metta_fastagent.train.ranks import say
from metta_fastagent.train.trainer import Trainer

# options that a resumed run may change; the others must match, so that it equals an uninterrupted run
RESUMABLE = (
    *("steps", "stop_return", "device", "cuda_graphs", "threads"),
    *("evaluation_interval", "checkpoint_interval", "check_ranks"),
)
# programs for a new Python process: print where a module is, and fail if an environment is not registered
FOUND = "import importlib.util, sys; print(importlib.util.find_spec(sys.argv[1]).origin)"
REGISTERED = (
    "import sys, gymnasium; name = sys.argv[1]; sys.exit(not any(each == name or each.startswith(name + '-v') "
    "for each in gymnasium.registry))"
)


def resumed_config(saved: dict[str, Any], given: dict[str, Any]) -> TrainConfig:
    """The checkpoint's config, overridden by the given options. Raises UsageError if any outside RESUMABLE differ."""
    for name, value in given.items():
        if name not in RESUMABLE and value != saved.get(name):
            raise UsageError(f"{name}: got {value!r}, expected {saved.get(name)!r} as in the checkpoint")
    return TrainConfig.from_dict({**saved, **given})


def keep_files(folder: Path, resume: Path, state: dict[str, Any]) -> float:
    """The resumed run's highest return; copies its best.pt if the run continues in another folder.

    In its own folder it never overwrites a later checkpoint or one of another run (UsageError), and sets damaged ones
    aside.
    """
    own, found, damaged = is_folder_of(folder, resume), {}, {}
    for path in filter(os.path.lexists, map(resume.with_name, (CHECKPOINT, BEST))):
        try:
            found[path.name] = load_checkpoint(path)
        except CheckpointError as error:
            damaged[path] = error
    for name, saved in found.items() if own else ():
        updates = saved["counters"]["updates"]
        if _identity(saved) != _identity(state):
            raise UsageError(f"--out: got {folder}, whose {name} is of another run, expected a folder of its own")
        if name == CHECKPOINT and updates > state["counters"]["updates"]:
            came = f"got {resume} of update {state['counters']['updates']}"
            expected = f"expected one after update {updates} of {folder / name}, which it would overwrite, or --out"
            raise UsageError(f"--resume: {came}, {expected}")
    for path, error in damaged.items():
        say(f"note: {error}" + (f"; kept as {set_aside(path)}" if own else ""))
    best, returns = found.get(BEST), [state["counters"]["best_return"]]
    if best is not None and _identity(best) == _identity(state):
        returns.append(best["counters"]["best_return"])
        if not own:
            with replacing(folder / BEST) as file:
                file.write(resume.with_name(BEST).read_bytes())
    return max(returns)


def _identity(state: dict[str, Any]) -> dict[str, Any]:
    """The options that all checkpoints of a run have in common."""
    return {name: value for name, value in state["config"].items() if name not in RESUMABLE}


def how_to_resume(trainer: Trainer, checkpoint: Path, *options: str) -> str:
    """The shell command, with these further options, that resumes the run; if it would fail, what works, and why."""
    config = trainer.config
    reason = not_importable("env", config.env, trainer.make_env)
    reason = reason or not_importable("agent", config.agent, trainer.make_policy)
    if not reason and printable(str(checkpoint)) != str(checkpoint):
        reason = "the folder's name cannot be printed"
    if reason:
        return f"train(..., resume={str(checkpoint)!r}): {reason}"
    if int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size())) != ranks.world_size():
        return f"torchrun on each machine as before, with --resume {checkpoint}"
    return resume_command(checkpoint, *options)


def not_importable(option: str, path: str, made: Any = None) -> str:
    """Why a new Python in this folder cannot import `path` (the name of `made`, if given); empty if it can."""
    module, colon, name = path.partition(":")
    if not colon:
        return ""
    if module == "gym":
        module, _, name = name.rpartition(":")
    elif callable(made):
        with suppress(ValueError):
            made = None if module != "__main__" and import_object(option, path) is made else made
        if made is not None:
            return f"{option} {path!r} is an object of this program, which the command cannot import"
    known = getattr(sys.modules.get(module), "__file__", None)
    probe = [sys.executable, "-c", FOUND if module else REGISTERED, module or name]
    done = subprocess.run(probe, capture_output=True, text=True)
    found = done.returncode == 0 and (not module or done.stdout.strip() == str(known))
    return "" if found else f"{option} {path!r} cannot be imported from this folder"


def resume_command(checkpoint: Path, *options: str) -> str:
    """The shell command that resumes from `checkpoint` with this Python and number of ranks, in this folder."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks.world_size()}"]
    start = [this_python(), *(launcher if ranks.world_size() > 1 else ())]
    path = f"./{checkpoint}" if str(checkpoint).startswith("-") else str(checkpoint)
    return shell_command([*start, "-m", "metta_fastagent.train", "--resume", path, *options])
