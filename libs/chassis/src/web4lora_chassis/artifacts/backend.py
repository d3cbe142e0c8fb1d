"""What a store needs of the place that holds its keys and bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from web4lora_chassis.artifacts.manifest import FileEntry

Advance = Callable[[int], None]
"""Called with the number of bytes just moved; a resumed part counts when it is found there."""

PART_PREFIX = ".part-"
"""Files whose names begin with this are being written; no reader sees them."""

STORE = "store"
"""Key in the metadata of an `Unavailable` that is about the store, with its address."""

BUCKET_MISSING = "BUCKET_MISSING"
"""The reason of a `NotFound` that is about the whole store, not about a key."""


@dataclass(frozen=True)
class Stored:
    """What a key holds: its size, and when it was last stored or touched, as seconds since 1970."""

    key: str
    size_bytes: int
    stored_at: float


@dataclass(frozen=True)
class Unfinished:
    """Bytes on their way to a key, which no reader sees.

    Attributes:
        key: Where they were to go.
        id: The back end's name for them.
        size_bytes: How many there are.
        moved_at: When the last of them came, as seconds since 1970.
    """

    key: str
    id: str
    size_bytes: int
    moved_at: float


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

    def stored(self, prefix: str, name: str = "") -> Iterator[Stored]:
        """Yield what there is below a prefix, in the order of the keys; with a name, only such files."""

    def touch(self, key: str) -> None:
        """Note that a key is in use as of now.

        Raises:
            NotFound: No such key.
        """

    def unfinished(self, prefix: str) -> Iterator[Unfinished]:
        """Yield what is on its way to keys below a prefix, or was when its writer ended."""

    def discard(self, upload: Unfinished) -> None:
        """Remove what is on its way; what is gone already is no error."""

    def delete(self, key: str) -> None:
        """Remove a key; a missing one is no error."""
