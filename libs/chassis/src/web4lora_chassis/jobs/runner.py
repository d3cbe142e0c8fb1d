"""The service's side of jobs: accept, start a child for each, watch, cancel, go on after a restart."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from web4lora_chassis.errors import AlreadyExists, InvalidInput, NotFound, disk_error
from web4lora_chassis.jobs.record import (
    LESS_MEMORY,
    SECRETS_VARIABLE,
    JobFailure,
    JobRecord,
    JobState,
    Progress,
)

log = logging.getLogger(__name__)

_SAVE_INTERVAL_SECONDS = 1.0
_EVENT_LIMIT_BYTES = 64 << 20
_REQUEST_ID_LENGTH = 200
_EXIT_POLL_SECONDS = 0.05
_DRAIN_SECONDS = 5.0
# Progress is not saved with every change; after a restart revisions still have to grow.
_RESTART_REVISIONS = 1_000_000


class JobRunner:
    """Runs jobs in child processes, in the order in which they came.

    Args:
        root: Folder of the jobs' folders: `<root>/<job id>/job.json`, `log.txt`, `work/`.
        module: The module that is the child's program; it calls `worker_main`.
        concurrency: Jobs at work at once.
        memory_retries: How often a job that ended for want of memory is started again.
        cancel_grace_seconds: Time between asking a child to end and killing it.
        env: Variables for the children on top of ours.
    """

    def __init__(
        self,
        root: Path,
        module: str,
        *,
        concurrency: int = 1,
        memory_retries: int = 0,
        cancel_grace_seconds: float = 5.0,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._root = root
        self._module = module
        self._memory_retries = memory_retries
        self._cancel_grace_seconds = cancel_grace_seconds
        self._env = {**os.environ, **(env or {})}
        self._jobs: dict[str, JobRecord] = {}
        self._by_request: dict[str, str] = {}
        self._watched: dict[str, asyncio.Event] = {}
        self._slots = asyncio.Semaphore(concurrency)
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
                log.info("job %s goes on after a restart", record.id)
                revision = record.revision + _RESTART_REVISIONS
                self._update(record.id, state=JobState.QUEUED, revision=revision)
                self._schedule(record.id)

    async def stop(self) -> None:
        """End the children; their jobs go on at the next start."""
        self._stopping = True
        for child in list(self._children.values()):
            _signal(child, signal.SIGKILL)
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._terminations, return_exceptions=True)

    async def create(
        self, kind: str, request_id: str, spec: Mapping[str, Any], held: Mapping[str, str] | None = None
    ) -> JobRecord:
        """Accept a job; it is on disk when this returns.

        Args:
            kind: Which handler does it.
            request_id: The caller's key, 1 to 200 characters: the same key and spec give the same job again.
            spec: What to do, as JSON data.
            held: Secrets for the handler. They stay in memory: a job that is taken up after a restart of the
                service is without them.

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
        record = JobRecord(id=job_id, kind=kind, request_id=request_id, spec=dict(spec), created_at=now)
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

    def _schedule(self, job_id: str) -> None:
        task = asyncio.get_running_loop().create_task(self._run(job_id), name=f"job {job_id}")
        self._tasks[job_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(job_id, None))

    async def _run(self, job_id: str) -> None:
        """Wait for a slot, then start the job's child, again after want of memory while that is allowed."""
        async with self._slots:
            while self._jobs[job_id].state is JobState.QUEUED:
                try:
                    await self._run_child(job_id)
                except Exception as error:
                    log.exception("job %s", job_id)
                    reason = f"The job could not be run: {type(error).__name__}: {error}"
                    failure = JobFailure("INTERNAL", reason, "The service's log has the details.")
                    await self._end(job_id, state=JobState.FAILED, error=failure)

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
                    self._update(job_id, save=save, progress=Progress(**event["progress"]))
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
        """Bring a job into a terminal state and remove its working files."""
        self._update(job_id, ended_at=time.time(), **fields)
        self._secrets.pop(job_id, None)
        if self._jobs[job_id].state is not JobState.FAILED:  # a failed job's files may explain it
            await asyncio.to_thread(shutil.rmtree, self._root / job_id / "work", ignore_errors=True)

    def _update(self, job_id: str, *, save: bool = True, **fields: Any) -> None:
        """Change a job, on disk first, and wake who watches; with no pause in which a change is lost."""
        record = self._jobs[job_id].changed(**fields)
        if save:
            try:
                record.save(self._root / job_id / "job.json")
            except OSError as error:
                # The work itself goes on; after a restart the job is taken up from its last saved state.
                log.error("job %s: its state %s is not on disk: %s", job_id, record.state, error)
        self._jobs[job_id] = record
        watched = self._watched.pop(job_id, None)
        if watched:
            watched.set()

    def _begin_termination(self, child: asyncio.subprocess.Process) -> None:
        task = asyncio.get_running_loop().create_task(self._terminate(child))
        self._terminations.add(task)  # the loop itself would forget it
        task.add_done_callback(self._terminations.discard)

    async def _terminate(self, child: asyncio.subprocess.Process) -> None:
        _signal(child, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_exited(child), self._cancel_grace_seconds)
        _signal(child, signal.SIGKILL)


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
    known = isinstance(event, dict) and event.keys() & {"progress", "result", "error"}
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
    if code == -signal.SIGKILL:
        return JobFailure(
            "OUT_OF_MEMORY",
            "The worker process was killed from outside, most likely because memory ran out.",
            LESS_MEMORY,
            metadata,
        )
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return JobFailure(
        "WORKER_DIED", f"The worker process ended with {how}.", f"Its log may say why: {log_path}", metadata
    )
