"""The child process of a deployer's job: reads the spec, does the work, returns the contract's result."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import ParseDict
from web4.lora.v1 import deployer_pb2
from web4lora_chassis.artifacts import open_store
from web4lora_chassis.errors import FailedPrecondition
from web4lora_chassis.jobs import JobContext, worker_main
from web4lora_chassis.rpc import ref_of
from web4lora_chassis.rpc.jobs import to_json
from web4lora_chassis.settings import load

from web4lora_deployer.deploy import DEFAULT_PARALLEL, DeployRequest, deploy
from web4lora_deployer.deployments import Deployments
from web4lora_deployer.evaluate import EvaluateRequest, evaluate
from web4lora_deployer.messages import deployment_message
from web4lora_deployer.push import PushRequest, push
from web4lora_deployer.registry import read_credentials
from web4lora_deployer.results import budgets_of, candidate_of, result_message
from web4lora_deployer.runtimes.base import Health, State
from web4lora_deployer.settings import DeployerSettings
from web4lora_deployer.verify import VerifyRequest, verify


def run_deploy(context: JobContext) -> Mapping[str, Any]:
    """Do a deploy job."""
    settings = load(DeployerSettings)
    spec = ParseDict(dict(context.spec), deployer_pb2.DeploySpec())
    how = spec.deploy
    request = DeployRequest(
        name=spec.name,
        gguf=ref_of(spec.gguf),
        files=ref_of(spec.files) if spec.HasField("files") else None,
        target=how.target if how.HasField("target") else settings.target,
        context_tokens=how.context_tokens if how.HasField("context_tokens") else None,
        parallel=how.parallel if how.HasField("parallel") else DEFAULT_PARALLEL,
        parameters=_parameters(spec.parameters),
        adapters={adapter.name: ref_of(adapter.gguf) for adapter in spec.adapters},
    )
    outcome = deploy(request, settings, open_store(settings), context.work_dir, context.report)
    health = Health(State.SERVING, deployed=outcome.deployed)
    deployments = Deployments(settings.deployer_home)
    name, scales = deployments.name(outcome.deployment.name), deployments.scales(outcome.deployment)
    return to_json(
        deployer_pb2.DeployResult(
            deployment=deployment_message(outcome.deployment, health, name, scales),
            ready_seconds=outcome.ready_seconds,
            unchanged=outcome.unchanged,
        )
    )


def run_verify(context: JobContext) -> Mapping[str, Any]:
    """Do a verify job."""
    settings = load(DeployerSettings)
    spec = ParseDict(dict(context.spec), deployer_pb2.VerifySpec())
    how = spec.verify
    request = VerifyRequest(
        name=spec.name,
        deployment=spec.deployment,
        suite=ref_of(how.suite),
        reference=ref_of(spec.reference) if spec.HasField("reference") else None,
        base=ref_of(spec.base_gguf) if spec.HasField("base_gguf") else None,
        budgets=budgets_of(how.budgets),
        run=json.loads(spec.run_json) if spec.run_json else {},
    )
    outcome = verify(request, settings, open_store(settings), context.work_dir, context.report)
    return to_json(result_message(outcome))


def run_evaluate(context: JobContext) -> Mapping[str, Any]:
    """Do an evaluate job."""
    settings = load(DeployerSettings)
    spec = ParseDict(dict(context.spec), deployer_pb2.EvaluateSpec())
    request = EvaluateRequest(
        name=spec.name,
        model=candidate_of(spec.model),
        suite=ref_of(spec.suite),
        against=tuple(candidate_of(model) for model in spec.against),
        budgets=budgets_of(spec.budgets, max_score_drop_points=None),
        secrets=context.secrets,
    )
    outcome = evaluate(request, settings, open_store(settings), context.work_dir, context.report)
    return to_json(result_message(outcome))


def run_push(context: JobContext) -> Mapping[str, Any]:
    """Do a push job."""
    spec = ParseDict(dict(context.spec), deployer_pb2.PushSpec())
    if spec.secret and spec.secret not in context.secrets:
        raise FailedPrecondition(
            "The registry's login was forgotten when the deployer was restarted.",
            fix="Push again; what has arrived is not sent again.",
            reason="SECRET_LOST",
        )
    request = PushRequest(
        deployment=spec.deployment,
        reference=spec.reference,
        credentials=read_credentials(context.secrets.get(spec.secret, "")),
        plain_http=spec.plain_http,
    )
    outcome = push(request, load(DeployerSettings), context.report)
    return to_json(
        deployer_pb2.PushResult(
            reference=outcome.reference,
            digest=outcome.digest,
            size_bytes=outcome.size_bytes,
            sent_bytes=outcome.sent_bytes,
        )
    )


def _parameters(message: deployer_pb2.ModelParameters) -> dict[str, Any]:
    """Return the parameters that a message sets, by the names of `Parameters`."""
    given: dict[str, Any] = {
        name: getattr(message, name)
        for name in ("system", "temperature", "license")
        if message.HasField(name)
    }
    return {**given, "stop": tuple(message.stop)} if message.stop else given


HANDLERS = {"deploy": run_deploy, "verify": run_verify, "evaluate": run_evaluate, "push": run_push}

if __name__ == "__main__":
    logging.getLogger("httpx").setLevel(logging.WARNING)  # addresses may hold a key to an upload
    sys.exit(worker_main(HANDLERS))
