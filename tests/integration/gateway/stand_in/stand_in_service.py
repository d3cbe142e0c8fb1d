"""A worker service for the gateway's tests: the real contract and the real job runner over trivial work.

python stand_in_service.py trainer|packager|deployer CONTROL_FOLDER
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from google.protobuf.json_format import ParseDict
from web4.lora.v1 import (
    deployer_pb2,
    deployer_pb2_grpc,
    packager_pb2,
    packager_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
)
from web4lora_chassis.errors import FailedPrecondition, NotFound
from web4lora_chassis.jobs import JobRunner
from web4lora_chassis.rpc import JobApi, Registration, serve
from web4lora_chassis.settings import Settings, load

NAME, CONTROL = sys.argv[1], Path(sys.argv[2])
MODULES = {
    "trainer": (trainer_pb2, trainer_pb2_grpc),
    "packager": (packager_pb2, packager_pb2_grpc),
    "deployer": (deployer_pb2, deployer_pb2_grpc),
}
INFO = {
    "trainer": {"version": "0.1.0", "device": "stand-in", "tools": {"torch": "2"}},
    "packager": {"version": "0.1.0", "llama_cpp_version": "b1", "llama_cpp_ready": True},
    "deployer": {
        "version": "0.1.0",
        "runtimes": [{"target": "llama-server", "usable": True, "version": "b1"}],
    },
}


def make_servicer(api: JobApi) -> object:
    messages, services = MODULES[NAME]
    title = NAME.capitalize()

    def answer(call: str) -> type:
        return getattr(messages, f"{call}Response")

    async def create(self, request, context):
        return answer(f"Create{title}Job")(job=await api.create(request))

    async def get(self, request, context):
        return answer(f"Get{title}Job")(job=api.get(request.id))

    async def list_jobs(self, request, context):
        jobs, token = api.list(request)
        return answer(f"List{title}Jobs")(jobs=jobs, next_page_token=token)

    async def watch(self, request, context):
        async for job in api.watch(request.id):
            yield answer(f"Watch{title}Job")(job=job)

    async def cancel(self, request, context):
        return answer(f"Cancel{title}Job")(job=await api.cancel(request.id))

    async def info(self, request, context):
        return ParseDict(INFO[NAME], answer(f"Get{title}Info")())

    async def list_deployments(self, request, context):
        return answer("ListDeployments")(deployments=deployments())

    async def get_deployment(self, request, context):
        return answer("GetDeployment")(deployment=found(request.id))

    async def promote(self, request, context):
        before = [other for other in names() if other != request.id]
        (CONTROL / "names.json").write_text(json.dumps([request.id, *before]))
        return answer("PromoteDeployment")(deployment=found(request.id))

    async def roll_back(self, request, context):
        serving = names()
        if serving[0] == request.from_id:
            if len(serving) == 1:
                raise FailedPrecondition("no earlier one", reason="NO_EARLIER_CANDIDATE")
            (CONTROL / "names.json").write_text(json.dumps(serving[1:]))
        return answer("RollbackDeployment")(deployment=found(request.name))

    async def delete(self, request, context):
        (CONTROL / f"deployment-{request.id.partition(':v')[2]}.json").unlink(missing_ok=True)
        return answer("DeleteDeployment")()

    calls = {
        f"Create{title}Job": create, f"Get{title}Job": get, f"List{title}Jobs": list_jobs,
        f"Watch{title}Job": watch, f"Cancel{title}Job": cancel, f"Get{title}Info": info,
    }  # fmt: skip
    if NAME == "deployer":
        calls |= {
            "ListDeployments": list_deployments, "GetDeployment": get_deployment,
            "PromoteDeployment": promote, "RollbackDeployment": roll_back, "DeleteDeployment": delete,
        }  # fmt: skip
    return type("StandIn", (getattr(services, f"{title}ServiceServicer"),), calls)()


def deployments() -> list[deployer_pb2.Deployment]:
    made = [
        ParseDict(json.loads(path.read_text()), deployer_pb2.Deployment())
        for path in sorted(CONTROL.glob("deployment-*.json"))
    ]
    for deployment in made:
        deployment.promoted = names()[:1] == [deployment.id]
    return made


def names() -> list[str]:
    """Return what served under the one name there is, newest first."""
    place = CONTROL / "names.json"
    return json.loads(place.read_text()) if place.exists() else []


def found(id_or_name: str) -> deployer_pb2.Deployment:
    known = {deployment.id: deployment for deployment in deployments()}
    for deployment in list(known.values()):
        if deployment.promoted or deployment.name not in known:
            known[deployment.name] = deployment
    if id_or_name not in known:
        raise NotFound(f"There is no deployment {id_or_name}.")
    return known[id_or_name]


async def main() -> None:
    settings = load(Settings)
    runner = JobRunner(
        settings.home / NAME / "jobs",
        "stand_in_child",
        cancel_grace_seconds=1,
        env={"PYTHONPATH": str(Path(__file__).parent), "STAND_IN_CONTROL": str(CONTROL)},
    )
    await runner.start()
    messages, services = MODULES[NAME]
    title = NAME.capitalize()
    api = JobApi(runner, getattr(messages, f"{title}Job"), lambda kind, spec: None)
    add = getattr(services, f"add_{title}ServiceServicer_to_server")
    address = getattr(settings, f"{NAME}_address")
    await serve(address, [Registration(f"web4.lora.v1.{title}Service", add, make_servicer(api))], settings)
    await runner.stop()


asyncio.run(main())
