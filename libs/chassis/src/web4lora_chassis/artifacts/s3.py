"""An S3 bucket as the artifact store's back end, through the MinIO SDK."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from minio.commonconfig import REPLACE, CopySource
from minio.credentials.providers import Provider
from minio.error import S3Error
from urllib3.exceptions import HTTPError, MaxRetryError

from web4lora_chassis.artifacts.backend import PART_PREFIX, Advance, Stored, Unfinished
from web4lora_chassis.artifacts.manifest import AGAIN, FileEntry
from web4lora_chassis.artifacts.s3_client import connect, translated
from web4lora_chassis.artifacts.s3_upload import (
    SHA256_HEADER,
    MultipartUpload,
    UploadGone,
    abort,
    abort_unfinished,
    all_unfinished,
    changed,
)
from web4lora_chassis.errors import DataLoss, Unavailable, disk_error

PART_BYTES = 16 << 20
PARALLEL_PARTS = 4
_MIN_PART_BYTES = 5 << 20
_CHUNK_BYTES = 1 << 20
_TRIES = 4


class S3Backend:
    """Keys and bytes in a bucket. Every object carries its SHA-256 as user metadata.

    Args:
        endpoint: Host and port of the store.
        bucket: The bucket; it must be there.
        access_key: Empty for anonymous access.
        secret_key: Its secret.
        region: The bucket's region.
        secure: TLS.
        provider: Gives the key in place of the two, anew when it has ended.
        part_bytes: Larger files are sent in parts of this size, at least 5 MiB.
        parallel: Parts on their way at once; memory is bounded by one more.
        connect_timeout_seconds: For a connection to stand.
        stall_timeout_seconds: Without a byte sent or received.
    """

    def __init__(
        self,
        endpoint: str,
        bucket: str,
        access_key: str,
        secret_key: str,
        region: str,
        secure: bool,
        *,
        provider: Provider | None = None,
        part_bytes: int = PART_BYTES,
        parallel: int = PARALLEL_PARTS,
        connect_timeout_seconds: float = 5.0,
        stall_timeout_seconds: float = 30.0,
    ) -> None:
        self.url = f"s3+{'https' if secure else 'http'}://{endpoint}/{bucket}"
        self._bucket = bucket
        self._part_bytes = max(part_bytes, _MIN_PART_BYTES)
        self._parallel = parallel
        self._client = connect(
            endpoint,
            access_key=access_key,
            secret_key=secret_key,
            provider=provider,
            region=region,
            secure=secure,
            connections=parallel + 1,
            connect_timeout_seconds=connect_timeout_seconds,
            stall_timeout_seconds=stall_timeout_seconds,
        )

    def put_file(
        self,
        key: str,
        source: Path,
        entry: FileEntry,
        advance: Advance,
        *,
        link: bool,  # noqa: ARG002 - a bucket can't keep the file in place
    ) -> None:
        """Upload a file unless its bytes are there; see `Backend.put_file`."""
        moved = _Moved(advance)
        with translated(self.url, key):
            for _ in range(_TRIES):
                if self._holds(key, entry):
                    moved.restart(entry.size_bytes)
                    return
                moved.restart()
                with contextlib.suppress(UploadGone):
                    self._upload(key, source, entry, moved.add)
        raise Unavailable(
            f"{key} could not be stored in {self.url}: somebody else is writing to the same key.",
            fix="Try again when they are done.",
        )

    def get_file(self, key: str, target: Path, entry: FileEntry, advance: Advance) -> None:
        """Download a file, resuming an interrupted download, and verify it; see `Backend.get_file`."""
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _part_file(target, entry) as part:
                try:
                    with translated(self.url, key):
                        self._download(key, part, entry, _Moved(advance))
                except BaseException as error:
                    if not (isinstance(error, Unavailable | KeyboardInterrupt) and part.tell()):
                        Path(part.name).unlink(missing_ok=True)  # nothing to go on from
                    raise
                part.flush()
                os.fsync(part.fileno())
                Path(part.name).replace(target)
        except OSError as error:
            raise disk_error(error, target) from error

    def read(self, key: str, limit_bytes: int) -> bytes:
        """Return a small object; see `Backend.read`."""
        with translated(self.url, key):
            response = self._client.get_object(self._bucket, key)
            try:
                data = b""
                while len(data) <= limit_bytes and (chunk := response.read(limit_bytes + 1 - len(data))):
                    data += chunk
            finally:
                response.close()
                response.release_conn()
        if len(data) > limit_bytes:
            raise DataLoss(
                f"{key} in {self.url} is larger than the {limit_bytes} bytes it may have.", fix=AGAIN
            )
        return data

    def write(self, key: str, data: bytes) -> None:
        """Store a small object; see `Backend.write`."""
        with translated(self.url, key):
            self._put(key, data, hashlib.sha256(data).hexdigest())

    def stored(self, prefix: str, name: str = "") -> Iterator[Stored]:
        """Yield the objects below a prefix; see `Backend.stored`."""
        with translated(self.url, prefix):
            for found in self._client.list_objects(self._bucket, prefix=prefix, recursive=True):
                if name and found.object_name.rsplit("/", 1)[-1] != name:
                    continue
                stored_at = found.last_modified.timestamp() if found.last_modified else 0.0
                yield Stored(found.object_name, found.size or 0, stored_at)

    def touch(self, key: str) -> None:
        """Copy an object onto itself, in the store; see `Backend.touch`."""
        with translated(self.url, key):
            found = self._client.stat_object(self._bucket, key)
            sha256 = (found.metadata or {}).get(SHA256_HEADER, "")
            self._client.copy_object(
                self._bucket,
                key,
                CopySource(self._bucket, key),
                metadata={SHA256_HEADER: sha256},
                metadata_directive=REPLACE,
            )

    def unfinished(self, prefix: str) -> Iterator[Unfinished]:
        """Yield the uploads that are not complete; see `Backend.unfinished`."""
        with translated(self.url, prefix):
            yield from all_unfinished(self._client, self._bucket, prefix)

    def discard(self, upload: Unfinished) -> None:
        """Abort an upload; see `Backend.discard`."""
        with translated(self.url, upload.key):
            abort(self._client, self._bucket, upload.key, upload.id)

    def delete(self, key: str) -> None:
        """Remove a key and what interrupted uploads of it left; see `Backend.delete`."""
        with translated(self.url, key):
            self._client.remove_object(self._bucket, key)
            abort_unfinished(self._client, self._bucket, key)

    def _holds(self, key: str, entry: FileEntry) -> bool:
        """Tell whether a key holds these bytes already."""
        try:
            found = self._client.stat_object(self._bucket, key)
        except S3Error as error:
            if error.code == "NoSuchKey":
                return False
            raise
        sha256 = (found.metadata or {}).get(SHA256_HEADER)
        return found.size == entry.size_bytes and sha256 == entry.sha256

    def _put(self, key: str, data: bytes, sha256: str) -> None:
        self._client.put_object(
            self._bucket,
            key,
            io.BytesIO(data),
            len(data),
            metadata={SHA256_HEADER: sha256},
            part_size=max(len(data), _MIN_PART_BYTES),  # one request
        )

    def _upload(self, key: str, source: Path, entry: FileEntry, advance: Advance) -> None:
        if entry.size_bytes > self._part_bytes:
            upload = MultipartUpload(
                self._client, self._bucket, key, entry, part_bytes=self._part_bytes, parallel=self._parallel
            )
            upload.run(source, advance)
            abort_unfinished(self._client, self._bucket, key)
            return
        with source.open("rb") as file:
            data = file.read(entry.size_bytes + 1)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise changed(source)
        self._put(key, data, entry.sha256)

    def _download(self, key: str, part: IO[bytes], entry: FileEntry, moved: _Moved) -> None:
        """Fill the part file from where it stands, however often the connection breaks on the way."""
        start, digest = _taken_up(part, entry)
        moved.restart(start)
        place = start
        tries = _TRIES
        while place < entry.size_bytes:
            before = place
            try:
                for chunk in self._chunks(key, place, entry):
                    part.write(chunk)
                    digest.update(chunk)
                    place += len(chunk)
                    moved.add(len(chunk))
            except MaxRetryError:
                raise
            except HTTPError:  # broken on the way; a part further on is worth as many tries again
                tries = _TRIES if place - before >= self._part_bytes else tries - 1
                if not tries:
                    raise
        if digest.hexdigest() == entry.sha256:
            return
        if not start:
            raise DataLoss(
                f"{key} in {self.url} is not what its digest says: expected sha256 {entry.sha256[:12]}…, "
                f"found {digest.hexdigest()[:12]}….",
                fix=AGAIN,
            )
        part.truncate(0)  # what was left of the interrupted download may be at fault
        self._download(key, part, entry, moved)

    def _chunks(self, key: str, start: int, entry: FileEntry) -> Iterator[bytes]:
        """Yield an object's bytes from a place on.

        Raises:
            DataLoss: The object doesn't have the size that `entry` says.
        """
        try:
            response = self._client.get_object(self._bucket, key, offset=start)
        except S3Error as error:
            if error.code == "InvalidRange":
                raise _other_size(key, self.url) from error
            raise
        try:
            expected = entry.size_bytes - start
            if int(response.headers.get("content-length", expected)) != expected:
                raise _other_size(key, self.url)
            yield from response.stream(_CHUNK_BYTES)
        finally:
            response.close()
            response.release_conn()


class _Moved:
    """Progress that never goes back, although a try may begin anew."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._place = 0
        self._reported = 0

    def add(self, size_bytes: int) -> None:
        self._place += size_bytes
        if self._place > self._reported:
            self._advance(self._place - self._reported)
            self._reported = self._place

    def restart(self, place: int = 0) -> None:
        self._place = 0
        self.add(place)


def _other_size(key: str, url: str) -> DataLoss:
    return DataLoss(f"{key} in {url} does not have the size that its manifest says.", fix=AGAIN)


def _taken_up(part: IO[bytes], entry: FileEntry) -> tuple[int, hashlib._Hash]:
    """Return how much of a file an interrupted download left, and the hash of that much."""
    part.seek(0)
    digest = hashlib.sha256()
    size_bytes = 0
    while chunk := part.read(_CHUNK_BYTES):
        digest.update(chunk)
        size_bytes += len(chunk)
    if size_bytes <= entry.size_bytes:
        return size_bytes, digest
    part.seek(0)
    part.truncate()
    return 0, hashlib.sha256()


@contextlib.contextmanager
def _part_file(target: Path, entry: FileEntry) -> Iterator[IO[bytes]]:
    """Open the file that a download goes into. One that another process is filling is left to it."""
    place = target.with_name(f"{PART_PREFIX}{entry.sha256[:32]}")
    with _open(place) as part:
        if _locked(part, place):
            yield part
            return
    place = target.with_name(f"{PART_PREFIX}{secrets.token_hex(8)}")
    with _open(place) as part:
        try:
            yield part
        finally:
            place.unlink(missing_ok=True)


def _locked(part: IO[bytes], place: Path) -> bool:
    """Tell whether the file is ours alone now, and still at its place: another may have finished it."""
    try:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return place.exists() and place.stat().st_ino == os.fstat(part.fileno()).st_ino


def _open(place: Path) -> IO[bytes]:
    """Open a file to read and write; make it when it is missing, leave it as it is when it is there."""
    return open(place, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o644))
