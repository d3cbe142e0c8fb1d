"""What is known of a run and its stages, and its form in the database."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any, Self

from web4lora_chassis.jobs import JobFailure, Progress

STAGE_NAMES = ("prepare", "train", "package", "deploy", "verify", "promote")
"""The stages of a run, in order."""


class RunState(StrEnum):
    """Where a run stands; the names of the contract's RunState."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    CANCELLING = "CANCELLING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def terminal(self) -> bool:
        """True when the run will never change again."""
        return self in (RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED)


class StageState(StrEnum):
    """Where a stage stands; the names of the contract's StageState."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    REUSED = "REUSED"

    @property
    def done(self) -> bool:
        """True when the stage has a result."""
        return self in (StageState.SUCCEEDED, StageState.REUSED)


@dataclass(frozen=True)
class StageResult:
    """What a stage came to once, for this run or a later one to take over.

    Attributes:
        key: Digest of everything that went in.
        run_id: The run that made it.
        result: The result message's JSON data.
        versions: Versions of the worker and of its tools.
    """

    key: str
    run_id: str
    result: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StageRecord:
    """A stage as it is at one moment; times are seconds since 1970, 0 before they are known."""

    name: str
    state: StageState = StageState.PENDING
    progress: Progress = field(default_factory=Progress)
    error: JobFailure | None = None
    job_id: str = ""
    reused_from_run: str = ""
    started_at: float = 0.0
    ended_at: float = 0.0
    key: str = ""
    result: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read it back from JSON data."""
        fields = dict(data)
        fields["state"] = StageState(fields["state"])
        fields["progress"] = Progress(**fields["progress"])
        fields["error"] = JobFailure(**fields["error"]) if fields["error"] else None
        return cls(**fields)


@dataclass(frozen=True)
class RunRecord:
    """A run as it is at one moment.

    Attributes:
        id: run_<date>_<n>.
        request_id: The caller's key.
        request_digest: Tells whether a repeated request_id comes with the same request.
        nonce: Makes the keys of the run's jobs unique, even if the run's id was used by a lost database.
        pipeline: JSON data of the contract's Pipeline, every default filled in.
        from_stage: This stage and those after it run even if their inputs were run before; empty: none.
        taken_over: By stage, results of the run that this one retries.
        state: Where it stands.
        stages: Its stages, in order.
        error: Set when it failed.
        created_at: Seconds since 1970.
        ended_at: Seconds since 1970; 0 before.
        output_dir: Its folder for people; empty when there is none.
        revision: Grows with every change, over restarts too.
    """

    id: str
    request_id: str
    request_digest: str
    nonce: str
    pipeline: Mapping[str, Any]
    from_stage: str = ""
    taken_over: Mapping[str, StageResult] = field(default_factory=dict)
    state: RunState = RunState.QUEUED
    stages: tuple[StageRecord, ...] = tuple(StageRecord(name) for name in STAGE_NAMES)
    error: JobFailure | None = None
    created_at: float = 0.0
    ended_at: float = 0.0
    output_dir: str = ""
    revision: int = 1

    def stage(self, name: str) -> StageRecord:
        """Return a stage by its name; one that was not there yet when the run was made is still to come."""
        return next((stage for stage in self.stages if stage.name == name), StageRecord(name))

    def forced(self, name: str) -> bool:
        """Tell whether a stage must run even if the same inputs were run before."""
        return bool(self.from_stage) and STAGE_NAMES.index(name) >= STAGE_NAMES.index(self.from_stage)

    def changed(self, **fields: Any) -> RunRecord:
        """Return the run with other fields and a later revision."""
        # The clock carries the revision over a restart, which forgets the revisions of unsaved progress.
        return replace(self, revision=max(self.revision + 1, int(time.time() * 1000)), **fields)

    def with_stage(self, name: str, **fields: Any) -> RunRecord:
        """Return the run with other fields of one stage."""
        changed = replace(self.stage(name), **fields)
        stages = [changed if stage.name == name else stage for stage in self.stages]
        if changed not in stages:
            stages.append(changed)
        return self.changed(stages=tuple(stages))

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read it back from JSON data."""
        fields = dict(data)
        fields["state"] = RunState(fields["state"])
        fields["stages"] = tuple(StageRecord.from_json(stage) for stage in fields["stages"])
        fields["error"] = JobFailure(**fields["error"]) if fields["error"] else None
        fields["taken_over"] = {name: StageResult(**made) for name, made in fields["taken_over"].items()}
        return cls(**fields)
