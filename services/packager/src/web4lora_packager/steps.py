"""Finished steps of a job, kept on disk so that a job that starts again goes on behind the last of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from web4lora_chassis.artifacts import hash_file
from web4lora_chassis.jobs.record import write_json


@dataclass(frozen=True)
class Step:
    """A finished step.

    Attributes:
        files: SHA-256 of the files it made, by their path in the working folder.
        data: What else it found out, as JSON data.
    """

    files: Mapping[str, str]
    data: Mapping[str, Any]


class Steps:
    """The steps of one job.

    Args:
        folder: The job's working folder; a step writes below it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._notes = folder / "steps"
        self._notes.mkdir(exist_ok=True)

    def do(self, name: str, output: Path, make: Callable[[], Mapping[str, Any]]) -> Step:
        """Do a step, unless an earlier attempt did it and its files are still what they were.

        Args:
            name: The step's name.
            output: The file or folder that it makes; what a broken attempt left there is removed first.
            make: Does it and returns what it found out, as JSON data.
        """
        note = self._notes / f"{name}.json"
        if note.is_file():
            data = json.loads(note.read_text(encoding="utf-8"))
            if data["files"] == self._hashes(output):
                return Step(data["files"], data["data"])
            note.unlink()
        if output.is_dir():
            shutil.rmtree(output)
        else:
            output.unlink(missing_ok=True)
        found = dict(make())
        step = Step(self._hashes(output), found)
        write_json(note, {"files": step.files, "data": step.data})
        return step

    def _hashes(self, output: Path) -> dict[str, str]:
        if output.is_dir():
            paths = sorted(path for path in output.rglob("*") if path.is_file())
        else:
            paths = [output] if output.is_file() else []
        return {path.relative_to(self._folder).as_posix(): hash_file(path) for path in paths}
