from __future__ import annotations

import asyncio

import pytest
from web4.lora.v1 import jobs_pb2
from web4lora_chassis.errors import Cancelled, NotFound, Unavailable
from web4lora_chassis.jobs import Progress
from web4lora_gateway.job_following import job_progress, patiently, race


def test_a_race_ends_with_the_work_or_the_cancel():
    async def body() -> None:
        cancelled = asyncio.Event()
        assert await race(asyncio.sleep(0, "done"), cancelled) == "done"
        stopped = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                stopped.set()

        task = asyncio.create_task(race(work(), cancelled))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        cancelled.set()
        with pytest.raises(Cancelled):
            await task
        assert stopped.is_set()

    asyncio.run(body())


def test_what_is_out_of_reach_is_waited_for_and_other_errors_are_not(monkeypatch):
    monkeypatch.setattr("web4lora_gateway.job_following._FIRST_DELAY_SECONDS", 0.001)
    answers = iter([Unavailable("no"), Unavailable("no"), 7])
    told = []

    async def call() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def report(progress: object) -> None:
        told.append(progress.message)  # type: ignore[attr-defined]

    async def missing() -> None:
        raise NotFound("gone")

    assert asyncio.run(patiently(call, "the store", report, asyncio.Event())) == 7
    assert told == ["waiting for the store …"] * 2
    with pytest.raises(NotFound):
        asyncio.run(patiently(missing, "the store", report, asyncio.Event()))


def test_a_queued_job_says_that_it_waits():
    job = jobs_pb2.Job(state=jobs_pb2.JOB_STATE_QUEUED)
    assert job_progress("trainer", job).message == "waiting in the trainer's queue"
    job = jobs_pb2.Job(
        state=jobs_pb2.JOB_STATE_RUNNING, progress={"phase": "train", "done": 3, "figures": {"loss": 1}}
    )
    assert job_progress("trainer", job) == Progress("train", 3, figures={"loss": 1.0})
