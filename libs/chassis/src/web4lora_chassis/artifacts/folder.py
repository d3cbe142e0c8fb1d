"""A folder as the artifact store's back end: files are linked in and out, not copied."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from web4lora_chassis.artifacts.backend import PART_PREFIX, Advance, Stored, Unfinished
from web4lora_chassis.artifacts.manifest import AGAIN, FileEntry, hash_file
from web4lora_chassis.errors import DataLoss, InvalidInput, NotFound, Unavailable, disk_error

_STALE_SECONDS = 24 * 3600.0
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES}


class FolderBackend:
    """Keys are paths below a folder. Stored files are read-only, because others may hold links to them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.url = root.as_uri()

    def put_file(self, key: str, source: Path, entry: FileEntry, advance: Advance, *, link: bool) -> None:
        """Link a file into the folder, or copy it; see `Backend.put_file`."""
        place = self._place(key)
        if not (
            place.is_file() and place.stat().st_size == entry.size_bytes and hash_file(place) == entry.sha256
        ):
            self._put(source, place, entry, link=link)
        else:
            self.touch(key)  # so that nobody takes it for what a cut-off upload left
        advance(entry.size_bytes)

    def get_file(self, key: str, target: Path, entry: FileEntry, advance: Advance) -> None:
        """Link a file out of the folder, or copy it to another file system; see `Backend.get_file`."""
        place = self._place(key)
        if not place.is_file():
            raise NotFound(f"{key} is not in the store {self.url}.", fix=AGAIN)
        self._put(place, target, entry, link=True)
        advance(entry.size_bytes)

    def read(self, key: str, limit_bytes: int) -> bytes:
        """Return a small file; see `Backend.read`."""
        try:
            with self._place(key).open("rb") as file:
                data = file.read(limit_bytes + 1)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise NotFound(f"{key} is not in the store {self.url}.") from error
        except OSError as error:
            raise Unavailable(f"{key} in {self.url} can't be read: {error.strerror}.") from error
        if len(data) > limit_bytes:
            raise DataLoss(
                f"{key} in {self.url} is larger than the {limit_bytes} bytes it may have.", fix=AGAIN
            )
        return data

    def write(self, key: str, data: bytes) -> None:
        """Write a small file and put it in place at once; see `Backend.write`."""
        place = self._place(key)
        part = self._part(place)
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(place)
        except OSError as error:
            raise disk_error(error, place) from error
        finally:
            part.unlink(missing_ok=True)

    def stored(self, prefix: str, name: str = "") -> Iterator[Stored]:
        """Yield the files below a prefix; see `Backend.stored`."""
        for place in self._files(prefix):
            if place.name.startswith(PART_PREFIX) or (name and place.name != name):
                continue
            with contextlib.suppress(FileNotFoundError):  # deleted since
                found = place.stat()
                # Of a link, the modification time is that of the linked file: not when it was stored.
                yield Stored(place.relative_to(self._root).as_posix(), found.st_size, found.st_ctime)

    def touch(self, key: str) -> None:
        """Give a file the time of now; see `Backend.touch`."""
        place = self._place(key)
        try:
            os.utime(place)
        except FileNotFoundError as error:
            raise NotFound(f"{key} is not in the store {self.url}.", fix=AGAIN) from error
        except OSError as error:
            raise disk_error(error, place) from error

    def unfinished(self, prefix: str) -> Iterator[Unfinished]:
        """Yield the files that are being written; see `Backend.unfinished`."""
        for place in self._files(prefix):
            if place.name.startswith(PART_PREFIX):
                with contextlib.suppress(FileNotFoundError):
                    found = place.stat()
                    key = place.relative_to(self._root).as_posix()
                    yield Unfinished(key, key, found.st_size, found.st_ctime)

    def discard(self, upload: Unfinished) -> None:
        """Remove a file that was being written; see `Backend.discard`."""
        self.delete(upload.id)

    def delete(self, key: str) -> None:
        """Remove a file and the folders that this leaves empty; see `Backend.delete`."""
        place = self._place(key)
        place.unlink(missing_ok=True)
        for folder in place.parents:
            if folder == self._root:
                break
            try:
                folder.rmdir()
            except OSError:
                break  # not empty, or gone already

    def _files(self, prefix: str) -> Iterator[Path]:
        """Yield all files below a prefix in the order of their keys."""
        places = (Path(folder, name) for folder, _, names in os.walk(self._place(prefix)) for name in names)
        yield from sorted(places, key=Path.as_posix)

    def _place(self, key: str) -> Path:
        place = (self._root / key).absolute()
        if ".." in Path(key).parts or not place.is_relative_to(self._root):
            raise InvalidInput(f"The key {key!r} leaves the store.")
        return place

    def _part(self, place: Path) -> Path:
        """Return a new file beside a place, which no reader sees."""
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale_parts(place.parent)
            handle, name = tempfile.mkstemp(prefix=PART_PREFIX, dir=place.parent)
        except OSError as error:
            raise disk_error(error, place) from error
        os.close(handle)
        return Path(name)

    def _put(self, source: Path, place: Path, entry: FileEntry, *, link: bool) -> None:
        """Link or copy a file to a place, verified before it is seen there."""
        part = self._part(place)
        try:
            if not (link and _linked(source, part)):
                shutil.copyfile(source, part)
            if part.stat().st_size != entry.size_bytes or hash_file(part) != entry.sha256:
                raise DataLoss(
                    f"{source} is not what its digest says: expected sha256 {entry.sha256[:12]}….", fix=AGAIN
                )
            part.chmod(0o444)
            part.replace(place)
        except OSError as error:
            raise disk_error(error, place) from error
        finally:
            part.unlink(missing_ok=True)


def _linked(source: Path, part: Path) -> bool:
    """Make `part` a hard link to `source`; return False where the file system can't."""
    part.unlink()
    try:
        os.link(source.resolve(), part)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return False
    return True


def _remove_stale_parts(folder: Path) -> None:
    """Remove what writers left that were killed long ago."""
    limit = time.time() - _STALE_SECONDS
    for part in folder.glob(f"{PART_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            if part.stat().st_ctime < limit:  # of a link, the modification time is that of the linked file
                part.unlink()
