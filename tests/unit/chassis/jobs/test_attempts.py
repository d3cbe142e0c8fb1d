"""A job that ends its service at every start is given up; one that gets further each time is not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from web4lora_chassis.jobs import JobRecord, JobRunner, JobState, Progress
from web4lora_chassis.jobs.attempts import REASON

HERE = Path(__file__).parent


def killed_at(root: Path, places: list[Progress], **options: Any) -> JobRecord:
    """Return a job after its service was killed at each of some places, as the last start finds it."""
    (root / "j").mkdir(parents=True)
    place = root / "j" / "job.json"
    JobRecord("j", "succeed", "r", {"steps": 1}).save(place)

    async def start() -> JobRecord:
        runner = JobRunner(root, "job_child", env={"PYTHONPATH": str(HERE)}, **options)
        await runner.start()
        record = runner.get("j")
        await runner.stop()
        return record

    record = JobRecord.load(place)
    for progress in places:
        # As it is on disk while its child works.
        record.changed(state=JobState.RUNNING, progress=progress, stopped=False).save(place)
        record = asyncio.run(start())
    return record


def test_a_job_that_ends_its_service_at_every_start_fails_and_says_so(tmp_path: Path) -> None:
    start = Progress("start")
    assert killed_at(tmp_path / "four", [start] * 4).state is JobState.QUEUED
    record = killed_at(tmp_path / "five", [start] * 5)
    assert record.state is JobState.FAILED
    assert record.error is not None
    assert record.error.reason == REASON
    assert "ended 5 times while this job was at the same place (start)" in record.error.message
    assert killed_at(tmp_path / "two", [start] * 2, attempts=2).state is JobState.FAILED


def test_a_job_that_gets_further_may_be_interrupted_any_number_of_times(tmp_path: Path) -> None:
    further = [Progress("train", done) for done in range(0, 120, 10)]
    assert killed_at(tmp_path / "further", further).state is JobState.QUEUED
    stuck = [*further, *[Progress("start"), Progress("train", 110)] * 3]
    record = killed_at(tmp_path / "stuck", stuck)
    assert record.state is JobState.FAILED
    assert record.error is not None
    assert "(start)" in record.error.message or "(train 110)" in record.error.message


def test_a_service_that_is_stopped_interrupts_nothing(tmp_path: Path) -> None:
    async def stopped_at_work() -> JobRecord:
        runner = JobRunner(tmp_path, "job_child", env={"PYTHONPATH": str(HERE)}, attempts=1)
        await runner.start()
        if not runner.list():
            await runner.create(
                "hang", "r", {"pids": str(tmp_path / "pids"), "release": str(tmp_path / "no")}
            )
        while not (tmp_path / "pids").exists():
            await asyncio.sleep(0.02)
        (tmp_path / "pids").unlink()
        record = runner.list()[0]
        await runner.stop()
        return record

    for attempt in (1, 2, 3):
        record = asyncio.run(stopped_at_work())
        assert record.state is JobState.RUNNING
        assert record.attempt == attempt


@pytest.mark.parametrize("value", [0, -1])
def test_no_attempt_at_all_can_t_be_set(value: int) -> None:
    from pydantic import ValidationError
    from web4lora_chassis.settings import Settings

    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Settings(job_attempts=value)
