"""The scheduler over stand-ins in this process: turns, loss, pause, cancel, restarts, random schedules."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from web4.lora.v1 import jobs_pb2
from web4lora_chassis.errors import NotFound, Unavailable
from web4lora_chassis.jobs import Progress
from web4lora_gateway import cancellations, crew, job_following, scheduler
from web4lora_gateway.cancellations import Cancellations
from web4lora_gateway.crew import Crew
from web4lora_gateway.database import open_database
from web4lora_gateway.outcomes import Stopped
from web4lora_gateway.places import Mode, Place, PlaceBook
from web4lora_gateway.scheduler import Callbacks, Scheduler
from web4lora_gateway.workers import WorkerInfo

SPEC = jobs_pb2.JobSpec(train={"name": "demo"})
SCHEDULES = 200


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_following, "_FIRST_DELAY_SECONDS", 0.002)
    monkeypatch.setattr(job_following, "_LONGEST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(scheduler, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(scheduler, "_TIDY_SECONDS", 0.05)
    monkeypatch.setattr(crew, "_BEAT_SECONDS", 0.005)
    monkeypatch.setattr(cancellations, "_INTERVAL_SECONDS", 0.01)


class StandIn:
    """A trainer: one job at a time, in order, each of as many steps as its turn takes; steps need it up."""

    name = "trainer"
    address = "127.0.0.1:1"

    def __init__(self, id: str, memory_bytes: int = 16 << 30) -> None:
        self.id = id
        self.memory_bytes = memory_bytes
        self.up = True
        self.held = False
        self.jobs: dict[str, jobs_pb2.Job] = {}
        self.steps: dict[str, int] = {}
        self.most_at_once = 0

    def __str__(self) -> str:
        return f"the trainer {self.id}"

    def _answer(self) -> None:
        if not self.up:
            raise Unavailable(f"The trainer {self.id} is out of reach.")

    async def info(self, _timeout_seconds: float = 1.0) -> WorkerInfo:
        self._answer()
        return WorkerInfo({"trainer": "1"}, device="cpu", memory_bytes=self.memory_bytes)

    async def create(self, request: jobs_pb2.CreateJobRequest) -> jobs_pb2.Job:
        self._answer()
        for job in self.jobs.values():
            if job.request_id == request.request_id:
                return job
        job = jobs_pb2.Job(id=f"{self.id}-{len(self.jobs)}", request_id=request.request_id)
        job.state = jobs_pb2.JOB_STATE_QUEUED
        self.jobs[job.id], self.steps[job.id] = job, 2
        return job

    async def watch(self, job_id: str) -> AsyncIterator[jobs_pb2.Job]:
        while True:
            self._answer()
            if job_id not in self.jobs:
                raise NotFound(job_id)
            yield self.jobs[job_id]
            await asyncio.sleep(0.001)

    async def cancel(self, job_id: str) -> jobs_pb2.Job:
        self._answer()
        if job_id not in self.jobs:
            raise NotFound(job_id)
        job = self.jobs[job_id]
        if job.state in (jobs_pb2.JOB_STATE_QUEUED, jobs_pb2.JOB_STATE_RUNNING):
            job.state = jobs_pb2.JOB_STATE_CANCELLED
        return job

    async def find(self, request_id: str) -> str:
        self._answer()
        return next((job.id for job in self.jobs.values() if job.request_id == request_id), "")

    async def live(self) -> None:
        """Do the jobs."""
        while True:
            at_work = [
                job
                for job in self.jobs.values()
                if job.state in (jobs_pb2.JOB_STATE_QUEUED, jobs_pb2.JOB_STATE_RUNNING)
            ]
            self.most_at_once = max(self.most_at_once, len(at_work))
            if at_work and self.up and not self.held:
                job = at_work[0]
                job.state = jobs_pb2.JOB_STATE_RUNNING
                self.steps[job.id] -= 1
                if self.steps[job.id] <= 0:
                    job.state = jobs_pb2.JOB_STATE_SUCCEEDED
            await asyncio.sleep(0.001)


class World:
    """Some trainers, a database, and the schedulers of some gateways over it."""

    def __init__(self, folder: Path, trainers: list[StandIn], gateways: int = 1, grace: float = 0.02) -> None:
        self.trainers = trainers
        self.by_id = {trainer.id: trainer for trainer in trainers}
        self.grace = grace
        self.engine = open_database(f"sqlite:///{folder / 'gateway.sqlite'}")
        sa.event.listen(self.engine, "connect", lambda raw, _: raw.execute("PRAGMA synchronous=OFF"))
        self.ended: set[str] = set()
        self.told: dict[str, list[Progress]] = {}
        self.queued: dict[str, list[bool]] = {}
        self.said: list[str] = []
        self.cancels: dict[str, asyncio.Event] = {}
        self._background: list[asyncio.Task[Any]] = []
        self._own: dict[int, list[asyncio.Task[Any]]] = {}
        self.schedulers = [self._gateway(number) for number in range(gateways)]
        self._background += [asyncio.create_task(trainer.live()) for trainer in trainers]

    # What `Workers` is to the scheduler and the crew.
    def of_kind(self, kind: str) -> list[StandIn]:
        return self.trainers if kind == "trainer" else []

    def _gateway(self, number: int) -> Scheduler:
        workers: Any = self
        undelivered = Cancellations(self.engine, workers)
        team = Crew(self.engine, workers)

        async def ended(run_id: str) -> bool:
            return run_id in self.ended

        made = Scheduler(PlaceBook(self.engine), team, workers, undelivered, self.grace, ended)
        self._own[number] = [
            asyncio.create_task(work)
            for work in (made.schedule_for_ever(), team.beat_for_ever(), undelivered.deliver())
        ]
        return made

    async def restart(self, number: int) -> None:
        """Kill a gateway, its runs are the caller's to kill, and start it again."""
        await _stop(self._own[number])
        self.schedulers[number] = self._gateway(number)

    async def work(self, name: str, gateway: int = 0, **fields: Any) -> jobs_pb2.Job | Stopped:
        cancelled = self.cancels.setdefault(name, asyncio.Event())

        async def queued(waits: bool) -> None:
            self.queued.setdefault(name, []).append(waits)

        async def report(progress: Progress) -> None:
            self.told.setdefault(name, []).append(progress)

        async def created(_worker: Any, _job_id: str) -> None:
            return None

        async def say(line: str) -> None:
            self.said.append(line)

        place = Place(name, f"run_{name}", "trainer", "train", **fields)
        made = await self.schedulers[gateway].work(
            place, SPEC, Callbacks(queued, created, report, say, cancelled)
        )
        self.ended.add(place.run_id)
        return made

    def last(self, name: str) -> Progress:
        """Return what some work's run was told last."""
        return self.told.get(name, [Progress()])[-1]

    async def places(self) -> list[Place]:
        return await PlaceBook(self.engine).open()

    async def close(self) -> None:
        await _stop([*self._background, *itertools.chain.from_iterable(self._own.values())])
        self.engine.dispose()


async def _stop(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def world(folder: Path, *trainers: StandIn, **options: Any) -> AsyncIterator[World]:
    made = World(folder, list(trainers), **options)
    try:
        async with asyncio.timeout(60):
            yield made
    finally:
        await made.close()


def succeeded(job: jobs_pb2.Job | Stopped) -> bool:
    return isinstance(job, jobs_pb2.Job) and job.state == jobs_pb2.JOB_STATE_SUCCEEDED


def test_one_works_the_others_are_queued_and_told_and_priority_comes_first(tmp_path: Path) -> None:
    async def main() -> None:
        trainer = StandIn("trainer")
        trainer.held = True
        async with world(tmp_path, trainer) as made:
            first = asyncio.create_task(made.work("first"))
            await until(lambda: trainer.jobs)
            second = asyncio.create_task(made.work("second"))
            await until(lambda: "second" in made.told)
            urgent = asyncio.create_task(made.work("urgent", priority=1))
            await until(lambda: made.last("second").message == "waiting for the trainer, 2 runs ahead")
            await until(lambda: made.last("urgent").message == "waiting for the trainer, 1 run ahead")
            assert made.last("urgent").phase == "wait"
            trainer.held = False
            assert all(map(succeeded, await asyncio.gather(first, second, urgent)))
            assert [job.request_id for job in trainer.jobs.values()] == ["first", "urgent", "second"]
            assert made.queued == {"first": [False], "second": [True, False], "urgent": [True, False]}
            assert trainer.most_at_once == 1

    asyncio.run(main())


def test_a_lost_trainers_work_begins_anew_on_another_and_its_job_there_is_cancelled(tmp_path: Path) -> None:
    async def main() -> None:
        one, other = StandIn("trainer"), StandIn("gpu-1")
        one.held = True
        async with world(tmp_path, one, other) as made:
            work = asyncio.create_task(made.work("w"))
            await until(lambda: one.jobs)
            one.up = False
            assert succeeded(await work)
            assert [job.request_id for job in other.jobs.values()] == ["w/2"]
            assert "trainer is out of reach since" in made.said[0]
            one.up = True
            (left,) = one.jobs.values()
            await until(lambda: left.state == jobs_pb2.JOB_STATE_CANCELLED)

    asyncio.run(main())


def test_a_trainer_that_comes_back_within_the_grace_goes_on_with_its_job(tmp_path: Path) -> None:
    async def main() -> None:
        one, other = StandIn("trainer"), StandIn("gpu-1")
        one.held = True
        async with world(tmp_path, one, other, grace=600.0) as made:
            work = asyncio.create_task(made.work("w"))
            await until(lambda: one.jobs)
            one.up = False
            await until(lambda: made.told.get("w"))  # that it is waited for
            one.up, one.held = True, False
            assert succeeded(await work)
            assert (len(one.jobs), len(other.jobs)) == (1, 0)

    asyncio.run(main())


def test_pause_stops_the_job_and_resume_goes_on_on_the_same_trainer(tmp_path: Path) -> None:
    async def main() -> None:
        one, other = StandIn("trainer"), StandIn("gpu-1", memory_bytes=1)
        one.held = True
        async with world(tmp_path, one, other) as made:
            work = asyncio.create_task(made.work("w"))
            await until(lambda: one.jobs)
            crew_ = made.schedulers[0].crew
            await crew_.set_mode("trainer", Mode.PAUSED)
            await until(lambda: made.queued["w"] == [False, True])
            (stopped,) = one.jobs.values()
            assert stopped.state == jobs_pb2.JOB_STATE_CANCELLED
            await until(lambda: "is paused" in made.last("w").message)
            one.held = False
            await crew_.set_mode("trainer", Mode.ACTIVE)
            assert succeeded(await work)
            assert [job.request_id for job in one.jobs.values()] == ["w", "w/2"]
            assert not other.jobs
            with pytest.raises(NotFound, match="no trainer 'nobody'"):
                await crew_.set_mode("nobody", Mode.PAUSED)

    asyncio.run(main())


def test_a_draining_trainer_ends_its_work_and_takes_nothing_new(tmp_path: Path) -> None:
    async def main() -> None:
        one = StandIn("trainer")
        one.held = True
        async with world(tmp_path, one) as made:
            first = asyncio.create_task(made.work("first"))
            await until(lambda: one.jobs)
            await made.schedulers[0].crew.set_mode("trainer", Mode.DRAINING)
            second = asyncio.create_task(made.work("second"))
            one.held = False
            assert succeeded(await first)
            await until(lambda: "draining" in made.last("second").message)
            assert len(one.jobs) == 1
            await made.schedulers[0].crew.set_mode("trainer", Mode.ACTIVE)
            assert succeeded(await second)

    asyncio.run(main())


def test_cancel_in_line_makes_no_job_and_cancel_at_work_ends_it(tmp_path: Path) -> None:
    async def main() -> None:
        one = StandIn("trainer")
        one.held = True
        async with world(tmp_path, one) as made:
            first = asyncio.create_task(made.work("first"))
            await until(lambda: one.jobs)
            second = asyncio.create_task(made.work("second"))
            await until(lambda: "second" in made.told)
            made.cancels["second"].set()
            assert await second == Stopped()
            made.cancels["first"].set()
            assert await first == Stopped()
            (job,) = one.jobs.values()
            assert job.state == jobs_pb2.JOB_STATE_CANCELLED
            assert await made.places() == []

    asyncio.run(main())


def test_a_gateway_killed_after_the_jobs_end_goes_straight_to_it(tmp_path: Path) -> None:
    """The step's result was not written: its work is asked for again, and must not wait behind others."""

    async def main() -> None:
        one = StandIn("trainer")
        async with world(tmp_path, one) as made:
            assert succeeded(await made.work("first"))
            made.ended.clear()
            one.held = True
            second = asyncio.create_task(made.work("second"))
            await until(lambda: len(one.jobs) == 2)
            assert succeeded(await made.work("first"))
            one.held = False
            assert succeeded(await second)
            assert len(one.jobs) == 2

    asyncio.run(main())


def test_a_gateway_killed_while_it_gives_work_back_does_not_end_by_its_own_cancel(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        one, two = StandIn("trainer"), StandIn("gpu-1")
        one.held = two.held = True
        async with world(tmp_path, one, two) as made:
            first = asyncio.create_task(made.work("first"))
            await until(lambda: one.jobs or two.jobs)
            owner = one if one.jobs else two
            gives_back, delivers = asyncio.Event(), made.schedulers[0].cancellations.deliver_one

            async def killed(*of: Any) -> None:
                await delivers(*of)
                gives_back.set()
                await asyncio.Event().wait()

            made.schedulers[0].cancellations.deliver_one = killed  # type: ignore[method-assign, assignment]
            await made.schedulers[0].crew.set_mode(owner.id, Mode.PAUSED)
            await asyncio.wait_for(gives_back.wait(), 30)
            await _stop([first])
            await made.restart(0)
            one.held = two.held = False
            again = asyncio.create_task(made.work("first"))
            await made.schedulers[0].crew.set_mode(owner.id, Mode.ACTIVE)
            assert succeeded(await again)

    asyncio.run(main())


@pytest.mark.parametrize("ended", ["nothing", "its job"])
def test_what_a_gateway_thought_dead_gives_back_is_found_in_line(tmp_path: Path, ended: str) -> None:
    """It was stopped, another took its run over, and then it wrote: the work is done all the same."""

    async def main() -> None:
        one = StandIn("trainer")
        one.held = True
        async with world(tmp_path, one, gateways=2) as made:
            work = asyncio.create_task(made.work("first"))
            await until(lambda: one.jobs)
            (place,) = await made.places()
            back = await PlaceBook(made.engine).give_back(place, "trainer-0")
            assert back.attempt == 2
            if ended == "its job":
                await until(lambda: one.jobs["trainer-0"].state == jobs_pb2.JOB_STATE_CANCELLED)
            one.held = False
            assert succeeded(await work)
            assert await made.places() == []

    asyncio.run(main())


def test_cancelled_work_leaves_the_line_whatever_a_gateway_thought_dead_wrote(tmp_path: Path) -> None:
    """Else it would be given a turn that nobody takes, and hold up everyone behind it."""

    async def main() -> None:
        one = StandIn("trainer")
        one.held = True
        async with world(tmp_path, one) as made:
            work = asyncio.create_task(made.work("first"))
            await until(lambda: one.jobs)
            (place,) = await made.places()
            await PlaceBook(made.engine).give_back(place, "")
            made.cancels["first"].set()
            assert isinstance(await work, Stopped)
            assert await made.places() == []

    asyncio.run(main())


def test_a_gateway_that_was_thought_dead_ends_no_work_that_has_another_job(tmp_path: Path) -> None:
    async def main() -> None:
        one = StandIn("trainer")
        one.held = True
        async with world(tmp_path, one) as made:
            work = asyncio.create_task(made.work("first"))
            await until(lambda: one.jobs)
            (place,) = await made.places()
            await made.schedulers[0].crew.set_mode("trainer", Mode.PAUSED)
            await until(lambda: made.last("first").message.startswith("waiting for a trainer"))
            assert (await PlaceBook(made.engine).finish(place)).attempt == 2
            await made.schedulers[0].crew.set_mode("trainer", Mode.ACTIVE)
            one.held = False
            assert succeeded(await work)
            assert len(one.jobs) == 2

    asyncio.run(main())


@pytest.mark.parametrize("twenty", range(SCHEDULES // 20))
def test_no_random_schedule_leaves_work_stuck(tmp_path: Path, twenty: int) -> None:
    """Trainers lost and back, paused, draining; runs cancelled; gateways killed: all work ends."""
    for seed in range(20 * twenty, 20 * twenty + 20):
        try:
            # Each has a database of its own: killed gateways of the one before may still write to theirs.
            folder = tmp_path / str(seed)
            folder.mkdir()
            asyncio.run(_schedule(random.Random(seed), folder))
        except BaseException as error:
            error.add_note(f"schedule {seed}")
            raise


async def _schedule(dice: random.Random, folder: Path) -> None:
    trainers = [StandIn(name) for name in ("trainer", "gpu-1", "gpu-2")[: dice.randint(1, 3)]]
    gateways = dice.randint(1, 2)
    async with world(folder, *trainers, gateways=gateways) as made:
        tasks: dict[str, tuple[int, asyncio.Task[Any]]] = {}
        fields: dict[str, dict[str, Any]] = {}

        def begin(name: str, gateway: int) -> None:
            tasks[name] = gateway, asyncio.create_task(made.work(name, gateway, **fields[name]))

        for number in range(dice.randint(3, 8)):
            fields[f"w{number}"] = {"priority": dice.randint(-1, 1), "seconds": dice.choice([0.0, 60.0])}
            begin(f"w{number}", dice.randrange(gateways))
        for _ in range(dice.randint(2, 8)):
            await asyncio.sleep(dice.uniform(0, 0.02))
            trainer = dice.choice(trainers)
            match dice.choice(["lose", "back", "pause", "resume", "drain", "cancel", "kill", "forget"]):
                case "lose":
                    trainer.up = False
                case "back":
                    trainer.up = True
                case "pause":
                    await made.schedulers[0].crew.set_mode(trainer.id, Mode.PAUSED)
                case "drain":
                    await made.schedulers[0].crew.set_mode(trainer.id, Mode.DRAINING)
                case "resume":
                    await made.schedulers[0].crew.set_mode(trainer.id, Mode.ACTIVE)
                case "cancel":
                    made.cancels[dice.choice(list(tasks))].set()
                case "forget" if not trainer.up:  # its disk is lost with it
                    trainer.jobs.clear()
                case "kill":
                    gateway = dice.randrange(gateways)
                    killed = [
                        name for name, (own, task) in tasks.items() if own == gateway and not task.done()
                    ]
                    await _stop([tasks[name][1] for name in killed])
                    await made.restart(gateway)
                    for name in killed:  # another gateway takes the run over, or this one goes on
                        begin(name, dice.randrange(gateways))
        for trainer in trainers:
            trainer.up = True
            await made.schedulers[0].crew.set_mode(trainer.id, Mode.ACTIVE)
        ends = {name: await task for name, (_, task) in tasks.items()}
        for name, end in ends.items():
            assert succeeded(end) or made.cancels[name].is_set(), (name, end)
        async with asyncio.timeout(30):  # what a gateway that was killed still wrote is tidied away
            while await made.places():
                await asyncio.sleep(0.002)
        at_work = (jobs_pb2.JOB_STATE_QUEUED, jobs_pb2.JOB_STATE_RUNNING)
        left = [job for each in trainers for job in each.jobs.values()]
        await until(lambda: not any(job.state in at_work for job in left))
        for name in fields:
            done = [job for job in left if job.request_id.partition("/")[0] == name]
            assert sum(job.state == jobs_pb2.JOB_STATE_SUCCEEDED for job in done) <= 2
