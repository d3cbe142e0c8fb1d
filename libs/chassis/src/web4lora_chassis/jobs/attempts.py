"""Jobs whose service ended while they were at work: how often that may happen without getting further."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from web4lora_chassis.jobs.record import JobFailure, JobRecord

REASON = "SERVICE_ENDED"


def interrupted(record: JobRecord) -> Mapping[str, Any]:
    """Return what an interruption changes in a job that was at work when its service ended.

    A service that was stopped is no interruption. A job that got further than at any interruption before
    begins to count anew: a long one may outlive any number of them.
    """
    if record.stopped:
        return {"stopped": False}
    phase, done = record.progress.phase, record.progress.done
    further = done > record.reached.get(phase, -1)
    reached = {**record.reached, phase: max(done, record.reached.get(phase, -1))}
    return {"interruptions": 1 if further else record.interruptions + 1, "reached": reached}


def given_up(record: JobRecord, attempts: int) -> JobFailure | None:
    """Return why a job is not started again; None for one that may be.

    Args:
        record: The job, its last interruption counted.
        attempts: Interruptions at one place that it may have.
    """
    if record.interruptions < attempts:
        return None
    progress = record.progress
    place = f"{progress.phase} {progress.done}" if progress.done else progress.phase or "its start"
    return JobFailure(
        REASON,
        f"Its service ended {record.interruptions} times while this job was at the same place ({place}), so "
        "it is not started again.",
        "Most likely memory ran out, of the machine or of the container: the logs of the service and of the "
        "job may say. Then run it again.",
    )
