"""What is known of a run and its stages, and its form in the database.

A document says which version of the form it has. What this version does not know of it, a newer one having
written it, is kept and written back.
"""

from __future__ import annotations

import functools
import time
from collections.abc import KeysView, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, Self

from web4lora_chassis.jobs import JobFailure, Progress

SCHEMA = 2
"""Version of the form of a run's document: raised when an older gateway would misread it."""

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
    QUEUED = "QUEUED"
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
        work_seconds: How long the work took; 0 when that is not known.
        unknown: Fields that a newer version wrote.
    """

    key: str
    run_id: str
    result: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)
    work_seconds: float = 0.0
    unknown: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return _data(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read it back from JSON data."""
        return cls(**_known(cls, data))


@dataclass(frozen=True)
class StageRecord:
    """A stage as it is at one moment; times are seconds since 1970, 0 before they are known.

    `work_seconds` is how long the work took: of a stage that was taken over, when it ran. `begun` says that
    what can't be called back was begun. `unknown` holds fields that a newer version wrote.
    """

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
    work_seconds: float = 0.0
    begun: bool = False
    unknown: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return _data(self, progress=asdict(self.progress), error=_failure_data(self.error))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read it back from JSON data."""
        known = _known(cls, data)
        known["state"] = StageState(known["state"])
        known["progress"] = progress_from_json(known["progress"])
        known["error"] = _failure(known["error"])
        return cls(**known)


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
        owner: Who made it; empty when that is not known.
        kept: It stays whatever the retention settings say.
        labels: What it is found by, as its maker says.
        priority: What comes first where runs wait: a word of `PRIORITIES`.
        device: A word that the trainer's device must hold; empty: any.
        sweep: The sweep that it is one of; empty: of none.
        sweep_values: The values that the sweep gave it, by key.
        forked_from: The run whose finished stages it takes over where their inputs are the same.
        schema: Version of the document's form.
        unknown: Fields that a newer version wrote.
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
    owner: str = ""
    kept: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    priority: str = "normal"
    device: str = ""
    sweep: str = ""
    sweep_values: Mapping[str, str] = field(default_factory=dict)
    forked_from: str = ""
    schema: int = SCHEMA
    unknown: Mapping[str, Any] = field(default_factory=dict)

    def stage(self, name: str) -> StageRecord:
        """Return a stage by its name; one that was not there yet when the run was made is still to come."""
        return next((stage for stage in self.stages if stage.name == name), StageRecord(name))

    def forced(self, name: str) -> bool:
        """Tell whether a stage must run even if the same inputs were run before."""
        return bool(self.from_stage) and STAGE_NAMES.index(name) >= STAGE_NAMES.index(self.from_stage)

    def changed(self, **fields: Any) -> RunRecord:
        """Return the run with other fields and a later revision."""
        return replace(self, revision=later(self.revision), **fields)

    def with_stage(self, name: str, **fields: Any) -> RunRecord:
        """Return the run with other fields of one stage."""
        changed = replace(self.stage(name), **fields)
        stages = [changed if stage.name == name else stage for stage in self.stages]
        if changed not in stages:
            stages.append(changed)
        return self.changed(stages=tuple(stages))

    def queued(self, name: str, *, waits: bool) -> RunRecord:
        """Return the run with a stage that waits for its turn, or has it; unchanged where that is known."""
        state = StageState.QUEUED if waits else StageState.RUNNING
        if self.stage(name).state is state or self.stage(name).state not in (
            StageState.QUEUED,
            StageState.RUNNING,
        ):
            return self
        begins = {} if waits else {"started_at": time.time()}
        changed = self.with_stage(name, state=state, **begins)
        if self.state not in (RunState.QUEUED, RunState.RUNNING):
            return changed
        return replace(changed, state=RunState.QUEUED if waits else RunState.RUNNING)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return _data(
            self,
            stages=[stage.to_json() for stage in self.stages],
            taken_over={name: made.to_json() for name, made in self.taken_over.items()},
            error=_failure_data(self.error),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read it back from JSON data.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: It is no document of this version.
        """
        known = _known(cls, data)
        if data.get("schema", 1) > SCHEMA:
            raise ValueError(f"its form is of version {data['schema']}; this gateway reads {SCHEMA} at most")
        known["schema"] = SCHEMA
        known["state"] = RunState(known["state"])
        known["stages"] = tuple(StageRecord.from_json(stage) for stage in known["stages"])
        known["error"] = _failure(known["error"])
        known["taken_over"] = {
            name: StageResult.from_json(made) for name, made in known["taken_over"].items()
        }
        return cls(**known)


def later(revision: int) -> int:
    """Return a later revision. The clock carries it over a restart, which forgets those not saved."""
    return max(revision + 1, int(time.time() * 1000))


@dataclass(frozen=True)
class UnreadableRun:
    """A run whose document this version can't read: what the columns beside it say.

    Attributes:
        id: run_<date>_<n>.
        request_id: The caller's key.
        name: The pipeline's name; empty when that is not known.
        state: Where it stood, in the word of the version that wrote it; empty when that is not known.
        created_at: Seconds since 1970.
        revision: Grows with every change.
        error: What is wrong with the document, for people.
        owner: Whose it is; empty: not known, so only who may administer may delete it.
    """

    id: str
    request_id: str
    name: str
    state: str
    created_at: float
    revision: int
    error: JobFailure
    owner: str = ""


def progress_from_json(data: Mapping[str, Any]) -> Progress:
    """Read a progress back from JSON data; what is not known of it is left out, the next one replaces it."""
    names = _names(Progress)
    return Progress(**{name: value for name, value in data.items() if name in names})


def _failure(data: Mapping[str, Any] | None) -> JobFailure | None:
    if not data:
        return None
    names = _names(JobFailure)
    return JobFailure(**{name: value for name, value in data.items() if name in names})


def _failure_data(failure: JobFailure | None) -> dict[str, Any] | None:
    return asdict(failure) if failure else None


def _known(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a class has; all others together as `unknown`."""
    names = _names(cls) - {"unknown"}
    known = {name: value for name, value in data.items() if name in names}
    unknown = {name: value for name, value in data.items() if name not in names}
    return {**known, "unknown": unknown}


def _data(record: Any, **inner: Any) -> dict[str, Any]:
    """Return a record's fields, those that a newer version wrote in their place; `inner` are records in it.

    Nothing is copied: it is written down at once, and pipelines and results are large.
    """
    data = {name: getattr(record, name) for name in _names(record.__class__)} | inner
    return {**data.pop("unknown"), **data}


@functools.cache
def _names(cls: type) -> KeysView[str]:
    return {each.name: None for each in fields(cls)}.keys()
