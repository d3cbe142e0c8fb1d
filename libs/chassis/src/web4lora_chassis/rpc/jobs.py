"""The job resource as messages, and the five RPCs that every worker serves for its jobs alike."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import PurePosixPath
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from web4.lora.v1 import jobs_pb2, jobs_pb2_grpc

from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.jobs import (
    JobContext,
    JobFailure,
    JobRecord,
    JobRunner,
    JobState,
    Progress,
    worker_main,
)
from web4lora_chassis.jobs.child import Handler
from web4lora_chassis.rpc.auth import caller
from web4lora_chassis.rpc.bounds import fitting
from web4lora_chassis.rpc.json_data import from_json, to_json

_MAX_PAGE_SIZE = 1000
_DEFAULT_PAGE_SIZE = 100

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]
Check = Callable[[Any, Context], object]
"""Given a spec and the call that brought it; raises InvalidInput for one that could never be done."""


class PageRequest(Protocol):
    """A List request."""

    page_size: int
    page_token: str


def page(items: Sequence[T], request: PageRequest, key: Callable[[T], str]) -> tuple[list[T], str]:
    """Return a page of items and the token of the next one.

    Args:
        items: All items, in the listing's order.
        request: The List request.
        key: An item's id; the token is the id of the last item of the page before.

    Raises:
        InvalidInput: A page size or token out of bounds.
    """
    size = page_size(request)
    start = 0
    if request.page_token:
        keys = [key(item) for item in items]
        if request.page_token not in keys:
            raise InvalidInput("page_token names no page of this listing.", metadata={"field": "page_token"})
        start = keys.index(request.page_token) + 1
    rows = list(items[start : start + size])
    return rows, key(rows[-1]) if start + size < len(items) else ""


def page_size(request: PageRequest) -> int:
    """Return how many items a page has at most.

    Raises:
        InvalidInput: It is out of bounds.
    """
    if not 0 <= request.page_size <= _MAX_PAGE_SIZE:
        raise InvalidInput(f"page_size needs 0 to {_MAX_PAGE_SIZE}.", metadata={"field": "page_size"})
    return request.page_size or _DEFAULT_PAGE_SIZE


def failure_of(message: jobs_pb2.JobError) -> JobFailure:
    """Return the failure that a message holds."""
    return JobFailure(message.reason, message.message, message.fix, dict(message.metadata))


def failure_message(failure: JobFailure | None) -> jobs_pb2.JobError | None:
    """Return a failure as a message."""
    return jobs_pb2.JobError(**asdict(failure)) if failure else None


def progress_of(message: jobs_pb2.Progress) -> Progress:
    """Return the progress that a message holds."""
    return Progress(
        message.phase, message.done, message.total, message.unit, message.seconds_left,
        dict(message.figures), message.message,
    )  # fmt: skip


def progress_message(progress: Progress) -> jobs_pb2.Progress:
    """Return progress as a message."""
    return jobs_pb2.Progress(**asdict(progress))


def timestamp(seconds: float) -> Timestamp | None:
    """Return a time, in seconds since 1970, as a message; 0 is none."""
    if not seconds:
        return None
    message = Timestamp()
    message.FromMilliseconds(int(seconds * 1000))
    return message


def job_message(record: JobRecord, notice: str = "") -> jobs_pb2.Job:
    """Return a job as a message; its kind is the field of its spec and of its result.

    Args:
        record: The job.
        notice: What people who follow a job at work should know of its machine; empty: nothing.
    """
    progress = record.progress
    if notice and record.state is JobState.RUNNING:
        progress = replace(progress, message=" · ".join(filter(None, (progress.message, notice))))
    result = None if record.result is None else {record.kind: record.result}
    return jobs_pb2.Job(
        id=record.id,
        state=jobs_pb2.JobState.Value(f"JOB_STATE_{record.state}"),
        progress=progress_message(progress),
        error=failure_message(record.error),
        request_id=record.request_id,
        attempt=record.attempt,
        create_time=timestamp(record.created_at),
        start_time=timestamp(record.started_at),
        end_time=timestamp(record.ended_at),
        revision=record.revision,
        owner=record.owner,
        spec=from_json(jobs_pb2.JobSpec, {record.kind: record.spec}),
        result=from_json(jobs_pb2.JobResult, result) if result else None,
    )


class JobService(jobs_pb2_grpc.JobServiceServicer):
    """Answers the contract's JobService for a worker.

    Args:
        worker: Its name, for errors.
        runner: Its jobs.
        checks: What refuses a spec before its job is accepted, by each kind of job that the worker does.
        notice: Says what people who follow a job at work should know of the machine.
    """

    def __init__(
        self,
        worker: str,
        runner: JobRunner,
        checks: Mapping[str, Check],
        notice: Callable[[], str] = str,
    ) -> None:
        self._notice = notice
        self._worker = worker
        self._runner = runner
        self._checks = checks

    async def CreateJob(
        self, request: jobs_pb2.CreateJobRequest, context: Context
    ) -> jobs_pb2.CreateJobResponse:
        """Create a job."""
        kind = request.spec.WhichOneof("kind")
        if kind is None:
            raise InvalidInput("The request names no work: set exactly one spec.", metadata={"field": "spec"})
        spec: Message = getattr(request.spec, kind)
        if kind not in self._checks:
            raise InvalidInput(
                f"The {self._worker} does no {kind} jobs.",
                fix=f"Ask the {worker_of(spec)}.",
                reason="OTHER_WORKER",
                metadata={"field": "spec"},
            )
        self._checks[kind](spec, context)
        record = await self._runner.create(
            kind, request.request_id, to_json(spec), dict(request.secrets), owner=caller().on_behalf_of
        )
        return jobs_pb2.CreateJobResponse(job=self._message(record))

    async def GetJob(self, request: jobs_pb2.GetJobRequest, _: Context) -> jobs_pb2.GetJobResponse:
        """Return a job."""
        return jobs_pb2.GetJobResponse(job=self._message(self._runner.get(request.id)))

    async def ListJobs(self, request: jobs_pb2.ListJobsRequest, _: Context) -> jobs_pb2.ListJobsResponse:
        """Return a page of jobs, newest first, and the next page's token."""
        records, token = page(self._runner.list(), request, lambda record: record.id)
        jobs, token = fitting([self._message(record) for record in records], token, lambda job: job.id)
        return jobs_pb2.ListJobsResponse(jobs=jobs, next_page_token=token)

    async def WatchJob(
        self, request: jobs_pb2.WatchJobRequest, _: Context
    ) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        """Yield snapshots of a job until it ends."""
        async for record in self._runner.watch(request.id):
            yield jobs_pb2.WatchJobResponse(job=self._message(record))

    async def CancelJob(self, request: jobs_pb2.CancelJobRequest, _: Context) -> jobs_pb2.CancelJobResponse:
        """Ask a job to end."""
        end = self._runner.end_early if request.keep else self._runner.cancel
        return jobs_pb2.CancelJobResponse(job=self._message(await end(request.id)))

    def _message(self, record: JobRecord) -> jobs_pb2.Job:
        return job_message(record, self._notice())


def worker_of(spec: Message) -> str:
    """Return who does the work of a spec: its message stands in the file of the contract named so."""
    return PurePosixPath(spec.DESCRIPTOR.file.name).stem


def job_process(handlers: Mapping[str, Callable[[Any, JobContext], Message]]) -> int:
    """Be the process of a worker's job; return its exit code.

    Args:
        handlers: What does each kind of job, from its spec to its result.
    """

    def in_json(kind: str, handler: Callable[[Any, JobContext], Message]) -> Handler:
        def work(context: JobContext) -> Mapping[str, Any]:
            spec = ParseDict({kind: dict(context.spec)}, jobs_pb2.JobSpec())
            return to_json(handler(getattr(spec, kind), context))

        return work

    return worker_main({kind: in_json(kind, handler) for kind, handler in handlers.items()})
