"""What of ended jobs goes by count, age and size, and what stays whatever the bounds."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from web4lora_chassis.errors import NotFound
from web4lora_chassis.jobs import JobRecord, JobRunner, JobState
from web4lora_chassis.jobs.retention import surplus
from web4lora_chassis.keeping import DAY_SECONDS, GB
from web4lora_chassis.settings import Settings

NOW = 2e9


def job(name: str, days: float, state: JobState = JobState.FAILED) -> JobRecord:
    ended_at = NOW - days * DAY_SECONDS if state.terminal else 0.0
    return JobRecord(name, "train", f"request-{name}", {}, state=state, ended_at=ended_at)


def test_jobs_go_by_count_and_age_but_not_before_a_day() -> None:
    jobs = [
        job("new", 0.5),
        job("yesterday", 2),
        job("week", 8),
        job("old", 91),
        job("work", 0, JobState.RUNNING),
    ]
    assert surplus(jobs, {}, Settings(), NOW).jobs == {"old"}
    assert surplus(jobs, {}, Settings(keep_jobs=1), NOW).jobs == {"yesterday", "week", "old"}
    assert surplus(jobs, {}, Settings(keep_jobs=1, keep_jobs_days=0.1), NOW).jobs == {
        "yesterday",
        "week",
        "old",
    }
    assert surplus(jobs, {}, Settings(keep_jobs=0, keep_jobs_days=0), NOW).jobs == set()


def test_working_files_go_by_age_and_size_the_oldest_first() -> None:
    jobs = [job("a", 1), job("b", 2), job("c", 3), job("old", 8), job("work", 0, JobState.RUNNING)]
    sizes = {name: 9 * GB for name in ("a", "b", "c", "old", "work")}
    assert surplus(jobs, sizes, Settings(), NOW).work == {"c", "old"}
    assert surplus(jobs, sizes, Settings(keep_failed_work_gb=0), NOW).work == {"old"}
    keep_all = Settings(keep_failed_work_gb=0, keep_failed_work_days=0)
    assert surplus(jobs, sizes, keep_all, NOW).work == set()
    assert surplus(jobs, sizes, keep_all, NOW, urgent=True).work == {"a", "b", "c", "old"}


def test_a_worker_forgets_and_removes_what_goes(tmp_path: Path) -> None:
    now = time.time()
    for name, days, state in (("old", 100, "SUCCEEDED"), ("failed", 10, "FAILED"), ("fresh", 1, "FAILED")):
        (tmp_path / name / "work").mkdir(parents=True)
        (tmp_path / name / "work" / "model").write_bytes(b"x" * 1000)
        (tmp_path / name / "log.txt").write_text("why it failed")
        JobRecord(
            name, "fail", f"r-{name}", {}, state=JobState(state), ended_at=now - days * DAY_SECONDS
        ).save(tmp_path / name / "job.json")

    async def main() -> None:
        runner = JobRunner(tmp_path, "job_child")
        await runner.start()
        assert await runner.prune(Settings()) == 2000
        assert {record.id for record in runner.list()} == {"fresh", "failed"}
        with pytest.raises(NotFound):
            runner.get("old")
        assert await runner.prune(Settings()) == 0

    asyncio.run(main())
    assert not (tmp_path / "old").exists()
    assert (tmp_path / "failed" / "log.txt").exists()
    assert not (tmp_path / "failed" / "work").exists()
    assert (tmp_path / "fresh" / "work" / "model").exists()
