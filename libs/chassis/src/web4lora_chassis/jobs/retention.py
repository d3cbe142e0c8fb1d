"""Which ended jobs, and which of their working files, a worker no longer keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from web4lora_chassis.jobs.record import JobRecord, JobState
from web4lora_chassis.keeping import DAY_SECONDS, GB, Keeping

_LEAST_SECONDS = DAY_SECONDS
"""Whoever created a job may have been away when it ended, and still has to hear of its result."""


@dataclass(frozen=True)
class Surplus:
    """What may go: ids of jobs, and of jobs that stay on record without their working files."""

    jobs: frozenset[str]
    work: frozenset[str]


def surplus(
    records: Iterable[JobRecord],
    work_bytes: Mapping[str, int],
    keep: Keeping,
    now: float,
    *,
    urgent: bool = False,
) -> Surplus:
    """Return what may go by count, age and size. Jobs that have not ended stay.

    Args:
        records: All jobs.
        work_bytes: Sizes of the working files that jobs have, by id.
        keep: The bounds.
        now: Seconds since 1970.
        urgent: The disk is nearly full: no working files of jobs that have ended stay.
    """
    ended = sorted(
        (record for record in records if record.state.terminal),
        key=lambda record: (record.ended_at, record.id),
        reverse=True,
    )
    jobs = set()
    for number, record in enumerate(ended):
        age = now - record.ended_at
        too_many = bool(keep.keep_jobs) and number >= keep.keep_jobs and age > _LEAST_SECONDS
        too_old = bool(keep.keep_jobs_days) and age > max(keep.keep_jobs_days * DAY_SECONDS, _LEAST_SECONDS)
        if too_many or too_old:
            jobs.add(record.id)
    work = set()
    room = keep.keep_failed_work_gb * GB
    for record in ended:
        if record.id not in work_bytes or record.id in jobs:
            continue
        room -= work_bytes[record.id]
        age = now - record.ended_at
        too_old = bool(keep.keep_failed_work_days) and age > keep.keep_failed_work_days * DAY_SECONDS
        too_large = bool(keep.keep_failed_work_gb) and room < 0
        if urgent or too_old or too_large or record.state is not JobState.FAILED:
            work.add(record.id)
    return Surplus(frozenset(jobs), frozenset(work))
