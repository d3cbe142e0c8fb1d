"""Checkpoints that are whole or are none: every file's hash is listed, and the list is written last.

A kill, a full disk or a power cut can end a checkpoint anywhere, or cut a file short that was written before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from web4lora_chassis.artifacts import hash_file
from web4lora_chassis.jobs.record import write_json

LIST_NAME = "files.json"
_NEEDED = (
    "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt",
    "trainer_state.json",
)  # fmt: skip
"""What an exact resume reads."""


def seal(folder: Path) -> None:
    """Bring a checkpoint's files to the disk, then the list of their hashes: now it counts as whole."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in (*paths, folder):
        _sync(path)
    hashes = {path.relative_to(folder).as_posix(): hash_file(path) for path in paths}
    if missing := [name for name in _NEEDED if name not in hashes]:
        raise AssertionError(f"{folder.name} was saved without {', '.join(missing)}")
    write_json(folder / LIST_NAME, {"sha256": hashes})
    _sync(folder)
    _sync(folder.parent)


def last_whole_checkpoint(folder: Path, note: Callable[[str], None]) -> Path | None:
    """Return the newest whole checkpoint; what is not whole is removed.

    Args:
        folder: Holds the checkpoints.
        note: Told of each that is not whole, and what happens instead.
    """
    found = sorted((path for path in folder.glob("checkpoint-*") if path.is_dir()), key=step_of, reverse=True)
    lost = []
    whole = None
    for path in found:
        problem = _problem(path)
        if problem is None:
            whole = path
            break
        lost.append(f"{path.name} is not whole ({problem})")
        shutil.rmtree(path, ignore_errors=True)
    if lost:
        then = f"goes on from {whole.name}" if whole else "starts anew: no other checkpoint is left"
        note(f"{'; '.join(lost)}; the training {then}")
    return whole


def is_whole(checkpoint: Path) -> bool:
    """Tell whether a checkpoint is as it was saved."""
    return _problem(checkpoint) is None


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was saved; -1 for a folder that is none."""
    number = checkpoint.name.rsplit("-", 1)[1]
    return int(number) if number.isdecimal() else -1


def _problem(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint, if anything."""
    try:
        hashes = json.loads((folder / LIST_NAME).read_text(encoding="utf-8"))["sha256"]
        if missing := [name for name in _NEEDED if name not in hashes]:
            return f"its list lacks {missing[0]}"
        for name, digest in hashes.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if hash_file(folder / name) != digest:
                return f"{name} is not as it was saved"
    except FileNotFoundError:
        return "it was not saved to its end"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it can't be read: {error!r}"
    return None


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
