"""Test a deployment: the suite on the 16-bit model, then on the deployed one, and the reports of both.

Only one model is in memory at a time, beside what serves under the name already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore
from web4lora_chassis.jobs import Progress
from web4lora_chassis.model_files.gguf import read_gguf

from web4lora_deployer.records.deployments import Deployment, Deployments
from web4lora_deployer.report import ReportFacts, VerifySummary, write_reports
from web4lora_deployer.runtimes import open_runtime
from web4lora_deployer.runtimes.base import Report
from web4lora_deployer.serving import promotion
from web4lora_deployer.settings import DeployerSettings
from web4lora_deployer.suite import Budgets, check_budgets, load_suite
from web4lora_deployer.testing.measure import Bench, last_report, serving


@dataclass(frozen=True)
class VerifyRequest:
    """What to test, and against what.

    Attributes:
        name: Name of the report.
        deployment: Id, or name, of the deployment.
        suite: The suite.
        reference: The 16-bit GGUF that drops are measured from; None measures none.
        base: The untrained base model as a GGUF, to compare with; None leaves it out.
        budgets: Limits of the verdict.
        run: run.json so far, for the reports.
    """

    name: str
    deployment: str
    suite: ArtifactRef
    reference: ArtifactRef | None = None
    base: ArtifactRef | None = None
    budgets: Budgets = field(default_factory=Budgets)
    run: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class VerifyOutcome:
    """What the tests found, the artifact that tells it, and how many prompts the suite has."""

    summary: VerifySummary
    report: ArtifactRef
    prompts: int


def verify(
    request: VerifyRequest,
    settings: DeployerSettings,
    store: ArtifactStore,
    work_dir: Path,
    report: Report,
) -> VerifyOutcome:
    """Test a deployment and write the reports.

    Args:
        request: What to test, and against what.
        settings: Where the runtimes and the records are.
        store: Holds the artifacts, and takes the report.
        work_dir: Kept from attempt to attempt.
        report: Takes progress.

    Raises:
        NotFound: The deployment or an artifact is not there.
        InvalidInput: The suite or a limit is wrong.
        FailedPrecondition: The deployment does not serve.
        ResourceExhausted: The 16-bit model does not fit into memory.
        Unavailable: The runtime or the store is out of reach.
    """
    store.get(request.suite, work_dir / "suite")
    suite = load_suite(work_dir / "suite")
    check_budgets(suite, request.budgets)
    deployments = Deployments(settings.deployer_home)
    record = deployments.find(request.deployment)
    runtime = open_runtime(record.target, settings)
    if record.loaded:
        serving(runtime, record)
    bench = Bench(suite, settings, store, work_dir, report)
    limits = {"context_tokens": record.context_tokens, "parallel": record.parallel}
    others = {"base": request.base, "reference": request.reference}
    unmeasured = any(ref is not None and not bench.measured(role) for role, ref in others.items())
    with promotion.set_aside(record.id, settings) if unmeasured else contextlib.nullcontext():
        base = bench.file("base", "base", request.base, **limits) if request.base else None
        reference = (
            bench.file("reference", "16 bit", request.reference, **limits) if request.reference else None
        )
    report(Progress(phase=f"load {record.id}"))
    record = promotion.reload(record.id, settings)
    deployed = serving(runtime, record)
    file = deployments.path(record)
    label = read_gguf(file).quantization or "deployed"
    measured = bench.deployment("deployed", label, record, runtime, deployed)
    facts = ReportFacts(
        name=request.name,
        suite=suite,
        deployed=measured,
        reference=reference,
        base=base,
        budgets=request.budgets,
        run=request.run,
        previous=last_report(store, request.name, work_dir, _before(deployments, record)),
        speed_limit=bench.limit(file, measured, loaded=record.id),
    )
    report(Progress(phase="report"))
    summary = write_reports(work_dir / "report", facts)
    inputs = [ref for ref in (record.gguf, request.reference, request.base, request.suite) if ref is not None]
    ref = store.put(
        "report",
        request.name,
        {path.name: path for path in summary.files},
        inputs=inputs,
        parameters={"deployment": record.id, "target": record.target, "state": summary.state.lower()},
        tools={"web4lora-deployer": version("web4lora-deployer"), record.target: deployed.version},
        created_by="deployer",
    )
    return VerifyOutcome(summary, ref, len(suite.prompts))


def _before(deployments: Deployments, record: Deployment) -> tuple[str, ...]:
    """Return what served under a deployment's name before it, newest first."""
    name = deployments.name(record.name)
    served = (name.current, *name.previous) if name else ()
    return tuple(other for other in served if other != record.id)
