"""What is special to each stage of a run."""

from typing import Any

from web4lora_gateway.pipeline import Pipeline
from web4lora_gateway.stages.base import CallStage, Inputs, JobStage, Stage
from web4lora_gateway.stages.deploy import Deploy
from web4lora_gateway.stages.package import Package
from web4lora_gateway.stages.prepare import Prepare
from web4lora_gateway.stages.promote import Promote
from web4lora_gateway.stages.train import Train
from web4lora_gateway.stages.verify import Untested, Verify

AnyStage = JobStage[Any, Any] | CallStage[Any]


def stages_of(pipeline: Pipeline) -> dict[str, AnyStage]:
    """Return the stages of a pipeline's run by name, in order."""
    tests: AnyStage = Untested() if pipeline.suite is None else Verify()
    stages: tuple[AnyStage, ...] = (Prepare(), Train(), Package(), Deploy(), tests, Promote())
    return {stage.name: stage for stage in stages}


__all__ = [
    "AnyStage",
    "CallStage",
    "Deploy",
    "Inputs",
    "JobStage",
    "Package",
    "Prepare",
    "Promote",
    "Stage",
    "Train",
    "Untested",
    "Verify",
    "stages_of",
]
