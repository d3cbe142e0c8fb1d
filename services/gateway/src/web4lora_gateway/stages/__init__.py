"""What is special to each stage of a run; `STAGES` holds them in order."""

from web4lora_gateway.stages import deploy, package, prepare, promote, train, verify
from web4lora_gateway.stages.base import Calls, Inputs, Stage

STAGES: tuple[Stage, ...] = (
    prepare.STAGE,
    train.STAGE,
    package.STAGE,
    deploy.STAGE,
    verify.STAGE,
    promote.STAGE,
)
BY_NAME = {stage.name: stage for stage in STAGES}

__all__ = ["BY_NAME", "STAGES", "Calls", "Inputs", "Stage"]
