"""Deletes runs: their record, their workflow and their folders. What they made stays for the collection."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from dbos import DBOS
from web4lora_chassis.artifacts import ArtifactStore
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, Unavailable, disk_error

from web4lora_gateway.database import DELETED, HOLDS, RUNS, call, upsert
from web4lora_gateway.folder import point_to_newest
from web4lora_gateway.pools import BYTES
from web4lora_gateway.records import RunRecord, RunState
from web4lora_gateway.runs import RunBook
from web4lora_gateway.settings import GatewaySettings

log = logging.getLogger(__name__)

_WORKFLOW_SECONDS = 10.0
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class RunDeleter:
    """Deletes runs that have ended.

    Attributes:
        engine: The database.
        book: The runs.
        store: Their folders in the store.
        settings: Where their folders on this machine are.
        at_work: Tells whether a run's workflow is at work in this process.
    """

    engine: sa.Engine
    book: RunBook
    store: ArtifactStore
    settings: GatewaySettings
    at_work: Callable[[str], bool]

    async def delete(self, run_id: str, permit: Callable[[str, str], None] | None = None) -> None:
        """Delete a run. Its folders go first, so that a call that is cut off can be repeated.

        Args:
            run_id: The run.
            permit: Given the run's owner and id, refuses by raising; None: whoever's it is.

        Raises:
            InvalidInput: No id of one run.
            NotFound: No such run.
            FailedPrecondition: It is at work, or kept.
            Unavailable: The store is out of reach, or the run's end is still being written down.
        """
        if run_id in ("", "latest"):
            raise InvalidInput(
                "A run is deleted by its id.",
                fix="`web4lora runs list` shows the ids.",
                metadata={"field": "id"},
            )
        run = await self.book.find(run_id)
        if permit is not None:
            permit(run.owner, run.id)
        if not (run.state and RunState(run.state).terminal):
            raise FailedPrecondition(
                f"{run.id} is at work.",
                fix=f"Wait for its end, or cancel it: `web4lora runs cancel {run.id}`.",
                reason="RUN_AT_WORK",
            )
        if isinstance(run, RunRecord) and run.kept:
            raise FailedPrecondition(
                f"{run.id} is kept.",
                fix=f"`web4lora runs keep --release {run.id}` lets go of it.",
                reason="RUN_KEPT",
            )
        await self.book.finish(self._delete(run.id))

    async def deleted(self, prefix: str) -> frozenset[str]:
        """Return the ids of deleted runs that begin in a way."""
        query = sa.select(DELETED.c.id).where(DELETED.c.id.startswith(prefix, autoescape=True))
        return frozenset(
            await call(self.engine, lambda connection: connection.execute(query).scalars().all())
        )

    async def _delete(self, run_id: str) -> None:
        await self._workflow_ended(run_id)
        await BYTES.run(self._remove_folders, run_id)
        await DBOS.delete_workflow_async(run_id)

        def write(connection: sa.Connection) -> None:
            upsert(connection, DELETED, {"id": run_id})
            connection.execute(sa.delete(HOLDS).where(HOLDS.c.run_id == run_id))
            connection.execute(sa.delete(RUNS).where(RUNS.c.id == run_id, RUNS.c.ended))

        await call(self.engine, write)
        log.info("%s was deleted", run_id)

    async def _workflow_ended(self, run_id: str) -> None:
        """Wait for the last step of a run that has ended a moment ago to be written down."""
        try:
            async with asyncio.timeout(_WORKFLOW_SECONDS):
                while self.at_work(run_id):
                    await asyncio.sleep(_LOOK_SECONDS)
        except TimeoutError as error:
            raise Unavailable(f"The end of {run_id} is being written down.", fix="Try again.") from error

    def _remove_folders(self, run_id: str) -> None:
        self.store.unpublish(run_id)
        outputs = self.settings.outputs_dir
        for place in filter(None, (outputs, self.settings.state_dir / "runs")):
            _remove(place / run_id)
        if outputs is not None:
            point_to_newest(outputs)


def _remove(place: Path) -> None:
    try:
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
    except OSError as error:
        raise disk_error(error, place) from error
