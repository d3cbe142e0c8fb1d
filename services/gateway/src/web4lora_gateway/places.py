"""The lines before the workers: who is next, and who waits for what. All gateways share them.

The workflow engine's own queues only count: so many workflows at once. They can't say which trainer has the
memory or the device that a run needs, nor that one is paused or lost, so the lines are a table of our own.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from web4lora_gateway.database import CANCELLATIONS, PLACES, Waiting, call, insert_once, upsert

PRIORITIES: Mapping[str, int] = {"low": -1, "normal": 0, "high": 1}
"""What comes first, by the words of the contract's Priority."""


class Mode(StrEnum):
    """What people allow a trainer; the names of the contract's TrainerMode."""

    ACTIVE = "ACTIVE"
    PAUSED = "PAUSED"
    DRAINING = "DRAINING"


@dataclass(frozen=True)
class WorkerState:
    """A worker as this gateway sees it.

    Attributes:
        id: Its name.
        kind: "trainer", "packager" or "deployer".
        mode: What people allow it.
        lost_at: Since when it is out of reach, in seconds since 1970; 0 while it answers.
        device: What it trains on, in words; empty when that is not known.
        memory_bytes: Memory of that device; 0 when it is not known.
    """

    id: str
    kind: str
    mode: Mode = Mode.ACTIVE
    lost_at: float = 0.0
    device: str = ""
    memory_bytes: int = 0


@dataclass(frozen=True)
class Place:
    """A piece of work in a line, one stage of one run.

    Attributes:
        work: Names the work: the request_id of its first job.
        run_id: The run.
        kind: The kind of worker that does it.
        lane: Of that worker: each lane of a worker does one at a time.
        priority: What comes first.
        device: A word that the worker's device must hold, such as "cuda"; empty: any.
        memory_bytes: Memory that it needs; 0 when that is not known.
        seconds: How long it will take; 0 when that is not known.
        entered_at: Since when it waits, in seconds since 1970.
        began_at: When its turn came; 0 before.
        attempt: How many jobs it has had: more than one when a trainer was lost or paused.
        worker: Who does it, or did last.
        turn: The lane of the worker that it has now; None while it waits.
        done: Its job has ended.
    """

    work: str
    run_id: str
    kind: str
    lane: str
    priority: int = 0
    device: str = ""
    memory_bytes: int = 0
    seconds: float = 0.0
    entered_at: float = 0.0
    began_at: float = 0.0
    attempt: int = 1
    worker: str = ""
    turn: str | None = None
    done: bool = False

    @property
    def request_id(self) -> str:
        """The request_id of the job that does it now."""
        return self.work if self.attempt == 1 else f"{self.work}/{self.attempt}"


@dataclass(frozen=True)
class Line:
    """How lines are ordered and given out.

    Attributes:
        places: All work that is not done, of all gateways.
        workers: The workers, in the order in which work is given to them.
        grace_seconds: How long one may be out of reach before its work is another's.
        now: Seconds since 1970.
    """

    places: Sequence[Place]
    workers: Sequence[WorkerState]
    grace_seconds: float
    now: float

    def waiting(self) -> list[Place]:
        """Return the work that waits, in the order in which it is next."""
        waiting = [place for place in self.places if place.turn is None]
        return sorted(waiting, key=lambda place: (-place.priority, place.entered_at, place.work))

    def next_turns(self) -> Iterator[tuple[Place, WorkerState]]:
        """Yield whose turn comes at which worker now."""
        taken = {place.turn for place in self.places}
        for place in self.waiting():
            for worker in self.takers(place):
                turn = turn_of(worker.id, place.lane)
                if turn not in taken:
                    taken.add(turn)
                    yield place, worker
                    break

    def takers(self, place: Place) -> list[WorkerState]:
        """Return the workers that would take some work once they are free.

        What one has begun stays its own while it is not lost: its checkpoints are there. A prepare goes where
        most memory is, so that what it refuses fits nowhere else.
        """
        able = [worker for worker in self.fitting(place) if self.takes_work(worker)]
        owner = next((worker for worker in self.workers if worker.id == place.worker), None)
        if owner is not None and not self.lost(owner):
            return [worker for worker in able if worker is owner]
        if place.lane == "prepare":
            most = max((worker.memory_bytes for worker in able), default=0)
            return [worker for worker in able if worker.memory_bytes == most]
        return able

    def fitting(self, place: Place) -> list[WorkerState]:
        """Return the workers that have what some work needs, whether they take any now or not."""
        return [worker for worker in self.workers if _fits(place, worker)]

    def takes_work(self, worker: WorkerState) -> bool:
        """Tell whether a worker takes new work; the only one of its kind is waited for at its door."""
        alone = [other.kind for other in self.workers].count(worker.kind) == 1
        return worker.mode is Mode.ACTIVE and (alone or not worker.lost_at)

    def lost(self, worker: WorkerState) -> bool:
        """Tell whether a worker is out of reach for longer than is waited for."""
        return bool(worker.lost_at) and self.now - worker.lost_at > self.grace_seconds

    def must_leave(self, place: Place) -> str:
        """Return why work must leave the worker that does it, in words; empty when it may go on there."""
        worker = next((each for each in self.workers if each.id == place.worker), None)
        if worker is None:
            return f"{place.worker} is no longer among the {place.kind}s"
        if worker.mode is Mode.PAUSED:
            return f"{worker.id} is paused"
        if self.lost(worker) and any(taker is not worker for taker in self.takers(place)):
            seconds = self.now - worker.lost_at
            return (
                f"{worker.id} is out of reach since {seconds:.0f} s; the work begins anew on another "
                f"{place.kind}, or goes on when that one is back first"
            )
        return ""

    def told(self) -> Iterator[tuple[Place, str, float]]:
        """Yield all work that waits, with what for, in words, and about how long, in seconds; 0: unknown."""
        ahead: dict[tuple[str, str], int] = {}
        seconds: dict[tuple[str, str], float | None] = {}
        for place in self.places:
            if place.turn is not None:
                _count(place, place.began_at + place.seconds - self.now, ahead, seconds)
        for place in self.waiting():
            line = (place.kind, place.lane)
            takers = self.takers(place)
            if not takers:
                yield place, self._why_nobody(place), 0.0
            else:
                about = (seconds.get(line, 0.0) or 0.0) / len(takers)
                yield place, _behind(place, ahead.get(line, 0), about), about
            _count(place, place.seconds, ahead, seconds)

    def _why_nobody(self, place: Place) -> str:
        """Say why no worker takes some work."""
        fitting = self.fitting(place)
        if not fitting:
            needs = [f"{place.memory_bytes / 1e9:.1f} GB of memory"] if place.memory_bytes else []
            needs += [f"the device {place.device}"] if place.device else []
            return f"waiting: no {place.kind} has {' and '.join(needs)}"
        owner = next((worker for worker in fitting if worker.id == place.worker), None)
        those = [owner] if owner and not self.lost(owner) else fitting
        said = [f"{worker.id} is {_absent(worker)}" for worker in those]
        return f"waiting for a {place.kind}: {', '.join(said)}"


def _absent(worker: WorkerState) -> str:
    if worker.mode is not Mode.ACTIVE:
        return f"{worker.mode.lower()} (`web4lora trainers resume {worker.id}`)"
    return "out of reach"


def _behind(place: Place, ahead: int, seconds: float) -> str:
    parts = [f"waiting for the {place.kind}"]
    if ahead:
        parts.append(f"{ahead} run{'s' if ahead != 1 else ''} ahead")
    if seconds:
        minutes, hours = round(seconds / 60), round(seconds / 3600)
        if hours > 1:
            parts.append(f"about {hours} h")
        else:
            parts.append(f"about {minutes} min" if minutes else "less than a minute")
    return ", ".join(parts)


def _count(
    place: Place,
    seconds: float,
    ahead: dict[tuple[str, str], int],
    total: dict[tuple[str, str], float | None],
) -> None:
    """Count some work among what comes first; where its time is not known, neither is that of the line."""
    line = (place.kind, place.lane)
    ahead[line] = ahead.get(line, 0) + 1
    known = total.get(line, 0.0)
    total[line] = None if known is None or not place.seconds else known + max(seconds, 0.0)


def _fits(place: Place, worker: WorkerState) -> bool:
    return (
        worker.kind == place.kind
        and place.device.lower() in worker.device.lower()
        and (not worker.memory_bytes or place.memory_bytes <= worker.memory_bytes)
    )


def turn_of(worker: str, lane: str) -> str:
    """Return the name of a lane of a worker, of which only one piece of work can have the turn."""
    return f"{worker}/{lane}"


class PlaceBook:
    """Keeps the places in the database."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    async def enter(self, place: Place, waiting: Waiting | None = None) -> Place:
        """Enter a line; what is in it already, or was, keeps its place."""
        row = dataclasses.asdict(dataclasses.replace(place, entered_at=time.time()))

        def work(connection: sa.Connection) -> Place:
            insert_once(connection, PLACES, row)  # another gateway may do so at this very moment
            found = connection.execute(sa.select(PLACES).where(PLACES.c.work == place.work)).one()
            return Place(**found._mapping)

        return await call(self._engine, work, waiting)

    async def open(self) -> list[Place]:
        """Return all places whose work is not done."""
        query = sa.select(PLACES).where(~PLACES.c.done)
        rows = await call(self._engine, lambda connection: connection.execute(query).all(), _patient)
        return [Place(**row._mapping) for row in rows]

    async def take(self, place: Place, worker: str) -> Place | None:
        """Give work its turn at a worker; None when another gateway was faster."""
        taken = dataclasses.replace(
            place, worker=worker, turn=turn_of(worker, place.lane), began_at=time.time()
        )
        statement = (
            sa.update(PLACES)
            .where(
                PLACES.c.work == place.work,
                PLACES.c.turn.is_(None),
                PLACES.c.attempt == place.attempt,
                ~PLACES.c.done,
            )
            .values(worker=taken.worker, turn=taken.turn, began_at=taken.began_at)
        )
        try:
            return taken if await self._execute(statement) else None
        except sa.exc.IntegrityError:
            return None

    async def give_back(self, place: Place, job_id: str = "") -> Place:
        """Put work whose worker does not go on back to where it was in the line; its next job is another.

        The cancel of the job that it had is kept with it, for `Cancellations` to deliver.

        Args:
            place: The place as it was at that worker.
            job_id: The job there, where it is known.

        Returns:
            The place as it is in the line now.
        """
        back = {"turn": None, "began_at": 0.0, "attempt": place.attempt + 1, "done": False}
        cancel = {"worker": place.worker, "request_id": place.request_id, "job_id": job_id}

        def work(connection: sa.Connection) -> Place:
            if place.turn is not None:
                upsert(connection, CANCELLATIONS, cancel)
            return _change(connection, place, back)

        return await call(self._engine, work, _patient)

    async def finish(self, place: Place) -> Place:
        """Leave a line: the job has ended, or is wanted no more. Who asks again goes straight to that job.

        Returns:
            The place as it is now: still in line where its work has another job by now, because a gateway
            that was thought dead gave it back.
        """
        left = {"turn": None, "done": True}
        return await call(self._engine, lambda connection: _change(connection, place, left), _patient)

    async def forget(self, run_ids: Iterable[str]) -> None:
        """Forget the places of runs that have ended."""
        await self._execute(sa.delete(PLACES).where(PLACES.c.run_id.in_(list(run_ids))))

    async def run_ids(self) -> set[str]:
        """Return the runs that have places."""
        query = sa.select(PLACES.c.run_id).distinct()
        return set(
            await call(self._engine, lambda connection: connection.execute(query).scalars().all(), _patient)
        )

    async def _execute(self, statement: sa.Executable) -> int:
        def work(connection: sa.Connection) -> int:
            return int(connection.execute(statement).rowcount)

        return await call(self._engine, work, _patient)


def _change(connection: sa.Connection, place: Place, values: dict[str, Any]) -> Place:
    """Change a place that has no other job yet, and return it as it is now."""
    same = (PLACES.c.work == place.work, PLACES.c.attempt == place.attempt)
    connection.execute(sa.update(PLACES).where(*same).values(**values))
    found = connection.execute(sa.select(PLACES).where(PLACES.c.work == place.work)).one_or_none()
    return Place(**found._mapping) if found else dataclasses.replace(place, **values)


async def _patient(_line: str) -> None:
    """Wait for the database; it is logged by who waits."""
