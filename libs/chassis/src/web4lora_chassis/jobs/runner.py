"""The service's side of jobs: accept, start a child for each, watch, cancel, go on after a restart."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import secrets
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from web4lora_chassis import process
from web4lora_chassis.environment import STORE_KEY, environment
from web4lora_chassis.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidInput,
    NotFound,
    OutOfMemory,
    disk_error,
)
from web4lora_chassis.jobs.attempts import given_up, interrupted
from web4lora_chassis.jobs.record import (
    END_EARLY_FILE,
    LESS_MEMORY,
    SECRETS_VARIABLE,
    JobFailure,
    JobRecord,
    JobState,
    Progress,
)
from web4lora_chassis.jobs.retention import surplus
from web4lora_chassis.keeping import Keeping, folder_bytes
from web4lora_chassis.telemetry import belongs_to, metrics, origin, traces

log = logging.getLogger(__name__)

_SAVE_INTERVAL_SECONDS = 1.0
_ROOM_INTERVAL_SECONDS = 1.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_EVENT_LIMIT_BYTES = 64 << 20
_REQUEST_ID_LENGTH = 200
_EXIT_POLL_SECONDS = 0.05
_ROOM_POLL_SECONDS = 2.0
_DRAIN_SECONDS = 5.0
# Progress is not saved with every change; after a restart revisions still have to grow.
_RESTART_REVISIONS = 1_000_000


class JobRunner:
    """Runs jobs in child processes: in each lane one at a time, in the order in which they came.

    Args:
        root: Folder of the jobs' folders: `<root>/<job id>/job.json`, `log.txt`, `work/`.
        module: The module that is the child's program; it calls `worker_main`.
        lanes: The lane of each kind of job; kinds that are not named share one.
        lacks: Asked before a job starts beside others that are at work, by its kind: what it waits for, in
            words, until the answer is empty. Without it jobs of different lanes never wait for each other.
        memory_retries: How often a job that ended for want of memory is started again.
        cancel_grace_seconds: Time between asking a child to end and killing it.
        env: Variables for the children on top of ours.
        secrets: Names of variables with secrets that the children need besides the store's key.
        attempts: How often its service may end while a job is at one place.
        can_end_early: Kinds of jobs whose handlers ask `JobContext.end_early`.
    """

    def __init__(
        self,
        root: Path,
        module: str,
        *,
        lanes: Mapping[str, str] | None = None,
        lacks: Callable[[str], str] | None = None,
        memory_retries: int = 0,
        cancel_grace_seconds: float = 5.0,
        env: Mapping[str, str] | None = None,
        secrets: Sequence[str] = (),
        attempts: int = 5,
        can_end_early: Collection[str] = (),
    ) -> None:
        self._root = root
        self._attempts = attempts
        self._module = module
        self._memory_retries = memory_retries
        self._cancel_grace_seconds = cancel_grace_seconds
        self._env = {**environment(*STORE_KEY, *secrets, ours=True), **(env or {})}
        self._can_end_early = frozenset(can_end_early)
        self._jobs: dict[str, JobRecord] = {}
        self._by_request: dict[str, str] = {}
        self._watched: dict[str, asyncio.Event] = {}
        self._lanes = dict(lanes or {})
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._lacks = lacks
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._secrets: dict[str, Mapping[str, str]] = {}
        self._terminations: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def start(self) -> None:
        """Load the jobs on disk and go on with those that had not ended."""
        self._root.mkdir(parents=True, exist_ok=True)
        records = [record for path in self._root.glob("*/job.json") if (record := _load(path))]
        for record in sorted(records, key=lambda record: (record.created_at, record.id)):
            self._jobs[record.id] = record
            self._by_request[record.request_id] = record.id
            if record.state is JobState.CANCELLING:
                await self._end(record.id, state=JobState.CANCELLED)
            elif not record.state.terminal:
                await self._take_up(record)

    async def _take_up(self, record: JobRecord) -> None:
        """Go on with a job that a restart cut off, unless the service ends over it again and again."""
        revision = record.revision + _RESTART_REVISIONS
        if record.state is JobState.RUNNING:
            record = record.changed(revision=revision, **interrupted(record))
            self._jobs[record.id] = record
            if failure := given_up(record, self._attempts):
                log.warning("job %s failed: %s", record.id, failure.message)
                await self._end(record.id, state=JobState.FAILED, error=failure)
                return
        log.info("job %s goes on after a restart", record.id)
        self._update(record.id, state=JobState.QUEUED, revision=revision)
        self._schedule(record.id)

    async def prune(self, keep: Keeping, *, urgent: bool = False) -> int:
        """Remove ended jobs and working files that are no longer kept.

        Args:
            keep: The bounds.
            urgent: The disk is nearly full; see `surplus`.

        Returns:
            How much room that freed, in bytes.
        """
        ended = [record for record in self._jobs.values() if record.state.terminal]
        work = {record.id: self._root / record.id / "work" for record in ended}
        sizes = await asyncio.to_thread(
            lambda: {job_id: folder_bytes(folder) for job_id, folder in work.items() if folder.is_dir()}
        )
        going = surplus(ended, sizes, keep, time.time(), urgent=urgent)
        for job_id in going.jobs:
            record = self._jobs.pop(job_id)
            self._by_request.pop(record.request_id, None)
        places = [self._root / job_id for job_id in going.jobs] + [work[job_id] for job_id in going.work]
        for place in places:
            await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)
        if places:
            log.info("%d ended jobs and the files of %d others went", len(going.jobs), len(going.work))
        return sum(sizes.get(job_id, 0) for job_id in going.jobs | going.work)

    async def stop(self) -> None:
        """End the children; their jobs go on at the next start."""
        self._stopping = True
        for job_id in self._children:
            if self._jobs[job_id].state is JobState.RUNNING:
                self._update(job_id, stopped=True)
        for child in list(self._children.values()):
            _signal(child, signal.SIGKILL)
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._terminations, return_exceptions=True)

    async def create(
        self,
        kind: str,
        request_id: str,
        spec: Mapping[str, Any],
        held: Mapping[str, str] | None = None,
        *,
        owner: str = "",
    ) -> JobRecord:
        """Accept a job; it is on disk when this returns.

        Args:
            kind: Which handler does it.
            request_id: The caller's key, 1 to 200 characters: the same key and spec give the same job again.
            spec: What to do, as JSON data.
            held: Secrets for the handler. They stay in memory: a job that is taken up after a restart of the
                service is without them.
            owner: For whom the gateway asks; empty for a run.

        Raises:
            InvalidInput: A request_id of the wrong length.
            AlreadyExists: The key was used with another spec.
            ResourceExhausted: The disk is full.
        """
        if not 1 <= len(request_id) <= _REQUEST_ID_LENGTH:
            raise InvalidInput(
                f"request_id needs 1 to {_REQUEST_ID_LENGTH} characters.", metadata={"field": "request_id"}
            )
        if request_id in self._by_request:
            record = self._jobs[self._by_request[request_id]]
            if record.kind != kind or dict(record.spec) != dict(spec):
                raise AlreadyExists(
                    f"The request_id {request_id!r} was used with another spec, for the job {record.id}.",
                    fix="Use a new request_id for new work.",
                )
            return record
        now = time.time()
        job_id = f"{kind}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}-{secrets.token_hex(4)}"
        record = JobRecord(
            id=job_id,
            kind=kind,
            request_id=request_id,
            spec=dict(spec),
            created_at=now,
            owner=owner,
            origin=origin(),
        )
        folder = self._root / job_id
        try:
            folder.mkdir(parents=True)
            record.save(folder / "job.json")
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise disk_error(error, folder) from error
        self._jobs[job_id] = record
        self._by_request[request_id] = job_id
        if held:
            self._secrets[job_id] = dict(held)
        self._schedule(job_id)
        return record

    def get(self, job_id: str) -> JobRecord:
        """Return a job as it is now.

        Raises:
            NotFound: No such job.
        """
        try:
            return self._jobs[job_id]
        except KeyError:
            raise NotFound(f"There is no job {job_id!r}.", metadata={"job": job_id}) from None

    def list(self) -> list[JobRecord]:
        """Return all jobs, newest first."""
        return sorted(self._jobs.values(), key=lambda record: (record.created_at, record.id), reverse=True)

    def waiting(self) -> dict[str, float]:
        """Return how many jobs have not ended, by state: a metric."""
        states = [record.state for record in list(self._jobs.values()) if not record.state.terminal]
        return {str(state): states.count(state) for state in JobState if not state.terminal}

    def memory_bytes(self) -> dict[str, float]:
        """Return the resident memory of each kind of job at work, all its processes together: a metric."""
        found: dict[str, float] = {}
        for job_id, child in list(self._children.items()):
            kind = self._jobs[job_id].kind
            with contextlib.suppress(psutil.NoSuchProcess):  # it ends just now
                process = psutil.Process(child.pid)
                everyone = [process, *process.children(recursive=True)]
                found[kind] = found.get(kind, 0) + sum(each.memory_info().rss for each in everyone)
        return found

    async def watch(self, job_id: str) -> AsyncIterator[JobRecord]:
        """Yield the job as it is now, then after changes (some may be skipped); end with a terminal state.

        Raises:
            NotFound: No such job.
        """
        record = self.get(job_id)
        yield record
        while not record.state.terminal:
            changed = self._watched.setdefault(job_id, asyncio.Event())
            if self._jobs[job_id] is record:  # else it changed while the caller looked at the last one
                await changed.wait()
            record = self._jobs[job_id]
            yield record

    async def cancel(self, job_id: str) -> JobRecord:
        """Ask a job to end; its child and all that it started are killed after the grace time.

        Raises:
            NotFound: No such job.
        """
        record = self.get(job_id)
        if record.state is JobState.QUEUED:
            await self._end(job_id, state=JobState.CANCELLED)
        elif record.state is JobState.RUNNING:
            self._update(job_id, state=JobState.CANCELLING)
            child = self._children.get(job_id)
            if child is not None:
                self._begin_termination(child)
        return self._jobs[job_id]

    async def end_early(self, job_id: str) -> JobRecord:
        """Ask a job to end early and to keep what it made; it goes on until its handler looks.

        Raises:
            NotFound: No such job.
            FailedPrecondition: It has not begun, is being cancelled, or its work can't end early.
            ResourceExhausted: The disk is full.
        """
        record = self.get(job_id)
        if record.state.terminal:
            return record
        if record.kind not in self._can_end_early:
            raise FailedPrecondition(f"A {record.kind} job can't end early.", fix="Cancel it without keep.")
        if record.attempt == 0 or record.state is JobState.CANCELLING:
            what = "has not begun" if record.attempt == 0 else "is being cancelled"
            raise FailedPrecondition(
                f"The job {job_id} {what}: there is nothing to keep.", fix="Cancel it without keep."
            )
        path = self._root / job_id / END_EARLY_FILE
        try:
            path.touch()
        except OSError as error:
            raise disk_error(error, path) from error
        return record

    def _schedule(self, job_id: str) -> None:
        task = asyncio.get_running_loop().create_task(self._run(job_id), name=f"job {job_id}")
        self._tasks[job_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(job_id, None))

    async def _run(self, job_id: str) -> None:
        """Wait for a turn, then start the job's child, again after want of memory while that is allowed."""
        record = self._jobs[job_id]
        with belongs_to(
            run=record.origin.get("run", ""),
            job=job_id,
            traceparent=record.origin.get("traceparent", ""),
        ):
            await self._run_in_turn(job_id)

    async def _run_in_turn(self, job_id: str) -> None:
        async with self._turns[self._lanes.get(self._jobs[job_id].kind, "")]:
            while self._jobs[job_id].state is JobState.QUEUED:
                if lacking := await self._lacking(job_id):
                    self._update(job_id, save=False, progress=Progress(phase="wait", message=lacking))
                    await asyncio.sleep(_ROOM_POLL_SECONDS)
                    continue
                try:
                    await self._run_child(job_id)
                except Exception as error:
                    log.exception("job %s", job_id)
                    reason = f"The job could not be run ({type(error).__name__})."
                    failure = JobFailure("INTERNAL", reason, "The service's log has the details.")
                    await self._end(job_id, state=JobState.FAILED, error=failure)

    async def _lacking(self, job_id: str) -> str:
        """Return what a job has to wait for beside those at work; alone it waits for nothing."""
        if self._lacks is None or not self._children:
            return ""
        return await asyncio.to_thread(self._lacks, self._jobs[job_id].kind)

    async def _run_child(self, job_id: str) -> None:
        """Start the job's child and see it to its end."""
        record = self._jobs[job_id]
        folder = self._root / job_id
        self._update(
            job_id,
            state=JobState.RUNNING,
            attempt=record.attempt + 1,
            started_at=record.started_at or time.time(),
            progress=Progress(phase="start"),
        )
        held = self._secrets.get(job_id)
        with (folder / "log.txt").open("ab") as log_file:
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-m", self._module, str(folder),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log_file,
                env={**self._env, SECRETS_VARIABLE: "stdin"} if held else self._env,
                start_new_session=True, limit=_EVENT_LIMIT_BYTES,
            )  # fmt: skip
        self._children[job_id] = child
        if held:
            await _hand_over(child, held)
        if self._jobs[job_id].state is JobState.CANCELLING:  # asked for while the child was being started
            self._begin_termination(child)
        outcome: dict[str, Any] = {}
        follow = asyncio.get_running_loop().create_task(self._follow(job_id, child, outcome))
        try:
            code = await _exited(child)
        finally:
            self._children.pop(job_id, None)
            _signal(child, signal.SIGKILL)  # also what the child started and left behind: it holds our pipes
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(follow, _DRAIN_SECONDS)
            await _exited(child)
        if not self._stopping:
            await self._conclude(job_id, outcome, code)

    async def _follow(self, job_id: str, child: asyncio.subprocess.Process, outcome: dict[str, Any]) -> None:
        """Take the child's events in; its result or error goes into `outcome`, nothing when it died."""
        assert child.stdout is not None
        saved_at = time.monotonic()
        try:
            while line := await child.stdout.readline():
                event = _event(line)
                if "progress" in event:
                    save = time.monotonic() - saved_at > _SAVE_INTERVAL_SECONDS
                    saved_at = time.monotonic() if save else saved_at
                    progress = Progress(**event["progress"])
                    self._update(job_id, save=save, progress=progress)
                    speed = progress.figures.get("tokens_per_second", 0.0)
                    metrics.JOB_TOKENS_PER_SECOND.labels(self._jobs[job_id].kind).set(speed)
                elif "counted" in event:
                    metrics.add(event["counted"])
                elif event:
                    outcome.update(event)
                else:  # printed while the child's modules were being loaded
                    log.info("job %s: %s", job_id, line.decode("utf-8", errors="replace").rstrip())
        except BaseException:
            _signal(child, signal.SIGKILL)  # nobody reads what it has to say any more
            raise

    async def _conclude(self, job_id: str, last: Mapping[str, Any], code: int) -> None:
        """Give the job the state that its child's end means."""
        record = self._jobs[job_id]
        if "result" in last:
            await self._end(job_id, state=JobState.SUCCEEDED, result=last["result"])
            return
        if record.state is JobState.CANCELLING:
            await self._end(job_id, state=JobState.CANCELLED)
            return
        failure = (
            JobFailure(**last["error"]) if "error" in last else _death(code, self._root / job_id / "log.txt")
        )
        if failure.reason == "OUT_OF_MEMORY" and record.memory_failures < self._memory_retries:
            log.warning("job %s: %s It is started again with less.", job_id, failure.message)
            self._update(job_id, state=JobState.QUEUED, memory_failures=record.memory_failures + 1)
            return
        log.warning("job %s failed: %s", job_id, failure.message)
        await self._end(job_id, state=JobState.FAILED, error=failure)

    async def _end(self, job_id: str, **fields: Any) -> None:
        """Bring a job into a terminal state and remove its working files.

        The state is on disk first: who starts again without it needs the working files to go on from.
        """
        fields["ended_at"] = time.time()
        while self._save(job_id, self._jobs[job_id].changed(**fields)) in _NO_ROOM:
            message = "waiting for room on the disk to write down how the job ended …"
            self._update(job_id, save=False, progress=Progress(phase="wait", message=message))
            await asyncio.sleep(_ROOM_INTERVAL_SECONDS)
        self._update(job_id, save=False, **fields)
        _observe(self._jobs[job_id])
        self._secrets.pop(job_id, None)
        if self._jobs[job_id].state is not JobState.FAILED:  # a failed job's files may explain it
            await asyncio.to_thread(shutil.rmtree, self._root / job_id / "work", ignore_errors=True)

    def _update(self, job_id: str, *, save: bool = True, **fields: Any) -> None:
        """Change a job, on disk first, and wake who watches; with no pause in which a change is lost."""
        record = self._jobs[job_id].changed(**fields)
        if save:
            # Without it the work itself goes on; after a restart the job goes on from its last saved state.
            self._save(job_id, record)
        self._jobs[job_id] = record
        watched = self._watched.pop(job_id, None)
        if watched:
            watched.set()

    def _save(self, job_id: str, record: JobRecord) -> int:
        """Write a job to the disk; return the number of the error, or 0."""
        try:
            record.save(self._root / job_id / "job.json")
        except OSError as error:
            log.error("job %s: its state %s is not on disk: %s", job_id, record.state, error)
            return error.errno or -1
        return 0

    def _begin_termination(self, child: asyncio.subprocess.Process) -> None:
        task = asyncio.get_running_loop().create_task(self._terminate(child))
        self._terminations.add(task)  # the loop itself would forget it
        task.add_done_callback(self._terminations.discard)

    async def _terminate(self, child: asyncio.subprocess.Process) -> None:
        _signal(child, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_exited(child), self._cancel_grace_seconds)
        _signal(child, signal.SIGKILL)


def _observe(record: JobRecord) -> None:
    """Count a job that ended, and make its span."""
    began = record.started_at or record.ended_at
    metrics.JOB_SECONDS.labels(record.kind, record.state).observe(record.ended_at - began)
    metrics.JOB_TOKENS_PER_SECOND.labels(record.kind).set(0)
    parent = record.origin.get("traceparent", "")
    traces.ended_span(
        f"job {record.kind}",
        traces.span_id_of(record.id, parent),
        parent,
        record.created_at,
        record.ended_at,
        record.error.message if record.error else "",
        job=record.id,
        state=record.state,
        attempts=record.attempt,
    )


def _load(path: Path) -> JobRecord | None:
    """Read a job from disk; one that can't be read is set aside, so that the others go on."""
    try:
        return JobRecord.load(path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        aside = path.with_name("job.json.unreadable")
        log.error("%s can't be read and is set aside as %s: %r", path, aside.name, error)
        path.replace(aside)
        return None


def _event(line: bytes) -> dict[str, Any]:
    """Return the event that a line holds, or nothing for a line that is none."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    known = isinstance(event, dict) and event.keys() & {"progress", "result", "error", "counted"}
    return event if known else {}


async def _hand_over(child: asyncio.subprocess.Process, held: Mapping[str, str]) -> None:
    """Write a job's secrets to its child's standard input, which stays open: its end tells of ours."""
    assert child.stdin is not None
    child.stdin.write(json.dumps(dict(held)).encode() + b"\n")
    with contextlib.suppress(ConnectionError):  # it has ended already, which its exit code tells
        await child.stdin.drain()


async def _exited(child: asyncio.subprocess.Process) -> int:
    """Wait until a child has ended. `child.wait` may also wait for those that inherited its pipes."""
    while child.returncode is None:
        await asyncio.sleep(_EXIT_POLL_SECONDS)
    return child.returncode


def _signal(child: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Signal a child and all that it started; those that are gone are no error."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _death(code: int, log_path: Path) -> JobFailure:
    """Say why a child ended without a result or an error."""
    metadata = {"log": str(log_path), "exit_code": str(code)}
    error = process.failure("The worker process", code, reason="WORKER_DIED")
    fix = LESS_MEMORY if isinstance(error, OutOfMemory) else f"{error.fix} Its log may say why: {log_path}"
    return JobFailure(error.reason, error.message, fix.strip(), metadata)
