"""How many runs a gateway takes in, and how fast it answers meanwhile, on SQLite and on PostgreSQL.

    .venv/bin/python benchmarks/gateway.py
    .venv/bin/python benchmarks/gateway.py --postgresql postgresql://user@host/an_empty_database
    .venv/bin/python benchmarks/gateway.py --overhead outputs/latest/run.json

The gateway is a process of its own; its workers are played by this one and answer at once, so that
the figures are the gateway's alone. Nothing else should be at work on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import psutil
import sqlalchemy as sa
from google.protobuf.json_format import ParseDict
from web4.lora.v1 import (
    deployer_pb2,
    deployer_pb2_grpc,
    deployments_pb2,
    deployments_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    packager_pb2,
    packager_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
)
from web4lora_chassis.artifacts import open_store
from web4lora_chassis.rpc import async_channel, ref_message
from web4lora_chassis.settings import Settings
from web4lora_gateway.database import RUNS, open_database

SUBMISSIONS, AT_ONCE = 200, 16
WATCHERS, WATCHED, WATCH_SECONDS = 200, 20, 15.0
PROGRESS_SECONDS = 0.5
RUNS_KEPT, PAGE = 10_000, 100
CALLS, PAGES, SETTLE_SECONDS = 200, 20, 5.0
START_LIMIT_SECONDS = 120.0
WANTED = {
    "submissions a second": "100 or more", "GetRun p99, ms": "below 50", "page of 100, ms": "50",
    "start, s": "2",
}  # fmt: skip


class Workers(jobs_pb2_grpc.JobServiceServicer):
    """Plays the trainer, the packager and the deployer: every job ends at once, unless trainings are held."""

    def __init__(self, refs: dict[str, Any]) -> None:
        self.refs = refs
        self.jobs: dict[str, jobs_pb2.Job] = {}
        self.held = False

    def _result(self, kind: str) -> dict[str, Any]:
        gguf = {"artifact": self.refs["gguf"], "type": "Q4_K_M", "loads": True}
        return {
            "prepare": {"base": self.refs["base_model"], "context_tokens": 8192},
            "train": {"adapter": self.refs["adapter"], "final_loss": 0.5, "steps": "3"},
            "package": {"merged": self.refs["base_model"], "reference": {**gguf, "type": "F16"},
                        "quantized": [gguf], "files": self.refs["report"]},
            "deploy": {"deployment": self.deployment()},
        }[kind]  # fmt: skip

    def deployment(self) -> dict[str, Any]:
        """Return the one deployment there is."""
        return {"id": "demo:v1", "name": "demo", "target": "llama-server", "gguf": self.refs["gguf"],
                "state": "DEPLOYMENT_STATE_SERVING"}  # fmt: skip

    async def CreateJob(self, request: jobs_pb2.CreateJobRequest, _: Any) -> jobs_pb2.CreateJobResponse:
        """See the contract."""
        job = self.jobs.get(request.request_id)
        if job is None:
            kind = str(request.spec.WhichOneof("kind"))
            job = jobs_pb2.Job(id=f"{kind}-{uuid.uuid4().hex}", request_id=request.request_id)
            if kind == "train" and self.held:
                job.state = jobs_pb2.JOB_STATE_RUNNING
            else:
                job.state = jobs_pb2.JOB_STATE_SUCCEEDED
                ParseDict({kind: self._result(kind)}, job.result)
            self.jobs[request.request_id] = job
        return jobs_pb2.CreateJobResponse(job=job)

    async def WatchJob(
        self, request: jobs_pb2.WatchJobRequest, _: Any
    ) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        """See the contract."""
        job = jobs_pb2.Job(id=request.id, state=jobs_pb2.JOB_STATE_RUNNING)
        while self.held:
            job.progress.done += 1
            job.progress.figures["sent"] = time.time()
            yield jobs_pb2.WatchJobResponse(job=job)
            await asyncio.sleep(PROGRESS_SECONDS)
        job.state = jobs_pb2.JOB_STATE_SUCCEEDED
        ParseDict({"train": self._result("train")}, job.result)
        yield jobs_pb2.WatchJobResponse(job=job)

    async def serve(self) -> tuple[grpc.aio.Server, int]:
        """Serve on a free port; return the server and the port."""
        server = grpc.aio.server()
        jobs_pb2_grpc.add_JobServiceServicer_to_server(self, server)
        shown = self

        class Trainer(trainer_pb2_grpc.TrainerServiceServicer):
            async def GetTrainerInfo(self, *_: Any) -> trainer_pb2.GetTrainerInfoResponse:
                return trainer_pb2.GetTrainerInfoResponse(version="0", device="none")

        class Packager(packager_pb2_grpc.PackagerServiceServicer):
            async def GetPackagerInfo(self, *_: Any) -> packager_pb2.GetPackagerInfoResponse:
                return packager_pb2.GetPackagerInfoResponse(version="0", llama_cpp_version="b1")

        class Deployer(deployer_pb2_grpc.DeployerServiceServicer):
            async def GetDeployerInfo(self, *_: Any) -> deployer_pb2.GetDeployerInfoResponse:
                return deployer_pb2.GetDeployerInfoResponse(version="0")

        class Deployments(deployments_pb2_grpc.DeploymentServiceServicer):
            async def GetDeployment(self, *_: Any) -> deployments_pb2.GetDeploymentResponse:
                found = ParseDict(shown.deployment(), deployments_pb2.Deployment())
                return deployments_pb2.GetDeploymentResponse(deployment=found)

            async def PromoteDeployment(self, *_: Any) -> deployments_pb2.PromoteDeploymentResponse:
                found = ParseDict(shown.deployment(), deployments_pb2.Deployment())
                return deployments_pb2.PromoteDeploymentResponse(deployment=found)

        trainer_pb2_grpc.add_TrainerServiceServicer_to_server(Trainer(), server)
        packager_pb2_grpc.add_PackagerServiceServicer_to_server(Packager(), server)
        deployer_pb2_grpc.add_DeployerServiceServicer_to_server(Deployer(), server)
        deployments_pb2_grpc.add_DeploymentServiceServicer_to_server(Deployments(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port


class Gateway:
    """A gateway on a free port with a state folder of its own."""

    def __init__(self, home: Path, workers_port: int, database: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        worker = f"127.0.0.1:{workers_port}"
        self._env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("WEB4LORA_")},
            "WEB4LORA_HOME": str(home), "WEB4LORA_GATEWAY_ADDRESS": self.address,
            "WEB4LORA_TRAINER_ADDRESS": worker, "WEB4LORA_PACKAGER_ADDRESS": worker,
            "WEB4LORA_DEPLOYER_ADDRESS": worker, "WEB4LORA_DATABASE": database,
            # A trainer does one training at a time: as many of them as there are trainings to watch.
            "WEB4LORA_TRAINERS": ",".join(f"t{n}={worker}" for n in range(1, WATCHED)),
        }  # fmt: skip
        self._log = home / "gateway.log"
        self.settings = Settings(home=home)

    @contextlib.asynccontextmanager
    async def running(
        self,
    ) -> AsyncIterator[tuple[gateway_pb2_grpc.GatewayServiceStub, float, psutil.Process]]:
        """Run it; yields what calls it, how many seconds its start took, and its process."""
        began = time.monotonic()
        with self._log.open("ab") as log:
            process = subprocess.Popen([sys.executable, "-m", "web4lora_gateway"], env=self._env, stderr=log)
        try:
            async with async_channel(self.address, self.settings) as channel:
                api = gateway_pb2_grpc.GatewayServiceStub(channel)
                request = gateway_pb2.ListRunsRequest(page_size=1)
                await api.ListRuns(request, timeout=START_LIMIT_SECONDS, wait_for_ready=True)
                yield api, time.monotonic() - began, psutil.Process(process.pid)
        finally:
            process.terminate()
            await asyncio.to_thread(process.wait)


def cpu_ms(process: psutil.Process) -> float:
    """Return the processor time that a process has used, in milliseconds: other work does not change it."""
    times = process.cpu_times()
    return 1000 * float(times.user + times.system)


def percentile(values: list[float], percent: int) -> float:
    """Return a percentile in milliseconds."""
    return 1000 * statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def pipeline_of(settings: Settings) -> tuple[gateway_pb2.Pipeline, dict[str, Any]]:
    """Store a dataset and what jobs result in; return a pipeline and the references by kind."""
    store = open_store(settings)
    file = settings.home / "rows.jsonl"
    file.write_text('{"messages": []}\n', encoding="utf-8")
    pipeline = gateway_pb2.Pipeline(name="demo", base={"model": "smollm2-135m-instruct"})
    dataset = store.put("dataset", "data", {"train/rows.jsonl": file}, link=False)
    pipeline.dataset.artifact.CopyFrom(ref_message(dataset))
    refs = {}
    for kind in ("base_model", "adapter", "gguf", "report"):
        ref = store.put(kind, "demo", {f"{kind}.txt": file}, link=False)
        refs[kind] = {"kind": f"ARTIFACT_KIND_{kind.upper()}", "name": ref.name, "digest": ref.digest}
    return pipeline, refs


def request_of(pipeline: gateway_pb2.Pipeline, seed: int) -> gateway_pb2.CreateRunRequest:
    """Return a request for a run of its own."""
    request = gateway_pb2.CreateRunRequest(pipeline=pipeline, request_id=uuid.uuid4().hex)
    request.pipeline.train.seed = seed
    return request


async def submit(api: Any, pipeline: gateway_pb2.Pipeline, count: int) -> float:
    """Return how many runs a second are taken in."""
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            await api.CreateRun(request_of(pipeline, number))

    began = time.monotonic()
    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    return count / (time.monotonic() - began)


async def ended(api: Any) -> None:
    """Wait until every run has ended."""
    unended = gateway_pb2.ListRunsRequest(states=[1, 2, 3], page_size=1)
    while (await api.ListRuns(unended)).runs:
        await asyncio.sleep(0.5)


async def watch(
    api: Any, workers: Workers, pipeline: gateway_pb2.Pipeline
) -> tuple[list[float], list[float]]:
    """Watch runs at work; return the seconds of events on their way, and of GetRun meanwhile."""
    workers.held = True
    created = [await api.CreateRun(request_of(pipeline, 10_000 + n)) for n in range(WATCHED)]
    run_ids = [answer.run.id for answer in created]
    for run_id in run_ids:
        async for answer in api.WatchRun(gateway_pb2.WatchRunRequest(id=run_id)):
            if answer.run.stages[1].progress.figures:
                break
            if answer.run.end_time.seconds:
                raise SystemExit(f"{run_id} ended: {answer.run.error}")
    delays: list[float] = []
    calls: list[float] = []

    async def watcher(run_id: str) -> None:
        sent = 0.0
        async for answer in api.WatchRun(gateway_pb2.WatchRunRequest(id=run_id)):
            latest = answer.run.stages[1].progress.figures.get("sent", 0.0)
            if latest > sent:
                if sent:  # the first one may be an old one
                    delays.append(time.time() - latest)
                sent = latest

    watching = [asyncio.create_task(watcher(run_ids[n % WATCHED])) for n in range(WATCHERS)]
    deadline = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline:
        began = time.monotonic()
        await api.GetRun(gateway_pb2.GetRunRequest(id=run_ids[len(calls) % WATCHED]))
        calls.append(time.monotonic() - began)
        await asyncio.sleep(0.01)
    workers.held = False
    await asyncio.gather(*watching)
    return delays, calls


def multiply(database: str, home: Path) -> None:
    """Fill the database up with copies of a finished run."""
    engine = open_database(database or f"sqlite:///{home}/gateway/gateway.sqlite")
    with engine.begin() as connection:
        rows = [dict(row._mapping) for row in connection.execute(sa.select(RUNS))]
        text = json.dumps(rows[0]["document"])
        copies = []
        for number in range(RUNS_KEPT - len(rows)):
            run_id = f"run_2025-01-01_{number + 1}"
            document = json.loads(text.replace(rows[0]["id"], run_id))
            row = {**rows[0], "id": run_id, "request_id": run_id, "document": document}
            copies.append({**row, "created_at": rows[0]["created_at"] - number})
        connection.execute(sa.insert(RUNS), copies)
    engine.dispose()


async def measure(database: str, submissions: int) -> dict[str, float]:
    """Return the figures of a gateway on a database; empty: SQLite."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        pipeline, refs = pipeline_of(Settings(home=home))
        workers = Workers(refs)
        server, port = await workers.serve()
        gateway = Gateway(home, port, database)
        async with gateway.running() as (api, _, process):
            used = cpu_ms(process)
            found["submissions a second"] = await submit(api, pipeline, submissions)
            began = time.monotonic()
            await ended(api)
            found["run, all told, CPU ms"] = (cpu_ms(process) - used) / submissions
            run_id = (await api.ListRuns(gateway_pb2.ListRunsRequest(page_size=1))).runs[0].id
            used = cpu_ms(process)
            for _ in range(CALLS):
                await api.GetRun(gateway_pb2.GetRunRequest(id=run_id))
            found["GetRun, CPU ms"] = (cpu_ms(process) - used) / CALLS
            found["runs ended a second, all told"] = submissions / (
                submissions / found["submissions a second"] + time.monotonic() - began
            )
            delays, calls = await watch(api, workers, pipeline)
            found["GetRun p50, ms"], found["GetRun p99, ms"] = percentile(calls, 50), percentile(calls, 99)
            found["event delay p50, ms"] = percentile(delays, 50)
            found["event delay p99, ms"] = percentile(delays, 99)
            await ended(api)
            found["memory, MB"] = process.memory_info().rss / 1e6
        await asyncio.to_thread(multiply, database, home)
        async with gateway.running() as (api, seconds, process):
            found["start, s"], found["start, CPU ms"] = seconds, cpu_ms(process)
            await asyncio.sleep(SETTLE_SECONDS)  # what it does once, behind its start
            took, used = [], cpu_ms(process)
            for _ in range(PAGES):
                began = time.monotonic()
                await api.ListRuns(gateway_pb2.ListRunsRequest(page_size=PAGE))
                took.append(1000 * (time.monotonic() - began))
            found["page of 100, ms"] = statistics.median(took)
            found["page of 100, CPU ms"] = (cpu_ms(process) - used) / PAGES
            found["memory with 10,000 runs, MB"] = process.memory_info().rss / 1e6
        await server.stop(None)
    return found


def overhead(facts: dict[str, Any]) -> tuple[float, float]:
    """Return the seconds of a run that were no stage's, waiting for its turn among them, and their share.

    Args:
        facts: What its run.json holds.
    """
    created, ended = (datetime.fromisoformat(facts[name]).timestamp() for name in ("created", "ended"))
    stages = [stage for stage in facts["stages"].values() if stage["state"] == "SUCCEEDED"]
    between = ended - created - sum(stage.get("seconds", 0.0) for stage in stages)
    return between, between / (ended - created)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--postgresql", default="", help="address of an empty database")
    parser.add_argument("--submissions", type=int, default=SUBMISSIONS, help=f"{SUBMISSIONS} unless given")
    parser.add_argument("--overhead", type=Path, help="only say how much of a run was no stage's")
    options = parser.parse_args()
    if options.overhead:
        seconds, share = overhead(json.loads(options.overhead.read_text(encoding="utf-8")))
        print(f"{seconds:.2f} s between the stages, {share:.2%} of the run; wanted: at most 2 %")
        return
    databases = {"SQLite": ""} | ({"PostgreSQL": address} if (address := options.postgresql) else {})
    figures = {
        name: asyncio.run(measure(address, options.submissions)) for name, address in databases.items()
    }
    print(f"{'':32}" + "".join(f"{name:>12}" for name in figures) + "   wanted")
    for what in next(iter(figures.values())):
        cells = "".join(f"{each[what]:>12.1f}" for each in figures.values())
        print(f"{what:32}{cells}   {WANTED.get(what, '')}".rstrip())
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.1f}; {WATCHERS} watchers, {options.submissions} runs")


if __name__ == "__main__":
    main()
