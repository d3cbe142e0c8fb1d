"""A disk that is nearly full: pruned of what is safe, warned of in the log and in the progress of jobs."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

import pytest
from web4lora_chassis import keeping
from web4lora_chassis.jobs import JobRecord, JobRunner, JobState, Progress
from web4lora_chassis.keeping import Keeping
from web4lora_chassis.rpc.housekeeping import Housekeeping
from web4lora_chassis.rpc.jobs import job_message
from web4lora_chassis.settings import Settings


def failed_job(root: Path) -> Path:
    model = root / "jobs" / "failed" / "work" / "model"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"x" * 1000)
    record = JobRecord("failed", "fail", "r", {}, state=JobState.FAILED, ended_at=time.time())
    record.save(root / "jobs" / "failed" / "job.json")
    return model


def test_a_disk_that_is_nearly_full_is_pruned_and_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = failed_job(tmp_path)
    free = [6e9, 1e9, 1.2e9, 1.2e9, 6e9]
    monkeypatch.setattr(keeping, "free_bytes", lambda _place: free.pop(0))
    asked: list[bool] = []

    def more(_: Keeping, urgent: bool) -> int:
        asked.append(urgent)
        return 0

    async def main() -> list[str]:
        runner = JobRunner(tmp_path / "jobs", "job_child")
        await runner.start()
        house = Housekeeping(tmp_path, runner, Settings(), more)
        notices = []
        for _ in range(4):
            await house.look()
            notices.append(house.notice)
        return notices

    with caplog.at_level(logging.WARNING):
        first, second, third, last = asyncio.run(main())
    assert (first, last) == ("", "")
    assert second == third
    assert "has 1.2 GB left" in second
    assert "web4lora gc" in second
    assert caplog.text.count("GB left") == 1
    assert asked == [False, True], "once in a while, not at every look"
    assert not model.exists()


def test_the_progress_of_a_job_at_work_shows_the_warning() -> None:
    record = JobRecord(
        "j", "train", "r", {}, state=JobState.RUNNING, progress=Progress("train", message="loss 1")
    )
    assert job_message(record, "little room").progress.message == "loss 1 · little room"
    assert job_message(record).progress.message == "loss 1"
    assert job_message(record.changed(state=JobState.SUCCEEDED), "little room").progress.message == "loss 1"
