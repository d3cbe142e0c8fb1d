"""What the workflow must know of a stage."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from web4.lora.v1 import artifacts_pb2, deployer_pb2
from web4lora_chassis.errors import Internal
from web4lora_chassis.rpc.jobs import to_json

from web4lora_gateway.pipeline import Pipeline
from web4lora_gateway.records import RunRecord
from web4lora_gateway.workers import Workers

M = TypeVar("M", bound=Message)


@dataclass(frozen=True)
class Inputs:
    """What a stage works from.

    Attributes:
        pipeline: What the run does.
        results: JSON data of the results of the stages before, by name.
        run_json: The run's facts so far, as run.json holds them.
    """

    pipeline: Pipeline
    results: Mapping[str, Mapping[str, Any]]
    run_json: str = ""

    @classmethod
    def of(cls, record: RunRecord, run_json: str = "") -> Inputs:
        """Take them from a run."""
        results = {stage.name: stage.result for stage in record.stages if stage.result is not None}
        return cls(Pipeline.from_json(record.pipeline), results, run_json)

    def result(self, stage: str, message: M) -> M:
        """Return the result of a stage before, filled into an empty message.

        Raises:
            Internal: That stage has no result.
        """
        if stage not in self.results:
            raise Internal(f"The stage {stage} has no result to go on from.")
        return ParseDict(dict(self.results[stage]), message, ignore_unknown_fields=True)


def _nothing(*_: object) -> tuple[()]:
    return ()


def _always(_: Inputs) -> bool:
    return True


def _no_deployment(*_: object) -> None:
    return None


def _spec_json(_: Inputs, spec: Message) -> dict[str, Any]:
    return to_json(spec)


Ref = artifacts_pb2.ArtifactRef


@dataclass(frozen=True)
class Calls:
    """How a stage is done that is no job: by a few calls of a worker, each safe to repeat.

    Attributes:
        decide: Says what to do, as JSON data. That is durable before anything is done, so a crash in between
            does not change it.
        act: Does what was decided and returns the result; may be done again after a crash.
        told: One line on a result for the run's log.
    """

    decide: Callable[[Inputs, Workers], Coroutine[Any, Any, Mapping[str, Any]]]
    act: Callable[[Inputs, Workers, Mapping[str, Any]], Coroutine[Any, Any, Message]]
    told: Callable[[Any], str]


@dataclass(frozen=True)
class Stage:
    """One stage of every run.

    Attributes:
        name: Its name, which is also the field of its spec in the worker's Create request.
        worker: Who does it.
        spec: Makes the spec of the worker's job; None when `calls` does the stage.
        result: An empty message of its result's type.
        identity: What decides its result, as JSON data; the spec unless said otherwise.
        key_tools: Versions of these tools of the worker decide its result too.
        reusable: Tells whether the inputs name their content, so that an earlier result can be taken over.
        artifacts: The artifacts that its result names; all must be in the store to take it over.
        deployment: The deployment that must still serve to take its result over.
        files: The artifacts whose files people look for in the run's folder.
        calls: How the stage is done without a job; never taken over from another run.
    """

    name: str
    worker: str
    spec: Callable[[Inputs], Message | None]
    result: Callable[[], Message]
    identity: Callable[[Inputs, Any], Mapping[str, Any]] = field(default=_spec_json)
    key_tools: tuple[str, ...] = ()
    reusable: Callable[[Inputs], bool] = field(default=_always)
    artifacts: Callable[[Any], tuple[Ref, ...]] = field(default=_nothing)
    deployment: Callable[[Inputs, Any], deployer_pb2.Deployment | None] = field(default=_no_deployment)
    files: Callable[[Any], tuple[Ref, ...]] = field(default=_nothing)
    calls: Calls | None = None

    def read(self, data: Mapping[str, Any]) -> Any:
        """Return a result's JSON data as its message."""
        return ParseDict(dict(data), self.result(), ignore_unknown_fields=True)
