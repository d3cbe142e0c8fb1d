"""What artifacts are needed for: by runs, by what is deployed, by evaluations, and by work in progress."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from web4.lora.v1 import jobs_pb2
from web4lora_chassis.artifacts.index import Indexed
from web4lora_chassis.errors import Web4Error
from web4lora_chassis.keeping import HOUR_SECONDS, Keeping
from web4lora_chassis.rpc.artifact_messages import refs_in

from web4lora_gateway.database import RUNS, call
from web4lora_gateway.holds import Holds
from web4lora_gateway.workers import Worker, Workers, ended

_PAGE = 200
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DONE = ("SUCCEEDED", "REUSED")


@dataclass
class Needs:
    """What must stay, each with what for.

    Attributes:
        digests: Artifacts that are named.
        at_work: Those of them that work in progress uses: what is made from them may be its own, which no
            record names until it ends.
        names: Names under which work in progress stores what it makes.
        bases: Work in progress that may store any base model.
    """

    digests: dict[str, list[str]] = field(default_factory=dict)
    at_work: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    bases: list[str] = field(default_factory=list)

    def add(self, digests: Iterable[str], what: str) -> None:
        """Note that something needs artifacts."""
        for digest in digests:
            found = self.digests.setdefault(digest, [])
            if what not in found:
                found.append(what)

    def add_work(self, digests: Iterable[str], name: str, what: str) -> None:
        """Note that work in progress uses artifacts, and stores others under a name."""
        known = list(digests)
        self.add(known, what)
        self.at_work.update(dict.fromkeys(known, what))
        if name:
            self.names[name] = what

    def kept_for(self, rows: Sequence[Indexed], new_hours: float) -> dict[str, list[str]]:
        """Return what each artifact is kept for, by digest; nothing for those that nothing needs.

        Args:
            rows: All artifacts in the store.
            new_hours: Younger ones stay.
        """
        by_digest = {row.ref.digest: row for row in rows}
        kept: dict[str, list[str]] = {}
        for digest, reasons in self.digests.items():
            _spread(digest, reasons, by_digest, kept)
        now = time.time()
        for row in rows:
            if row.ref.digest not in kept:
                reasons = [*self._of_work(row), *_of_age(row, now, new_hours)]
                if reasons:
                    _spread(row.ref.digest, reasons[:1], by_digest, kept)
        return kept

    def _of_work(self, row: Indexed) -> Iterable[str]:
        for ref in row.inputs:
            if ref.digest in self.at_work:
                yield f"made from what {self.at_work[ref.digest]} uses"
        for name, what in self.names.items():
            if row.ref.name == name or row.ref.name.startswith(f"{name}-"):
                yield f"of the name that {what} stores under"
        if row.ref.kind == "base_model":
            yield from self.bases


@dataclass(frozen=True)
class NeedsFinder:
    """Asks the database and the workers.

    Attributes:
        engine: The database.
        holds: What runs are about to take over.
        workers: Their jobs, and the deployments.
        keep: What labels say of runs.
    """

    engine: sa.Engine
    holds: Holds
    workers: Workers
    keep: Keeping

    async def all(self, keep_runs: int | None) -> Needs:
        """Return all that is needed.

        Args:
            keep_runs: Of the runs that have ended and are not kept, by hand or by a label, only the newest
                this many count. None: all.

        Raises:
            Unavailable: The deployer is out of reach, without which nobody knows what serves.
        """
        needs = Needs()
        await self._of_deployer(needs)
        await self._of_work(needs)
        await self.add_ended_runs(needs, keep_runs)
        return needs

    async def add_ended_runs(self, needs: Needs, keep_runs: int | None) -> None:
        """Note what ended runs need; `keep_runs` as for `all`."""
        counted, now = 0, time.time()
        async for row in self._runs([RUNS.c.ended]):
            kept = self._kept(json.loads(row.document), now)
            counted += not kept
            if kept or keep_runs is None or counted <= keep_runs:
                needs.add(_digests(row.document), f"{row.id}{kept}")

    def _kept(self, document: dict[str, Any], now: float) -> str:
        """Return how a run is kept, whatever else is said of runs, in words; empty: it is not."""
        if document.get("kept"):
            return ", kept"
        rule = self.keep.label_rule(document.get("labels") or {})
        ended_at = document.get("ended_at") or 0.0
        return f", kept {rule}" if rule and not rule.over(ended_at, now) else ""

    async def of_work(self) -> Needs:
        """Return what work in progress needs, as of now."""
        needs = Needs()
        await self._of_work(needs)
        return needs

    async def _of_work(self, needs: Needs) -> None:
        async for row in self._runs([~RUNS.c.ended]):
            what = f"{row.id}, at work"
            needs.add_work(_digests(row.document), row.name, what)
            if not _prepared(row.document):
                needs.bases.append(f"{what}, whose base model is not known yet")
        for digest, runs in (await self.holds.held()).items():
            needs.add([digest], f"{runs[0]}, about to take it over")
        for worker in self.workers.by_id.values():
            try:
                async for job in _jobs(worker):
                    if not ended(job):
                        spec = getattr(job.spec, job.spec.WhichOneof("kind") or "", None)
                        what = f"the {worker.name}'s job {job.id}"
                        needs.add_work(_refs(job), getattr(spec, "name", ""), what)
            except Web4Error:
                if worker is self.workers.deployer:
                    raise
                continue  # its jobs are those of runs, which have not ended

    async def _of_deployer(self, needs: Needs) -> None:
        for deployment in await self.workers.deployer.all_deployments():
            what = f"the deployment {deployment.id}"
            if deployment.promoted:
                what += f", which serves as {deployment.name}"
            needs.add(_refs(deployment), what)
        async for job in _jobs(self.workers.deployer):
            if job.result.WhichOneof("kind") == "evaluate":
                needs.add(_refs(job.result), f"the evaluation {job.id}")

    async def _runs(self, where: Sequence[sa.ColumnElement[bool]]) -> AsyncIterator[Any]:
        """Yield id, name and document's text of runs, newest first."""
        document = sa.cast(RUNS.c.document, sa.Text).label("document")
        columns = (RUNS.c.id, RUNS.c.name, RUNS.c.created_at, document)
        order = (RUNS.c.created_at.desc(), RUNS.c.id.desc())
        last: Any = None
        while True:
            query = sa.select(*columns).where(*where).order_by(*order).limit(_PAGE)
            if last is not None:
                place = sa.tuple_(RUNS.c.created_at, RUNS.c.id)
                query = query.where(place < sa.tuple_(last.created_at, sa.literal(last.id)))
            rows = await call(self.engine, functools.partial(_rows, query=query))
            for row in rows:
                yield row
            if len(rows) < _PAGE:
                return
            last = rows[-1]


def _rows(connection: sa.Connection, query: sa.Select[Any]) -> list[Any]:
    return list(connection.execute(query))


def _spread(
    digest: str, reasons: Sequence[str], by_digest: dict[str, Indexed], kept: dict[str, list[str]]
) -> None:
    """Note what an artifact is kept for, and with it all that it was made from."""
    waiting, seen = [digest], {digest}
    while waiting:
        here = waiting.pop()
        found = kept.setdefault(here, [])
        found += [reason for reason in reasons if reason not in found]
        if here in by_digest:
            new = [ref.digest for ref in by_digest[here].inputs if ref.digest not in seen]
            seen.update(new)
            waiting += new


def _of_age(row: Indexed, now: float, new_hours: float) -> Iterable[str]:
    age = now - max(row.created_at, row.stored.stored_at)
    if age < new_hours * HOUR_SECONDS:
        yield f"new: stored {max(0, age) / HOUR_SECONDS:.0f} h ago, and left alone for {new_hours:g} h"


def _digests(document: str) -> set[str]:
    """Return every digest in a run's document, also in one that a newer version wrote."""
    return set(_DIGEST.findall(document))


def _refs(message: Any) -> list[str]:
    return [ref.digest for ref in refs_in(message)]


def _prepared(document: str) -> bool:
    stages = json.loads(document).get("stages") or []
    return any(stage.get("name") == "prepare" and stage.get("state") in _DONE for stage in stages)


async def _jobs(worker: Worker) -> AsyncIterator[jobs_pb2.Job]:
    request = jobs_pb2.ListJobsRequest(page_size=_PAGE)
    while True:
        answer = await worker.call(worker.jobs.ListJobs, request)
        for job in answer.jobs:
            yield job
        if not answer.next_page_token:
            return
        request.page_token = answer.next_page_token
