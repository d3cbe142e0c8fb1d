"""What the workflow must know of a stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from web4.lora.v1 import artifacts_pb2, deployments_pb2, jobs_pb2
from web4lora_chassis.errors import Internal
from web4lora_chassis.jobs import JobFailure
from web4lora_chassis.rpc import failure_of, from_json, to_json

from web4lora_gateway.keys import stage_key
from web4lora_gateway.outcomes import Decision, Done, Failed
from web4lora_gateway.pipeline import Pipeline
from web4lora_gateway.records import RunRecord
from web4lora_gateway.workers import Deployer, WorkerInfo

S = TypeVar("S", bound=Message)
R = TypeVar("R", bound=Message)
Ref = artifacts_pb2.ArtifactRef


class Stage(ABC, Generic[R]):
    """One stage of every run; `JobStage` or `CallStage` says how it is done.

    Attributes:
        name: Its name, which is also that of its spec and its result in the worker's job.
        worker: Who does it.
        made: The message of its result.
    """

    name: ClassVar[str]
    worker: ClassVar[str]
    made: type[R]

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> R:
        """Return a result's JSON data as its message."""
        return from_json(cls.made, data)

    def files(self, _result: R) -> tuple[Ref, ...]:
        """Return the artifacts whose files people look for in the run's folder."""
        return ()

    def accept(self, _inputs: Inputs, _result: R) -> None:
        """Refuse a result, taken over or new, that the run's settings do not fit; none unless said otherwise.

        With it later stages would fail. The result is kept, for the run with better settings.

        Raises:
            InvalidInput: Names the field.
        """


@dataclass(frozen=True)
class Inputs:
    """What a stage works from.

    Attributes:
        pipeline: What the run does.
        results: JSON data of the results of the stages before, by name.
        facts: Makes the run's facts so far, as run.json holds them.
    """

    pipeline: Pipeline
    results: Mapping[str, Mapping[str, Any]]
    facts: Callable[[], str] = str

    @classmethod
    def of(cls, record: RunRecord, facts: Callable[[], str] = str) -> Inputs:
        """Take them from a run."""
        results = {stage.name: stage.result for stage in record.stages if stage.result is not None}
        return cls(Pipeline.from_json(record.pipeline), results, facts)

    def find(self, stage: type[Stage[R]]) -> R | None:
        """Return the result of a stage before, or None."""
        return stage.read(self.results[stage.name]) if stage.name in self.results else None

    def of_stage(self, stage: type[Stage[R]]) -> R:
        """Return the result of a stage before.

        Raises:
            Internal: That stage has no result.
        """
        result = self.find(stage)
        if result is None:
            raise Internal(f"The stage {stage.name} has no result to go on from.")
        return result


class JobStage(Stage[R], Generic[S, R]):
    """A stage that is a job of its worker. Its result can be taken over by a run with the same inputs.

    Attributes:
        revision: Raised when the same inputs give another result than before: what an older version made is
            then not taken over.
        key_tools: Versions of these tools of the worker decide its result too.
        asks_first: The worker is asked what it is before the spec is complete.
        lane: Of its worker, where that has several; each does one job at a time.
    """

    revision: ClassVar[int] = 1
    key_tools: ClassVar[tuple[str, ...]] = ()
    asks_first: ClassVar[bool] = False
    lane: ClassVar[str] = ""

    @abstractmethod
    def spec(self, inputs: Inputs) -> S:
        """Make the spec of the worker's job."""

    def complete(self, spec: S, info: WorkerInfo) -> None:
        """Fill in what the pipeline leaves to the worker; only of a stage that asks first."""

    def identity(self, _inputs: Inputs, spec: S) -> Mapping[str, Any]:
        """Return what decides the result, as JSON data: the spec, unless said otherwise."""
        return to_json(spec)

    def needs(self, _inputs: Inputs) -> tuple[int, float]:
        """Return the memory, in bytes, and the time, in seconds, that the job will need; 0 where unknown."""
        return 0, 0.0

    def work(self, spec: Mapping[str, Any]) -> jobs_pb2.JobSpec:
        """Return the work of a spec, given as JSON data."""
        return ParseDict({self.name: dict(spec)}, jobs_pb2.JobSpec())

    def outcome(self, job: jobs_pb2.Job) -> Done | Failed:
        """Return what a job that has ended came to."""
        if job.state == jobs_pb2.JOB_STATE_FAILED:
            return Failed(failure_of(job.error))
        if job.state == jobs_pb2.JOB_STATE_CANCELLED:
            text = f"The {self.worker}'s job {job.id} was cancelled there."
            return Failed(JobFailure("CANCELLED", text, "Retry the run."))
        return Done(to_json(job.result)[self.name], job.id)

    def key(self, inputs: Inputs, spec: S, versions: Mapping[str, str]) -> str:
        """Return the key of the result: a digest of everything that goes in."""
        tools = {tool: versions.get(tool, "") for tool in self.key_tools}
        parts = {"identity": self.identity(inputs, spec), "tools": tools, "revision": self.revision}
        return stage_key(self.name, parts)

    def reusable(self, _inputs: Inputs) -> bool:
        """Tell whether the inputs name their content, so that an earlier result can be taken over."""
        return True

    def complete_result(self, _result: R) -> bool:
        """Tell whether a result is all that its inputs make, so that later runs can take it over."""
        return True

    @abstractmethod
    def artifacts(self, result: R) -> tuple[Ref, ...]:
        """Return the artifacts that a result names; all must be in the store to take it over."""

    def deployment(self, _inputs: Inputs, _result: R) -> deployments_pb2.Deployment | None:
        """Return the deployment that must still serve to take a result over."""
        return None


class CallStage(Stage[R]):
    """A stage that is done by a few calls of the deployer, each safe to repeat; never taken over."""

    worker = "deployer"

    @abstractmethod
    async def decide(self, inputs: Inputs, deployer: Deployer) -> Decision:
        """Say what to do. That is durable before it is done, so a crash in between does not change it."""

    @abstractmethod
    async def act(self, inputs: Inputs, deployer: Deployer, decision: Decision) -> R:
        """Do what was decided and return the result; may be done again after a crash."""

    @abstractmethod
    def summary(self, result: R) -> str:
        """Return one line on a result for the run's log."""

    def although_cancelled(self, result: R) -> R:
        """Return a result that says that the run was cancelled too late to stop it."""
        return result
