"""Checkpoint files: written atomically, read without executing code from the file."""

import contextlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from metta_fastagent.ops._checks import first_line

# identifies the files of this trainer
FORMAT = "metta_fastagent.train.checkpoint"
VERSION = 3
REQUIRED = (
    *("config", "counters", "model", "optimizer", "initial_weights", "initial_weight_magnitudes"),
    *("action_names", "max_action_args", "feature_mapping"),
    # per rank: memory, environment, rollout and random
    "ranks",
    *("package_version", "torch_version", "backend"),
)


class CheckpointError(ValueError):
    """A file is missing, damaged or not a checkpoint of this trainer, or it is of a different run."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values, with all keys of REQUIRED) to `path` atomically.

    It is written to a temporary file in the same folder, flushed to the disk and renamed, so that a crash leaves the
    previous file intact.
    """
    missing = [key for key in REQUIRED if key not in state]
    if missing:
        raise ValueError(f"state: got no {', '.join(missing)}, expected all keys of REQUIRED")
    # a fixed name, so that the next save overwrites what a killed process left
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, with tensors on `device`. Raises CheckpointError."""
    _check_archive(path)
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        # torch's own message is a page about loading the file anyway
        raise _unusable(path, "a file with other objects than tensors and plain values") from None
    except (RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise _unusable(path, f"a file that torch cannot load ({first_line(error)})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise _unusable(path, f"a file without the format {FORMAT!r}")
    if state.get("version") != VERSION:
        raise _unusable(path, f"version {state.get('version')!r}", f"version {VERSION}")
    missing = [key for key in REQUIRED if key not in state]
    if missing:
        raise _unusable(path, f"a file without {', '.join(missing)}")
    return state


def _unusable(path: Path, came: str, expected: str = "a checkpoint of this trainer") -> CheckpointError:
    return CheckpointError(f"{path}: got {came}, expected {expected}")


def _check_archive(path: Path) -> None:
    """Check the archive's checksums, which torch ignores."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except FileNotFoundError:
        raise _unusable(path, "no such file") from None
    except IsADirectoryError:
        raise _unusable(path, "a folder", "a checkpoint file such as checkpoint.pt inside it") from None
    except OSError as error:
        raise _unusable(path, f"an unreadable file ({error.strerror or error})") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise _unusable(path, f"a damaged or foreign file ({first_line(error)})") from None
    if damaged is not None:
        raise _unusable(path, f"a damaged file (checksum of {damaged})")


def _sync_folder(folder: Path) -> None:
    # not all systems can open a folder; the file itself is already on the disk
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
