"""Verify: the suite, run on the 16-bit model and the deployed one. Taken over only while that one serves.

A pipeline without a suite tests nothing, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from web4.lora.v1 import deployer_pb2, packager_pb2
from web4lora_chassis.rpc.jobs import to_json

from web4lora_gateway.stages.base import Calls, Inputs, Ref, Stage
from web4lora_gateway.workers import Workers


def _deployed(inputs: Inputs) -> deployer_pb2.Deployment:
    return inputs.result("deploy", deployer_pb2.DeployResult()).deployment


def _spec(inputs: Inputs) -> deployer_pb2.VerifySpec | None:
    if inputs.pipeline.suite is None:
        return None
    package = inputs.result("package", packager_pb2.PackageResult())
    return deployer_pb2.VerifySpec(
        name=inputs.pipeline.name,
        deployment=_deployed(inputs).id,
        reference=package.reference.artifact,
        verify=inputs.pipeline.verify,
        run_json=inputs.run_json,
        base_gguf=package.base_gguf if package.HasField("base_gguf") else None,
    )


def _identity(inputs: Inputs, spec: deployer_pb2.VerifySpec) -> Mapping[str, Any]:
    # The text of run.json differs from run to run and decides no score; what is deployed does.
    deployment = deployer_pb2.Deployment()
    deployment.CopyFrom(_deployed(inputs))
    for name in ("endpoint", "state", "detail", "create_time", "promoted"):
        deployment.ClearField(name)
    told = to_json(spec)
    told.pop("run_json", None)
    return {"spec": told, "deployment": to_json(deployment)}


def _artifacts(result: deployer_pb2.VerifyResult) -> tuple[Ref, ...]:
    return (result.report,) if result.HasField("report") else ()


def _deployment(inputs: Inputs, _: deployer_pb2.VerifyResult) -> deployer_pb2.Deployment:
    return _deployed(inputs)


async def _no_suite(_: Inputs, __: Workers) -> Mapping[str, Any]:
    return {"do": "nothing"}


async def _nothing_tested(_: Inputs, __: Workers, ___: Mapping[str, Any]) -> deployer_pb2.VerifyResult:
    return deployer_pb2.VerifyResult(verdict="nothing was tested: the pipeline file names no suite")


def _told(result: deployer_pb2.VerifyResult) -> str:
    return result.verdict


STAGE = Stage(
    name="verify",
    worker="deployer",
    spec=_spec,
    result=deployer_pb2.VerifyResult,
    identity=_identity,
    artifacts=_artifacts,
    deployment=_deployment,
    files=_artifacts,
    calls=Calls(_no_suite, _nothing_tested, _told),
)
