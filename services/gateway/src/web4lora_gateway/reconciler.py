"""Finds every run that has not ended and that nobody carries on, and has it carried on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from dbos import DBOS
from web4lora_chassis.errors import Web4Error

from web4lora_gateway.gateways import Gateways
from web4lora_gateway.records import RunRecord
from web4lora_gateway.runs import RunBook

log = logging.getLogger(__name__)

_INTERVAL_SECONDS = 5.0
_WAITS_FOR_ITS_TURN = ("ENQUEUED", "DELAYED")


@dataclass
class Reconciler:
    """Compares the runs with their workflows, at the start and every few seconds.

    Attributes:
        book: The runs.
        gateways: Who lives.
        start: Starts a run's workflow.
        at_work: Tells whether a run's workflow is at work in this process.
        give_up: Ends a run whose workflow ended without it; given the run and the state of its workflow.
    """

    book: RunBook
    gateways: Gateways
    start: Callable[[str], Awaitable[None]]
    at_work: Callable[[str], bool]
    give_up: Callable[[str, str], Awaitable[None]]
    _suspects: set[str] = field(default_factory=set)

    async def reconcile_for_ever(self) -> None:
        """Do it every few seconds, whatever comes between."""
        while True:
            try:
                await self.reconcile()
            except Web4Error as error:
                log.warning("runs that nobody carries on are looked for again: %s", error.message)
            except Exception:
                log.exception("runs that nobody carries on are looked for again")
            await asyncio.sleep(_INTERVAL_SECONDS)

    async def reconcile(self) -> None:
        """Have the runs carried on that this gateway, or one that is gone, left."""
        live = await self.gateways.live()
        left, adopted = [], set()
        for run in await self.book.unended():
            if run.gateway == self.gateways.own:
                if not self.at_work(run.id):
                    left.append(run.id)
            elif run.gateway not in live and await self.book.adopt(run):
                log.info("%s is taken over from %s", run.id, run.gateway or "an earlier version")
                left.append(run.id)
                adopted.add(run.id)
        left = [run_id for run_id in left if isinstance(await self.book.find(run_id), RunRecord)]
        states = await _workflow_states(left)
        # One that is just being taken from the queue is not at work for a moment.
        suspects = {run_id for run_id in left if states.get(run_id) == "PENDING"}
        for run_id in left:
            state = states.get(run_id)
            if state is None:
                await self.start(run_id)
            elif state in _WAITS_FOR_ITS_TURN:
                continue
            elif state == "PENDING":
                if run_id in adopted | self._suspects and not self.at_work(run_id):
                    log.info("%s is taken up again", run_id)
                    await DBOS.resume_workflow_async(run_id)
            elif not self.at_work(run_id):
                await self.give_up(run_id, state)
        self._suspects = suspects


async def _workflow_states(run_ids: list[str]) -> dict[str, str]:
    if not run_ids:
        return {}
    found = await DBOS.list_workflows_async(workflow_ids=run_ids, load_input=False, load_output=False)
    return {status.workflow_id: status.status for status in found}
