"""The workers as a gateway sees them: the trainers' heartbeat, and what people allow each of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import sqlalchemy as sa
from web4lora_chassis.errors import NotFound, Web4Error

from web4lora_gateway.database import TRAINERS, call, upsert
from web4lora_gateway.places import Mode, WorkerState
from web4lora_gateway.workers import Worker, WorkerInfo, Workers

log = logging.getLogger(__name__)

_BEAT_SECONDS = 5.0
_TIMEOUT_SECONDS = 3.0


@dataclass
class Seen:
    """What was last seen of a trainer.

    Attributes:
        info: What it said of itself; None before it ever answered.
        seen_at: When it answered last, in seconds since 1970; 0 before.
        lost_at: Since when it does not answer; 0 while it does.
    """

    info: WorkerInfo | None = None
    seen_at: float = 0.0
    lost_at: float = 0.0


@dataclass
class Crew:
    """Asks every trainer every few seconds how it is, and keeps what people set of them.

    Attributes:
        engine: The database.
        workers: The workers.
        changed: Called when a trainer came, went, or was set.
    """

    engine: sa.Engine
    workers: Workers
    changed: Callable[[], None] = lambda: None
    _seen: dict[str, Seen] = field(default_factory=dict)

    async def beat_for_ever(self) -> None:
        """Look after the trainers for ever."""
        while True:
            await asyncio.gather(*(self._look(worker) for worker in self.workers.of_kind("trainer")))
            await asyncio.sleep(_BEAT_SECONDS)

    async def _look(self, trainer: Worker) -> None:
        seen = self.seen(trainer.id)
        before = (bool(seen.lost_at), seen.info is None)
        try:
            seen.info = await trainer.info(_TIMEOUT_SECONDS)
        except Web4Error as error:
            if not seen.lost_at:
                log.warning("%s is lost: %s", trainer, error.message)
                seen.lost_at = time.time()
        else:
            if seen.lost_at:
                log.warning("%s is back", trainer)
            seen.seen_at, seen.lost_at = time.time(), 0.0
        if before != (bool(seen.lost_at), seen.info is None):
            self.changed()

    def seen(self, worker_id: str) -> Seen:
        """Return what was last seen of a trainer."""
        return self._seen.setdefault(worker_id, Seen())

    async def states(self) -> list[WorkerState]:
        """Return all workers, in the order in which work is given to them."""
        modes = await self.modes()
        return [
            self._state(worker, modes.get(worker.id, Mode.ACTIVE)) for worker in self.workers.by_id.values()
        ]

    def _state(self, worker: Worker, mode: Mode) -> WorkerState:
        seen = self.seen(worker.id)
        known = seen.info or WorkerInfo({})
        return WorkerState(worker.id, worker.name, mode, seen.lost_at, known.device, known.memory_bytes)

    async def modes(self) -> dict[str, Mode]:
        """Return what people set of trainers."""
        rows = await call(
            self.engine, lambda connection: connection.execute(sa.select(TRAINERS)).all(), _patient
        )
        return {row.id: Mode(row.mode) for row in rows}

    async def set_mode(self, name: str, mode: Mode) -> Worker:
        """Set what a trainer is allowed.

        Args:
            name: Its name or its address.
            mode: What it is allowed from now on, over restarts.

        Raises:
            NotFound: There is no such trainer.
        """
        trainer = self.trainer(name)
        await call(
            self.engine,
            lambda connection: upsert(connection, TRAINERS, {"id": trainer.id, "mode": str(mode)}),
        )
        self.changed()
        return trainer

    def trainer(self, name: str) -> Worker:
        """Return a trainer by its name or its address.

        Raises:
            NotFound: There is no such trainer.
        """
        trainers = self.workers.of_kind("trainer")
        for trainer in trainers:
            if name in (trainer.id, trainer.address):
                return trainer
        names = ", ".join(trainer.id for trainer in trainers)
        raise NotFound(f"There is no trainer {name!r}.", fix=f"The trainers are {names}.")


async def _patient(_line: str) -> None:
    """Wait for the database; it is logged by who waits."""
