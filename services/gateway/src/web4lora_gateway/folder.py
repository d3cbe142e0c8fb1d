"""A run's folder: what people look for, linked from the store, under the names they expect."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore
from web4lora_chassis.errors import disk_error

LOG = "logs/run.log"
FACTS = "run.json"
_LATEST = "latest"

_PUBLISHED = frozenset(
    ("logs/loss.csv", "logs/loss.png", "Modelfile", "SHA256SUMS", "eval_log.md", "eval.json",
     "drawio_diagram.png")
)  # fmt: skip
"""Small files that go to the store's own folder of the run too; artifacts are in the store anyway."""
_NOT_FOR_PEOPLE = frozenset((LOG, FACTS, "modelfile.json"))
_RUN_ID = re.compile(r"run_(\d{4}-\d{2}-\d{2})_([1-9]\d*)")


class RunFolder:
    """Writes one run's folder. No reader ever sees half a file, and a killed writer loses nothing.

    Args:
        run_id: The run.
        store: The artifacts, and the run's folder in the store.
        outputs_dir: Folder of all runs' folders; None: only the small files are gathered, in `state_dir`.
        state_dir: The gateway's own folder.
    """

    def __init__(self, run_id: str, store: ArtifactStore, outputs_dir: Path | None, state_dir: Path) -> None:
        self._run_id = run_id
        self._store = store
        self._outputs_dir = outputs_dir
        self._state_dir = state_dir
        self.path = (outputs_dir or state_dir / "runs") / run_id

    def begin(self) -> None:
        """Make the folder, and `latest` lead to it unless that leads to a newer run's."""
        try:
            (self.path / "logs").mkdir(parents=True, exist_ok=True)
            if self._outputs_dir is not None:
                _point(self._outputs_dir / _LATEST, self._run_id)
        except OSError as error:
            raise disk_error(error, self.path) from error

    def place(self, refs: Iterable[ArtifactRef]) -> None:
        """Bring the artifacts' files in: all with an outputs folder, else those that are published."""
        for ref in refs:
            paths = [entry.path for entry in self._store.manifest(ref).files]
            if self._outputs_dir is None:
                wanted = [path for path in paths if path in _PUBLISHED]
            else:
                wanted = [path for path in paths if path not in _NOT_FOR_PEOPLE]
            if wanted:
                self._store.get(ref, self.path, only=wanted)

    def log(self, line: str) -> None:
        """Add a line to the run's log."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        place = self.path / LOG
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("a", encoding="utf-8") as file:
                file.write(f"{stamp} {line}\n")
        except OSError as error:
            raise disk_error(error, place) from error

    def write_facts(self, text: str) -> None:
        """Put run.json in place at once."""
        place = self.path / FACTS
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".part-", dir=self.path)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            os.replace(name, place)
        except OSError as error:
            raise disk_error(error, place) from error

    def publish(self) -> None:
        """Put the small files into the run's folder in the store.

        Raises:
            ResourceExhausted, FailedPrecondition: There is no room to copy what still changes.
            Unavailable: The store is out of reach.
        """
        # Copies: the store may link what it is given and make it read-only, and these still change.
        try:
            self._state_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".publish-", dir=self._state_dir) as name:
                copies = {path: Path(name) / Path(path).name for path in (LOG, FACTS)}
                files = {path: self.path / path for path in _PUBLISHED if (self.path / path).is_file()}
                for path, copy in copies.items():
                    if (self.path / path).is_file():
                        shutil.copyfile(self.path / path, copy)
                        files[path] = copy
                self._store.publish(self._run_id, files)
        except OSError as error:
            raise disk_error(error, self._state_dir) from error


def taken(run_id: str, store: ArtifactStore, outputs_dir: Path | None) -> bool:
    """Tell whether a folder of that name holds another run's files."""
    here = outputs_dir is not None and os.path.lexists(outputs_dir / run_id)
    return here or bool(store.published(run_id))


def point_to_newest(outputs_dir: Path) -> None:
    """Make `latest` lead to the newest run's folder that is left, if it leads to one that is gone."""
    link = outputs_dir / _LATEST
    if not link.is_symlink() or link.exists():
        return
    link.unlink(missing_ok=True)
    left = [path.name for path in outputs_dir.iterdir() if _RUN_ID.fullmatch(path.name) and path.is_dir()]
    if left:
        _point(link, max(left, key=_order))


def _point(link: Path, run_id: str) -> None:
    """Make a link lead to a run's folder beside it, at once, unless it leads to a newer run's."""
    if link.is_symlink():
        if _order(link.readlink().name) >= _order(run_id):
            return
    elif link.exists():
        return  # somebody's own file or folder of that name
    part = link.with_name(f".part-{run_id}")
    part.unlink(missing_ok=True)
    part.symlink_to(run_id)
    os.replace(part, link)


def _order(run_id: str) -> tuple[str, int]:
    match = _RUN_ID.fullmatch(run_id)
    return (match[1], int(match[2])) if match else ("", 0)
