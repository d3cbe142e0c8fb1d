"""The child process of a deployer's job: from the contract's spec to its result."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from web4.lora.v1 import deployer_pb2
from web4lora_chassis.artifacts import open_store
from web4lora_chassis.errors import FailedPrecondition
from web4lora_chassis.jobs import JobContext
from web4lora_chassis.pipeline.deploy import DeploySettings
from web4lora_chassis.rpc import job_process, ref_of
from web4lora_chassis.settings import load

from web4lora_deployer.deployment_messages import deployment_message
from web4lora_deployer.records.deployments import Deployments
from web4lora_deployer.registry import read_credentials
from web4lora_deployer.registry.push import PushRequest, push
from web4lora_deployer.runtimes.base import Health, State
from web4lora_deployer.serving.automatic import deploy_where_it_works
from web4lora_deployer.serving.deploy import DeployRequest
from web4lora_deployer.settings import DeployerSettings
from web4lora_deployer.testing.evaluate import EvaluateRequest, evaluate
from web4lora_deployer.testing.report_messages import budgets_of, evaluated_model, result_message
from web4lora_deployer.testing.verify import VerifyRequest, verify


def run_deploy(spec: deployer_pb2.DeploySpec, context: JobContext) -> deployer_pb2.DeployResult:
    """Do a deploy job."""
    settings = load(DeployerSettings)
    wanted = DeploySettings.of(spec.deploy)
    request = DeployRequest(
        name=spec.name,
        gguf=ref_of(spec.gguf),
        files=ref_of(spec.files) if spec.HasField("files") else None,
        target=wanted.target or settings.target,
        context_tokens=wanted.context_tokens,
        parallel=wanted.parallel,
        parameters=_parameters(spec.parameters),
        adapters={adapter.name: ref_of(adapter.gguf) for adapter in spec.adapters},
    )
    outcome = deploy_where_it_works(request, settings, open_store(settings), context.work_dir, context.report)
    health = Health(State.SERVING, deployed=outcome.deployed)
    deployments = Deployments(settings.deployer_home)
    name, scales = deployments.name(outcome.deployment.name), deployments.scales(outcome.deployment)
    return deployer_pb2.DeployResult(
        deployment=deployment_message(outcome.deployment, health, name, scales),
        ready_seconds=outcome.ready_seconds,
        unchanged=outcome.unchanged,
        passed_over=outcome.passed_over,
    )


def run_verify(spec: deployer_pb2.VerifySpec, context: JobContext) -> deployer_pb2.VerifyResult:
    """Do a verify job."""
    settings = load(DeployerSettings)
    request = VerifyRequest(
        name=spec.name,
        deployment=spec.deployment,
        suite=ref_of(spec.verify.suite),
        reference=ref_of(spec.reference) if spec.HasField("reference") else None,
        base=ref_of(spec.base_gguf) if spec.HasField("base_gguf") else None,
        budgets=budgets_of(spec.verify.budgets),
        run=json.loads(spec.run_json) if spec.run_json else {},
    )
    outcome = verify(request, settings, open_store(settings), context.work_dir, context.report)
    return result_message(outcome)


def run_evaluate(spec: deployer_pb2.EvaluateSpec, context: JobContext) -> deployer_pb2.VerifyResult:
    """Do an evaluate job."""
    settings = load(DeployerSettings)
    request = EvaluateRequest(
        name=spec.name,
        model=evaluated_model(spec.model),
        suite=ref_of(spec.suite),
        against=tuple(evaluated_model(model) for model in spec.against),
        budgets=budgets_of(spec.budgets, max_score_drop_points=None),
        secrets=context.secrets,
    )
    outcome = evaluate(request, settings, open_store(settings), context.work_dir, context.report)
    return result_message(outcome)


def run_push(spec: deployer_pb2.PushSpec, context: JobContext) -> deployer_pb2.PushResult:
    """Do a push job."""
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
    return deployer_pb2.PushResult(
        reference=outcome.reference,
        digest=outcome.digest,
        size_bytes=outcome.size_bytes,
        sent_bytes=outcome.sent_bytes,
    )


def _parameters(message: deployer_pb2.ModelParameters) -> dict[str, Any]:
    """Return the parameters that a message sets, by the names of `Parameters`."""
    given: dict[str, Any] = {
        name: getattr(message, name)
        for name in ("system", "temperature", "license")
        if message.HasField(name)
    }
    return {**given, "stop": tuple(message.stop)} if message.stop else given


if __name__ == "__main__":
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # addresses may hold a key to an upload
    sys.exit(
        job_process({"deploy": run_deploy, "verify": run_verify, "evaluate": run_evaluate, "push": run_push})
    )
