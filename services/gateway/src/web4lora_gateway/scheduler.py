"""Who works when: work waits in line, gets its turn at a worker, and comes back when that is lost."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from web4.lora.v1 import jobs_pb2
from web4lora_chassis.errors import Cancelled, Unavailable, Web4Error
from web4lora_chassis.jobs import Progress

from web4lora_gateway.cancellations import Cancellations
from web4lora_gateway.crew import Crew
from web4lora_gateway.job_following import Report, cancel_job, follow, race
from web4lora_gateway.outcomes import Stopped
from web4lora_gateway.places import Line, Place, PlaceBook
from web4lora_gateway.workers import Worker, Workers

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
_TIDY_SECONDS = 30.0


@dataclass(frozen=True)
class Callbacks:
    """How a run hears of its work.

    Attributes:
        queued: Told that the work waits for its turn, or, with False, that it has it.
        created: Told the job's id, and whose it is.
        report: Told how far the work is.
        say: Given a line for the run's log.
        cancelled: Ends the work.
    """

    queued: Callable[[bool], Awaitable[None]]
    created: Callable[[Worker, str], Awaitable[None]]
    report: Report
    say: Callable[[str], Awaitable[None]]
    cancelled: asyncio.Event


@dataclass
class _Here:
    """Work that a run of this gateway waits for."""

    callbacks: Callbacks
    place: Place
    waits_for: Progress | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    reason: str = ""


@dataclass
class Scheduler:
    """Gives work to workers.

    Attributes:
        places: The lines.
        crew: The workers as they are.
        workers: The workers.
        cancellations: Cancels to be delivered later.
        grace_seconds: How long a worker may be out of reach before its work is another's.
        ended: Tells whether a run has ended.
    """

    places: PlaceBook
    crew: Crew
    workers: Workers
    cancellations: Cancellations
    grace_seconds: float
    ended: Callable[[str], Awaitable[bool]]
    _took: dict[tuple[str, str], float] = field(default_factory=dict)
    _here: dict[str, _Here] = field(default_factory=dict)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _told_at: float = float("-inf")

    def __post_init__(self) -> None:
        """Hear of the workers."""
        self.crew.changed = self._news.set

    async def work(
        self, place: Place, spec: jobs_pb2.JobSpec, callbacks: Callbacks
    ) -> jobs_pb2.Job | Stopped:
        """Have a worker do some work, once its turn has come. May be asked again after a crash.

        Args:
            place: Where it stands in line.
            spec: What to do.
            callbacks: How the run hears of it.

        Returns:
            The job as it ended; or what became of it when the run was cancelled.

        Raises:
            Web4Error: The worker refused the job.
        """
        seconds = place.seconds or self._took.get((place.kind, place.lane), 0.0)
        place = await self.places.enter(
            dataclasses.replace(place, seconds=seconds), lambda line: callbacks.report(_waits(line))
        )
        if place.done and not place.worker:  # cancelled before its turn
            return Stopped()
        here = self._here[place.work] = _Here(callbacks, place)
        try:
            while True:
                if not here.place.done:
                    await self._turn(here)
                job = await self._at_its_worker(here, spec)
                if job is not None:
                    return job
        except Cancelled:
            note = await self._cancel(here.place)
            await self._leave(here.place)
            return Stopped(note=note)
        finally:
            del self._here[place.work]
            self._news.set()

    async def _turn(self, here: _Here) -> None:
        """Wait for the turn of some work."""
        cancelled, told = here.callbacks.cancelled, False
        here.waits_for = None
        self._news.set()
        while here.place.turn is None and not here.place.done:
            await race(here.news.wait(), cancelled)
            here.news.clear()
            if here.place.turn is None and here.waits_for is not None:
                if not told:
                    told = True
                    await here.callbacks.queued(True)
                await here.callbacks.report(here.waits_for)
        await here.callbacks.queued(False)

    async def _at_its_worker(self, here: _Here, spec: jobs_pb2.JobSpec) -> jobs_pb2.Job | None:
        """Have the worker whose turn it is do the job; None when the work has to go back into the line."""
        place, callbacks = here.place, here.callbacks
        worker = self.workers.by_id.get(place.worker)
        if worker is None:
            here.reason = f"{place.worker} is no longer among the {place.kind}s"
            await self._give_back(here, "")
            return None
        request = jobs_pb2.CreateJobRequest(request_id=place.request_id, spec=spec)
        job_id = ""

        async def created(created_id: str) -> None:
            nonlocal job_id
            job_id = created_id
            await callbacks.created(worker, created_id)

        stop = here.stop = asyncio.Event()
        if callbacks.cancelled.is_set():
            stop.set()
        watch = asyncio.create_task(_pass_on(callbacks.cancelled, stop))
        try:
            job = await follow(worker, request, created=created, report=callbacks.report, cancelled=stop)
        except Cancelled:
            if callbacks.cancelled.is_set():
                raise
            await self._give_back(here, job_id)
            return None
        except Web4Error:
            await self._leave(place)
            raise
        finally:
            watch.cancel()
        now = await self.places.finish(place)
        if now.attempt != place.attempt:  # given back by a gateway that was thought dead
            if job.state == jobs_pb2.JOB_STATE_CANCELLED:  # by its cancel, not by anybody's wish
                here.place = now
                return None
            await self._leave(now)
        self._took[place.kind, place.lane] = time.time() - place.began_at
        return job

    async def _leave(self, place: Place) -> None:
        """Leave the line for good, also when the work has another job by now: nobody waits for that one."""
        while (now := await self.places.finish(place)).attempt != place.attempt:
            place = now

    async def _give_back(self, here: _Here, job_id: str) -> None:
        """Take work from a worker that is lost or paused; its job is cancelled, now or once that is back."""
        before = here.place
        await here.callbacks.say(here.reason)
        # Given back first, with its cancel: a gateway that is killed in between must not take the job that it
        # cancelled itself for the work's end when it is back.
        here.place = await self.places.give_back(before, job_id)
        worker = self.workers.by_id.get(before.worker)
        if worker is not None and before.turn is not None:
            with contextlib.suppress(Unavailable):
                await self.cancellations.deliver_one(worker, before.request_id, job_id)
        here.reason = ""

    async def _cancel(self, place: Place, job_id: str = "") -> str:
        """Cancel the job of some work, later when its worker is out of reach; return what to say of it."""
        worker = self.workers.by_id.get(place.worker)
        if worker is None or place.turn is None:  # no job was ever made, or nobody can be told
            return ""
        try:
            await cancel_job(worker, place.request_id, job_id)
        except Unavailable as error:
            await self.cancellations.add(worker.id, place.request_id, job_id)
            return f"{error.message} Its job is cancelled as soon as it is back."
        except Web4Error as error:
            return f"The {worker.name} could not cancel its job: {error.message}"
        return ""

    async def schedule_for_ever(self) -> None:
        """Give turns out, at once when something changed and every second for what other gateways change."""
        tidied_at = 0.0
        while True:
            try:
                if self._here:
                    await self.schedule()
                if time.monotonic() - tidied_at > _TIDY_SECONDS:
                    tidied_at = time.monotonic()
                    await self.tidy()
            except Web4Error as error:
                log.warning("no turns are given: %s", error.message)
            except Exception:
                log.exception("no turns are given")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._news.wait()
            self._news.clear()

    async def schedule(self) -> None:
        """Give turns out once, and tell everyone here, at most once a second, what they wait for."""
        places = {place.work: place for place in await self.places.open()}
        workers = await self.crew.states()

        def line() -> Line:
            return Line(list(places.values()), workers, self.grace_seconds, time.time())

        for place, worker in list(line().next_turns()):
            taken = await self.places.take(place, worker.id)
            if taken is not None:
                places[place.work] = taken
        for here in list(self._here.values()):
            found = places.get(here.place.work)
            if here.place.turn is None and not here.place.done:
                # What the line says counts: a gateway that died may have written last.
                found = found or await self.places.enter(here.place)
                if found.turn is not None or found.done or found.attempt != here.place.attempt:
                    here.place = found
                    here.news.set()
            elif found is None or found.turn is None or found.attempt != here.place.attempt:
                continue
            elif reason := line().must_leave(found):
                here.reason = reason
                here.stop.set()
        if time.monotonic() - self._told_at >= _LOOK_SECONDS:
            self._told_at = time.monotonic()
            self._tell(line())

    def _tell(self, line: Line) -> None:
        """Tell everyone here what they wait for; with many in line that is the larger part of the work."""
        for place, message, seconds in line.told():
            waiting = self._here.get(place.work)
            if waiting is not None and waiting.place.turn is None:
                waits_for = _waits(message, seconds)
                if waiting.waits_for != waits_for:
                    waiting.waits_for = waits_for
                    waiting.news.set()

    async def tidy(self) -> None:
        """Forget the places of runs that have ended, also of those that ended in a way of their own."""
        here = {each.place.run_id for each in self._here.values()}
        known = await self.places.run_ids() - here
        gone = [run_id for run_id in sorted(known) if await self.ended(run_id)]
        if gone:
            await self.places.forget(gone)
            self._news.set()


def _waits(message: str, seconds: float = 0.0) -> Progress:
    # To the minute: the time is an estimate, and every change of it would be news to all who watch.
    return Progress(phase="wait", message=message, seconds_left=60.0 * round(seconds / 60))


async def _pass_on(event: asyncio.Event, other: asyncio.Event) -> None:
    await event.wait()
    other.set()
