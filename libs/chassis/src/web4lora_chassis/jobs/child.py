"""The child's side of a job: call the handler, pass events to the service, end when the service ends.

Events are JSON lines on standard output: {"progress": …}, then {"result": …} or {"error": …}. Whatever else
is printed goes to standard error, which the service keeps as the job's log.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from web4lora_chassis.errors import OutOfMemory, Web4Error
from web4lora_chassis.jobs.record import JobFailure, JobRecord, Progress

_PROGRESS_INTERVAL_SECONDS = 0.2


class _Events:
    """Writes events to the service, at most a few a second of the same phase."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._last = ("", 0.0)

    def progress(self, progress: Progress) -> None:
        finished = progress.total > 0 and progress.done >= progress.total
        phase, sent_at = self._last
        now = time.monotonic()
        if progress.phase == phase and not finished and now - sent_at < _PROGRESS_INTERVAL_SECONDS:
            return
        self._last = (progress.phase, now)
        self.send({"progress": asdict(progress)})

    def send(self, event: Mapping[str, Any]) -> None:
        with self._lock:
            self._stream.write(json.dumps(event) + "\n")
            self._stream.flush()


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
    """

    id: str
    spec: Mapping[str, Any]
    attempt: int
    memory_failures: int
    work_dir: Path
    report: Callable[[Progress], None]


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
    threading.Thread(target=_end_with_the_service, daemon=True).start()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `finally` blocks run on cancel
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    job_dir = Path(sys.argv[1])
    record = JobRecord.load(job_dir / "job.json")
    work_dir = job_dir / "work"
    work_dir.mkdir(exist_ok=True)
    context = JobContext(
        record.id, record.spec, record.attempt, record.memory_failures, work_dir, events.progress
    )
    try:
        result = handlers[record.kind](context)
    except Web4Error as error:
        traceback.print_exc()
        events.send({"error": asdict(JobFailure.of(error))})
        return 1
    except MemoryError:
        traceback.print_exc()
        events.send({"error": asdict(JobFailure.of(OutOfMemory("Memory ran out.")))})
        return 1
    except KeyboardInterrupt:
        return 1
    except Exception as error:  # noqa: BLE001 - the last resort: named, logged with its trace, and passed on
        traceback.print_exc()
        events.send(
            {
                "error": asdict(
                    JobFailure(
                        "INTERNAL",
                        f"{type(error).__name__}: {error}",
                        "This is a defect; the log has the details.",
                        {"log": str(job_dir / "log.txt")},
                    )
                )
            }
        )
        return 1
    events.send({"result": dict(result)})
    return 0


def _end_with_the_service() -> None:
    """Kill this process and its children once standard input closes: the service is gone."""
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGKILL)
