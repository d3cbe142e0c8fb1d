"""The child's side of a job: call the handler, pass events to the service, end when the service ends.

Events are JSON lines on standard output: {"progress": …}, then {"counted": …} for the metrics, then
{"result": …} or {"error": …}. Whatever else is printed goes to standard error, which the service keeps as the
job's log.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from web4lora_chassis.artifacts.backend import STORE
from web4lora_chassis.errors import OutOfMemory, Unavailable, Web4Error, disk_error, no_room
from web4lora_chassis.jobs.record import (
    END_EARLY_FILE,
    LESS_MEMORY,
    SECRETS_VARIABLE,
    JobFailure,
    JobRecord,
    Progress,
)
from web4lora_chassis.settings import Settings, load
from web4lora_chassis.telemetry import belongs_to, metrics, start_child, traces

_PROGRESS_INTERVAL_SECONDS = 0.2
_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.5, 30.0


class _Events:
    """Writes events to the service, at most a few a second of the same phase."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._last = ("", 0.0)
        self._phases = _Phases()

    def progress(self, progress: Progress) -> None:
        self._phases.enter(progress.phase)
        finished = progress.total > 0 and progress.done >= progress.total
        phase, sent_at = self._last
        now = time.monotonic()
        if progress.phase == phase and not finished and now - sent_at < _PROGRESS_INTERVAL_SECONDS:
            return
        self._last = (progress.phase, now)
        self.send({"progress": asdict(progress)})

    def finish(self) -> None:
        """End the last phase, and send what was counted."""
        self._phases.enter("")
        self.send({"counted": metrics.counted()})

    def send(self, event: Mapping[str, Any]) -> None:
        line = json.dumps(event) + "\n"
        with self._lock:
            self._stream.write(line)
            self._stream.flush()


class _Phases:
    """Makes a span of each phase that a job tells of, once the next one begins."""

    def __init__(self) -> None:
        self._phase = ""
        self._parent = ""
        self._began = 0.0
        self._count = 0

    def enter(self, phase: str) -> None:
        """Begin a phase; an empty one ends the last."""
        if phase == self._phase:
            return
        now = time.time()
        if self._phase:
            own = traces.span_id_of(f"{self._parent} {self._count}", self._parent)
            traces.ended_span(self._phase, own, self._parent, self._began, now)
        self._phase, self._parent, self._began = phase, traces.traceparent(), now
        self._count += 1


@dataclass(frozen=True)
class JobContext:
    """What a handler is given.

    Attributes:
        id: The job's id.
        spec: What to do, as JSON data of the contract's message.
        attempt: 1 at first; more after the service was restarted or memory ran out.
        memory_failures: How often this job ended for want of memory.
        work_dir: A folder that is kept from attempt to attempt, and removed when the job has ended.
        report: Passes progress on; cheap to call often.
        end_early: Tells whether the work is to end now and keep what it made; cheap to ask often.
        secrets: What the creator of the job handed over besides its spec; empty after the service restarted.
    """

    id: str
    spec: Mapping[str, Any]
    attempt: int
    memory_failures: int
    work_dir: Path
    report: Callable[[Progress], None]
    end_early: Callable[[], bool]
    secrets: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[[JobContext], Mapping[str, Any]]
"""Does a job and returns its result as JSON data of the contract's message."""


def worker_main(handlers: Mapping[str, Handler]) -> int:
    """Do the job whose folder is the first argument.

    Args:
        handlers: What does each kind of job.

    Returns:
        The exit code: 0 when the job succeeded, 1 when it failed with an error that was passed on.
    """
    events = _Events(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)  # whatever libraries print belongs in the log
    secrets = _secrets()
    threading.Thread(target=_end_with_the_service, daemon=True).start()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `finally` blocks run on cancel

    job_dir = Path(sys.argv[1])
    record = JobRecord.load(job_dir / "job.json")
    start_child(load(Settings))
    alone = _wait_until_alone(job_dir)
    work_dir = job_dir / "work"
    work_dir.mkdir(exist_ok=True)
    context = JobContext(
        record.id, record.spec, record.attempt, record.memory_failures, work_dir, events.progress,
        (job_dir / END_EARLY_FILE).exists, secrets,
    )  # fmt: skip
    parent = traces.span_id_of(record.id, record.origin.get("traceparent", ""))
    with alone, belongs_to(run=record.origin.get("run", ""), job=record.id, traceparent=parent):
        return _work(handlers[record.kind], context, events, job_dir / "log.txt")


def _work(handler: Handler, context: JobContext, events: _Events, log_path: Path) -> int:
    """Call the handler and pass on how it ended."""
    try:
        try:
            with traces.span("attempt", attempt=context.attempt):
                result = dict(_with_the_store(handler, context))
        finally:
            events.finish()
        events.send({"result": result})
    except KeyboardInterrupt:
        return 1
    except Exception as error:  # noqa: BLE001 - the last resort: logged with its trace, and passed on
        traceback.print_exc()
        events.send({"error": asdict(_failure(error, log_path))})
        return 1
    return 0


def _with_the_store(handler: Handler, context: JobContext) -> Mapping[str, Any]:
    """Call the handler, anew for as long as the artifact store is away: hours of work may be done by then.

    As after a kill of the service, it goes on from what is in its work folder.
    """
    delay_seconds = _FIRST_DELAY_SECONDS
    while True:
        try:
            return handler(context)
        except Unavailable as error:
            if STORE not in error.metadata:
                raise
            why = error.message
        context.report(Progress(phase="wait", message=f"{why} …"))
        time.sleep(delay_seconds)
        delay_seconds = min(2 * delay_seconds, _LONGEST_DELAY_SECONDS)


def _failure(error: Exception, log_path: Path) -> JobFailure:
    """Say for people what an error means."""
    if isinstance(error, Web4Error):
        return JobFailure.of(error)
    if isinstance(error, MemoryError):
        return JobFailure.of(OutOfMemory("Memory ran out.", fix=LESS_MEMORY))
    if isinstance(error, OSError) and no_room(error):
        return JobFailure.of(disk_error(error, Path(error.filename or log_path.parent)))
    # Its text, which may hold paths or data, is in the log alone.
    return JobFailure(
        "INTERNAL",
        f"An error that was not foreseen ({type(error).__name__}).",
        "This is a defect; the log has the details.",
        {"log": str(log_path)},
    )


def _wait_until_alone(job_dir: Path) -> IO[bytes]:
    """Wait until no other child works on this job: that of a killed service may be about to end still."""
    file = (job_dir / "lock").open("wb")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _secrets() -> Mapping[str, str]:
    """Read what the service hands over: the first line of standard input, which nobody else can see."""
    if os.environ.pop(SECRETS_VARIABLE, "") != "stdin":
        return {}
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:  # the service is gone; `_end_with_the_service` sees that too
            return {}
        line += byte
    held: Mapping[str, str] = json.loads(line)
    return held


def _end_with_the_service() -> None:
    """Kill this process and its children once standard input closes: the service is gone."""
    while os.read(0, 4096):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)  # started by hand: the group is the shell's
