"""The artifact store: manifests and files over a back end that holds keys and bytes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

from web4lora_chassis.artifacts.manifest import KINDS, ArtifactRef, FileEntry, Manifest, hash_file
from web4lora_chassis.errors import DataLoss, InvalidInput, NotFound
from web4lora_chassis.settings import Settings

Advance = Callable[[int], None]
"""Called with the number of bytes just moved; a resumed part counts when it is found there."""

_MANIFEST = "manifest.json"
_MANIFEST_LIMIT_BYTES = 16 << 20


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
            link: The files are ours and never change again, so a store on the same disk may link them and make
                them read-only. False for files that belong to the user: they are copied.
            advance: Called with the number of bytes just stored.

        Returns:
            Its reference. The manifest is written last: the artifact is complete from then on.

        Raises:
            InvalidInput: A name or path that is not allowed.
            DataLoss: A file changed while it was stored.
            ResourceExhausted: The disk is full.
            Unavailable: The store is out of reach.
        """
        entries = {
            path: FileEntry(path, hash_file(source), source.stat().st_size)
            for path, source in sorted(files.items())
        }
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
        if self._stored(ref) is not None:
            advance(ref.size_bytes)
            return ref
        for path, entry in entries.items():
            self._backend.put_file(f"{ref.prefix}/{path}", files[path], entry, advance, link=link)
        self._backend.write(f"{ref.prefix}/{_MANIFEST}", json.dumps(manifest.to_json(), indent=1).encode())
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
        """Return the artifacts of a kind, a name and the beginning of a digest, newest first; empty means any."""
        found = []
        for wanted in [kind] if kind else KINDS:
            prefix = f"artifacts/{wanted}/{name}/" if name else f"artifacts/{wanted}/"
            for key in self._backend.keys(prefix):
                parts = key.split("/")
                if len(parts) == 5 and parts[4] == _MANIFEST and parts[3].startswith(digest[:12]):
                    found.append(
                        Manifest.from_json(json.loads(self._backend.read(key, _MANIFEST_LIMIT_BYTES)))
                    )
        found = [manifest for manifest in found if manifest.digest.startswith(digest)]
        return sorted(found, key=lambda manifest: manifest.created_at, reverse=True)

    def publish(self, run_id: str, files: Mapping[str, Path], advance: Advance = _ignore) -> None:
        """Put files into a run's folder, `runs/<run id>/`, under the names people look for; replaces old ones."""
        for path, source in sorted(files.items()):
            entry = FileEntry(path, hash_file(source), source.stat().st_size)
            self._backend.put_file(f"runs/{run_id}/{path}", source, entry, advance, link=True)

    def published(self, run_id: str) -> list[str]:
        """Return the paths in a run's folder."""
        prefix = f"runs/{run_id}/"
        return [key.removeprefix(prefix) for key in self._backend.keys(prefix)]

    def delete(self, ref: ArtifactRef) -> None:
        """Remove an artifact, its manifest first, so that nobody sees it without its files."""
        manifest = self._stored(ref)
        self._backend.delete(f"{ref.prefix}/{_MANIFEST}")
        for entry in manifest.files if manifest else ():
            self._backend.delete(f"{ref.prefix}/{entry.path}")

    def _stored(self, ref: ArtifactRef) -> Manifest | None:
        """Return the manifest stored at an artifact's place, or None."""
        try:
            text = self._backend.read(f"{ref.prefix}/{_MANIFEST}", _MANIFEST_LIMIT_BYTES)
        except NotFound:
            return None
        try:
            return Manifest.from_json(json.loads(text))
        except ValueError as error:
            raise DataLoss(f"The manifest of {ref} can't be read: {error}.") from error


def open_store(settings: Settings) -> ArtifactStore:
    """Open the store that the settings name.

    Raises:
        InvalidInput: The address is of no known form.
    """
    parts = urlsplit(settings.store)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        from web4lora_chassis.artifacts.folder import FolderBackend

        return ArtifactStore(FolderBackend(Path(url2pathname(parts.path))))
    if parts.scheme in ("s3+http", "s3+https") and parts.hostname and parts.path.strip("/"):
        from web4lora_chassis.artifacts.s3 import S3Backend

        return ArtifactStore(
            S3Backend(
                endpoint=parts.netloc,
                bucket=parts.path.strip("/"),
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
