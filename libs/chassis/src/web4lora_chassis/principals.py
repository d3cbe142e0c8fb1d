"""Who may call: principals with a scope, known by the hash of a token, in one file of a stack's home."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

from web4lora_chassis.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidInput,
    NotFound,
    Unauthenticated,
    disk_error,
    shown,
)
from web4lora_chassis.jobs.record import write_json

PRINCIPALS_FILE = "principals.json"
"""Below a stack's home, readable by its owner alone."""

ADMIN = "admin"
"""Who shows the stack's own token."""
GATEWAY = "gateway"
"""Who shows a worker its own token."""
LOCAL = "local"
"""Anybody on this machine, where no token is asked for."""

_RESERVED = (ADMIN, GATEWAY, LOCAL)
_TOKEN = re.compile(r"w4_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_NAME = re.compile(r"[a-z][a-z0-9]*(?:[-._@][a-z0-9]+)*")
_NAME_LENGTH = 63
_FORM = 1


class Scope(IntEnum):
    """What a principal may do; each allows all that a lower one does. The numbers are the contract's."""

    READ = 1
    RUN = 2
    ADMIN = 3


@dataclass(frozen=True)
class Principal:
    """Somebody, or a program, that may call; times are seconds since 1970, 0 for never.

    Attributes:
        name: Never given twice, since runs name their owner.
        scope: What it may do.
        id: Stands in its token, and stays when that is rotated; empty for one that is in no file.
        token_sha256: Of its whole token.
        created_at: When it was added.
        expires_at: From when on its token is refused.
        revoked_at: When it was revoked.
    """

    name: str
    scope: Scope
    id: str = ""
    token_sha256: str = ""
    created_at: float = 0.0
    expires_at: float = 0.0
    revoked_at: float = 0.0


class Principals:
    """The principals of a stack. Every read sees what any process wrote last.

    Args:
        home: The stack's home.

    Attributes:
        keep: Given each principal that is added or changed, before it counts; an error of it ends the change.
    """

    def __init__(self, home: Path) -> None:
        self.keep: Callable[[Principal], None] = _nowhere_else
        self._path = home / PRINCIPALS_FILE
        self._seen: tuple[int, int, int] | None = None
        self._by_id: Mapping[str, Principal] = {}

    def all(self) -> list[Principal]:
        """Return every principal, by name.

        Raises:
            FailedPrecondition: The file can't be read, or is none of ours.
        """
        return sorted(self._read().values(), key=lambda principal: principal.name)

    def check(self, token: str) -> Principal:
        """Return whose token this is.

        Raises:
            Unauthenticated: Nobody's, or its principal has expired or was revoked.
            FailedPrecondition: The file can't be read, or is none of ours.
        """
        match = _TOKEN.fullmatch(token)
        found = self._read().get(match[1]) if match else None
        expected = found.token_sha256 if found else ""
        if not hmac.compare_digest(_hash(token), expected) or found is None:
            raise _unknown_token()
        self.require_valid(found)
        return found

    def require_valid(self, principal: Principal) -> None:
        """Refuse a principal that has expired, was revoked, or has another token by now.

        Raises:
            Unauthenticated: It is so.
        """
        now = self._read().get(principal.id)
        if now is None or now.token_sha256 != principal.token_sha256:
            raise _unknown_token()
        if now.revoked_at:
            raise Unauthenticated(
                f"The token of {now.name} was revoked.",
                fix="Ask who administers the stack for another.",
                reason="TOKEN_REVOKED",
            )
        if now.expires_at and now.expires_at <= time.time():
            raise Unauthenticated(
                f"The token of {now.name} expired at {_moment(now.expires_at)}.",
                fix=f"`web4lora people rotate {now.name}` gives another; an administrator may.",
                reason="TOKEN_EXPIRED",
            )

    def add(self, name: str, scope: Scope, expires_at: float = 0.0) -> tuple[Principal, str]:
        """Add a principal; return it and its token, which is kept nowhere.

        Raises:
            InvalidInput: The name is none, or the time is past.
            AlreadyExists: The name is or was another's.
            ResourceExhausted, FailedPrecondition: The file can't be written.
        """
        if not _NAME.fullmatch(name) or len(name) > _NAME_LENGTH or name in _RESERVED:
            raise InvalidInput(
                f"{shown(name)} is no principal's name: 1 to {_NAME_LENGTH} of a-z, 0-9 and single signs of "
                f"-._@ between them, a letter first, and none of {', '.join(_RESERVED)}.",
                metadata={"field": "name"},
            )
        _require_future(expires_at)
        with self._changing() as by_id:
            if any(other.name == name for other in by_id.values()):
                raise AlreadyExists(
                    f"There is or was a principal {name}.",
                    fix=f"Choose another name, or `web4lora people rotate {name}` for another token.",
                )
            made = Principal(name, scope, secrets.token_hex(6), "", time.time(), expires_at)
            made, token = _with_token(made)
            self.keep(made)
            by_id[made.id] = made
        return made, token

    def rotate(self, name: str, expires_at: float = 0.0) -> tuple[Principal, str]:
        """Give a principal another token, and another end; return it and the token.

        Raises:
            NotFound: There is none of that name.
            InvalidInput: The time is past.
            FailedPrecondition: It was revoked.
            ResourceExhausted: The file can't be written.
        """
        _require_future(expires_at)
        with self._changing() as by_id:
            found = _named(by_id, name)
            if found.revoked_at:
                raise FailedPrecondition(
                    f"{name} was revoked at {_moment(found.revoked_at)}.",
                    fix="Add a principal of another name.",
                )
            found, token = _with_token(replace(found, expires_at=expires_at))
            self.keep(found)
            by_id[found.id] = found
        return found, token

    def revoke(self, name: str) -> Principal:
        """Refuse a principal's token from now on; one that was revoked is returned as it is.

        Raises:
            NotFound: There is none of that name.
            ResourceExhausted, FailedPrecondition: The file can't be written.
        """
        with self._changing() as by_id:
            found = _named(by_id, name)
            if not found.revoked_at:
                found = replace(found, revoked_at=time.time())
                self.keep(found)
                by_id[found.id] = found
        return found

    def take(self, others: Callable[[], Iterable[Principal]]) -> None:
        """Write down principals as they are elsewhere, in place of those with the same ids.

        Args:
            others: Reads them; what it raises ends this.

        Raises:
            ResourceExhausted, FailedPrecondition: The file can't be read or written.
        """
        if {principal.id: principal for principal in others()}.items() <= self._read().items():
            return
        with self._changing() as by_id:  # read again, as they are while none changes here
            by_id.update((principal.id, principal) for principal in others())

    def _read(self) -> Mapping[str, Principal]:
        """Return the principals by id, read anew when the file has changed."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            self._seen, self._by_id = None, {}
            return self._by_id
        except OSError as error:
            raise self._unreadable(error.strerror or str(error)) from error
        seen = (status.st_mtime_ns, status.st_size, status.st_ino)
        if seen != self._seen:
            self._by_id = self._load()
            self._seen = seen
        return self._by_id

    def _load(self) -> dict[str, Principal]:
        try:
            data = json.loads(self._path.read_text(encoding="utf-8"))
            if data["form"] != _FORM:
                raise self._unreadable("it was written by another version")
            records = [Principal(**{**each, "scope": Scope(each["scope"])}) for each in data["principals"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._unreadable(f"{type(error).__name__}") from error
        return {record.id: record for record in records}

    def _unreadable(self, why: str) -> FailedPrecondition:
        return FailedPrecondition(
            f"{self._path} can't be read: {why}.",
            fix="Restore it, or remove it and add the principals again with the stack's own token.",
            reason="PRINCIPALS_UNREADABLE",
        )

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, Principal]]:
        """Give the principals to be changed, alone among processes; write them unless an error comes."""
        try:
            lock = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise disk_error(error, self._path) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            by_id = dict(self._read())
            yield by_id
            data: dict[str, Any] = {"form": _FORM, "principals": [asdict(each) for each in by_id.values()]}
            try:
                write_json(self._path, data)  # made by mkstemp: mode 0600
            except OSError as error:
                raise disk_error(error, self._path) from error
        finally:
            os.close(lock)


def _nowhere_else(_principal: Principal) -> None:
    """Keep a principal in the home alone."""


def _with_token(principal: Principal) -> tuple[Principal, str]:
    token = f"w4_{principal.id}_{secrets.token_urlsafe(32)}"
    return replace(principal, token_sha256=_hash(token)), token


def _hash(token: str) -> str:
    """Return what is kept of a token. It has 256 random bits, so a plain hash can't be guessed back."""
    return hashlib.sha256(token.encode()).hexdigest()


def _named(by_id: Mapping[str, Principal], name: str) -> Principal:
    found = [principal for principal in by_id.values() if principal.name == name]
    if found:  # two of them, where two gateways became one stack: the other is next once this one is revoked
        return min(found, key=lambda principal: principal.revoked_at)
    raise NotFound(f"There is no principal {shown(name)}.", fix="`web4lora people list` shows all.")


def _require_future(expires_at: float) -> None:
    if expires_at and expires_at <= time.time():
        raise InvalidInput(f"{_moment(expires_at)} is past.", metadata={"field": "expire_time"})


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _unknown_token() -> Unauthenticated:
    return Unauthenticated(
        "The token that was shown is nobody's.",
        fix="Is it whole, and of this stack? `web4lora people` gives tokens.",
        reason="TOKEN_UNKNOWN",
    )
