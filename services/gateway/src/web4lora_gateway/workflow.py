"""One run as a durable workflow: prepare, train, package, deploy, verify, promote.

Each stage is three steps whose results DBOS keeps: `plan` decides whether the stage runs and with which spec,
`work` has the worker do it, as a job or by calls, `conclude` writes down what came of it. A step that was cut
off by a crash runs again, so each of them may: the job is created with a request_id that is the same every
time, calls are safe to repeat, and files are placed, not added.

Cancel is a state of the run, which every waiting step looks at, and not DBOS' own cancel: that one ends the
workflow at once, so nothing could be told to the worker any more if the gateway was killed in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dbos import DBOS, SetWorkflowID
from web4lora_chassis.artifacts import ArtifactStore
from web4lora_chassis.errors import Cancelled, Web4Error
from web4lora_chassis.jobs import JobFailure, Progress
from web4lora_chassis.rpc import ref_of, to_json

from web4lora_gateway.database import Waiting
from web4lora_gateway.folder import RunFolder
from web4lora_gateway.job_following import patiently
from web4lora_gateway.outcomes import (
    BEGUN,
    PLANNED,
    WORKED,
    YES_OR_NO,
    Begun,
    Decision,
    DoCalls,
    DoJob,
    Done,
    Ended,
    Failed,
    Kept,
    Plan,
    Reuse,
    Stopped,
    ended_by,
)
from web4lora_gateway.pipeline import Pipeline
from web4lora_gateway.places import PRIORITIES, Place
from web4lora_gateway.plan import Planner, threaded
from web4lora_gateway.pools import BYTES
from web4lora_gateway.records import STAGE_NAMES, RunRecord, RunState, StageResult, StageState
from web4lora_gateway.run_json import run_json
from web4lora_gateway.runs import RunBook
from web4lora_gateway.scheduler import Callbacks, Scheduler
from web4lora_gateway.settings import GatewaySettings
from web4lora_gateway.stage_results import StageResults
from web4lora_gateway.stages import AnyStage, CallStage, Inputs, JobStage, stages_of
from web4lora_gateway.telemetry import belongs_to_run, run_ended, stage_ended, step
from web4lora_gateway.workers import Worker, Workers

log = logging.getLogger(__name__)

_NEVER = asyncio.Event()
"""Is never set: what waits for it can't be cancelled."""

T = TypeVar("T")


@dataclass(frozen=True)
class RunWorkflow:
    """Carries runs through their stages.

    Attributes:
        book: The runs.
        results: Earlier results by key.
        store: The artifacts.
        workers: Who does the work.
        scheduler: Gives work to them.
        settings: Where folders are.
    """

    book: RunBook
    results: StageResults
    store: ArtifactStore
    workers: Workers
    scheduler: Scheduler
    settings: GatewaySettings
    _at_work: Counter[str] = field(default_factory=Counter)
    _turns: dict[str, asyncio.Lock] = field(default_factory=dict)
    _began: dict[tuple[str, str], float] = field(default_factory=dict)

    def register(self) -> Callable[[str], Coroutine[Any, Any, None]]:
        """Make the workflow known to DBOS and return what starts it, by run id, at most once for each."""

        @DBOS.workflow(name="run_pipeline", max_recovery_attempts=None)
        async def run_pipeline(run_id: str) -> None:
            await self._run(run_id)

        async def start(run_id: str) -> None:
            with SetWorkflowID(run_id):
                await DBOS.start_workflow_async(run_pipeline, run_id)

        return start

    def at_work(self, run_id: str) -> bool:
        """Tell whether a run's workflow is at work in this process."""
        return self._at_work[run_id] > 0

    async def give_up(self, run_id: str, state: str) -> None:
        """End a run whose workflow ended without it; `state` is the workflow's."""
        await self.book.carry(run_id)
        await self._end(run_id, _failure(RuntimeError(f"the workflow ended: {state}")))

    async def _run(self, run_id: str) -> None:
        self._at_work[run_id] += 1
        try:
            # The engine may have a run twice at work in one process: once because it was at work before a
            # restart, and once from the queue that another gateway put it into, which thought this one dead.
            async with self._turns.setdefault(run_id, asyncio.Lock()):
                await self._through_all_stages(run_id)
        except Exception as error:
            log.exception("run %s: defect", run_id)
            await self._end(run_id, _failure(error))
            raise
        finally:
            self._at_work[run_id] -= 1
            if not self._at_work[run_id]:
                del self._at_work[run_id]
                self._turns.pop(run_id, None)
                for name in STAGE_NAMES:
                    self._began.pop((run_id, name), None)
                self.book.put_down(run_id)

    async def _through_all_stages(self, run_id: str) -> None:
        try:
            record = await self.book.carry(run_id, _logged(run_id))
        except Web4Error as error:
            log.warning("%s is left alone: %s", run_id, error.message)
            raise asyncio.CancelledError from error  # so that the engine keeps it as it is
        with belongs_to_run(record):
            if record.state is not RunState.QUEUED and not record.state.terminal:
                await self._log(run_id, "the gateway was restarted; the run goes on")
            began = await _step("begin", BEGUN, self._begin, run_id)
            for name in STAGE_NAMES if isinstance(began, Begun) else ():
                if not await self._stage(run_id, name):
                    break
            failure = began.error if isinstance(began, Failed) else None
            await _step("end", YES_OR_NO, self._end, run_id, failure)

    async def _stage(self, run_id: str, name: str) -> bool:
        """Take a run through a stage; return whether it goes on."""
        plan = await _step(f"plan {name}", PLANNED, self._plan, run_id, name)
        outcome: Reuse | Done | Ended
        if isinstance(plan, DoJob | DoCalls):
            outcome = await _step(f"work {name}", WORKED, self._work, run_id, name, plan)
        else:
            outcome = plan
        return await _step(f"conclude {name}", YES_OR_NO, self._conclude, run_id, name, plan, outcome)

    async def _begin(self, run_id: str) -> Begun | Ended:
        def begin(record: RunRecord) -> RunRecord:
            return record.changed(state=RunState.RUNNING) if record.state is RunState.QUEUED else record

        record = await self._change(run_id, begin)
        try:
            await self._patiently(run_id, STAGE_NAMES[0], "room", threaded(self._folder(run_id).begin))
            await self._write(record)
        except Web4Error as error:
            return ended_by(error)
        await self._log(run_id, f"{run_id} started: {record.pipeline['name']}")
        return Begun()

    async def _plan(self, run_id: str, name: str) -> Plan | Ended:
        """Decide whether a stage runs, and how."""

        def begin(record: RunRecord) -> RunRecord:
            started_at = record.stage(name).started_at
            if not started_at:
                self._began[run_id, name] = time.monotonic()
            return record.with_stage(
                name,
                state=StageState.RUNNING,
                progress=Progress(phase="start"),
                started_at=started_at or time.time(),
            )

        record = await self._change(run_id, begin, name)
        try:
            return await Planner(self.results, self.store, self.workers, self._waiting(run_id, name)).plan(
                record, _stage_of(record, name), lambda who, call: self._patiently(run_id, name, who, call)
            )
        except Web4Error as error:
            return ended_by(error)

    async def _work(self, run_id: str, name: str, plan: DoJob | DoCalls) -> Done | Ended:
        """Have the worker do a stage."""
        record = await self.book.get(run_id, _logged(run_id))
        match _stage_of(record, name), plan:
            case JobStage() as stage, DoJob():
                return await self._job(record, stage, plan)
            case CallStage() as stage, DoCalls():
                return await self._call(record, stage, plan.decision)
        return Failed(
            JobFailure("PLANNED_OTHERWISE", f"Another version planned {name} in a way that this one has not.",
                       f"Retry the run: `web4lora runs retry {run_id} --from {name}`.")
        )  # fmt: skip

    async def _job(self, record: RunRecord, stage: JobStage[Any, Any], plan: DoJob) -> Done | Ended:
        """Do a stage that is a job."""
        run_id, name = record.id, stage.name
        memory_bytes, seconds = stage.needs(Inputs.of(record))
        place = Place(
            work=f"{run_id}/{record.nonce}/{name}/{plan.key[:16]}",
            run_id=run_id,
            kind=stage.worker,
            lane=stage.lane or stage.worker,
            priority=PRIORITIES[record.priority],
            device=record.device if stage.worker == "trainer" else "",
            memory_bytes=memory_bytes,
            seconds=seconds,
        )

        async def created(worker: Worker, job_id: str) -> None:
            new = False

            def note(record: RunRecord) -> RunRecord:
                nonlocal new
                new = record.stage(name).job_id != job_id
                return record.with_stage(name, job_id=job_id) if new else record

            await self._change(run_id, note, name)
            if new:
                await self._log(run_id, f"{name}: job {job_id} of {worker}")

        async def queued(waits: bool) -> None:
            await self._change(run_id, lambda record: record.queued(name, waits=waits), name)
            if not waits and (run_id, name) in self._began:  # waiting is no work
                self._began[run_id, name] = time.monotonic()

        callbacks = Callbacks(
            queued=queued,
            created=created,
            report=self._report(run_id, name),
            say=lambda line: self._log(run_id, f"{name}: {line}"),
            cancelled=self.book.cancelled(run_id),
        )
        try:
            last = await self.scheduler.work(place, stage.work(plan.spec), callbacks)
        except Web4Error as error:
            return ended_by(error)
        return last if isinstance(last, Stopped) else stage.outcome(last)

    async def _call(self, record: RunRecord, stage: CallStage[Any], decision: Decision) -> Done | Ended:
        """Do a stage that is no job. Once begun it is concluded: a call cut off may have been heard."""
        deployer, inputs, name = self.workers.deployer, Inputs.of(record), stage.name

        def begin(record: RunRecord) -> RunRecord:
            if record.stage(name).begun or record.state is RunState.CANCELLING:
                return record
            return record.with_stage(name, begun=True)

        record = await self._change(record.id, begin, name)
        if not record.stage(name).begun:
            return Stopped()
        try:
            result = await patiently(
                lambda: stage.act(inputs, deployer, decision),
                str(deployer),
                self._report(record.id, name),
                cancelled=_NEVER,
            )
        except Web4Error as error:
            return ended_by(error)
        if self.book.cancelled(record.id).is_set():
            result = stage.although_cancelled(result)
        await self._log(record.id, f"{stage.name}: {stage.summary(result)}")
        return Done(to_json(result))

    async def _conclude(
        self, run_id: str, name: str, plan: Plan | Ended, outcome: Reuse | Done | Ended
    ) -> bool:
        """Write down what came of a stage; return whether the run goes on."""
        if isinstance(plan, Ended):
            return await self._fail(run_id, name, plan)
        if isinstance(outcome, Ended):
            return await self._fail(run_id, name, outcome, plan.key)
        record = await self.book.get(run_id, _logged(run_id))
        stage = _stage_of(record, name)
        try:
            if isinstance(outcome, Reuse):
                made = outcome.reused
            else:
                took = self._took(record, name)
                made = StageResult(plan.key, run_id, outcome.result, plan.versions, took)
                # A decision is made anew in every run.
                if isinstance(stage, JobStage) and stage.complete_result(stage.read(made.result)):
                    await self.results.save(name, made, self._waiting(run_id, name))
            stage.accept(Inputs.of(record), stage.read(made.result))
            await self._succeed(run_id, stage, made, reused=isinstance(outcome, Reuse))
        except Web4Error as error:
            return await self._fail(run_id, name, ended_by(error), plan.key)
        return True

    def _took(self, record: RunRecord, name: str) -> float:
        """Return for how many seconds a stage was at work, whatever happened to the clock meanwhile."""
        began = self._began.pop((record.id, name), None)
        if began is not None:
            return time.monotonic() - began
        return max(time.time() - record.stage(name).started_at, 0.0)  # it began before a restart

    async def _succeed(self, run_id: str, stage: AnyStage, made: StageResult, *, reused: bool) -> None:
        name = stage.name
        refs = [ref_of(ref) for ref in stage.files(stage.read(made.result))]
        folder = self._folder(run_id)
        if refs:
            place = threaded(folder.place, refs, pool=BYTES)
            await self._patiently(run_id, name, "the artifact store", place)
        record = await self._change(
            run_id,
            lambda record: record.with_stage(
                name,
                state=StageState.REUSED if reused else StageState.SUCCEEDED,
                progress=Progress() if reused else record.stage(name).progress,
                result=made.result,
                versions=made.versions,
                key=made.key,
                work_seconds=made.work_seconds,
                reused_from_run=made.run_id if reused else "",
                ended_at=time.time(),
            ),
            name,
        )
        done = record.stage(name)
        stage_ended(done)
        outcome = (
            f"taken over from {made.run_id}" if reused else f"done in {done.ended_at - done.started_at:.1f} s"
        )
        await self._log(run_id, f"{name}: {outcome}")
        await self._write(record)
        with contextlib.suppress(Cancelled):  # the stage is done, and the run's end publishes too
            await self._patiently(run_id, name, "the artifact store", threaded(folder.publish, pool=BYTES))

    async def _fail(self, run_id: str, name: str, ended: Ended, key: str = "") -> bool:
        """Write down how a stage ended without a result; the run does not go on."""
        error, note = (ended.error, "") if isinstance(ended, Failed) else (None, ended.note)
        state = StageState.FAILED if error else StageState.CANCELLED
        record = await self._change(
            run_id,
            lambda record: record.with_stage(
                name,
                state=state,
                error=error,
                key=key,
                ended_at=time.time(),
                progress=Progress(phase="cancelled", message=note) if note else record.stage(name).progress,
            ),
            name,
        )
        stage_ended(record.stage(name))
        text = f"failed: {error.message}" if error else f"cancelled. {note}".rstrip()
        log.warning("run %s: %s %s", run_id, name, text)
        await self._log(run_id, f"{name}: {text}")
        return False

    async def _end(self, run_id: str, failure: JobFailure | None = None) -> bool:
        """Bring a run into the terminal state that its stages or its own failure mean, its folder first."""
        record = await self.book.get(run_id, _logged(run_id))
        if record.state.terminal:
            return True
        error = failure or next((stage.error for stage in record.stages if stage.error), None)
        if error:
            state = RunState.FAILED
        elif all(stage.state.done for stage in record.stages):
            state = RunState.SUCCEEDED
        else:
            state = RunState.CANCELLED
        now = time.time()

        def end(record: RunRecord) -> RunRecord:
            if failure:  # whatever was at work has ended with the run
                for stage in record.stages:
                    if stage.state in (StageState.QUEUED, StageState.RUNNING):
                        record = record.with_stage(
                            stage.name, state=StageState.FAILED, error=failure, ended_at=now
                        )
            return record.changed(state=state, error=error, ended_at=now)

        folder = self._folder(run_id)
        await self._log(run_id, f"{run_id} {state.lower()}{f': {error.message}' if error else ''}")
        try:
            await asyncio.to_thread(folder.write_facts, run_json(end(record)))
            await asyncio.to_thread(folder.publish)
        except Web4Error as problem:  # the run's end must not depend on its folder
            log.warning("run %s: its folder is incomplete: %s", run_id, problem.message)
        run_ended(await self._change(run_id, end))
        await self.scheduler.places.forget([run_id])
        return True

    async def _write(self, record: RunRecord) -> None:
        """Write run.json as of now; a run must not depend on it, and it is written anew after every stage."""
        try:
            await asyncio.to_thread(self._folder(record.id).write_facts, run_json(record))
        except Web4Error as error:
            log.warning("run %s: run.json is not up to date: %s", record.id, error.message)

    async def _log(self, run_id: str, line: str) -> None:
        """Add a line to the run's log; a run must not depend on it."""
        try:
            await asyncio.to_thread(self._folder(run_id).log, line)
        except Web4Error as error:
            log.warning("run %s: %s (%s)", run_id, line, error.message)

    async def _patiently(
        self, run_id: str, name: str, who: str, call: Callable[[], Coroutine[Any, Any, Any]]
    ) -> Any:
        return await patiently(call, who, self._report(run_id, name), self.book.cancelled(run_id))

    async def _change(
        self, run_id: str, change: Callable[[RunRecord], RunRecord], stage: str = ""
    ) -> RunRecord:
        """Change a run that is carried on here, waiting for the database as long as it takes.

        Args:
            run_id: The run.
            change: Makes the new record from the current one.
            stage: Whose progress says that the database is waited for; empty: the log does.
        """
        waiting = self._waiting(run_id, stage) if stage else _logged(run_id)
        return await self.book.change(run_id, change, carried=True, waiting=waiting)

    def _waiting(self, run_id: str, stage: str) -> Waiting:
        return lambda line: self.book.progress(run_id, stage, Progress(phase="wait", message=f"{line} …"))

    def _report(self, run_id: str, stage: str) -> Callable[[Progress], Awaitable[None]]:
        return lambda progress: self.book.progress(run_id, stage, progress)

    def _folder(self, run_id: str) -> RunFolder:
        return RunFolder(run_id, self.store, self.settings.outputs_dir, self.settings.state_dir)


def _logged(run_id: str) -> Waiting:
    async def waiting(line: str) -> None:
        log.warning("%s: %s", run_id, line)

    return waiting


async def _step(name: str, kept: Kept[T], function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
    """Take a step, once: what it came to is kept as JSON, and read back when the run is taken up again."""

    async def take() -> Any:
        with step(name):
            return kept.to_json(await function(*args))

    return kept.from_json(await DBOS.run_step_async({"name": name}, take))


def _stage_of(record: RunRecord, name: str) -> AnyStage:
    return stages_of(Pipeline.from_json(record.pipeline))[name]


def _failure(error: Exception) -> JobFailure:
    """Say for callers that something was not foreseen; its text, which may hold SQL, is in the log alone."""
    return JobFailure(
        "INTERNAL",
        f"An error that was not foreseen ({type(error).__name__}).",
        "This is a defect; the gateway's log has the details.",
    )
