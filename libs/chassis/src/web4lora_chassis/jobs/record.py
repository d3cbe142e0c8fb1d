"""What is known of a job, and its form on disk."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from web4lora_chassis.errors import Web4Error

LESS_MEMORY = "Close other programs, or choose a smaller base model or tokens_per_batch."
SECRETS_VARIABLE = "WEB4LORA_JOB_SECRETS"
"""Set for a child whose service writes the job's secrets, a line of JSON, to its standard input."""

END_EARLY_FILE = "end_early"
"""Lies in a job's folder once its work is to end early and keep what it made; a restart finds it there."""


class JobState(StrEnum):
    """Where a job stands; the names of the contract's JobState."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    CANCELLING = "CANCELLING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def terminal(self) -> bool:
        """True when the job will never change again."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True)
class Progress:
    """How far a job is; see the contract's Progress.

    Attributes:
        phase: The step at work, in words.
        done: Finished units.
        total: Units of this phase; 0 while unknown.
        unit: What a unit is: "steps", "bytes", "prompts".
        seconds_left: Time left of this phase; 0 while unknown.
        figures: Figures worth showing, by name.
        message: One line for people.
    """

    phase: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""
    seconds_left: float = 0.0
    figures: Mapping[str, float] = field(default_factory=dict)
    message: str = ""


@dataclass(frozen=True)
class JobFailure:
    """Why a job failed; see the contract's JobError."""

    reason: str
    message: str
    fix: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, error: Web4Error) -> Self:
        """Take it from an error."""
        return cls(error.reason, error.message, error.fix, error.metadata)


@dataclass(frozen=True)
class JobRecord:
    """A job as it is at one moment.

    Attributes:
        id: The worker's name for it.
        kind: Which handler does it; the field of the contract's `spec` that is set.
        request_id: The caller's key.
        spec: What to do, as JSON data of the contract's message.
        state: Where it stands.
        progress: How far it is.
        error: Set when it failed.
        result: Set when it succeeded: JSON data of the contract's message.
        attempt: How often its child was started.
        memory_failures: How often its child ended for want of memory.
        created_at: Seconds since 1970.
        started_at: Seconds since 1970; 0 before.
        ended_at: Seconds since 1970; 0 before.
        revision: Grows with every change.
        owner: For whom the gateway created it; empty for the jobs of runs.
        stopped: The service was stopped, not killed, while it was at work.
        interruptions: How often its service ended while it was at one place; see `attempts`.
        reached: The furthest place at an interruption, by phase.
        origin: What the call that created it was for, `run` and `traceparent`: for logs and traces alone.
    """

    id: str
    kind: str
    request_id: str
    spec: Mapping[str, Any]
    state: JobState = JobState.QUEUED
    progress: Progress = Progress()
    error: JobFailure | None = None
    result: Mapping[str, Any] | None = None
    attempt: int = 0
    memory_failures: int = 0
    created_at: float = 0.0
    started_at: float = 0.0
    ended_at: float = 0.0
    revision: int = 1
    owner: str = ""
    stopped: bool = False
    interruptions: int = 0
    reached: Mapping[str, int] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)

    def changed(self, **fields: Any) -> JobRecord:
        """Return the job with other fields and the next revision, unless one is given."""
        return replace(self, **{"revision": self.revision + 1, **fields})

    def save(self, path: Path) -> None:
        """Write it to disk so that a reader sees the old or the new one, and a crash loses neither."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read it from disk."""
        data = json.loads(path.read_text(encoding="utf-8"))
        data["state"] = JobState(data["state"])
        data["progress"] = Progress(**data["progress"])
        data["error"] = JobFailure(**data["error"]) if data["error"] else None
        return cls(**data)


def write_json(path: Path, data: Any) -> None:
    """Write JSON data to a file, replacing it at once, flushed to the disk."""
    handle, name = tempfile.mkstemp(prefix=".part-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
