"""Checkpoint files: written whole or not at all, read without running any code that they carry."""

import contextlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

# the first entry of every file; another value is another program's file
FORMAT = "metta_fastagent.train.checkpoint"
VERSION = 2
REQUIRED = (
    "config",
    "counters",
    "model",
    "optimizer",
    "initial_weights",
    "initial_weight_magnitudes",
    "action_names",
    "max_action_args",
    "feature_mapping",
    # for each rank: its memory, environment, rollout and random
    "ranks",
    "package_version",
    "torch_version",
    "backend",
)


class CheckpointError(ValueError):
    """The file is missing, damaged, or no checkpoint of this trainer; the message says which, with the path."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values, every key of REQUIRED) to `path`.

    The file appears whole: it is written under another name in the same folder, flushed to the disk and renamed, so a
    crash on the way leaves the previous file as it was.
    """
    missing = [key for key in REQUIRED if key not in state]
    if missing:
        raise ValueError(f"state must have every key of REQUIRED, lacks {missing}")
    # one name per checkpoint: what a killed process left is overwritten by the next one
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
    """Read what `save_checkpoint` wrote, tensors placed on `device`. Raises CheckpointError."""
    _check_archive(path)
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        # torch's own message is a page on how to load the file nevertheless
        raise CheckpointError(f"{path} is no checkpoint of this trainer (not only tensors and plain values)") from None
    except (RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no checkpoint of this trainer ({_first_line(error)})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this trainer (it has no format {FORMAT!r})")
    if state.get("version") != VERSION:
        raise CheckpointError(f"{path} has checkpoint version {state.get('version')!r}, this trainer reads {VERSION}")
    missing = [key for key in REQUIRED if key not in state]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}")
    return state


def _check_archive(path: Path) -> None:
    """torch reads entries without looking at their checksums, which would let damaged weights through."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder; give the checkpoint file inside it") from None
    except OSError as error:
        raise CheckpointError(f"{path} can not be read ({error.strerror or error})") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint ({_first_line(error)})") from None
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged (checksum of {damaged})")


def _sync_folder(folder: Path) -> None:
    # a folder can not be opened for this on every system; the file itself is on the disk by now
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
