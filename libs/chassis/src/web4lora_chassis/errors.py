"""One family of errors: each says what went wrong and where, and, as `fix`, what to do about it.

`web4lora_chassis.rpc.errors` maps them to gRPC status codes and back, so an error raised in a worker
reaches a client as the same class.

    Web4Error
    ├── of what was asked for, and stays wrong until it is asked for otherwise
    │   ├── InvalidInput        a value, a file or a row is wrong
    │   ├── NotFound            there is no such thing
    │   ├── AlreadyExists       the name or key is taken
    │   ├── Unauthenticated     no valid token
    │   └── PermissionDenied    a valid one that does not allow this
    ├── of the state of things, and right once that is changed
    │   ├── FailedPrecondition  something must be done first
    │   ├── ResourceExhausted   memory, disk or another limit
    │   │   └── OutOfMemory     while working
    │   └── DataLoss            bytes are not what their digest says
    ├── of the moment, and gone at another one
    │   ├── Unavailable         out of reach or busy: trying again may help
    │   └── Cancelled           ended on request
    └── Internal                a defect of ours
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

_UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def shown(value: object, limit: int = 80) -> str:
    """Write what a file or a caller says so that it fits into a line of an error: quoted, and shortened."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; data nested too deeply
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _printable(text: str) -> str:
    """Return a text that terminals, logs and gRPC take, whatever came into it from outside."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class Web4Error(Exception):
    """The root: an error meant for people.

    Its texts can be printed and sent: control signs and halves of surrogate pairs are written as escapes.

    Attributes:
        message: What went wrong, and where.
        fix: What to do about it; may be empty.
        reason: A stable word in UPPER_SNAKE_CASE for programs.
        metadata: Details by name.
    """

    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        fix: str = "",
        reason: str = "",
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        self.message = _printable(message)
        self.fix = _printable(fix)
        super().__init__(self.message)
        self.reason = reason or self.default_reason
        self.metadata: dict[str, str] = {
            key: _printable(str(value)) for key, value in (metadata or {}).items()
        }

    def __str__(self) -> str:
        """Return the message and, on a line of its own, the fix."""
        return f"{self.message}\n  {self.fix}" if self.fix else self.message


class InvalidInput(Web4Error):
    """What the user or caller gave is wrong, whatever the state of the system."""

    default_reason = "INVALID_INPUT"


class NotFound(Web4Error):
    """What was asked for is not there."""

    default_reason = "NOT_FOUND"


class AlreadyExists(Web4Error):
    """The name or key is taken by something else."""

    default_reason = "ALREADY_EXISTS"


class FailedPrecondition(Web4Error):
    """The system is not in the state that this needs."""

    default_reason = "FAILED_PRECONDITION"


class ResourceExhausted(Web4Error):
    """Memory, disk or another limit is used up, or would be."""

    default_reason = "RESOURCE_EXHAUSTED"


class OutOfMemory(ResourceExhausted):
    """Memory ran out while working."""

    default_reason = "OUT_OF_MEMORY"


class Unavailable(Web4Error):
    """A service or server is out of reach; trying again may help."""

    default_reason = "UNAVAILABLE"


class DataLoss(Web4Error):
    """Bytes are not what their digest says."""

    default_reason = "DATA_LOSS"


class Unauthenticated(Web4Error):
    """The caller showed no valid token."""

    default_reason = "UNAUTHENTICATED"


class PermissionDenied(Web4Error):
    """The caller is known, and may not do this."""

    default_reason = "PERMISSION_DENIED"


class Cancelled(Web4Error):
    """The work was ended on request."""

    default_reason = "CANCELLED"


class Internal(Web4Error):
    """A defect of ours."""

    default_reason = "INTERNAL"


def no_room(error: BaseException) -> bool:
    """Tell whether an error means that a disk is full.

    `tempfile` looks for a folder that it can write to, and where all are full it says that it found none.
    """
    if not isinstance(error, OSError):
        return False
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or (
        isinstance(error, FileNotFoundError) and "No usable temporary directory" in str(error)
    )


def disk_error(error: OSError, place: Path) -> Web4Error:
    """Return what a failed write or link at a place means for people."""
    if no_room(error):
        return ResourceExhausted(
            f"The disk is full: {place} could not be written.",
            fix="Free disk space, then try again.",
            reason="DISK_FULL",
            metadata={"path": place},
        )
    if isinstance(error, FileNotFoundError):
        return NotFound(
            f"{error.filename or place} is not there.", metadata={"path": error.filename or place}
        )
    return FailedPrecondition(
        f"{place} could not be written: {error.strerror or error}.",
        fix="Check the folder's owner and permissions.",
        reason="NOT_WRITABLE",
        metadata={"path": place},
    )
