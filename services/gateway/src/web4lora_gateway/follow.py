"""Follow one job of a worker to its end, over restarts of either side, or cancel it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from web4.lora.v1 import jobs_pb2
from web4lora_chassis.errors import Cancelled, NotFound, Unavailable
from web4lora_chassis.jobs import Progress

from web4lora_gateway.workers import Worker, ended

_FIRST_DELAY_SECONDS = 0.5
_LONGEST_DELAY_SECONDS = 5.0
_CANCEL_LIMIT_SECONDS = 20.0

T = TypeVar("T")
Report = Callable[[Progress], Awaitable[None]]


@dataclass(frozen=True)
class Work:
    """A job to be done.

    Attributes:
        kind: The field of its spec in the worker's Create request.
        request_id: The same for the same work, so that a repeated Create finds the first one's job.
        spec: JSON data of the contract's message.
    """

    kind: str
    request_id: str
    spec: Mapping[str, Any]


async def race(work: Coroutine[Any, Any, T], cancelled: asyncio.Event) -> T:
    """Return what some work comes to, unless the event is set first.

    Raises:
        Cancelled: The event was set; the work was stopped.
    """
    task = asyncio.ensure_future(work)
    waiter = asyncio.ensure_future(cancelled.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("The run was cancelled.")
        return task.result()
    finally:
        for pending in (task, waiter):
            pending.cancel()
        await asyncio.gather(task, waiter, return_exceptions=True)


async def patiently(
    call: Callable[[], Coroutine[Any, Any, T]], who: str, report: Report, cancelled: asyncio.Event
) -> T:
    """Repeat a repeatable call until whom it needs is in reach.

    Args:
        call: Makes the call.
        who: Whom it needs, for the progress message.
        report: Told while it waits.
        cancelled: Ends it.

    Raises:
        Cancelled: The event was set.
        Web4Error: Any error but Unavailable.
    """
    delay_seconds = _FIRST_DELAY_SECONDS
    while True:
        try:
            return await race(call(), cancelled)
        except Unavailable:
            await report(_waiting(who))
        await race(asyncio.sleep(delay_seconds), cancelled)
        delay_seconds = min(2 * delay_seconds, _LONGEST_DELAY_SECONDS)


async def follow(
    worker: Worker,
    work: Work,
    *,
    created: Callable[[str], Awaitable[None]],
    report: Report,
    cancelled: asyncio.Event,
) -> Any:
    """Have a worker do a job and return the job's last message.

    A worker that is out of reach is waited for as long as it takes: it may be down for a while, and finds the
    job on its disk when it is back.

    Args:
        worker: Who does it.
        work: What to do.
        created: Told the job's id once it is known.
        report: Told how far the job is.
        cancelled: Ends the following; the job itself is the caller's to cancel.

    Raises:
        Cancelled: The event was set.
        Web4Error: The worker refused the job.
    """
    delay_seconds = _FIRST_DELAY_SECONDS
    who = f"the {worker.name} at {worker.address}"
    while not cancelled.is_set():
        try:
            # Not raced: a Create cut off half-way could leave a job behind that nobody knows of.
            message = await worker.create(work.request_id, work.kind, work.spec)
        except Unavailable:
            await report(_waiting(who))
        else:
            await created(message.job.id)
            delay_seconds = _FIRST_DELAY_SECONDS
            try:
                last = await race(_watch(worker, message, report), cancelled)
                if last is not None:
                    return last
            except Unavailable:
                await report(_waiting(who))
            except NotFound:
                await report(Progress(phase="wait", message=f"{who} lost its job; it is created again"))
        await race(asyncio.sleep(delay_seconds), cancelled)
        delay_seconds = min(2 * delay_seconds, _LONGEST_DELAY_SECONDS)
    raise Cancelled("The run was cancelled.")


async def cancel_job(worker: Worker, request_id: str, job_id: str = "") -> None:
    """Cancel a job and wait a while for its end. A job that was never created is no error.

    Raises:
        Unavailable: The worker is out of reach.
    """
    with contextlib.suppress(NotFound):
        job_id = job_id or await worker.find(request_id)
        if not job_id or ended((await worker.cancel(job_id)).job):
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CANCEL_LIMIT_SECONDS):
                async for message in worker.watch(job_id):
                    if ended(message.job):
                        return


async def _watch(worker: Worker, message: Any, report: Report) -> Any:
    """Return the last message of a job, or None when the worker ended the stream early."""
    if ended(message.job):
        return message
    async for latest in worker.watch(message.job.id):
        await report(progress_of(worker.name, latest.job))
        if ended(latest.job):
            return latest
    return None


def progress_of(worker: str, job: jobs_pb2.Job) -> Progress:
    """Return a job's progress; a job that waits for its turn says so."""
    if job.state == jobs_pb2.JOB_STATE_QUEUED:
        return Progress(phase="wait", message=f"waiting in the {worker}'s queue")
    told = job.progress
    return Progress(
        phase=told.phase,
        done=told.done,
        total=told.total,
        unit=told.unit,
        seconds_left=told.seconds_left,
        figures=dict(told.figures),
        message=told.message,
    )


def _waiting(who: str) -> Progress:
    return Progress(phase="wait", message=f"waiting for {who} …")
