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

from web4lora_chassis.errors import AlreadyExists, InvalidInput, NotFound
from web4lora_chassis.jobs.record import JobFailure, JobRecord, JobState, Progress

log = logging.getLogger(__name__)

_SAVE_INTERVAL_SECONDS = 1.0
_EVENT_LIMIT_BYTES = 64 << 20
_REQUEST_ID_LENGTH = 200


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
        self._changed = asyncio.Condition()
        self._slots = asyncio.Semaphore(concurrency)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._stopping = False

    async def start(self) -> None:
        """Load the jobs on disk and go on with those that had not ended."""
        self._root.mkdir(parents=True, exist_ok=True)
        records = [JobRecord.load(path) for path in self._root.glob("*/job.json")]
        for record in sorted(records, key=lambda record: (record.created_at, record.id)):
            self._jobs[record.id] = record
            self._by_request[record.request_id] = record.id
            if record.state is JobState.CANCELLING:
                await self._update(record.id, state=JobState.CANCELLED, ended_at=time.time())
            elif not record.state.terminal:
                log.info("job %s goes on after a restart", record.id)
                await self._update(record.id, state=JobState.QUEUED)
                self._schedule(record.id)

    async def stop(self) -> None:
        """End the children; their jobs go on at the next start."""
        self._stopping = True
        for child in list(self._children.values()):
            _signal(child, signal.SIGKILL)
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def create(self, kind: str, request_id: str, spec: Mapping[str, Any]) -> JobRecord:
        """Accept a job; it is on disk when this returns.

        Args:
            kind: Which handler does it.
            request_id: The caller's key, 1 to 200 characters: the same key and spec give the same job again.
            spec: What to do, as JSON data.

        Raises:
            InvalidInput: A request_id of the wrong length.
            AlreadyExists: The key was used with another spec.
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
        job_id = f"{kind}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}-{secrets.token_hex(3)}"
        record = JobRecord(id=job_id, kind=kind, request_id=request_id, spec=dict(spec), created_at=now)
        folder = self._root / job_id
        folder.mkdir(parents=True)
        record.save(folder / "job.json")
        self._jobs[job_id] = record
        self._by_request[request_id] = job_id
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
        """Yield the job as it is now, then after changes (some may be skipped), and end with a terminal state.

        Raises:
            NotFound: No such job.
        """
        record = self.get(job_id)
        yield record
        while not record.state.terminal:
            seen = record.revision
            async with self._changed:
                await self._changed.wait_for(lambda: self._jobs[job_id].revision != seen)
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
            await self._update(job_id, state=JobState.CANCELLING)
            child = self._children.get(job_id)
            if child is not None:
                asyncio.get_running_loop().create_task(self._terminate(child))
        return self._jobs[job_id]

    def _schedule(self, job_id: str) -> None:
        task = asyncio.get_running_loop().create_task(self._run(job_id), name=f"job {job_id}")
        self._tasks[job_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(job_id, None))

    async def _run(self, job_id: str) -> None:
        """Wait for a slot, then start the job's child, again after want of memory while that is allowed."""
        async with self._slots:
            while self._jobs[job_id].state is JobState.QUEUED:
                await self._run_child(job_id)

    async def _run_child(self, job_id: str) -> None:
        record = self._jobs[job_id]
        folder = self._root / job_id
        await self._update(
            job_id,
            state=JobState.RUNNING,
            attempt=record.attempt + 1,
            started_at=record.started_at or time.time(),
            progress=Progress(phase="start"),
        )
        with (folder / "log.txt").open("ab") as log_file:
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-m", self._module, str(folder),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log_file,
                env=self._env, start_new_session=True, limit=_EVENT_LIMIT_BYTES,
            )  # fmt: skip
        self._children[job_id] = child
        if self._jobs[job_id].state is JobState.CANCELLING:  # asked for while the child was being started
            asyncio.get_running_loop().create_task(self._terminate(child))
        try:
            last = await self._follow(job_id, child)
            code = await child.wait()
        finally:
            self._children.pop(job_id, None)
            _signal(child, signal.SIGKILL)  # whatever the child started and left behind
        if not self._stopping:
            await self._conclude(job_id, last, code)

    async def _follow(self, job_id: str, child: asyncio.subprocess.Process) -> Mapping[str, Any]:
        """Take the child's events in; return its result or error, or nothing when it died."""
        assert child.stdout is not None
        last: Mapping[str, Any] = {}
        saved_at = time.monotonic()
        while line := await child.stdout.readline():
            event = json.loads(line)
            if "progress" in event:
                save = time.monotonic() - saved_at > _SAVE_INTERVAL_SECONDS
                saved_at = time.monotonic() if save else saved_at
                await self._update(job_id, save=save, progress=Progress(**event["progress"]))
            else:
                last = event
        return last

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
            await self._update(job_id, state=JobState.QUEUED, memory_failures=record.memory_failures + 1)
            return
        log.warning("job %s failed: %s", job_id, failure.message)
        await self._end(job_id, state=JobState.FAILED, error=failure)

    async def _end(self, job_id: str, **fields: Any) -> None:
        """Bring a job into a terminal state and remove its working files."""
        await self._update(job_id, ended_at=time.time(), **fields)
        if self._jobs[job_id].state is not JobState.FAILED:  # a failed job's files may explain it
            await asyncio.to_thread(shutil.rmtree, self._root / job_id / "work", ignore_errors=True)

    async def _update(self, job_id: str, *, save: bool = True, **fields: Any) -> None:
        """Change a job, on disk first, and wake who watches."""
        record = self._jobs[job_id].changed(**fields)
        if save:
            record.save(self._root / job_id / "job.json")
        async with self._changed:
            self._jobs[job_id] = record
            self._changed.notify_all()

    async def _terminate(self, child: asyncio.subprocess.Process) -> None:
        _signal(child, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(child.wait(), self._cancel_grace_seconds)
        _signal(child, signal.SIGKILL)


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
            "Close other programs, or choose a smaller base model or tokens_per_batch.",
            metadata,
        )
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return JobFailure(
        "WORKER_DIED", f"The worker process ended with {how}.", f"Its log may say why: {log_path}", metadata
    )
