"""A large file on its way into a bucket: in parallel parts, hashed as it is read, resumed where it stopped.

The SDK's public `put_object` can't take up an interrupted upload, and presigned URLs for each step would
mean signing, sending and parsing S3's XML on our own. So the SDK's own multipart calls are used, those of
which `put_object` is made; they are named in this file only, and the SDK's version is bounded for them.
"""

from __future__ import annotations

import datetime
import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from minio import Minio
from minio.datatypes import Part
from minio.error import S3Error

from web4lora_chassis.artifacts.backend import Unfinished
from web4lora_chassis.artifacts.manifest import FileEntry
from web4lora_chassis.errors import DataLoss

SHA256_HEADER = "x-amz-meta-sha256"
_MAX_PARTS = 10_000
_LONG_AGO = datetime.datetime.min.replace(tzinfo=datetime.UTC)


class UploadGone(Exception):
    """Somebody else completed, aborted or changed the upload meanwhile."""


class MultipartUpload:
    """Uploads one file under one key.

    Args:
        client: The connection.
        bucket: The bucket.
        key: The key.
        entry: What the file must be.
        part_bytes: Size of a part, at least 5 MiB. At most `parallel` + 1 parts are in memory.
        parallel: Parts on their way at once.
    """

    def __init__(
        self, client: Minio, bucket: str, key: str, entry: FileEntry, *, part_bytes: int, parallel: int
    ) -> None:
        self._client = client
        self._place = (bucket, key)
        self._entry = entry
        self._part_bytes = max(part_bytes, -(-entry.size_bytes // _MAX_PARTS))
        self._parallel = parallel

    def run(self, source: Path, advance: Callable[[int], None]) -> None:
        """Send the parts that are not there yet, then make the object visible.

        An interrupted upload of the key is taken up. Each of its parts is compared with ours by its MD5, so
        it doesn't matter of which content it was.

        Raises:
            DataLoss: The file is not what `entry` says; the upload was aborted.
            UploadGone: To be tried again.
            minio.error.MinioException, urllib3.exceptions.HTTPError: The upload can be resumed.
        """
        upload_id = self._unfinished()
        try:
            finished = self._finished(upload_id) if upload_id else {}
            upload_id = upload_id or self._create()
            parts = self._send_parts(upload_id, source, finished, advance)
            self._client._complete_multipart_upload(*self._place, upload_id, parts)
        except S3Error as error:
            if error.code in ("NoSuchUpload", "InvalidPart"):
                raise UploadGone from error
            raise
        except DataLoss:
            if upload_id:
                self._client._abort_multipart_upload(*self._place, upload_id)
            raise

    def _create(self) -> str:
        return self._client._create_multipart_upload(*self._place, {SHA256_HEADER: self._entry.sha256})

    def _unfinished(self) -> str | None:
        uploads = unfinished(self._client, *self._place)
        return uploads[-1] if uploads else None

    def _finished(self, upload_id: str) -> dict[int, Part]:
        """Return the parts that are in the store, by their numbers."""
        parts: dict[int, Part] = {}
        marker: str | None = None
        while True:
            answer = self._client._list_parts(*self._place, upload_id, part_number_marker=marker)
            parts.update((part.part_number, part) for part in answer.parts)
            if not answer.is_truncated:
                return parts
            marker = answer.next_part_number_marker

    def _send_parts(
        self, upload_id: str, source: Path, finished: dict[int, Part], advance: Callable[[int], None]
    ) -> list[Part]:
        """Read the file once, from its beginning, and send what is missing; return all parts in order."""
        parts: dict[int, Part] = {}
        pending: deque[tuple[int, int, Future[str]]] = deque()

        def collect() -> None:
            number, size, future = pending.popleft()
            parts[number] = Part(number, future.result())
            advance(size)

        digest = hashlib.sha256()
        size_bytes = 0
        with source.open("rb") as file, ThreadPoolExecutor(self._parallel, "upload") as pool:
            try:
                while data := file.read(self._part_bytes):
                    digest.update(data)
                    size_bytes += len(data)
                    if size_bytes > self._entry.size_bytes:
                        break
                    number = len(parts) + len(pending) + 1
                    if _same(finished.get(number), data):
                        parts[number] = finished[number]
                        advance(len(data))
                        continue
                    if len(pending) == self._parallel:
                        collect()
                    job = pool.submit(self._client._upload_part, *self._place, data, None, upload_id, number)
                    pending.append((number, len(data), job))
                while pending:
                    collect()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # leaving the block waits for those at work
                raise
        if size_bytes != self._entry.size_bytes or digest.hexdigest() != self._entry.sha256:
            raise changed(source)
        return [parts[number] for number in sorted(parts)]


def unfinished(client: Minio, bucket: str, key: str) -> list[str]:
    """Return the ids of a key's unfinished uploads, the newest last."""
    answer = client._list_multipart_uploads(bucket, prefix=key)
    uploads = [upload for upload in answer.uploads if upload.object_name == key and upload.upload_id]
    uploads.sort(key=lambda upload: upload.initiated_time or _LONG_AGO)
    return [str(upload.upload_id) for upload in uploads]


def abort_unfinished(client: Minio, bucket: str, key: str) -> None:
    """Remove what interrupted uploads of a key left in the store, which nobody sees but which takes room."""
    for upload_id in unfinished(client, bucket, key):
        abort(client, bucket, key, upload_id)


def abort(client: Minio, bucket: str, key: str, upload_id: str) -> None:
    """Remove one upload; one that is gone already is no error."""
    try:
        client._abort_multipart_upload(bucket, key, upload_id)
    except S3Error as error:
        if error.code != "NoSuchUpload":
            raise


def all_unfinished(client: Minio, bucket: str, prefix: str) -> Iterator[Unfinished]:
    """Yield the unfinished uploads to keys below a prefix, each with what came of it and when.

    MinIO knows prefixes only that are a whole key, so all are asked for. After a restart of its own it lists
    none; it removes what is a day old by itself.
    """
    answer = client._list_multipart_uploads(bucket)
    while True:
        for upload in answer.uploads:
            if not (upload.object_name or "").startswith(prefix) or not upload.upload_id:
                continue
            try:
                parts = client._list_parts(bucket, str(upload.object_name), upload.upload_id).parts
            except S3Error as error:
                if error.code == "NoSuchUpload":  # completed or aborted since
                    continue
                raise
            times = [part.last_modified for part in parts if part.last_modified]
            moved_at = max([upload.initiated_time or _LONG_AGO, *times])
            size = sum(part.size or 0 for part in parts)
            yield Unfinished(str(upload.object_name), str(upload.upload_id), size, moved_at.timestamp())
        if not answer.is_truncated:
            return
        answer = client._list_multipart_uploads(
            bucket,
            key_marker=answer.next_key_marker,
            upload_id_marker=answer.next_upload_id_marker,
        )


def changed(source: Path) -> DataLoss:
    """Return the error for a file that is no longer what it was when it was hashed."""
    return DataLoss(f"{source} was changed while it was stored; nothing of it is kept.")


def _same(part: Part | None, data: bytes) -> bool:
    """Tell whether a stored part holds these bytes. A part's ETag is its MD5, unless the store encrypts."""
    if part is None or part.size != len(data):
        return False
    return part.etag == hashlib.md5(data, usedforsecurity=False).hexdigest()
