"""The deployer's RPCs: jobs, deployments, and which runtimes there are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from web4.lora.v1 import artifacts_pb2, deployer_pb2, deployer_pb2_grpc
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.rpc import JobApi, ref_of

from web4lora_deployer import names, promotion
from web4lora_deployer.adapters import set_scales
from web4lora_deployer.deployments import Deployment, Deployments
from web4lora_deployer.messages import deployment_message, runtime_message
from web4lora_deployer.registry import parse_reference
from web4lora_deployer.runtimes import AUTO, RUNTIMES, check_target, llama_server, open_runtime
from web4lora_deployer.settings import DeployerSettings

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]

_CONTEXT_TOKENS = (128, 1 << 20)
_PARALLEL = (1, 64)
_HOTTEST = 2.0
_MAX_AGAINST = 4
_MAX_ADAPTERS = 16


class DeployerService(deployer_pb2_grpc.DeployerServiceServicer):
    """Answers the contract's DeployerService.

    Args:
        jobs: The job RPCs.
        settings: Where records and runtimes are.
    """

    def __init__(self, jobs: JobApi[deployer_pb2.DeployerJob], settings: DeployerSettings) -> None:
        self._jobs = jobs
        self._settings = settings
        self._deployments = Deployments(settings.deployer_home)

    async def GetDeployerInfo(
        self, _request: deployer_pb2.GetDeployerInfoRequest, _context: Context
    ) -> deployer_pb2.GetDeployerInfoResponse:
        """Look for all runtimes at once."""
        found = await asyncio.gather(
            *(asyncio.to_thread(make(self._settings).probe) for make in RUNTIMES.values())
        )
        return deployer_pb2.GetDeployerInfoResponse(
            version=version("web4lora-deployer"), runtimes=[runtime_message(status) for status in found]
        )

    async def CreateDeployerJob(
        self, request: deployer_pb2.CreateDeployerJobRequest, _context: Context
    ) -> deployer_pb2.CreateDeployerJobResponse:
        """Create a job."""
        return deployer_pb2.CreateDeployerJobResponse(job=await self._jobs.create(request))

    async def GetDeployerJob(
        self, request: deployer_pb2.GetDeployerJobRequest, _context: Context
    ) -> deployer_pb2.GetDeployerJobResponse:
        """Return a job."""
        return deployer_pb2.GetDeployerJobResponse(job=self._jobs.get(request.id))

    async def ListDeployerJobs(
        self, request: deployer_pb2.ListDeployerJobsRequest, _context: Context
    ) -> deployer_pb2.ListDeployerJobsResponse:
        """List jobs."""
        jobs, token = self._jobs.list(request)
        return deployer_pb2.ListDeployerJobsResponse(jobs=jobs, next_page_token=token)

    async def WatchDeployerJob(
        self, request: deployer_pb2.WatchDeployerJobRequest, _context: Context
    ) -> AsyncIterator[deployer_pb2.WatchDeployerJobResponse]:
        """Stream snapshots of a job."""
        async for job in self._jobs.watch(request.id):
            yield deployer_pb2.WatchDeployerJobResponse(job=job)

    async def CancelDeployerJob(
        self, request: deployer_pb2.CancelDeployerJobRequest, _context: Context
    ) -> deployer_pb2.CancelDeployerJobResponse:
        """Ask a job to end."""
        return deployer_pb2.CancelDeployerJobResponse(job=await self._jobs.cancel(request.id))

    async def ListDeployments(
        self, _request: deployer_pb2.ListDeploymentsRequest, _context: Context
    ) -> deployer_pb2.ListDeploymentsResponse:
        """List deployments, each asked how it does, all at once."""
        records = await asyncio.to_thread(self._deployments.list)
        messages = await asyncio.gather(*(self._message(record) for record in records))
        return deployer_pb2.ListDeploymentsResponse(deployments=messages)

    async def GetDeployment(
        self, request: deployer_pb2.GetDeploymentRequest, _context: Context
    ) -> deployer_pb2.GetDeploymentResponse:
        """Return a deployment by id or name."""
        record = await asyncio.to_thread(self._deployments.find, request.id)
        return deployer_pb2.GetDeploymentResponse(deployment=await self._message(record))

    async def PromoteDeployment(
        self, request: deployer_pb2.PromoteDeploymentRequest, _context: Context
    ) -> deployer_pb2.PromoteDeploymentResponse:
        """Point a deployment's name at it."""
        record = await asyncio.to_thread(promotion.promote, request.id, self._settings)
        return deployer_pb2.PromoteDeploymentResponse(deployment=await self._message(record))

    async def RollbackDeployment(
        self, request: deployer_pb2.RollbackDeploymentRequest, _context: Context
    ) -> deployer_pb2.RollbackDeploymentResponse:
        """Point a name back at the candidate before."""
        record = await asyncio.to_thread(
            promotion.roll_back, request.name, self._settings, from_id=request.from_id
        )
        return deployer_pb2.RollbackDeploymentResponse(deployment=await self._message(record))

    async def DeleteDeployment(
        self, request: deployer_pb2.DeleteDeploymentRequest, _context: Context
    ) -> deployer_pb2.DeleteDeploymentResponse:
        """Take a deployment out, and its name's place when it has it."""
        await asyncio.to_thread(promotion.delete, request.id, self._settings)
        return deployer_pb2.DeleteDeploymentResponse()

    async def SetAdapters(
        self, request: deployer_pb2.SetAdaptersRequest, _context: Context
    ) -> deployer_pb2.SetAdaptersResponse:
        """Set how strongly a deployment's adapters are applied."""
        record = await asyncio.to_thread(set_scales, request.id, dict(request.scales), self._settings)
        return deployer_pb2.SetAdaptersResponse(deployment=await self._message(record))

    async def _message(self, record: Deployment) -> deployer_pb2.Deployment:
        runtime = open_runtime(record.target, self._settings)
        health = await asyncio.to_thread(runtime.health, record)
        return deployment_message(
            record, health, self._deployments.name(record.name), self._deployments.scales(record)
        )


def check(
    _kind: str,
    spec: deployer_pb2.DeploySpec
    | deployer_pb2.VerifySpec
    | deployer_pb2.EvaluateSpec
    | deployer_pb2.PushSpec,
) -> None:
    """Refuse a spec out of bounds before its job is accepted.

    Raises:
        InvalidInput: The message names the field.
    """
    if isinstance(spec, deployer_pb2.DeploySpec):
        _check_deploy(spec)
    elif isinstance(spec, deployer_pb2.EvaluateSpec):
        _check_evaluate(spec)
    elif isinstance(spec, deployer_pb2.PushSpec):
        _check_push(spec)
    else:
        _check_verify(spec)


def _check_deploy(spec: deployer_pb2.DeploySpec) -> None:
    names.check_name(spec.name)
    _check_ref("gguf", spec.gguf, "gguf")
    if spec.HasField("files"):
        _check_ref("files", spec.files, "report")
    settings = spec.deploy
    if settings.HasField("target") and settings.target != AUTO:
        check_target(settings.target)
    if settings.HasField("context_tokens"):
        _check_range("context_tokens", settings.context_tokens, *_CONTEXT_TOKENS)
    if settings.HasField("parallel"):
        _check_range("parallel", settings.parallel, *_PARALLEL)
    if not 0 <= spec.parameters.temperature <= _HOTTEST:
        raise InvalidInput(
            f"parameters.temperature is {spec.parameters.temperature:g}; it needs 0 to {_HOTTEST:g}.",
            metadata={"field": "parameters.temperature"},
        )
    if not all(spec.parameters.stop):
        raise InvalidInput("parameters.stop holds an empty text.", metadata={"field": "parameters.stop"})
    _check_adapters(spec)


def _check_adapters(spec: deployer_pb2.DeploySpec) -> None:
    known: set[str] = set()
    for number, adapter in enumerate(spec.adapters):
        field, name = f"adapters[{number}]", adapter.name
        _check_ref(f"{field}.gguf", adapter.gguf, "gguf")
        if not names.is_name(name) or name in known:
            why = "which another one has" if name in known else "which can't be a name"
            raise InvalidInput(
                f"{field}.name is {name!r}, {why}.",
                fix="Give each a name of its own, of a-z and 0-9, with single dots, dashes or underscores.",
                metadata={"field": f"{field}.name"},
            )
        known.add(name)
    if len(known) > _MAX_ADAPTERS:
        raise InvalidInput(
            f"adapters names {len(known)}; {_MAX_ADAPTERS} are the most.",
            fix="Leave out those that are not switched to, or deploy them under another name.",
            metadata={"field": "adapters"},
        )
    target = spec.deploy.target if spec.deploy.HasField("target") else AUTO
    if known and target not in (AUTO, llama_server.TARGET):
        raise llama_server.only_here(target)


def _check_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidInput(
            f"deploy.{field} is {value}; it needs {low} to {high}.", metadata={"field": f"deploy.{field}"}
        )


def _check_verify(spec: deployer_pb2.VerifySpec) -> None:
    names.check_name(spec.name)
    _check_ref("verify.suite", spec.verify.suite, "suite")
    if spec.HasField("reference"):
        _check_ref("reference", spec.reference, "gguf")
    if spec.HasField("base_gguf"):
        _check_ref("base_gguf", spec.base_gguf, "gguf")
    try:
        run = json.loads(spec.run_json or "{}")
    except ValueError:
        run = None
    if not isinstance(run, dict):
        raise InvalidInput("run_json is not the text of a JSON object.", metadata={"field": "run_json"})
    if not spec.deployment:
        raise InvalidInput("deployment is empty; name what to test.", metadata={"field": "deployment"})


def _check_evaluate(spec: deployer_pb2.EvaluateSpec) -> None:
    names.check_name(spec.name)
    _check_ref("suite", spec.suite, "suite")
    _check_model("model", spec.model)
    if len(spec.against) > _MAX_AGAINST:
        raise InvalidInput(
            f"against names {len(spec.against)} models; {_MAX_AGAINST} are the most.",
            metadata={"field": "against"},
        )
    for number, model in enumerate(spec.against):
        _check_model(f"against[{number}]", model)


def _check_push(spec: deployer_pb2.PushSpec) -> None:
    if not spec.deployment:
        raise InvalidInput("deployment is empty; name what to push.", metadata={"field": "deployment"})
    parse_reference(spec.reference)


def _check_model(field: str, model: deployer_pb2.EvaluatedModel) -> None:
    problem = ""
    if bool(model.deployment) == bool(model.endpoint):
        problem = "names a deployment or an endpoint, one of both"
    elif model.endpoint:
        address = urlsplit(model.endpoint)
        if address.scheme not in ("http", "https") or not address.hostname:
            problem = f"has the endpoint {model.endpoint!r}, which is no http://HOST:PORT/v1"
        elif address.username or address.password or address.query:
            problem = "has a key in its endpoint, which reports show: hand it over as a secret"
        elif not model.model:
            problem = "has an endpoint and no name of the model there"
    elif model.model or model.secret:
        problem = "is a deployment, whose own name and address are used"
    if not problem and not (0 <= model.parallel <= _PARALLEL[1] and model.context_tokens >= 0):
        problem = f"needs parallel 0 to {_PARALLEL[1]}, and context_tokens from 0 on"
    if problem:
        raise InvalidInput(f"{field} {problem}.", metadata={"field": field})


def _check_ref(field: str, message: artifacts_pb2.ArtifactRef, kind: str) -> None:
    try:
        ref = ref_of(message)
    except InvalidInput as error:
        raise InvalidInput(f"{field}: {error.message}", fix=error.fix, metadata={"field": field}) from error
    if ref.kind != kind:
        raise InvalidInput(f"{field} names {ref}; it needs a {kind}.", metadata={"field": field})
