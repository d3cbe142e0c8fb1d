"""What the steps of a stage come to, and its form on disk: the workflow engine keeps it as JSON.

The form is the one that was kept from the first version on, so that a newer gateway goes on with a run that
an older one left at work: which class it is, is told by the fields that are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter
from web4lora_chassis.errors import Cancelled, Web4Error
from web4lora_chassis.jobs import JobFailure

from web4lora_gateway.records import StageResult

T = TypeVar("T")
_STRICT = ConfigDict(extra="forbid")


class Do(StrEnum):
    """What a stage that is no job does."""

    PROMOTE = "promote"
    KEEP = "keep"
    ROLL_BACK = "roll back"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Decision:
    """What to do, and why, in words. It is durable before it is done: a crash in between changes nothing."""

    do: Do
    why: str = ""


@dataclass(frozen=True)
class Begun:
    """The run has begun."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    begun: Literal[True] = True


@dataclass(frozen=True)
class Reuse:
    """A plan: an earlier result is taken over.

    Attributes:
        key: Digest of everything that went in.
        reused: The result.
        versions: None; it has its own.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    key: str
    reused: StageResult
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DoJob:
    """A plan: the worker does a job.

    Attributes:
        key: Digest of everything that goes in.
        spec: JSON data of the job's spec.
        versions: Versions of the worker and its tools.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    key: str
    spec: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DoCalls:
    """A plan: the worker is called; see `CallStage`.

    Attributes:
        key: Digest of the decision.
        decision: What to do.
        versions: None: the worker's own work is not asked for.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    key: str
    decision: Decision
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """An outcome: the stage has a result, as JSON data, made by a job or by calls."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    result: Mapping[str, Any]
    job_id: str = ""


@dataclass(frozen=True)
class Failed:
    """An outcome: the stage, or the run before it, failed."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    error: JobFailure


@dataclass(frozen=True)
class Stopped:
    """An outcome: the run was cancelled. The note says what became of the job, where that is not plain."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    cancelled: Literal[True] = True
    note: str = ""


Plan = Reuse | DoJob | DoCalls
Ended = Failed | Stopped


def ended_by(error: Web4Error) -> Ended:
    """Return the outcome that an error means."""
    return Stopped() if isinstance(error, Cancelled) else Failed(JobFailure.of(error))


class Kept(Generic[T]):
    """Brings outcomes of some classes into JSON data and back."""

    def __init__(self, kind: Any) -> None:
        self._adapter: TypeAdapter[T] = TypeAdapter(kind)

    def to_json(self, outcome: T) -> Any:
        """Return it as JSON data."""
        return self._adapter.dump_python(outcome, mode="json")

    def from_json(self, data: Any) -> T:
        """Read it back; what an older version kept names the fields of other classes too, as null."""
        if isinstance(data, dict):
            data = {name: value for name, value in data.items() if value is not None}
        return self._adapter.validate_python(data)


BEGUN: Kept[Begun | Failed | Stopped] = Kept(Begun | Failed | Stopped)
PLANNED: Kept[Plan | Ended] = Kept(Plan | Ended)
WORKED: Kept[Done | Ended] = Kept(Done | Ended)
YES_OR_NO: Kept[bool] = Kept(bool)
