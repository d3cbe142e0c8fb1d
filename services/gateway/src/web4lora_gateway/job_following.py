"""Follow one job of a worker to its end, over restarts of either side, or cancel it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from web4.lora.v1 import jobs_pb2
from web4lora_chassis.errors import Cancelled, NotFound, ResourceExhausted, Unavailable
from web4lora_chassis.jobs import Progress
from web4lora_chassis.rpc.jobs import progress_of

from web4lora_gateway.workers import Worker, ended

_FIRST_DELAY_SECONDS = 0.5
_LONGEST_DELAY_SECONDS = 5.0
_CANCEL_LIMIT_SECONDS = 20.0
_NO_ROOM = "DISK_FULL"

T = TypeVar("T")
Report = Callable[[Progress], Awaitable[None]]


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
    """Repeat a repeatable call until whom it needs is in reach, and there is room on the disk.

    Args:
        call: Makes the call.
        who: Whom it needs, for the progress message.
        report: Told while it waits.
        cancelled: Ends it.

    Raises:
        Cancelled: The event was set.
        Web4Error: Any other error.
    """
    delay_seconds = _FIRST_DELAY_SECONDS
    while True:
        try:
            return await race(call(), cancelled)
        except Unavailable:
            await report(_waiting(who))
        except ResourceExhausted as error:
            await report(_waiting_for_room(error))
        await race(asyncio.sleep(delay_seconds), cancelled)
        delay_seconds = min(2 * delay_seconds, _LONGEST_DELAY_SECONDS)


async def follow(
    worker: Worker,
    request: jobs_pb2.CreateJobRequest,
    *,
    created: Callable[[str], Awaitable[None]],
    report: Report,
    cancelled: asyncio.Event,
) -> jobs_pb2.Job:
    """Have a worker do a job and return it as it ended.

    A worker that is out of reach is waited for as long as it takes: it may be down for a while, and finds the
    job on its disk when it is back.

    Args:
        worker: Who does it.
        request: What to do; its request_id is the same for the same work.
        created: Told the job's id once it is known.
        report: Told how far the job is.
        cancelled: Ends the following; the job itself is the caller's to cancel.

    Raises:
        Cancelled: The event was set.
        Web4Error: The worker refused the job.
    """
    delay_seconds = _FIRST_DELAY_SECONDS
    while not cancelled.is_set():
        try:
            # Not raced: a Create cut off half-way could leave a job behind that nobody knows of.
            job = await worker.create(request)
        except Unavailable:
            await report(_waiting(str(worker)))
        except ResourceExhausted as error:
            await report(_waiting_for_room(error))
        else:
            await created(job.id)
            delay_seconds = _FIRST_DELAY_SECONDS
            try:
                last = await race(_watch(worker, job, report), cancelled)
                if last is not None:
                    return last
            except Unavailable:
                await report(_waiting(str(worker)))
            except NotFound:
                await report(Progress(phase="wait", message=f"{worker} lost its job; it is created again"))
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
        if not job_id or ended(await worker.cancel(job_id)):
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CANCEL_LIMIT_SECONDS):
                async for job in worker.watch(job_id):
                    if ended(job):
                        return


async def _watch(worker: Worker, job: jobs_pb2.Job, report: Report) -> jobs_pb2.Job | None:
    """Return a job as it ended, or None when the worker ended the stream early."""
    if ended(job):
        return job
    async for latest in worker.watch(job.id):
        await report(job_progress(worker.name, latest))
        if ended(latest):
            return latest
    return None


def job_progress(worker: str, job: jobs_pb2.Job) -> Progress:
    """Return a job's progress; a job that waits for its turn says so."""
    if job.state == jobs_pb2.JOB_STATE_QUEUED:
        lacking = job.progress.message if job.progress.phase == "wait" else ""
        return Progress(phase="wait", message=lacking or f"waiting in the {worker}'s queue")
    return progress_of(job.progress)


def _waiting_for_room(error: ResourceExhausted) -> Progress:
    """Return the progress of who waits for room on a disk; any other limit is an error."""
    if error.reason != _NO_ROOM:
        raise error
    return Progress(phase="wait", message=f"waiting for room: {error.message}")


def _waiting(who: str) -> Progress:
    return Progress(phase="wait", message=f"waiting for {who} …")
