"""Trainings that have not succeeded yet: kept beside the jobs, so that the next job of the same goes on.

A job's own folder goes with the job. What a night of training made must not: a driver's error, a full disk
or a cancel would cost all of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from web4lora_chassis.keeping import DAY_SECONDS, GB, Keeping, folder_bytes
from web4lora_chassis.pipeline.train import TrainSettings

_URGENT_DAYS = 1.0
"""When the disk is nearly full, trainings that nobody took up for so long go."""


class Training:
    """A training's folder.

    Args:
        root: Where trainings are kept.
        inputs: Digests of what is trained on.
        settings: How.
        job_folder: The job's own.
        keep: How much is kept of other trainings.
    """

    def __init__(
        self,
        root: Path,
        inputs: Sequence[str],
        settings: TrainSettings,
        job_folder: Path,
        keep: Keeping,
    ) -> None:
        self._keep = keep
        text = json.dumps([list(inputs), asdict(settings.of_result)], sort_keys=True)
        self._root = root
        self._kept = root / hashlib.sha256(text.encode()).hexdigest()[:32]
        self._done = job_folder / "training"

    @contextmanager
    def open(self) -> Iterator[Path]:
        """Yield the folder; nobody else trains in it until this ends. What is not kept of others goes."""
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the worker of a service that was killed may be about to end
            if self._done.is_dir():  # killed after `finish`: its job does not know yet
                yield self._done
                return
            self._kept.mkdir(exist_ok=True)
            os.utime(self._kept)
            _prune(self._root, self._keep, but=self._kept)
            yield self._kept

    def finish(self) -> None:
        """Hand the folder over to the job, whose files go once its success is on record."""
        if self._kept.is_dir():
            self._kept.replace(self._done)


def prune_trainings(root: Path, keep: Keeping, urgent: bool) -> int:
    """Remove the trainings that are no longer kept; never the one at work.

    Args:
        root: Where trainings are kept.
        keep: The bounds.
        urgent: The disk is nearly full.

    Returns:
        How much room that freed, in bytes.
    """
    if not root.is_dir():
        return 0
    with (root / "lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            at_work = None
        except BlockingIOError:
            at_work = max(_trainings(root), key=_used_at, default=None)  # opening one makes it the newest
        return _prune(root, keep, but=at_work, urgent=urgent)


def _prune(root: Path, keep: Keeping, *, but: Path | None, urgent: bool = False) -> int:
    """Remove trainings by count, age and size, the oldest first; return the bytes freed."""
    others = sorted((path for path in _trainings(root) if path != but), key=_used_at, reverse=True)
    days = [limit for limit in (keep.keep_trainings_days, _URGENT_DAYS if urgent else 0) if limit]
    freed, room = 0, keep.keep_trainings_gb * GB
    for number, path in enumerate(others):
        size = folder_bytes(path)
        room -= size
        age = time.time() - _used_at(path)
        if (
            (keep.keep_trainings and number >= keep.keep_trainings)
            or (days and age > min(days) * DAY_SECONDS)
            or (keep.keep_trainings_gb and room < 0)
        ):
            shutil.rmtree(path, ignore_errors=True)
            freed += size
    return freed


def _trainings(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()]


def _used_at(path: Path) -> float:
    return path.stat().st_mtime
