"""Verify: the suite, run on the 16-bit model and the deployed one. Taken over only while that one serves.

A pipeline without a suite tests nothing, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from web4.lora.v1 import deployer_pb2, deployments_pb2
from web4lora_chassis.rpc import to_json

from web4lora_gateway.outcomes import Decision, Do
from web4lora_gateway.stages.base import CallStage, Inputs, JobStage, Ref
from web4lora_gateway.stages.deploy import Deploy
from web4lora_gateway.stages.package import Package
from web4lora_gateway.workers import Deployer


class Verify(JobStage[deployer_pb2.VerifySpec, deployer_pb2.VerifyResult]):
    """A verify job."""

    name = "verify"
    worker = "deployer"
    made = deployer_pb2.VerifyResult
    revision = 2  # three words in place of two

    def spec(self, inputs: Inputs) -> deployer_pb2.VerifySpec:
        """Test what was deployed against the 16-bit model, and against the base where that is asked for."""
        package = inputs.of_stage(Package)
        return deployer_pb2.VerifySpec(
            name=inputs.pipeline.name,
            deployment=inputs.of_stage(Deploy).deployment.id,
            reference=package.reference.artifact,
            verify=inputs.pipeline.verify,
            run_json=inputs.facts(),
            base_gguf=package.base_gguf if package.HasField("base_gguf") else None,
        )

    def identity(self, inputs: Inputs, spec: deployer_pb2.VerifySpec) -> Mapping[str, Any]:
        """Leave the text of run.json out: it differs from run to run and decides no score."""
        deployment = inputs.of_stage(Deploy).deployment
        for name in ("endpoint", "state", "detail", "create_time", "promoted"):
            deployment.ClearField(name)
        data = to_json(spec)
        data.pop("run_json", None)
        return {"spec": data, "deployment": to_json(deployment)}

    def artifacts(self, result: deployer_pb2.VerifyResult) -> tuple[Ref, ...]:
        """Return the report."""
        return (result.report,) if result.HasField("report") else ()

    def files(self, result: deployer_pb2.VerifyResult) -> tuple[Ref, ...]:
        """Return the report."""
        return self.artifacts(result)

    def deployment(self, inputs: Inputs, _result: deployer_pb2.VerifyResult) -> deployments_pb2.Deployment:
        """Return what was tested."""
        return inputs.of_stage(Deploy).deployment


class Untested(CallStage[deployer_pb2.VerifyResult]):
    """Verify in the run of a pipeline that names no suite."""

    name = "verify"
    made = deployer_pb2.VerifyResult

    async def decide(self, _inputs: Inputs, _deployer: Deployer) -> Decision:
        """Test nothing."""
        return Decision(Do.NOTHING)

    async def act(
        self, _inputs: Inputs, _deployer: Deployer, _decision: Decision
    ) -> deployer_pb2.VerifyResult:
        """Say so."""
        return deployer_pb2.VerifyResult(verdict="nothing was tested: the pipeline file names no suite")

    def summary(self, result: deployer_pb2.VerifyResult) -> str:
        """Return the verdict."""
        return result.verdict
