"""A worker service for the gateway's tests: the real contract and the real job runner over trivial work.

python stand_in_service.py trainer|packager|deployer CONTROL_FOLDER

With STAND_IN_QUICK in the environment it starts no process for a job, which then takes some milliseconds.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path

from google.protobuf.json_format import ParseDict
from web4.lora.v1 import (
    deployer_pb2,
    deployer_pb2_grpc,
    deployments_pb2,
    deployments_pb2_grpc,
    packager_pb2,
    packager_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
)
from web4lora_chassis.errors import FailedPrecondition, NotFound
from web4lora_chassis.jobs import JobContext, JobRunner
from web4lora_chassis.jobs.record import JobState
from web4lora_chassis.rpc import Registration, Worker, worker_process
from web4lora_chassis.settings import Settings

NAME, CONTROL = sys.argv[1], Path(sys.argv[2])
MODULES = {
    "trainer": (trainer_pb2, trainer_pb2_grpc),
    "packager": (packager_pb2, packager_pb2_grpc),
    "deployer": (deployer_pb2, deployer_pb2_grpc),
}
KINDS = {
    "trainer": ("prepare", "train"),
    "packager": ("package",),
    "deployer": ("deploy", "verify", "evaluate", "push"),
}
INFO = {
    "trainer": {"version": "0.1.0", "device": "stand-in", "tools": {"torch": "2"}},
    "packager": {"version": "0.1.0", "llama_cpp_version": "b1", "llama_cpp_ready": True},
    "deployer": {
        "version": "0.1.0",
        "runtimes": [{"target": "llama-server", "usable": True, "version": "b1"}],
    },
}


def make_servicer() -> object:
    messages, services = MODULES[NAME]
    title = NAME.capitalize()

    def answer(call: str) -> type:
        return getattr(messages, f"{call}Response")

    async def info(self, request, context):
        told = dict(INFO[NAME])
        if NAME == "deployer" and (CONTROL / "target").exists():
            told["target"] = (CONTROL / "target").read_text()
        return ParseDict(told, answer(f"Get{title}Info")())

    async def check_suite(self, request, context):
        return answer("CheckSuite")(scores=["tool_call.valid", "answers.ends"])

    calls = {f"Get{title}Info": info}
    if NAME == "deployer":
        calls["CheckSuite"] = check_suite
    return type("StandIn", (getattr(services, f"{title}ServiceServicer"),), calls)()


class StandInDeployments(deployments_pb2_grpc.DeploymentServiceServicer):
    async def ListDeployments(self, request, context):
        return deployments_pb2.ListDeploymentsResponse(deployments=deployments())

    async def GetDeployment(self, request, context):
        return deployments_pb2.GetDeploymentResponse(deployment=found(request.id))

    async def PromoteDeployment(self, request, context):
        (CONTROL / "promoting").touch()
        while (CONTROL / "hold-promote").exists():
            await asyncio.sleep(0.05)
        before = [other for other in names() if other != request.id]
        (CONTROL / "names.json").write_text(json.dumps([request.id, *before]))
        return deployments_pb2.PromoteDeploymentResponse(deployment=found(request.id))

    async def RollbackDeployment(self, request, context):
        serving = names()
        if serving[0] == request.from_id:
            if len(serving) == 1:
                raise FailedPrecondition("no earlier one", reason="NO_EARLIER_CANDIDATE")
            (CONTROL / "names.json").write_text(json.dumps(serving[1:]))
        return deployments_pb2.RollbackDeploymentResponse(deployment=found(request.name))

    async def DeleteDeployment(self, request, context):
        (CONTROL / f"deployment-{request.id.partition(':v')[2]}.json").unlink(missing_ok=True)
        return deployments_pb2.DeleteDeploymentResponse()

    async def SetAdapters(self, request, context):
        deployment = found(request.id)
        for name, scale in request.scales.items():
            deployment.adapters.add(name=name, scale=scale)
        return deployments_pb2.SetAdaptersResponse(deployment=deployment)


def deployments() -> list[deployments_pb2.Deployment]:
    made = [
        ParseDict(json.loads(path.read_text()), deployments_pb2.Deployment())
        for path in sorted(CONTROL.glob("deployment-*.json"))
    ]
    for deployment in made:
        deployment.promoted = names()[:1] == [deployment.id]
    return made


def names() -> list[str]:
    """Return what served under the one name there is, newest first."""
    place = CONTROL / "names.json"
    return json.loads(place.read_text()) if place.exists() else []


def found(id_or_name: str) -> deployments_pb2.Deployment:
    known = {deployment.id: deployment for deployment in deployments()}
    for deployment in list(known.values()):
        if deployment.promoted or deployment.name not in known:
            known[deployment.name] = deployment
    if id_or_name not in known:
        raise NotFound(f"There is no deployment {id_or_name}.")
    return known[id_or_name]


class QuickRunner(JobRunner):
    """Does its jobs in a thread."""

    async def _run_child(self, job_id: str) -> None:
        record, work_dir = self._jobs[job_id], self._root / job_id / "work"
        work_dir.mkdir(exist_ok=True)
        self._update(job_id, state=JobState.RUNNING, attempt=record.attempt + 1, started_at=time.time())
        from stand_in_child import HANDLERS  # reads the environment

        context = JobContext(
            job_id,
            record.spec,
            record.attempt + 1,
            0,
            work_dir,
            report=lambda _: None,
            end_early=lambda: False,
        )
        result = await asyncio.to_thread(HANDLERS[record.kind], context)
        await self._end(job_id, state=JobState.SUCCEEDED, result=result)


def stand_in(settings: Settings) -> Worker:
    title = NAME.capitalize()
    add = getattr(MODULES[NAME][1], f"add_{title}ServiceServicer_to_server")
    kind = JobRunner
    if "STAND_IN_QUICK" in os.environ:
        os.environ |= {"STAND_IN_CONTROL": str(CONTROL), "STAND_IN_STEP_SECONDS": "0"}
        kind = QuickRunner
    runner = kind(
        settings.home / NAME / "jobs",
        "stand_in_child",
        lanes={"prepare": "prepare"},
        cancel_grace_seconds=1,
        can_end_early=("train",),
        env={"PYTHONPATH": str(Path(__file__).parent), "STAND_IN_CONTROL": str(CONTROL)},
    )
    own = [Registration(f"web4.lora.v1.{title}Service", add, make_servicer())]
    if NAME == "deployer":
        add = deployments_pb2_grpc.add_DeploymentServiceServicer_to_server
        own.append(Registration("web4.lora.v1.DeploymentService", add, StandInDeployments()))
    return Worker(
        NAME,
        getattr(settings, f"{NAME}_address"),
        own,
        runner,
        {kind: lambda *_: None for kind in KINDS[NAME]},
    )


sys.exit(worker_process(NAME, Settings, stand_in))
