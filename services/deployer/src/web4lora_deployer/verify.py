"""Test a deployment: the suite on the 16-bit model, then on the deployed one, and the reports of both.

Only one model is measured at a time. What is measured is kept: an interrupted job goes on behind it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import web4lora_llamacpp
from pydantic import TypeAdapter
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, Web4Error
from web4lora_chassis.jobs import Progress

from web4lora_deployer.deployments import Deployment, Deployments
from web4lora_deployer.gguf_file import read_facts
from web4lora_deployer.report import Measured, ReportFacts, ServedModel, VerifySummary, write_reports
from web4lora_deployer.runtimes import open_runtime
from web4lora_deployer.runtimes.base import Deployed, Report, Runtime, State
from web4lora_deployer.runtimes.llama_server import require_memory
from web4lora_deployer.settings import DeployerSettings
from web4lora_deployer.suite import (
    Budgets,
    Endpoint,
    Suite,
    SuiteResult,
    check_budgets,
    load_suite,
    run_suite,
)

log = logging.getLogger(__name__)

_HEALTHY_SECONDS = 120.0
_POLL_SECONDS = 0.5
_LOAD_SECONDS = 900.0
_EVAL = "eval.json"
_RESULT = TypeAdapter(SuiteResult)


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
    """What the tests found, and the artifact that tells it."""

    summary: VerifySummary
    report: ArtifactRef


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
    deployed = _serving(runtime, record)
    bench = _Bench(suite, record, settings, store, work_dir, report)
    if request.reference is not None or request.base is not None:
        _quietly(lambda: runtime.unload(record))
    base = bench.file("base", "base", request.base) if request.base else None
    reference = (
        bench.file("reference", "16 bit", request.reference) if request.reference is not None else None
    )
    facts = ReportFacts(
        name=request.name,
        suite=suite,
        deployed=bench.deployment(runtime, deployed, deployments.path(record)),
        reference=reference,
        base=base,
        budgets=request.budgets,
        run=request.run,
        previous=_previous(request.name, store, work_dir),
    )
    report(Progress(phase="report"))
    summary = write_reports(work_dir / "report", facts)
    inputs = [ref for ref in (record.gguf, request.reference, request.base, request.suite) if ref is not None]
    ref = store.put(
        "report",
        request.name,
        {path.name: path for path in summary.files},
        inputs=inputs,
        parameters={"deployment": record.id, "target": record.target, "passed": summary.passed},
        tools={"web4lora-deployer": version("web4lora-deployer"), record.target: deployed.version},
        created_by="deployer",
    )
    return VerifyOutcome(summary, ref)


@dataclass(frozen=True)
class _Bench:
    """Measures one model after the other under the same conditions: context, and requests at once."""

    suite: Suite
    record: Deployment
    settings: DeployerSettings
    store: ArtifactStore
    work_dir: Path
    report: Report

    def file(self, role: str, label: str, ref: ArtifactRef) -> Measured:
        """Serve a GGUF for the time of the suite and measure its answers; its speed is of no interest."""
        folder = self.work_dir / role
        manifest = self.store.get(ref, folder, advance=self._fetching(label, ref))
        if len(manifest.files) != 1:
            raise InvalidInput(f"{ref} has {len(manifest.files)} files; exactly one GGUF can be tested.")
        entry = manifest.files[0]
        file = folder / entry.path
        context_tokens = min(self.record.context_tokens, read_facts(file).context_tokens or 1 << 31)
        parallel = self.record.parallel
        served = ServedModel(
            label=label, digest=entry.sha256, size_bytes=entry.size_bytes, target="llama-server",
            context_tokens=context_tokens, parallel=parallel,
        )  # fmt: skip
        kept = self._kept(role)
        if kept is not None:
            return Measured(served, kept)
        llama = web4lora_llamacpp.ensure_built(self.settings.cache, self.report)
        require_memory(f"The {label} model", file, context_tokens, parallel)
        self.report(Progress(phase=f"load {label}"))
        with web4lora_llamacpp.LlamaServer(
            llama, file, context_tokens=context_tokens, parallel=parallel,
            log_file=self.work_dir / f"{role}.log", alias=role,
        ) as server:  # fmt: skip
            server.wait_ready(_LOAD_SECONDS)
            endpoint = Endpoint(server.endpoint, role, context_tokens)
            result = run_suite(
                self.suite, endpoint, report=self.report, max_parallel=parallel, label=label, extras=False
            )
        return Measured(served, self._keep(role, result))

    def deployment(self, runtime: Runtime, deployed: Deployed, file: Path) -> Measured:
        """Measure the deployed model: answers, odd prompts, speed, and memory."""
        record = self.record
        served = ServedModel(
            label=read_facts(file).quantization or "deployed",
            id=record.id,
            digest=record.sha256,
            size_bytes=record.size_bytes,
            target=record.target,
            endpoint=deployed.endpoint,
            runtime_version=deployed.version,
            context_tokens=record.context_tokens,
            parallel=record.parallel,
        )
        kept = self._kept("deployed")
        if kept is not None:
            return Measured(served, kept)

        def memory() -> int:
            try:
                return runtime.memory_bytes(record)
            except Web4Error:  # then it is not known at this moment
                return 0

        result = run_suite(
            self.suite,
            Endpoint(deployed.endpoint, deployed.model, record.context_tokens),
            report=self.report,
            max_parallel=record.parallel,
            label=served.label,
            memory=memory,
        )
        return Measured(served, self._keep("deployed", result))

    def _fetching(self, label: str, ref: ArtifactRef) -> Callable[[int], None]:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.report(Progress(phase=f"fetch {label}", done=done, total=ref.size_bytes, unit="bytes"))

        return advance

    def _kept(self, role: str) -> SuiteResult | None:
        """Return what an attempt before this one measured."""
        try:
            return _RESULT.validate_python(json.loads((self.work_dir / f"{role}.json").read_text("utf-8")))
        except FileNotFoundError:
            return None

    def _keep(self, role: str, result: SuiteResult) -> SuiteResult:
        part = self.work_dir / f".part-{role}.json"
        part.write_text(json.dumps(_RESULT.dump_python(result)), encoding="utf-8")
        part.replace(self.work_dir / f"{role}.json")
        return result


def _serving(runtime: Runtime, record: Deployment) -> Deployed:
    """Return where a deployment answers; one that is being started again is waited for.

    Raises:
        FailedPrecondition: It does not serve.
    """
    deadline = time.monotonic() + _HEALTHY_SECONDS
    while True:
        health = runtime.health(record)
        if health.state is State.SERVING and health.deployed is not None:
            return health.deployed
        if health.state is State.STOPPED or time.monotonic() > deadline:
            raise FailedPrecondition(
                f"{record.id} on {record.target} does not serve: {health.detail or health.state.lower()}",
                fix="Deploy it again, then test it.",
                reason="NOT_SERVING",
            )
        time.sleep(_POLL_SECONDS)


def _previous(name: str, store: ArtifactStore, work_dir: Path) -> Mapping[str, Any] | None:
    """Return the newest eval.json of an earlier test of this name, or None."""
    for manifest in store.find("report", name):
        if any(entry.path == _EVAL for entry in manifest.files):
            store.get(manifest.ref, work_dir / "previous", only=[_EVAL])
            data = json.loads((work_dir / "previous" / _EVAL).read_text(encoding="utf-8"))
            return data if isinstance(data, dict) else None
    return None


def _quietly(do: Callable[[], None]) -> None:
    """Do what would be nice but isn't needed."""
    try:
        do()
    except Web4Error as error:
        log.warning("%s", error)
