"""The target "auto": the first runtime that is found and can serve this model on this machine."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from web4lora_chassis import process
from web4lora_chassis.artifacts import ArtifactStore
from web4lora_chassis.errors import FailedPrecondition
from web4lora_chassis.jobs import Progress
from web4lora_chassis.pipeline.deploy import AUTO

from web4lora_deployer.runtimes import usable
from web4lora_deployer.runtimes.base import Report
from web4lora_deployer.runtimes.http import NOT_LOADABLE
from web4lora_deployer.serving.deploy import DeployOutcome, DeployRequest, deploy
from web4lora_deployer.settings import DeployerSettings

log = logging.getLogger(__name__)

# At fault is the runtime on this machine. What may pass, or lies in the model, is no better in another.
_RUNTIME_AT_FAULT = frozenset({process.CRASHED, NOT_LOADABLE})


def deploy_where_it_works(
    request: DeployRequest,
    settings: DeployerSettings,
    store: ArtifactStore,
    work_dir: Path,
    report: Report,
) -> DeployOutcome:
    """Deploy to the runtime that a request names; with "auto", to the first that does not crash here.

    Arguments and errors are those of `deploy`.
    """
    if request.target != AUTO or request.adapters:
        return deploy(request, settings, store, work_dir, report)
    passed_over: list[str] = []
    for runtime in usable(settings):
        try:
            outcome = deploy(replace(request, target=runtime.target), settings, store, work_dir, report)
        except FailedPrecondition as error:
            if error.reason not in _RUNTIME_AT_FAULT:
                raise
            passed_over.append(f"{runtime.target}: {error.message}")
            last = error
            said = f"passed over {runtime.target}: {error.message.splitlines()[0]}"
            log.warning("%s", said)
            report(Progress(phase="next runtime", message=said))
            continue
        return replace(outcome, passed_over=tuple(passed_over))
    raise FailedPrecondition(
        "\n  ".join(["No runtime on this machine can serve the model.", *passed_over]),
        fix=last.fix,
        reason=last.reason,
        metadata=last.metadata,
    )
