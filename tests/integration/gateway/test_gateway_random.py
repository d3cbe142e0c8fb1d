"""Everything killed, stopped, cut off and cancelled at random: no run is stuck, no job is done twice.

On PostgreSQL and MinIO these are killed and stopped too. Every clock jumps by ten minutes. What was
done to whom while runs were at which stage is printed as a table.

WEB4LORA_RANDOM_SEED repeats a schedule, WEB4LORA_RANDOM_SECONDS sets for how long things are broken.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import secrets
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from web4.lora.v1 import gateway_pb2
from web4lora_chassis.settings import Settings
from web4lora_gateway.records import STAGE_NAMES

from tests.servers.fixtures import MinioServer, free_port, program, started
from tests.servers.postgresql import server

SECONDS = float(os.environ.get("WEB4LORA_RANDOM_SECONDS", "30"))
SEED = int(os.environ.get("WEB4LORA_RANDOM_SEED", "20261126")) or random.SystemRandom().randrange(1, 1 << 30)
"""The same in every ordinary run; 0, as in `make soak`, draws one."""
WORKERS = ("trainer", "packager", "deployer")
MOST_RUNS_AT_WORK = 6
HEAL_SECONDS = 240.0


CLOCK_SECONDS = 600.0
CLOCK = """
import os, time
_real, _place = time.time, os.environ["TEST_CLOCK"]
def _time():
    try:
        with open(_place) as file:
            return _real() + float(file.read() or 0)
    except OSError:
        return _real()
time.time = _time
"""
"""Runs at the start of every process of ours, as `sitecustomize`: its clock is off by what a file says."""


class Minio:
    """A MinIO that can be killed and stopped."""

    def __init__(self, folder: Path) -> None:
        self.server = MinioServer(f"127.0.0.1:{free_port()}", "user", secrets.token_hex(16))
        self._folder = folder
        folder.mkdir()
        self._running = contextlib.ExitStack()
        self.start()
        self.server.client.make_bucket("test")

    def start(self) -> None:
        self._running = contextlib.ExitStack()
        names = {"USER": self.server.access_key, "PASSWORD": self.server.secret_key}
        env = {f"MINIO_ROOT_{name}": value for name, value in names.items()}
        env |= {"HOME": str(self._folder), "MINIO_BROWSER": "off", "MINIO_UPDATE": "off"}
        command = [program("minio"), "server", self._folder / "data", "--address", self.server.endpoint]
        ready = f"http://{self.server.endpoint}/minio/health/live"
        self._process = self._running.enter_context(started(command, ready, self._folder, env))
        self.server.wait()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait(timeout=30)
            self._running.close()

    def close(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._running.close()


class Schedule:
    """Breaks a stack by a seed, and remembers what it asked for."""

    def __init__(
        self, stack: Any, gateways: dict[str, Any], seed: int, servers: Mapping[str, Any] | None = None
    ) -> None:
        self.servers = dict(servers or {})
        self.matrix: dict[str, Counter[str]] = defaultdict(Counter)
        self.stack = stack
        self.pipeline = stack.pipeline()  # now: later the store that its data set is put into may be stopped
        self.apis = gateways
        self.random = random.Random(seed)
        self.requests: dict[str, gateway_pb2.CreateRunRequest] = {}
        self.cancelled: set[str] = set()
        self.stopped: dict[str, float] = {}
        self.done: Counter[str] = Counter()

    def go_on(self, seconds: float) -> None:
        actions: list[tuple[int, Callable[[], None]]] = [
            (6, self.create), (3, self.create_again), (3, self.cut_off), (2, self.cancel),
            (2, self.kill_gateway), (2, self.kill_worker), (2, self.stop), (1, self.fill_the_disk),
            (1, self.change_the_clock),
        ]  # fmt: skip
        if self.servers:
            actions.append((2, self.kill_server))
        weights = [weight for weight, _ in actions]
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            (_, action) = self.random.choices(actions, weights)[0]
            action()
            self.done[action.__name__] += 1
            self.go_on_with_the_stopped()
            time.sleep(self.random.uniform(0, 0.5))

    def create(self, timeout: float = 5.0) -> None:
        if self._at_work() >= MOST_RUNS_AT_WORK:
            return
        request_id = f"request-{len(self.requests)}"
        self.pipeline.train.seed = self.random.randrange(4)
        request = gateway_pb2.CreateRunRequest(pipeline=self.pipeline, request_id=request_id)
        self.requests[request_id] = request
        self._send(request_id, timeout)

    def cut_off(self) -> None:
        self.create(timeout=self.random.uniform(0.001, 0.1))

    def create_again(self) -> None:
        if self.requests:
            self._send(self.random.choice(list(self.requests)), self.random.uniform(0.001, 5))

    def _send(self, request_id: str, timeout: float) -> None:
        api = self.random.choice(list(self.apis.values()))
        with contextlib.suppress(grpc.RpcError):
            api.CreateRun(self.requests[request_id], timeout=timeout)

    def _at_work(self) -> int:
        listed = gateway_pb2.ListRunsRequest(states=range(1, 4))
        for api in self.apis.values():
            with contextlib.suppress(grpc.RpcError):
                return len(api.ListRuns(listed, timeout=2).runs)
        return 0

    def cancel(self) -> None:
        api = self.random.choice(list(self.apis.values()))
        with contextlib.suppress(grpc.RpcError):
            runs = api.ListRuns(gateway_pb2.ListRunsRequest(states=range(1, 4)), timeout=2).runs
            if runs:
                run = self.random.choice(list(runs))
                self.cancelled.add(run.id)
                api.CancelRun(gateway_pb2.CancelRunRequest(id=run.id), timeout=self.random.uniform(0.001, 2))

    def kill_gateway(self) -> None:
        self._kill(self.random.choice(list(self.apis)))

    def kill_worker(self) -> None:
        self._kill(self.random.choice(WORKERS))

    def kill_server(self) -> None:
        name = self.random.choice(list(self.servers))
        self._note(name, "SIGKILL")
        self.servers[name].signal(signal.SIGKILL)
        self.stopped.pop(name, None)
        time.sleep(self.random.uniform(0, 1.5))
        self.servers[name].start()

    def change_the_clock(self) -> None:
        seconds = self.random.choice((-CLOCK_SECONDS, 0.0, CLOCK_SECONDS))
        self._note("clock", f"{seconds / 60:+.0f} min")
        set_clock(self.stack, seconds)

    def _note(self, whom: str, what: str) -> None:
        """Note for the table at which stages the runs were when something was done to someone."""
        at_work: set[str] = set()
        for api in self.apis.values():
            with contextlib.suppress(grpc.RpcError):
                runs = api.ListRuns(gateway_pb2.ListRunsRequest(states=range(1, 4)), timeout=0.5).runs
                at_work = {_where(run) for run in runs}
                break
        for stage in at_work or {"nobody knows"}:
            self.matrix[f"{whom} {what}"][stage] += 1

    def table(self) -> str:
        """Return the matrix as text."""
        stages = ["begin", *STAGE_NAMES, "end", "nobody knows"]
        lines = [f"{'':24}" + "".join(f"{stage:>13}" for stage in stages)]
        for row in sorted(self.matrix):
            cells = "".join(f"{self.matrix[row][stage] or '':>13}" for stage in stages)
            lines.append(f"{row:24}{cells}".rstrip())
        return "\n".join(lines) + "\n"

    def _kill(self, name: str) -> None:
        self._note(name, "SIGKILL")
        for other in self.servers.keys() & self.stopped.keys():  # nobody starts while one of them is stopped
            self._signal(other, signal.SIGCONT)
            del self.stopped[other]
        self.stack.kill(name)
        self.stopped.pop(name, None)
        self.stack.start(name)

    def stop(self) -> None:
        name = self.random.choice([*self.apis, *WORKERS, *self.servers])
        self._note(name, "SIGSTOP")
        self._signal(name, signal.SIGSTOP)
        self.stopped[name] = time.monotonic() + self.random.uniform(0.2, 3)

    def go_on_with_the_stopped(self, *, all_of_them: bool = False) -> None:
        for name, until in list(self.stopped.items()):
            if all_of_them or time.monotonic() > until:
                self._signal(name, signal.SIGCONT)
                del self.stopped[name]

    def _signal(self, name: str, number: int) -> None:
        if name in self.servers:
            self.servers[name].signal(number)
        else:
            self.stack.processes[name].send_signal(number)

    def fill_the_disk(self) -> None:
        name = self.random.choice(list(self.apis))
        self._note(name, "disk full")
        process = self.stack.processes[name]
        _, most = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, most))
        time.sleep(self.random.uniform(0.1, 1.5))
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (most, most))


def set_clock(stack: Any, seconds: float) -> None:
    """Have the clocks of all processes of ours be off."""
    part = stack.root / "clock.part"
    part.write_text(str(seconds))
    part.replace(stack.root / "clock")


def _where(run: gateway_pb2.Run) -> str:
    """Return the stage that a run is at."""
    over = (gateway_pb2.STAGE_STATE_SUCCEEDED, gateway_pb2.STAGE_STATE_REUSED)
    for stage in run.stages:
        if stage.state not in over:
            begun = stage.state != gateway_pb2.STAGE_STATE_PENDING or stage is not run.stages[0]
            return STAGE_NAMES[stage.name - 1] if begun else "begin"
    return "end"


def check(schedule: Schedule) -> Counter[str]:
    """Wait for the end of every run; return how many ended in which state."""
    stack, api = schedule.stack, next(iter(schedule.apis.values()))
    schedule.go_on_with_the_stopped(all_of_them=True)
    deadline = time.monotonic() + HEAL_SECONDS
    while unended := api.ListRuns(gateway_pb2.ListRunsRequest(states=range(1, 4)), timeout=30).runs:
        stuck = [(run.id, gateway_pb2.RunState.Name(run.state)) for run in unended]
        assert time.monotonic() < deadline, f"stuck: {stuck}\n{unended[0]}\n{stack._logs()}"
        time.sleep(0.5)
    runs = list(api.ListRuns(gateway_pb2.ListRunsRequest(page_size=1000)).runs)
    return check_ended(stack, runs, schedule.cancelled)


def check_ended(stack: Any, runs: Sequence[gateway_pb2.Run], cancelled: Collection[str]) -> Counter[str]:
    """Hold runs that have ended, which are all there are, against what was asked for; return their states."""
    states = Counter(gateway_pb2.RunState.Name(run.state).removeprefix("RUN_STATE_") for run in runs)
    failed = [run for run in runs if run.state == gateway_pb2.RUN_STATE_FAILED]
    assert not failed, f"{failed[0].id}: {failed[0].error}\n{stack._logs()}"
    assert {run.id for run in runs if run.state == gateway_pb2.RUN_STATE_CANCELLED} <= set(cancelled)
    made = Counter(run.request_id for run in runs)
    assert made.total() == len(made), f"a request made two runs: {made.most_common(3)}"

    jobs = [job for worker in WORKERS for job in stack.jobs(worker)]
    by_stage = Counter(tuple(job["request_id"].split("/")[0::2]) for job in jobs)  # run and stage
    assert by_stage.total() == len(by_stage), f"a job was made twice: {by_stage.most_common(3)}"
    adapters = defaultdict(set)
    for run in runs:
        if run.state == gateway_pb2.RUN_STATE_SUCCEEDED:
            adapters[run.pipeline.train.seed].add(run.stages[1].train_result.adapter.digest)
    assert all(len(digests) == 1 for digests in adapters.values()), adapters
    return states


@pytest.fixture
def clock(stack):
    folder = stack.root / "clock-path"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CLOCK)
    stack.env |= {"TEST_CLOCK": str(stack.root / "clock"), "PYTHONPATH": str(folder)}


@pytest.fixture
def servers(stack, tmp_path):
    """The stack on a PostgreSQL and a MinIO of its own."""
    store = Minio(tmp_path / "minio")
    with contextlib.closing(store), server() as database:
        stack.env |= {
            "WEB4LORA_DATABASE": database.address,
            "WEB4LORA_STORE": f"s3+http://{store.server.endpoint}/test",
            "WEB4LORA_S3_ACCESS_KEY": store.server.access_key,
            "WEB4LORA_S3_SECRET_KEY": store.server.secret_key,
        }
        stack.settings = Settings(
            home=stack.root / "home",
            store=stack.env["WEB4LORA_STORE"],
            s3_access_key=store.server.access_key,
            s3_secret_key=store.server.secret_key,
        )
        try:
            yield {"database": database, "store": store}
        finally:
            database.signal(signal.SIGCONT)
            stack.stop()


def test_the_clock_of_a_process_is_off(stack, clock):
    set_clock(stack, CLOCK_SECONDS)
    stack.start()
    run = stack.create()
    assert run.create_time.seconds - time.time() > CLOCK_SECONDS / 2


@pytest.mark.timeout(SECONDS + HEAL_SECONDS + 180)
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_at_random(stack, clock, request, database):
    gateways, killable = {"gateway": stack.api}, {}
    if database == "postgresql":
        killable = request.getfixturevalue("servers")
        gateways["gateway-2"] = stack.add_gateway("gateway-2")
    sys.stdout.write(f"WEB4LORA_RANDOM_SEED={SEED} WEB4LORA_RANDOM_SECONDS={SECONDS:g}\n")
    stack.start(*WORKERS, *gateways)
    schedule = Schedule(stack, gateways, SEED, killable)
    schedule.go_on(SECONDS)
    states = check(schedule)
    sys.stdout.write(f"{database}: did {dict(schedule.done)}; runs {dict(states)}\n")
    sys.stdout.write(schedule.table())
    assert states, "nothing was made"
