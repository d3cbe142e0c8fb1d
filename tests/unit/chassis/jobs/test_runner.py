"""Jobs over real child processes: how each kind of end is seen, cancel, restart, idempotency."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
from web4lora_chassis.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidInput,
    NotFound,
    ResourceExhausted,
)
from web4lora_chassis.jobs import JobRecord, JobRunner, JobState, Progress

HERE = Path(__file__).parent


@contextlib.asynccontextmanager
async def running(root: Path, **options: Any) -> AsyncIterator[JobRunner]:
    runner = JobRunner(root, "job_child", env={"PYTHONPATH": str(HERE)}, **options)
    await runner.start()
    try:
        yield runner
    finally:
        await runner.stop()


async def ended(runner: JobRunner, job_id: str) -> JobRecord:
    async for record in runner.watch(job_id):
        last = record
    assert last.state.terminal
    return last


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def one(root: Path, kind: str, spec: dict[str, Any] | None = None, **options: Any) -> JobRecord:
    async with running(root, **options) as runner:
        record = await runner.create(kind, "request", spec or {})
        return await ended(runner, record.id)


def test_result_progress_and_log(tmp_path: Path) -> None:
    async def main() -> list[JobRecord]:
        async with running(tmp_path) as runner:
            record = await runner.create("succeed", "r", {"steps": 2, "echo": "é"})
            assert JobRecord.load(tmp_path / record.id / "job.json").state is JobState.QUEUED
            return [snapshot async for snapshot in runner.watch(record.id)]

    seen = asyncio.run(main())
    last = seen[-1]
    assert last.state is JobState.SUCCEEDED
    assert last.result == {"attempt": 1, "echo": "é"}
    assert last.progress == Progress("count", 2, 2, "steps", figures={"loss": 0.5})
    assert last.ended_at >= last.started_at >= last.created_at > 0
    assert [record.revision for record in seen] == sorted({record.revision for record in seen})
    assert JobRecord.load(tmp_path / last.id / "job.json") == last
    assert "this goes to the log" in (tmp_path / last.id / "log.txt").read_text()
    assert not (tmp_path / last.id / "work").exists()


def test_a_job_waits_for_a_store_that_is_away(tmp_path: Path) -> None:
    with socket.socket() as taken:  # and nobody listens on it
        taken.bind(("127.0.0.1", 0))
        store = f"s3+http://127.0.0.1:{taken.getsockname()[1]}/bucket"
        record = asyncio.run(one(tmp_path, "need_the_store", {"store": store}))
    assert record.state is JobState.SUCCEEDED, record.error
    assert record.result == {"attempt": 1}


def test_errors_of_ours_keep_their_words(tmp_path: Path) -> None:
    record = asyncio.run(one(tmp_path, "fail"))
    assert record.state is JobState.FAILED
    assert record.error is not None
    assert record.error.reason == "NO_ANSWER"
    assert record.error.message == "data.jsonl:3: no answer."
    assert record.error.fix == "Add one."
    assert record.error.metadata == {"line": "3"}


@pytest.mark.parametrize(
    ("kind", "reason", "message"),
    [
        ("crash", "INTERNAL", "An error that was not foreseen (RuntimeError)."),
        ("unserializable", "INTERNAL", "TypeError"),
        ("leave", "WORKER_DIED", "exit code 7"),
        ("unknown_kind", "WORKER_DIED", "exit code 1"),
        ("raise_memory_error", "OUT_OF_MEMORY", "Memory ran out"),
        ("run_out_of_memory", "OUT_OF_MEMORY", "was killed by SIGKILL, most likely because memory ran out"),
        (
            "segfault",
            "PROGRAM_CRASHED",
            "was killed by SIGSEGV, most likely it was compiled for instructions",
        ),
    ],
)
def test_every_other_end_is_named(tmp_path: Path, kind: str, reason: str, message: str) -> None:
    record = asyncio.run(one(tmp_path, kind, {"needed": 1}))
    assert record.state is JobState.FAILED
    assert record.error is not None
    assert record.error.reason == reason
    assert message in record.error.message
    if kind == "crash":
        log_text = Path(record.error.metadata["log"]).read_text()
        assert 'raise RuntimeError("tensor of the wrong shape")' in log_text


def test_a_grandchild_that_holds_the_pipes_does_not_hold_the_job(tmp_path: Path) -> None:
    record = asyncio.run(one(tmp_path, "fork"))
    assert record.error is not None
    assert "exit code 3" in record.error.message


def test_memory_retries_keep_the_work_folder_and_are_bounded(tmp_path: Path) -> None:
    record = asyncio.run(one(tmp_path / "a", "run_out_of_memory", {"needed": 2}, memory_retries=2))
    assert record.state is JobState.SUCCEEDED
    assert record.result == {"memory_failures": 2, "seen": ["attempt1", "attempt2", "attempt3"]}
    assert record.attempt == 3
    record = asyncio.run(one(tmp_path / "b", "run_out_of_memory", {"needed": 3}, memory_retries=2))
    assert record.state is JobState.FAILED
    assert record.attempt == 3


def test_request_id_makes_create_idempotent_across_restarts(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as runner:
            first, second = await asyncio.gather(
                runner.create("succeed", "r", {"steps": 1}), runner.create("succeed", "r", {"steps": 1})
            )
            assert first.id == second.id
            await ended(runner, first.id)
        async with running(tmp_path) as runner:
            assert (await runner.create("succeed", "r", {"steps": 1})).id == first.id
            with pytest.raises(AlreadyExists):
                await runner.create("succeed", "r", {"steps": 2})
            with pytest.raises(AlreadyExists):
                await runner.create("note", "r", {"steps": 1})
            for bad in ("", "x" * 201):
                with pytest.raises(InvalidInput):
                    await runner.create("succeed", bad, {})
            with pytest.raises(NotFound):
                runner.get("nobody")
            assert [record.id for record in runner.list()] == [first.id]

    asyncio.run(main())


def test_jobs_run_in_order_and_as_many_at_once_as_allowed(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path / "jobs") as runner:
            jobs = [
                await runner.create("note", f"r{name}", {"file": str(tmp_path / "notes"), "name": name})
                for name in "abc"
            ]
            for job in jobs:
                await ended(runner, job.id)

    asyncio.run(main())
    expected = [f"{what} {name}" for name in "abc" for what in ("begin", "end")]
    assert (tmp_path / "notes").read_text().splitlines() == expected


def test_each_lane_has_a_line_of_its_own(tmp_path: Path) -> None:
    async def main() -> list[JobRecord]:
        release = tmp_path / "release"
        spec = {"pids": str(tmp_path / "pids"), "release": str(release)}
        async with running(tmp_path / "jobs", lanes={"hang": "long", "note": "short"}) as runner:
            first = await runner.create("hang", "long", spec)
            second = await runner.create("hang", "long 2", spec)
            notes = [
                await runner.create("note", f"short {name}", {"file": str(tmp_path / "notes"), "name": name})
                for name in "abc"
            ]
            done = [await ended(runner, note.id) for note in notes]
            assert runner.get(first.id).state is JobState.RUNNING
            assert runner.get(second.id).state is JobState.QUEUED
            release.touch()
            return [*done, await ended(runner, first.id), await ended(runner, second.id)]

    *notes, first, second = asyncio.run(main())
    assert [note.state for note in notes] == [JobState.SUCCEEDED] * 3
    expected = [f"{what} {name}" for name in "abc" for what in ("begin", "end")]
    assert (tmp_path / "notes").read_text().splitlines() == expected
    assert first.ended_at <= second.started_at


def test_a_job_that_lacks_something_waits_beside_others_and_says_for_what(tmp_path: Path) -> None:
    lacking = ["waits for 2.5 GB of memory"]

    async def main() -> list[JobRecord]:
        release = tmp_path / "release"
        spec = {"pids": str(tmp_path / "pids"), "release": str(release)}
        lanes = {"hang": "long", "succeed": "short"}
        async with running(
            tmp_path / "jobs", lanes=lanes, lacks=lambda kind: lacking[0] if kind == "succeed" else ""
        ) as runner:
            alone = await runner.create("succeed", "alone", {})
            assert (await ended(runner, alone.id)).state is JobState.SUCCEEDED
            await runner.create("hang", "long", spec)
            await until((tmp_path / "pids").exists)
            waiting = await runner.create("succeed", "short", {})
            given_up = await runner.create("succeed", "given up", {})
            await until(lambda: runner.get(waiting.id).progress.phase == "wait")
            seen = runner.get(waiting.id)
            await runner.cancel(given_up.id)
            release.touch()  # what it waits for comes, or the others end
            return [seen, await ended(runner, waiting.id), runner.get(given_up.id)]

    seen, last, given_up = asyncio.run(main())
    assert seen.state is JobState.QUEUED
    assert seen.progress.message == "waits for 2.5 GB of memory"
    assert last.state is JobState.SUCCEEDED
    assert given_up.state is JobState.CANCELLED


@pytest.mark.parametrize("stubborn", [False, True])
def test_cancel_ends_the_child_and_what_it_started(tmp_path: Path, stubborn: bool) -> None:
    async def main() -> JobRecord:
        pids_file = tmp_path / "pids"
        async with running(tmp_path / "jobs", cancel_grace_seconds=0.3 if stubborn else 60) as runner:
            job = await runner.create("hang", "r", {"pids": str(pids_file), "stubborn": stubborn})
            waiting = await runner.create("succeed", "next", {})
            cancelled_in_queue = await runner.create("succeed", "never", {})
            assert (await runner.cancel(cancelled_in_queue.id)).state is JobState.CANCELLED
            await until(pids_file.exists)
            assert (await runner.cancel(job.id)).state is JobState.CANCELLING
            assert (await runner.cancel(job.id)).state is JobState.CANCELLING
            last = await ended(runner, job.id)
            pids = json.loads(pids_file.read_text())
            await until(lambda: gone(pids["child"]) and gone(pids["grandchild"]))
            assert (await ended(runner, waiting.id)).state is JobState.SUCCEEDED  # the queue goes on
            assert runner.get(cancelled_in_queue.id).attempt == 0
            assert (await runner.cancel(job.id)) == last  # a terminal job stays as it is
            return last

    last = asyncio.run(main())
    assert last.state is JobState.CANCELLED
    assert (tmp_path / "pids.cleaned").exists() is not stubborn  # asked politely, it could clean up
    assert not (tmp_path / "jobs" / last.id / "work").exists()


def test_cancel_while_the_child_is_being_started(tmp_path: Path) -> None:
    async def main() -> JobRecord:
        async with running(tmp_path) as runner:
            job = await runner.create("hang", "r", {"pids": str(tmp_path / "pids")})
            async for record in runner.watch(job.id):
                if record.state is JobState.RUNNING:
                    break
            await runner.cancel(job.id)
            return await ended(runner, job.id)

    assert asyncio.run(main()).state is JobState.CANCELLED


def test_progress_never_hides_a_cancel(tmp_path: Path) -> None:
    """Changes of a job from several sides must not overwrite each other."""

    async def main() -> None:
        async with running(tmp_path) as runner:
            pids = tmp_path / "pids"
            job = await runner.create("hang", "r", {"pids": str(pids)})
            watchers = [asyncio.create_task(ended(runner, job.id)) for _ in range(50)]
            await until(pids.exists)
            await runner.cancel(job.id)
            records = await asyncio.gather(*watchers)
            assert {record.state for record in records} == {JobState.CANCELLED}

    asyncio.run(main())


def test_a_watcher_that_is_slow_still_sees_the_end(tmp_path: Path) -> None:
    async def main() -> list[JobState]:
        states = []
        async with running(tmp_path) as runner:
            job = await runner.create("succeed", "r", {})
            async for record in runner.watch(job.id):
                states.append(record.state)
                await until(lambda: runner.get(job.id).state.terminal)
        return states

    assert asyncio.run(main()) == [JobState.QUEUED, JobState.SUCCEEDED]


def test_killed_service_takes_its_children_along_and_goes_on_when_back(tmp_path: Path) -> None:
    pids_file = tmp_path / "pids"
    service = subprocess.Popen(
        [sys.executable, "-m", "job_service", str(tmp_path / "jobs"), str(pids_file)],
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )
    try:
        while not pids_file.exists():
            assert service.poll() is None
            time.sleep(0.02)
    finally:
        service.send_signal(signal.SIGKILL)
        service.wait()
    pids = json.loads(pids_file.read_text())
    while not (gone(pids["child"]) and gone(pids["grandchild"])):
        time.sleep(0.02)
    pids_file.unlink()

    async def back() -> tuple[JobRecord, JobRecord]:
        async with running(tmp_path / "jobs") as runner:
            (job,) = runner.list()
            before = job
            await until(pids_file.exists)
            Path(f"{pids_file}.release").touch()
            return before, await ended(runner, job.id)

    before, after = asyncio.run(back())
    assert before.state is JobState.QUEUED
    assert after.state is JobState.SUCCEEDED
    assert after.attempt == 2
    assert after.revision > before.revision > 1


def test_stopped_service_resumes_its_queue_in_order(tmp_path: Path) -> None:
    async def main() -> None:
        pids_file = tmp_path / "pids"
        spec = {"pids": str(pids_file), "release": str(tmp_path / "release")}
        async with running(tmp_path / "jobs") as runner:
            first = await runner.create("hang", "a", spec)
            second = await runner.create("succeed", "b", {})
            await until(pids_file.exists)
        pids = json.loads(pids_file.read_text())
        assert gone(pids["child"])
        await until(lambda: gone(pids["grandchild"]))
        assert JobRecord.load(tmp_path / "jobs" / first.id / "job.json").state is JobState.RUNNING
        (tmp_path / "release").touch()
        async with running(tmp_path / "jobs") as runner:
            one, two = await ended(runner, first.id), await ended(runner, second.id)
            assert one.attempt == 2
            assert two.attempt == 1
            assert one.ended_at <= two.started_at

    asyncio.run(main())


def test_a_cancel_survives_a_restart(tmp_path: Path) -> None:
    (tmp_path / "j").mkdir()
    JobRecord("j", "hang", "r", {}, state=JobState.CANCELLING).save(tmp_path / "j" / "job.json")

    async def main() -> JobState:
        async with running(tmp_path) as runner:
            return runner.get("j").state

    assert asyncio.run(main()) is JobState.CANCELLED


@pytest.mark.parametrize("text", ["{", "[]", '{"id": "x"}', "\xff"])
def test_unreadable_job_is_named_and_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    asyncio.run(one(tmp_path, "succeed"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "job.json").write_text(text, encoding="latin-1")

    async def main() -> int:
        async with running(tmp_path) as runner:
            return len(runner.list())

    with caplog.at_level(logging.ERROR):
        assert asyncio.run(main()) == 1
    assert str(tmp_path / "broken" / "job.json") in caplog.text
    assert (tmp_path / "broken" / "job.json.unreadable").exists()


def test_a_result_that_finds_no_room_is_waited_for_and_the_work_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("web4lora_chassis.jobs.runner._ROOM_INTERVAL_SECONDS", 0.02)
    save, full = JobRecord.save, [True]

    def save_while_there_is_room(record: JobRecord, path: Path) -> None:
        if record.state is JobState.SUCCEEDED and full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(record, path)

    monkeypatch.setattr(JobRecord, "save", save_while_there_is_room)

    async def main() -> None:
        async with running(tmp_path) as runner:
            made = await runner.create("run_out_of_memory", "r", {"needed": 0})
            await until(lambda: runner.get(made.id).progress.phase == "wait")
            assert runner.get(made.id).state is JobState.RUNNING
            assert (tmp_path / made.id / "work" / "attempt1").exists()
            full[0] = False
            assert (await ended(runner, made.id)).state is JobState.SUCCEEDED
            await until(lambda: not (tmp_path / made.id / "work").exists())
        assert JobRecord.load(tmp_path / made.id / "job.json").state is JobState.SUCCEEDED

    asyncio.run(main())


def test_full_disk_on_create_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def main() -> None:
        async with running(tmp_path) as runner:
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", full)
                with pytest.raises(ResourceExhausted, match="disk is full"):
                    await runner.create("succeed", "r", {})
            assert list(tmp_path.iterdir()) == []
            assert runner.list() == []
            record = await runner.create("succeed", "r", {})
            assert (await ended(runner, record.id)).state is JobState.SUCCEEDED

    asyncio.run(main())


def test_many_jobs_load_and_list(tmp_path: Path) -> None:
    for number in range(300):
        folder = tmp_path / f"j{number}"
        folder.mkdir()
        record = JobRecord(folder.name, "note", f"r{number}", {}, JobState.SUCCEEDED, created_at=number + 1)
        (folder / "job.json").write_text(json.dumps(asdict(record)))

    async def main() -> list[str]:
        async with running(tmp_path) as runner:
            return [record.id for record in runner.list()]

    assert asyncio.run(main()) == [f"j{number}" for number in reversed(range(300))]


def test_secrets_reach_the_child_and_no_file(tmp_path: Path) -> None:
    secret = "key-" + os.urandom(8).hex()

    async def main() -> JobRecord:
        async with running(tmp_path) as runner:
            record = await runner.create("hold", "r", {"api_key": "name of it"}, {"api_key": secret})
            return await ended(runner, record.id)

    last = asyncio.run(main())
    assert last.result == {"lengths": {"api_key": len(secret)}, "in_env": False}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not any(secret.encode() in path.read_bytes() for path in files)


def test_a_job_without_secrets_gets_none(tmp_path: Path) -> None:
    assert asyncio.run(one(tmp_path, "hold")).result == {"lengths": {}, "in_env": False}


async def begun(runner: JobRunner, job_id: str) -> None:
    async for record in runner.watch(job_id):
        if record.progress.done:
            return


def test_a_job_that_ends_early_succeeds_with_what_it_made(tmp_path: Path) -> None:
    async def main() -> JobRecord:
        async with running(tmp_path, can_end_early=["count_up"]) as runner:
            record = await runner.create("count_up", "r", {})
            await begun(runner, record.id)
            assert (await runner.end_early(record.id)).state is JobState.RUNNING
            last = await ended(runner, record.id)
            assert await runner.end_early(record.id) == last
            return last

    last = asyncio.run(main())
    assert last.state is JobState.SUCCEEDED
    assert last.result == {"attempt": 1, "counted": True}


def test_a_jobs_next_attempt_still_knows_that_it_is_to_end_early(tmp_path: Path) -> None:
    async def main() -> JobRecord:
        async with running(tmp_path, can_end_early=["count_up"], memory_retries=1) as runner:
            record = await runner.create("count_up", "r", {"killed_attempts": 1})
            await begun(runner, record.id)
            await runner.end_early(record.id)
            return await ended(runner, record.id)

    last = asyncio.run(main())
    assert last.state is JobState.SUCCEEDED
    assert last.result == {"attempt": 2, "counted": False}


def test_what_has_nothing_to_keep_is_not_ended_early(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, can_end_early=["count_up"]) as runner:
            hanging = await runner.create("hang", "h", {"pids": str(tmp_path / "pids")})
            waiting = await runner.create("count_up", "w", {})
            await begun(runner, hanging.id)
            with pytest.raises(FailedPrecondition, match="A hang job can't end early"):
                await runner.end_early(hanging.id)
            with pytest.raises(FailedPrecondition, match="has not begun: there is nothing to keep"):
                await runner.end_early(waiting.id)
            with pytest.raises(NotFound):
                await runner.end_early("none")
            assert runner.get(waiting.id).state is JobState.QUEUED

    asyncio.run(main())
