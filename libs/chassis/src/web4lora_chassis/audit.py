"""The audit log: one JSON line a call, only ever appended, each with a hash over it and the line before.

A line that was changed, or removed from between others, breaks the chain. A file beside the log names the
last line, so that lines cut off at the end are missed too. Who may write these files may also forge the
whole: against such a one, copy the log elsewhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FILE_BYTES = 16 << 20
FILES_KEPT = 10
"""Of full files; the oldest goes when one more is full."""

_NO_HASH = "0" * 64
_APPEND = os.O_RDWR | os.O_APPEND | os.O_CREAT
_HEAD_BYTES = 128
_TAIL_BYTES = 16 << 10  # a line is much shorter


@dataclass(frozen=True)
class AuditEntry:
    """A call that changed something, or was refused; see the contract's AuditEntry.

    Attributes:
        number: 1 for the first ever.
        time: Seconds since 1970.
        principal: Who called.
        on_behalf_of: For whom the gateway called.
        call: The call's full name.
        resource: What it was about.
        result: "OK", or the reason of its error.
        peer: From where.
        request_id: The caller's key.
        skipped: Refused calls before it that were too many to be written down.
    """

    number: int
    time: float
    principal: str
    on_behalf_of: str
    call: str
    resource: str
    result: str
    peer: str
    request_id: str
    skipped: int = 0


@dataclass(frozen=True)
class Verification:
    """What reading a whole log found: how many lines, the oldest one's number, and what is wrong."""

    entries: int
    first_number: int
    problems: tuple[str, ...]


class AuditLog:
    """The log of one service, in `<folder>/<service>.jsonl`, `….1.jsonl` (the newest full one) and so on.

    Lines are handed to the system before `append` returns: they outlive the process, and all but the last
    seconds of them a power cut.

    Args:
        folder: Where the files are; made when missing.
        service: Whose log.
        file_bytes: A file that is larger is full.
        files_kept: How many full files are kept.
    """

    def __init__(
        self, folder: Path, service: str, *, file_bytes: int = FILE_BYTES, files_kept: int = FILES_KEPT
    ) -> None:
        self._folder = folder
        self._service = service
        self._file_bytes = file_bytes
        self._files_kept = files_kept
        self._path = folder / f"{service}.jsonl"
        self._head = folder / f"{service}.head.json"
        self._written: tuple[int, str, int, int] | None = None
        """Number and hash of the last line we wrote, and size and inode that the file had then."""

    def append(self, **values: Any) -> None:
        """Add a line.

        Args:
            values: The fields of AuditEntry but number and time.

        Raises:
            OSError: It can't be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(self._folder / f"{self._service}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two gateways of one home share the log
            number, previous = self._last()
            entry = AuditEntry(number=number + 1, time=time.time(), **values)
            line, digest = _line(asdict(entry), previous)
            size, inode = self._write(line)
            self._note(entry.number, digest)
            self._written = entry.number, digest, size, inode
        finally:
            os.close(lock)

    def entries(self) -> Iterator[AuditEntry]:
        """Yield the entries, newest first; lines that can't be read are left to `verify`."""
        known = {each.name for each in fields(AuditEntry)}
        for path in reversed(self._files()):
            for line in reversed(_lines(path)):
                data = _parsed(line)
                try:
                    yield AuditEntry(**{key: value for key, value in data.items() if key in known})
                except TypeError:
                    continue

    def verify(self) -> Verification:
        """Read the whole log and say what is wrong with it, each in one line that names file and line."""
        problems: list[str] = []
        first, count, number, previous = 0, 0, 0, ""
        for path in self._files():
            for index, line in enumerate(_lines(path), 1):
                where = f"{path.name}:{index}"
                data = _parsed(line)
                found, digest = data.get("number"), data.pop("hash", None)
                if not isinstance(found, int) or not isinstance(data.get("previous"), str):
                    problems.append(f"{where}: this is no line of an audit log")
                    continue
                count += 1
                first = first or found
                if _digest(data) != digest:
                    problems.append(f"{where}: line {found} was changed")
                if number and found != number + 1:
                    problems.append(f"{where}: {_gap(number + 1, found - 1)} before line {found}")
                elif previous and data["previous"] != previous:
                    problems.append(f"{where}: line {found} does not follow line {number}")
                elif found == 1 and data["previous"] != _NO_HASH:
                    problems.append(f"{where}: line 1 follows another line")
                number, previous = found, str(digest)
        if first > 1 and len(self._files()) <= self._files_kept:  # no full file has gone yet
            problems.insert(0, f"{self._service}: {_gap(1, first - 1)} at the beginning")
        head = _parsed(_text(self._head))
        last = head.get("number")
        if isinstance(last, int) and last > number:
            problems.append(f"{self._path.name}: {_gap(number + 1, last)} at the end")
        elif last == number and number and head.get("hash") != previous:
            problems.append(f"{self._path.name}: line {number} is not the one that was written last")
        return Verification(count, first, tuple(problems))

    def _last(self) -> tuple[int, str]:
        """Return number and hash of the last line written."""
        if self._written:
            number, digest, size, inode = self._written
            with contextlib.suppress(FileNotFoundError):
                status = self._path.stat()
                if (status.st_size, status.st_ino) == (size, inode):
                    return number, digest
        head = _parsed(_text(self._head))
        try:
            number, digest = int(head["number"]), str(head["hash"])
        except (KeyError, ValueError, TypeError):
            number, digest = 0, _NO_HASH
        # A process killed between line and head left the head one behind.
        for path in reversed(self._files()):
            tail = _parsed((_tail(path).splitlines() or [""])[-1])
            if isinstance(tail.get("number"), int) and tail["number"] > number:
                return int(tail["number"]), str(tail.get("hash", _NO_HASH))
            if tail:
                break
        return number, digest

    def _write(self, line: str) -> tuple[int, int]:
        """Write a line; return the file's size then, and its inode."""
        file = os.open(self._path, _APPEND, 0o600)
        try:
            status = os.fstat(file)
            if status.st_size >= self._file_bytes:
                os.fsync(file)
                os.close(file)
                self._rotate()
                file = os.open(self._path, _APPEND, 0o600)
                status = os.fstat(file)
            elif status.st_size and os.pread(file, 1, status.st_size - 1) != b"\n":
                line = "\n" + line  # the last one was cut off, by a full disk or a crash
            data = line.encode()
            if os.write(file, data) != len(data):
                raise OSError(f"{self._path}: the line could not be written whole")
            return status.st_size + len(data), status.st_ino
        finally:
            os.close(file)

    def _note(self, number: int, digest: str) -> None:
        """Say beside the log which line is the last; in place, since one that is torn is made up for."""
        text = json.dumps({"number": number, "hash": digest}).ljust(_HEAD_BYTES)
        file = os.open(self._head, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(file, text.encode(), 0)
        finally:
            os.close(file)

    def _rotate(self) -> None:
        """Make room for a new file: .jsonl becomes .1.jsonl, that .2.jsonl, and the oldest goes."""
        for number in range(self._files_kept, 0, -1):
            older = self._folder / f"{self._service}.{number}.jsonl"
            if number == self._files_kept:
                older.unlink(missing_ok=True)
            newer = self._path if number == 1 else self._folder / f"{self._service}.{number - 1}.jsonl"
            if newer.exists():
                newer.replace(older)

    def _files(self) -> list[Path]:
        """Return the files that are there, the oldest first."""
        full = [self._folder / f"{self._service}.{number}.jsonl" for number in range(self._files_kept, 0, -1)]
        return [path for path in (*full, self._path) if path.exists()]


def _line(data: Mapping[str, Any], previous: str) -> tuple[str, str]:
    """Return an entry as a line, and its hash."""
    linked = {**data, "previous": previous}
    digest = _digest(linked)
    return json.dumps({**linked, "hash": digest}) + "\n", digest


def _digest(data: Mapping[str, Any]) -> str:
    """Return the hash of a line: over its fields, the hash of the line before among them, sorted by name."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _gap(first: int, last: int) -> str:
    if first > last:
        return "the numbers go back"
    return f"line {first} is missing" if first == last else f"lines {first} to {last} are missing"


def _parsed(line: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _lines(path: Path) -> list[str]:
    return [line for line in _text(path).splitlines() if line]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace")
