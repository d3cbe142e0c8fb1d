"""The job resource as messages: what the five job RPCs of every worker have in common.

A worker's message, for example TrainerJob, has the field `job`, one field for each kind of spec, and one
named `<kind>_result` for each result; `JobApi` fills them by those names.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import Message
from web4.lora.v1 import jobs_pb2

from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.jobs import JobFailure, JobRecord, JobRunner

_MAX_PAGE_SIZE = 1000
_DEFAULT_PAGE_SIZE = 100

T = TypeVar("T")
M = TypeVar("M", bound=Message)


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
    if not 0 <= request.page_size <= _MAX_PAGE_SIZE:
        raise InvalidInput(f"page_size needs 0 to {_MAX_PAGE_SIZE}.", metadata={"field": "page_size"})
    start = 0
    if request.page_token:
        keys = [key(item) for item in items]
        if request.page_token not in keys:
            raise InvalidInput("page_token names no page of this listing.", metadata={"field": "page_token"})
        start = keys.index(request.page_token) + 1
    size = request.page_size or _DEFAULT_PAGE_SIZE
    rows = list(items[start : start + size])
    return rows, key(rows[-1]) if start + size < len(items) else ""


def failure_of(message: jobs_pb2.JobError) -> JobFailure:
    """Return the failure that a message holds."""
    return JobFailure(message.reason, message.message, message.fix, dict(message.metadata))


def _job_message(record: JobRecord) -> jobs_pb2.Job:
    progress = record.progress
    message = jobs_pb2.Job(
        id=record.id,
        state=jobs_pb2.JobState.Value(f"JOB_STATE_{record.state}"),
        progress=jobs_pb2.Progress(
            phase=progress.phase,
            done=progress.done,
            total=progress.total,
            unit=progress.unit,
            seconds_left=progress.seconds_left,
            figures=progress.figures,
            message=progress.message,
        ),
        request_id=record.request_id,
        attempt=record.attempt,
        revision=record.revision,
    )
    if record.error:
        error = record.error
        message.error.CopyFrom(
            jobs_pb2.JobError(
                reason=error.reason, message=error.message, fix=error.fix, metadata=error.metadata
            )
        )
    for field, seconds in (
        (message.create_time, record.created_at),
        (message.start_time, record.started_at),
        (message.end_time, record.ended_at),
    ):
        if seconds:
            field.FromMilliseconds(int(seconds * 1000))
    return message


class JobApi(Generic[M]):
    """Answers a worker's job RPCs from its `JobRunner`.

    Args:
        runner: The jobs.
        wrap: The worker's job message, for example TrainerJob.
        check: Called with kind and spec message before a job is accepted; raises InvalidInput.
    """

    def __init__(self, runner: JobRunner, wrap: type[M], check: Callable[[str, Any], None]) -> None:
        self._runner = runner
        self._wrap = wrap
        self._check = check

    async def create(self, request: Any) -> M:
        """Create the job that a Create request describes: the one spec that is set."""
        set_fields = [field.name for field, _ in request.ListFields()]
        kinds = [name for name in set_fields if name not in ("request_id", "secrets")]
        if len(kinds) != 1:
            raise InvalidInput("The request names no work: set exactly one spec.", metadata={"field": "spec"})
        kind = kinds[0]
        spec = getattr(request, kind)
        self._check(kind, spec)
        held = dict(getattr(request, "secrets", {}))
        return self._message(await self._runner.create(kind, request.request_id, to_json(spec), held))

    def get(self, job_id: str) -> M:
        """Return a job."""
        return self._message(self._runner.get(job_id))

    def list(self, request: PageRequest) -> tuple[list[M], str]:
        """Return a page of jobs, newest first, and the next page's token."""
        records, token = page(self._runner.list(), request, lambda record: record.id)
        return [self._message(record) for record in records], token

    async def watch(self, job_id: str) -> AsyncIterator[M]:
        """Yield snapshots of a job until it ends."""
        async for record in self._runner.watch(job_id):
            yield self._message(record)

    async def cancel(self, job_id: str) -> M:
        """Ask a job to end."""
        return self._message(await self._runner.cancel(job_id))

    def _message(self, record: JobRecord) -> M:
        data: dict[str, Any] = {record.kind: record.spec}
        if record.result is not None:
            data[f"{record.kind}_result"] = record.result
        message = ParseDict(data, self._wrap(), ignore_unknown_fields=True)
        message.job.CopyFrom(_job_message(record))  # type: ignore[attr-defined]
        return message


def to_json(message: Message) -> dict[str, Any]:
    """Return a message as JSON data with the contract's own field names; absent fields are left out."""
    data: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return data
