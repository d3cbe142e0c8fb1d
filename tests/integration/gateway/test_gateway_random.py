"""Everything killed, stopped, cut off and cancelled at random: no run is stuck, no job is done twice.

WEB4LORA_RANDOM_SEED repeats a schedule, WEB4LORA_RANDOM_SECONDS sets for how long things are broken.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from web4.lora.v1 import gateway_pb2

SECONDS = float(os.environ.get("WEB4LORA_RANDOM_SECONDS", "30"))
SEED = int(os.environ.get("WEB4LORA_RANDOM_SEED", "20261126")) or random.SystemRandom().randrange(1, 1 << 30)
"""The same in every ordinary run; 0, as in `make soak`, draws one."""
WORKERS = ("trainer", "packager", "deployer")
MOST_RUNS_AT_WORK = 6
HEAL_SECONDS = 240.0


class Schedule:
    """Breaks a stack by a seed, and remembers what it asked for."""

    def __init__(self, stack: Any, gateways: dict[str, Any], seed: int) -> None:
        self.stack = stack
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
        ]  # fmt: skip
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
        pipeline = self.stack.pipeline(seed=self.random.randrange(4))
        self.requests[request_id] = gateway_pb2.CreateRunRequest(pipeline=pipeline, request_id=request_id)
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

    def _kill(self, name: str) -> None:
        self.stack.kill(name)
        self.stopped.pop(name, None)
        self.stack.start(name)

    def stop(self) -> None:
        name = self.random.choice([*self.apis, *WORKERS])
        self.stack.processes[name].send_signal(signal.SIGSTOP)
        self.stopped[name] = time.monotonic() + self.random.uniform(0.2, 3)

    def go_on_with_the_stopped(self, *, all_of_them: bool = False) -> None:
        for name, until in list(self.stopped.items()):
            if all_of_them or time.monotonic() > until:
                self.stack.processes[name].send_signal(signal.SIGCONT)
                del self.stopped[name]

    def fill_the_disk(self) -> None:
        process = self.stack.processes[self.random.choice(list(self.apis))]
        _, most = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, most))
        time.sleep(self.random.uniform(0.1, 1.5))
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (most, most))


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
    states = Counter(gateway_pb2.RunState.Name(run.state).removeprefix("RUN_STATE_") for run in runs)
    failed = [run for run in runs if run.state == gateway_pb2.RUN_STATE_FAILED]
    assert not failed, f"{failed[0].id}: {failed[0].error}\n{stack._logs()}"
    assert {run.id for run in runs if run.state == gateway_pb2.RUN_STATE_CANCELLED} <= schedule.cancelled
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


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_at_random(stack, request, database):
    gateways = {"gateway": stack.api}
    if database == "postgresql":
        stack.env["WEB4LORA_DATABASE"] = request.getfixturevalue("postgresql")
        gateways["gateway-2"] = stack.add_gateway("gateway-2")
    sys.stdout.write(f"WEB4LORA_RANDOM_SEED={SEED} WEB4LORA_RANDOM_SECONDS={SECONDS:g}\n")
    stack.start(*WORKERS, *gateways)
    schedule = Schedule(stack, gateways, SEED)
    schedule.go_on(SECONDS)
    states = check(schedule)
    sys.stdout.write(f"{database}: did {dict(schedule.done)}; runs {dict(states)}\n")
    assert states, "nothing was made"
