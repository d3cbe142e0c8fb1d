"""One family of errors: each says what went wrong and where, and, as `fix`, what to do about it.

`web4lora_chassis.rpc.errors` maps them to gRPC status codes and back, so an error raised in a worker
reaches a client as the same class.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar


class Web4Error(Exception):
    """The root: an error meant for people.

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
        super().__init__(message)
        self.message = message
        self.fix = fix
        self.reason = reason or self.default_reason
        self.metadata: dict[str, str] = {key: str(value) for key, value in (metadata or {}).items()}

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


class Cancelled(Web4Error):
    """The work was ended on request."""

    default_reason = "CANCELLED"


class Internal(Web4Error):
    """A defect of ours."""

    default_reason = "INTERNAL"


def disk_error(error: OSError, place: Path) -> Web4Error:
    """Return what a failed write or link at a place means for people."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
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
