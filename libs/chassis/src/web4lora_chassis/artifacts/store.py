"""The artifact store: manifests and files over a back end that holds keys and bytes."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

from web4lora_chassis.artifacts.manifest import (
    KINDS,
    MANIFEST_NAME,
    ArtifactRef,
    FileEntry,
    Manifest,
    hash_file,
)
from web4lora_chassis.errors import DataLoss, InvalidInput, NotFound
from web4lora_chassis.settings import Settings

Advance = Callable[[int], None]
"""Called with the number of bytes just moved; a resumed part counts when it is found there."""

PART_PREFIX = ".part-"
"""Files whose names begin with this are being written; no reader sees them."""

BUCKET_MISSING = "BUCKET_MISSING"
"""The reason of a `NotFound` that is about the whole store, not about a key."""

_MANIFEST_LIMIT_BYTES = 16 << 20
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")

log = logging.getLogger(__name__)


class Backend(Protocol):
    """Keys and bytes. Keys use forward slashes. A key is seen only once its bytes are complete."""

    url: str
    """Its address without credentials."""

    def put_file(self, key: str, source: Path, entry: FileEntry, advance: Advance, *, link: bool) -> None:
        """Store a file under a key; do nothing when the key already holds those bytes.

        With `link` the file is given up to the store, which may keep it in place of a copy, read-only.

        Raises:
            DataLoss: The file's bytes are no longer what `entry` says.
            ResourceExhausted: The disk is full.
            Unavailable: The store is out of reach.
        """

    def get_file(self, key: str, target: Path, entry: FileEntry, advance: Advance) -> None:
        """Bring a file to `target`, verified before it is seen there; an interrupted download is resumed.

        Raises:
            NotFound: No such key.
            DataLoss: The bytes are not what `entry` says; nothing is left at `target`.
            Unavailable: The store is out of reach.
        """

    def read(self, key: str, limit_bytes: int) -> bytes:
        """Return a small object.

        Raises:
            NotFound: No such key.
            DataLoss: It is larger than the limit.
            Unavailable: The store is out of reach.
        """

    def write(self, key: str, data: bytes) -> None:
        """Store a small object, replacing what was there at once."""

    def keys(self, prefix: str) -> Iterator[str]:
        """Yield the keys below a prefix, in order."""

    def delete(self, key: str) -> None:
        """Remove a key; a missing one is no error."""


def _ignore(_: int) -> None:
    """Take progress that nobody watches."""


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
        if self._complete(ref):
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
            raise NotFound(f"{ref} is not in the store {self.url}.", metadata={"artifact": str(ref)})
        if manifest.digest != ref.digest:
            raise DataLoss(f"The manifest of {ref} was changed: its digest is {manifest.digest[:12]}.")
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
        for wanted in [kind] if kind else KINDS:
            prefix = f"artifacts/{wanted}/{name}/" if name else f"artifacts/{wanted}/"
            for key in self._backend.keys(prefix):
                parts = key.split("/")
                if len(parts) != 5 or parts[4] != MANIFEST_NAME or not parts[3].startswith(digest[:12]):
                    continue
                try:
                    manifest = self._read(key)
                except NotFound:
                    continue  # deleted since it was listed
                except DataLoss as error:
                    log.warning("not listed: %s", error)
                    continue
                if manifest.digest.startswith(digest) and key == f"{manifest.ref.prefix}/{MANIFEST_NAME}":
                    found.append(manifest)
        return sorted(found, key=lambda manifest: manifest.created_at, reverse=True)

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
        return [key.removeprefix(prefix) for key in self._backend.keys(prefix)]

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
        except (ValueError, DataLoss) as error:
            raise DataLoss(f"{key} in {self.url} is not an artifact manifest: {error}") from error


def _entry(path: str, source: Path) -> FileEntry:
    """Hash a file that is to be stored."""
    try:
        return FileEntry(path, hash_file(source), source.stat().st_size)
    except OSError as error:
        raise NotFound(f"{source} can't be read: {error.strerror}.", metadata={"path": source}) from error


def _run_prefix(run_id: str) -> str:
    if not _RUN_ID.fullmatch(run_id):
        raise InvalidInput(
            f"{run_id!r} is not a run's id.",
            fix="Use up to 128 letters, digits, dots, underscores and dashes.",
        )
    return f"runs/{run_id}/"


def open_store(settings: Settings) -> ArtifactStore:
    """Open the store that the settings name.

    Raises:
        InvalidInput: The address is of no known form.
    """
    parts = urlsplit(settings.store)
    bucket = parts.path.strip("/")
    if "@" in parts.netloc:
        raise InvalidInput(
            "WEB4LORA_STORE: an address must not hold credentials.",
            fix="Use WEB4LORA_S3_ACCESS_KEY_FILE and WEB4LORA_S3_SECRET_KEY_FILE.",
        )
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and bucket:
        from web4lora_chassis.artifacts.folder import FolderBackend

        return ArtifactStore(FolderBackend(Path(url2pathname(parts.path))))
    if parts.scheme in ("s3+http", "s3+https") and parts.hostname and _BUCKET.fullmatch(bucket):
        from web4lora_chassis.artifacts.s3 import S3Backend

        return ArtifactStore(
            S3Backend(
                endpoint=parts.netloc,
                bucket=bucket,
                access_key=settings.s3_access_key.get_secret_value(),
                secret_key=settings.s3_secret_key.get_secret_value(),
                region=settings.s3_region,
                secure=parts.scheme == "s3+https",
            )
        )
    raise InvalidInput(
        f"WEB4LORA_STORE: {settings.store!r} is not the address of a store.",
        fix="Use file:///folder or s3+http://host:port/bucket (s3+https for TLS).",
    )
