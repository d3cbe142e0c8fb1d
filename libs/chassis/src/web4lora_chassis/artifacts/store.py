"""The artifact store: manifests and files over a back end that holds keys and bytes."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from web4lora_chassis.artifacts.backend import BUCKET_MISSING, Advance, Backend, Stored, Unfinished
from web4lora_chassis.artifacts.manifest import (
    AGAIN,
    KINDS,
    MANIFEST_NAME,
    ArtifactRef,
    FileEntry,
    Manifest,
    hash_file,
)
from web4lora_chassis.errors import DataLoss, InvalidInput, NotFound

_MANIFEST_LIMIT_BYTES = 16 << 20
_MANIFEST_DEPTH = 4  # artifacts/<kind>/<name>/<digest12>/manifest.json
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

log = logging.getLogger(__name__)


def _ignore(_: int) -> None:
    """Take progress that nobody watches."""


@dataclass(frozen=True)
class CutOff:
    """What an upload left that was cut off.

    Attributes:
        prefix: The artifact's folder in the store.
        size_bytes: The room it takes.
        keys: Files that arrived.
        uploads: Files on their way.
    """

    prefix: str
    size_bytes: int
    keys: tuple[str, ...]
    uploads: tuple[Unfinished, ...]


class ArtifactStore:
    """Artifacts in a back end: `artifacts/<kind>/<name>/<digest12>/`, and run folders: `runs/<run id>/`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @property
    def url(self) -> str:
        """Address of the store, without credentials."""
        return self._backend.url

    def put(
        self,
        kind: str,
        name: str,
        files: Mapping[str, Path],
        *,
        inputs: Iterable[ArtifactRef] = (),
        parameters: Mapping[str, object] | None = None,
        tools: Mapping[str, str] | None = None,
        created_by: str = "",
        link: bool = True,
        advance: Advance = _ignore,
    ) -> ArtifactRef:
        """Store an artifact. Bytes that are there already are not moved again.

        Args:
            kind: One of `KINDS`.
            name: Its name.
            files: Path inside the artifact to the file on disk.
            inputs: The artifacts it was made from.
            parameters: What it was made with; values must be JSON data.
            tools: Versions of the tools that made it.
            created_by: The service that made it.
            link: The files are ours and never change again, so a store on the same disk may link them and
                make them read-only. False for files that belong to the user: they are copied.
            advance: Called with the number of bytes just stored.

        Returns:
            Its reference. The manifest is written last: the artifact is complete from then on.

        Raises:
            InvalidInput: A name or path that is not allowed.
            NotFound: One of the files is not there.
            DataLoss: A file changed while it was stored.
            ResourceExhausted: The disk is full.
            Unavailable: The store is out of reach.
        """
        entries = {path: _entry(path, source) for path, source in sorted(files.items())}
        manifest = Manifest(
            kind=kind,
            name=name,
            files=tuple(entries.values()),
            inputs=tuple(inputs),
            parameters={key: json.dumps(value, sort_keys=True) for key, value in (parameters or {}).items()},
            tools=dict(tools or {}),
            created_by=created_by,
            created_at=time.time(),
        )
        ref = manifest.ref
        if self._complete(ref) and self.touch(ref):
            advance(ref.size_bytes)
            return ref
        for path, entry in entries.items():
            self._backend.put_file(f"{ref.prefix}/{path}", files[path], entry, advance, link=link)
        self._backend.write(
            f"{ref.prefix}/{MANIFEST_NAME}", json.dumps(manifest.to_json(), indent=1).encode()
        )
        return ref

    def manifest(self, ref: ArtifactRef) -> Manifest:
        """Return an artifact's manifest, checked against its digest.

        Raises:
            NotFound: No such artifact.
            DataLoss: The manifest is not the one that the digest names.
        """
        manifest = self._stored(ref)
        if manifest is None:
            raise NotFound(
                f"{ref} is not in the store {self.url}.",
                fix="`web4lora artifacts list` shows what is; make it again if it was deleted.",
                metadata={"artifact": str(ref)},
            )
        if manifest.digest != ref.digest:
            raise DataLoss(
                f"The manifest of {ref} was changed: its digest is {manifest.digest[:12]}.", fix=AGAIN
            )
        return manifest

    def get(
        self, ref: ArtifactRef, target: Path, *, only: Iterable[str] | None = None, advance: Advance = _ignore
    ) -> Manifest:
        """Bring an artifact's files below a folder, each verified before it is seen there.

        Args:
            ref: The artifact.
            target: The folder, made when missing. Files in it that are right already stay. They may be links
                into the store: never change them in place.
            only: Just these paths; all when absent.
            advance: Called with the number of bytes just read.

        Returns:
            The artifact's manifest.

        Raises:
            NotFound: No such artifact.
            DataLoss: Bytes are not what their digest says.
            Unavailable: The store is out of reach.
        """
        manifest = self.manifest(ref)
        wanted = manifest.files if only is None else tuple(manifest.file(path) for path in only)
        for entry in wanted:
            place = target / entry.path
            if (
                place.is_file()
                and place.stat().st_size == entry.size_bytes
                and hash_file(place) == entry.sha256
            ):
                advance(entry.size_bytes)
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            self._backend.get_file(f"{ref.prefix}/{entry.path}", place, entry, advance)
        return manifest

    def find(self, kind: str = "", name: str = "", digest: str = "") -> list[Manifest]:
        """Return the artifacts of a kind, a name and the start of a digest; newest first, empty means any."""
        found = []
        for stored in self.manifests(kind, name):
            if not stored.key.split("/")[3].startswith(digest[:12]):
                continue
            manifest = self.listed(stored)
            if manifest is not None and manifest.digest.startswith(digest):
                found.append(manifest)
        return sorted(found, key=lambda manifest: manifest.created_at, reverse=True)

    def manifests(self, kind: str = "", name: str = "") -> Iterator[Stored]:
        """Yield where manifests are stored, of a kind and a name; empty means any. None of them is read."""
        for wanted in [kind] if kind else KINDS:
            prefix = f"artifacts/{wanted}/{name}/" if name else f"artifacts/{wanted}/"
            for stored in self._backend.stored(prefix, MANIFEST_NAME):
                if stored.key.count("/") == _MANIFEST_DEPTH:
                    yield stored

    def listed(self, stored: Stored) -> Manifest | None:
        """Return a manifest that was listed; None when it is gone since, or is not what belongs there."""
        try:
            manifest = self._read(stored.key)
        except NotFound:
            return None
        except DataLoss as error:
            log.warning("not listed: %s", error)
            return None
        return manifest if stored.key == f"{manifest.ref.prefix}/{MANIFEST_NAME}" else None

    def touch(self, ref: ArtifactRef) -> bool:
        """Note that an artifact is in use as of now; return whether it is there."""
        try:
            self._backend.touch(f"{ref.prefix}/{MANIFEST_NAME}")
        except NotFound as error:
            if error.reason == BUCKET_MISSING:
                raise
            return False
        return True

    def cut_off(self, before: float) -> list[CutOff]:
        """Return what uploads left that were cut off, the manifest never written.

        Args:
            before: Seconds since 1970. An artifact into which a byte came since then has a writer still.
        """
        moving: dict[str, list[Unfinished]] = {}
        for upload in self._backend.unfinished("artifacts/"):
            moving.setdefault(_folder_of(upload.key), []).append(upload)
        left: dict[str, list[Stored]] = {}
        for stored in self._backend.stored("artifacts/"):
            left.setdefault(_folder_of(stored.key), []).append(stored)
        found = []
        for prefix in sorted({*moving, *left}):
            uploads, files = moving.get(prefix, []), left.get(prefix, [])
            if any(stored.key == f"{prefix}/{MANIFEST_NAME}" for stored in files):
                files = []  # complete; what is on its way still is another try
            times = [*(upload.moved_at for upload in uploads), *(stored.stored_at for stored in files)]
            if times and max(times) < before:
                size = sum(upload.size_bytes for upload in uploads)
                size += sum(stored.size_bytes for stored in files)
                found.append(CutOff(prefix, size, tuple(stored.key for stored in files), tuple(uploads)))
        return found

    def free(self, upload: CutOff) -> None:
        """Remove what a cut-off upload left, unless the artifact was completed meanwhile."""
        for unfinished in upload.uploads:
            self._backend.discard(unfinished)
        for key in upload.keys:
            if next(self._backend.stored(f"{upload.prefix}/", MANIFEST_NAME), None) is not None:
                return
            self._backend.delete(key)

    def publish(self, run_id: str, files: Mapping[str, Path], advance: Advance = _ignore) -> None:
        """Put files into a run's folder, `runs/<run id>/`, under the names people look for; old ones go.

        Raises:
            InvalidInput: Not a run's id.
            NotFound: One of the files is not there.
            ResourceExhausted: The disk is full.
            Unavailable: The store is out of reach.
        """
        prefix = _run_prefix(run_id)
        for path, source in sorted(files.items()):
            self._backend.put_file(f"{prefix}{path}", source, _entry(path, source), advance, link=True)

    def published(self, run_id: str) -> list[str]:
        """Return the paths in a run's folder."""
        prefix = _run_prefix(run_id)
        return [stored.key.removeprefix(prefix) for stored in self._backend.stored(prefix)]

    def unpublish(self, run_id: str) -> None:
        """Remove a run's folder; one that is not there is no error."""
        prefix = _run_prefix(run_id)
        for path in self.published(run_id):
            self._backend.delete(f"{prefix}{path}")

    def delete(self, ref: ArtifactRef) -> None:
        """Remove an artifact, its manifest first, so that nobody sees it without its files."""
        manifest = self._stored(ref)
        self._backend.delete(f"{ref.prefix}/{MANIFEST_NAME}")
        for entry in manifest.files if manifest else ():
            self._backend.delete(f"{ref.prefix}/{entry.path}")

    def _stored(self, ref: ArtifactRef) -> Manifest | None:
        """Return the manifest stored at an artifact's place, or None."""
        try:
            return self._read(f"{ref.prefix}/{MANIFEST_NAME}")
        except NotFound as error:
            if error.reason == BUCKET_MISSING:
                raise
            return None

    def _complete(self, ref: ArtifactRef) -> bool:
        """Tell whether the artifact is there under its own manifest; a damaged one is written anew."""
        try:
            stored = self._stored(ref)
        except DataLoss:
            return False
        return stored is not None and stored.digest == ref.digest

    def _read(self, key: str) -> Manifest:
        text = self._backend.read(key, _MANIFEST_LIMIT_BYTES)
        try:
            return Manifest.from_json(json.loads(text))
        except DataLoss as error:
            raise DataLoss(
                f"{key} in {self.url} is not an artifact manifest: {error.message}.", fix=error.fix
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataLoss(f"{key} in {self.url} is not JSON: {error}.", fix=AGAIN) from error


def _entry(path: str, source: Path) -> FileEntry:
    """Hash a file that is to be stored."""
    try:
        return FileEntry(path, hash_file(source), source.stat().st_size)
    except OSError as error:
        raise NotFound(f"{source} can't be read: {error.strerror}.", metadata={"path": source}) from error


def _folder_of(key: str) -> str:
    """Return the folder of the artifact that a key belongs to."""
    return "/".join(key.split("/")[:_MANIFEST_DEPTH])


def _run_prefix(run_id: str) -> str:
    if not _RUN_ID.fullmatch(run_id):
        raise InvalidInput(
            f"{run_id!r} is not a run's id.",
            fix="Use up to 128 letters, digits, dots, underscores and dashes.",
        )
    return f"runs/{run_id}/"
