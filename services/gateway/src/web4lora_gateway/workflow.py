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
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from dbos import DBOS, SetWorkflowID
from web4.lora.v1 import jobs_pb2
from web4lora_chassis.artifacts import ArtifactStore
from web4lora_chassis.errors import Cancelled, Unavailable, Web4Error
from web4lora_chassis.jobs import JobFailure, Progress
from web4lora_chassis.rpc import failure_of, ref_of
from web4lora_chassis.rpc.jobs import to_json

from web4lora_gateway.cancellations import Cancellations
from web4lora_gateway.folder import RunFolder
from web4lora_gateway.follow import Work, cancel_job, follow, patiently
from web4lora_gateway.plan import Planner, threaded
from web4lora_gateway.records import RunRecord, RunState, StageResult, StageState
from web4lora_gateway.results import StageResults
from web4lora_gateway.run_json import run_json
from web4lora_gateway.runs import RunBook
from web4lora_gateway.settings import GatewaySettings
from web4lora_gateway.stages import BY_NAME, STAGES, Inputs, Stage
from web4lora_gateway.workers import Workers

log = logging.getLogger(__name__)

Json = dict[str, Any]


class StageFailed(Exception):
    """A stage ended without a result; carries what its step returns."""

    def __init__(self, outcome: Json) -> None:
        super().__init__("stage failed")
        self.outcome = outcome


@dataclass(frozen=True)
class RunWorkflow:
    """Carries runs through their stages.

    Attributes:
        book: The runs.
        results: Earlier results by key.
        store: The artifacts.
        workers: Who does the work.
        cancellations: Cancels to be delivered later.
        settings: Where folders are.
    """

    book: RunBook
    results: StageResults
    store: ArtifactStore
    workers: Workers
    cancellations: Cancellations
    settings: GatewaySettings

    def register(self) -> Callable[[str], Coroutine[Any, Any, None]]:
        """Make the workflow known to DBOS and return what starts it, by run id, at most once for each."""

        @DBOS.workflow(name="run_pipeline", max_recovery_attempts=None)
        async def run_pipeline(run_id: str) -> None:
            await self._run(run_id)

        async def start(run_id: str) -> None:
            with SetWorkflowID(run_id):
                await DBOS.start_workflow_async(run_pipeline, run_id)

        return start

    async def resume(
        self, records: Iterable[RunRecord], start: Callable[[str], Coroutine[Any, Any, None]]
    ) -> None:
        """Start the workflows of runs that were made durable just before a crash; DBOS resumes the others."""
        for record in records:
            status = await DBOS.get_workflow_status_async(record.id)
            if status is None:
                await start(record.id)
            elif status.status in ("PENDING", "ENQUEUED"):
                await self._log(record.id, "the gateway was restarted; the run goes on")
            else:
                await self._end(
                    record.id, asdict(_failure(RuntimeError(f"the workflow ended: {status.status}")))
                )

    async def _run(self, run_id: str) -> None:
        try:
            began = await _step("begin", self._begin, run_id)
            for stage in STAGES if not began.get("error") else ():
                plan = await _step(f"plan {stage.name}", self._plan, run_id, stage.name)
                outcome = plan
                if plan.get("spec") or plan.get("decision"):
                    outcome = await _step(f"work {stage.name}", self._work, run_id, stage.name, plan)
                if not await _step(
                    f"conclude {stage.name}", self._conclude, run_id, stage.name, plan, outcome
                ):
                    break
            await _step("end", self._end, run_id, began.get("error"))
        except Exception as error:
            log.exception("run %s: defect", run_id)
            await self._end(run_id, asdict(_failure(error)))
            raise

    async def _begin(self, run_id: str) -> Json:
        def begin(record: RunRecord) -> RunRecord:
            return record.changed(state=RunState.RUNNING) if record.state is RunState.QUEUED else record

        record = await self.book.change(run_id, begin)
        try:
            await asyncio.to_thread(self._folder(run_id).begin)
            await self._write(run_id)
        except Web4Error as error:
            return _outcome(error)
        await self._log(run_id, f"{run_id} started: {record.pipeline['name']}")
        return {"begun": True}

    async def _plan(self, run_id: str, name: str) -> Json:
        """Decide whether a stage runs: a Plan's fields, or how it failed."""
        stage = BY_NAME[name]
        record = await self.book.change(
            run_id,
            lambda record: record.with_stage(
                name,
                state=StageState.RUNNING,
                progress=Progress(phase="start"),
                started_at=record.stage(name).started_at or time.time(),
            ),
        )
        try:
            plan = await Planner(self.results, self.store, self.workers).plan(
                record, stage, lambda who, call: self._patiently(run_id, stage, who, call)
            )
        except Web4Error as error:
            return _outcome(error)
        return asdict(plan)

    async def _work(self, run_id: str, name: str, plan: Json) -> Json:
        """Have the worker do a stage: {"result": …, "job_id": …}, or how it failed."""
        stage = BY_NAME[name]
        worker = self.workers.by_name[stage.worker]
        record = await self.book.get(run_id)
        if plan.get("decision"):
            return await self._call(record, stage, plan["decision"])
        work = Work(name, f"{run_id}/{record.nonce}/{name}/{plan['key'][:16]}", plan["spec"])

        async def created(job_id: str) -> None:
            if (await self.book.get(run_id)).stage(name).job_id != job_id:
                await self.book.change(run_id, lambda record: record.with_stage(name, job_id=job_id))
                await self._log(run_id, f"{name}: job {job_id} of the {worker.name}")

        try:
            last = await follow(
                worker,
                work,
                created=created,
                report=self._report(run_id, name),
                cancelled=self.book.cancelled(run_id),
            )
        except Cancelled:
            return await self._cancel(run_id, stage, work)
        except Web4Error as error:
            return _outcome(error)
        if last.job.state == jobs_pb2.JOB_STATE_FAILED:
            return {"error": asdict(failure_of(last.job.error))}
        if last.job.state == jobs_pb2.JOB_STATE_CANCELLED:
            text = f"The {worker.name}'s job {last.job.id} was cancelled there."
            return {"error": asdict(JobFailure("CANCELLED", text, "Retry the run."))}
        return {"result": to_json(getattr(last, f"{name}_result")), "job_id": last.job.id}

    async def _call(self, record: RunRecord, stage: Stage, decision: Json) -> Json:
        """Do a stage that is no job: what `_work` returns."""
        calls = stage.calls
        assert calls is not None
        worker = self.workers.by_name[stage.worker]
        who = f"the {worker.name} at {worker.address}"
        inputs = Inputs.of(record)
        try:
            result = await self._patiently(
                record.id, stage, who, lambda: calls.act(inputs, self.workers, decision)
            )
        except Web4Error as error:
            return _outcome(error)
        await self._log(record.id, f"{stage.name}: {calls.told(result)}")
        return {"result": to_json(result)}

    async def _cancel(self, run_id: str, stage: Stage, work: Work) -> Json:
        """Cancel a stage's job, later when its worker is out of reach."""
        job_id = (await self.book.get(run_id)).stage(stage.name).job_id
        worker = self.workers.by_name[stage.worker]
        try:
            await cancel_job(worker, work.request_id, job_id)
        except Unavailable as error:
            await self.cancellations.add(worker.name, work.request_id, job_id)
            note = f"{error.message} Its job is cancelled as soon as it is back."
            return {"cancelled": True, "note": note}
        except Web4Error as error:
            return {"cancelled": True, "note": f"The {worker.name} could not cancel its job: {error.message}"}
        return {"cancelled": True}

    async def _conclude(self, run_id: str, name: str, plan: Json, outcome: Json) -> bool:
        """Write down what came of a stage; return whether the run goes on."""
        try:
            if plan.get("reused"):
                await self._succeed(run_id, name, StageResult(**plan["reused"]), reused=True)
            elif "result" in outcome:
                made = StageResult(plan["key"], run_id, outcome["result"], plan["versions"])
                if plan.get("spec"):  # a decision is made anew in every run
                    await self.results.save(name, made)
                await self._succeed(run_id, name, made, reused=False)
            else:
                raise StageFailed(outcome)
        except StageFailed as failed:
            await self._fail(run_id, name, failed.outcome, plan.get("key", ""))
            return False
        except Web4Error as error:
            await self._fail(run_id, name, _outcome(error), plan.get("key", ""))
            return False
        return True

    async def _succeed(self, run_id: str, name: str, made: StageResult, *, reused: bool) -> None:
        stage = BY_NAME[name]
        refs = [ref_of(ref) for ref in stage.files(stage.read(made.result))]
        folder = self._folder(run_id)
        await self._patiently(run_id, stage, "the artifact store", threaded(folder.place, refs))
        record = await self.book.change(
            run_id,
            lambda record: record.with_stage(
                name,
                state=StageState.REUSED if reused else StageState.SUCCEEDED,
                progress=Progress() if reused else record.stage(name).progress,
                result=made.result,
                versions=made.versions,
                key=made.key,
                reused_from_run=made.run_id if reused else "",
                ended_at=time.time(),
            ),
        )
        done = record.stage(name)
        how = (
            f"taken over from {made.run_id}" if reused else f"done in {done.ended_at - done.started_at:.1f} s"
        )
        await self._log(run_id, f"{name}: {how}")
        await self._write(run_id)
        with contextlib.suppress(Cancelled):  # the stage is done, and the run's end publishes too
            await self._patiently(run_id, stage, "the artifact store", threaded(folder.publish))

    async def _fail(self, run_id: str, name: str, outcome: Json, key: str) -> None:
        error = JobFailure(**outcome["error"]) if "error" in outcome else None
        state = StageState.FAILED if error else StageState.CANCELLED
        note = outcome.get("note", "")
        await self.book.change(
            run_id,
            lambda record: record.with_stage(
                name,
                state=state,
                error=error,
                key=key,
                ended_at=time.time(),
                progress=Progress(phase="cancelled", message=note) if note else record.stage(name).progress,
            ),
        )
        text = f"failed: {error.message}" if error else f"cancelled. {note}".rstrip()
        log.warning("run %s: %s %s", run_id, name, text)
        await self._log(run_id, f"{name}: {text}")

    async def _end(self, run_id: str, failed: Json | None = None) -> bool:
        """Bring a run into the terminal state that its stages or its own failure mean, its folder first."""
        record = await self.book.get(run_id)
        if record.state.terminal:
            return True
        failure = JobFailure(**failed) if failed else None
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
                    if stage.state is StageState.RUNNING:
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
        await self.book.change(run_id, end)
        return True

    async def _write(self, run_id: str) -> None:
        """Write run.json as of now."""
        record = await self.book.get(run_id)
        await asyncio.to_thread(self._folder(run_id).write_facts, run_json(record))

    async def _log(self, run_id: str, line: str) -> None:
        """Add a line to the run's log; a run must not depend on it."""
        try:
            await asyncio.to_thread(self._folder(run_id).log, line)
        except Web4Error as error:
            log.warning("run %s: %s (%s)", run_id, line, error.message)

    async def _patiently(
        self, run_id: str, stage: Stage, who: str, call: Callable[[], Coroutine[Any, Any, Any]]
    ) -> Any:
        return await patiently(call, who, self._report(run_id, stage.name), self.book.cancelled(run_id))

    def _report(self, run_id: str, stage: str) -> Callable[[Progress], Awaitable[None]]:
        return lambda progress: self.book.progress(run_id, stage, progress)

    def _folder(self, run_id: str) -> RunFolder:
        return RunFolder(run_id, self.store, self.settings.outputs_dir, self.settings.state_dir)


async def _step(name: str, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Any:
    return await DBOS.run_step_async({"name": name}, function, *args)


def _outcome(error: Web4Error) -> Json:
    if isinstance(error, Cancelled):
        return {"cancelled": True}
    return {"error": asdict(JobFailure.of(error))}


def _failure(error: Exception) -> JobFailure:
    return JobFailure(
        "INTERNAL", f"{type(error).__name__}: {error}", "This is a defect; the gateway's log has the details."
    )
