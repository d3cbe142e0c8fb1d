"""Evaluate a model wherever it answers: the suite on it and on those it is compared with, and the reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import web4lora_llamacpp
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore
from web4lora_chassis.errors import FailedPrecondition
from web4lora_chassis.jobs import Progress

from web4lora_deployer.records.deployments import Deployment, Deployments
from web4lora_deployer.report import Measured, ReportFacts, write_reports
from web4lora_deployer.runtimes import ollama, open_runtime
from web4lora_deployer.runtimes.base import Deployed, Report, Runtime
from web4lora_deployer.runtimes.ollama_api import OllamaApi
from web4lora_deployer.settings import DeployerSettings
from web4lora_deployer.suite import Budgets, Endpoint, check_budgets, load_suite
from web4lora_deployer.testing.differences import Probe, Side, compare_answers
from web4lora_deployer.testing.measure import Bench, last_report, quietly, serving
from web4lora_deployer.testing.verify import VerifyOutcome

DEFAULT_PARALLEL = 4


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate.

    Attributes:
        deployment: Id or name of a deployment; empty for an endpoint.
        endpoint: Address of an OpenAI-compatible API; empty for a deployment.
        model: The model's name in requests to that API.
        secret: Name of the secret that is the API's key; empty sends none.
        context_tokens: Longest prompt and answer of a request to an endpoint; 0 when unknown.
        parallel: Requests at once to an endpoint; 0 takes 4.
    """

    deployment: str = ""
    endpoint: str = ""
    model: str = ""
    secret: str = ""
    context_tokens: int = 0
    parallel: int = 0


@dataclass(frozen=True)
class EvaluateRequest:
    """What to evaluate, and against what.

    Attributes:
        name: Name of the report.
        model: The model.
        suite: The suite.
        against: Models to compare with; drops are measured from the first one.
        budgets: Limits of the verdict.
        secrets: Keys of APIs by name; not kept anywhere.
    """

    name: str
    model: EvaluatedModel
    suite: ArtifactRef
    against: tuple[EvaluatedModel, ...] = ()
    budgets: Budgets = field(default_factory=lambda: Budgets(max_score_drop_points=None))
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class _Model:
    """A model, found."""

    role: str
    label: str
    endpoint: Endpoint
    parallel: int
    record: Deployment | None = None
    runtime: Runtime | None = None
    deployed: Deployed | None = None

    def side(self, measured: Measured) -> Side:
        """Return it as one side of a comparison; Ollama alone tells which prompt it makes."""
        record = self.record
        if record is None or record.target != ollama.TARGET:
            return Side(measured)
        api = OllamaApi(self.endpoint.url.removesuffix("/v1"))
        return Side(measured, lambda messages: api.render(record.id, messages))


def evaluate(
    request: EvaluateRequest,
    settings: DeployerSettings,
    store: ArtifactStore,
    work_dir: Path,
    report: Report,
) -> VerifyOutcome:
    """Evaluate a model and write the reports.

    Args:
        request: What to evaluate, and against what.
        settings: Where the runtimes and the records are.
        store: Holds the suite, and takes the report.
        work_dir: Kept from attempt to attempt.
        report: Takes progress.

    Raises:
        NotFound: A deployment or the suite is not there.
        InvalidInput: The suite or a limit is wrong.
        FailedPrecondition: A model does not serve, refuses every request, or its key was lost in a restart.
        Unavailable: A model or the store is out of reach.
    """
    store.get(request.suite, work_dir / "suite")
    suite = load_suite(work_dir / "suite")
    check_budgets(suite, request.budgets)
    deployments = Deployments(settings.deployer_home)
    wanted = [request.model, *request.against]
    models = _named_apart(
        [
            _find(model, f"model-{number}", request.secrets, deployments, settings)
            for number, model in enumerate(wanted)
        ]
    )
    bench = Bench(suite, settings, store, work_dir, report)
    measured = [_measure(bench, model, deployments, alone=len(models) == 1) for model in models]
    file = deployments.path(models[0].record) if models[0].record else None

    def probe() -> Probe:
        assert file is not None
        llama = web4lora_llamacpp.ensure_built(settings.cache, report)
        return Probe(llama, file, measured[0].model.context_tokens, work_dir / "probe.log")

    first = models[0].record
    alone = first.id if first and len(models) == 1 else ""  # else it was let go of when it was measured
    report(Progress(phase="compare answers"))
    comparisons = tuple(
        compare_answers(
            suite, models[0].side(measured[0]), other.side(theirs), probe if file is not None else None
        )
        for other, theirs in zip(models[1:], measured[1:], strict=True)
    )
    facts = ReportFacts(
        name=request.name,
        suite=suite,
        deployed=measured[0],
        reference=measured[1] if len(measured) > 1 else None,
        budgets=request.budgets,
        previous=last_report(store, request.name, work_dir),
        speed_limit=bench.limit(file, measured[0], loaded=alone),
        with_diagram=False,
        comparisons=comparisons,
    )
    report(Progress(phase="report"))
    summary = write_reports(work_dir / "report", facts)
    inputs = [model.record.gguf for model in models if model.record] + [request.suite]
    parameters = {
        "models": [model.record.id if model.record else model.endpoint.model for model in models],
        "state": summary.state.lower(),
    }
    ref = store.put(
        "report",
        request.name,
        {path.name: path for path in summary.files},
        inputs=inputs,
        parameters=parameters,
        tools={"web4lora-deployer": version("web4lora-deployer")},
        created_by="deployer",
    )
    return VerifyOutcome(summary, ref, len(suite.prompts))


def _find(
    model: EvaluatedModel,
    role: str,
    secrets: Mapping[str, str],
    deployments: Deployments,
    settings: DeployerSettings,
) -> _Model:
    """Look a model up; a deployment must serve."""
    if model.secret and model.secret not in secrets:
        raise FailedPrecondition(
            f"The key of {model.endpoint} is gone: the deployer was restarted, "
            "and keys are not written down.",
            fix="Start the evaluation again.",
            reason="SECRET_LOST",
        )
    if model.endpoint:
        endpoint = Endpoint(model.endpoint, model.model, model.context_tokens, secrets.get(model.secret, ""))
        return _Model(role, model.model, endpoint, model.parallel or DEFAULT_PARALLEL)
    record = deployments.find(model.deployment)
    runtime = open_runtime(record.target, settings)
    deployed = serving(runtime, record)
    endpoint = Endpoint(deployed.endpoint, deployed.model, record.context_tokens)
    return _Model(role, record.name, endpoint, record.parallel, record, runtime, deployed)


def _named_apart(models: list[_Model]) -> list[_Model]:
    """Give models of one name labels that tell them apart: by deployment and runtime, or by address."""
    labels = [model.label for model in models]
    longer = [
        f"{model.record.id} on {model.record.target}"
        if model.record
        else f"{model.label} at {model.endpoint.url}"
        for model in models
    ]
    labels = [long if labels.count(label) > 1 else label for label, long in zip(labels, longer, strict=True)]
    return [
        replace(model, label=label if labels.count(label) == 1 else f"{label} ({number})")
        for number, (model, label) in enumerate(zip(models, labels, strict=True), start=1)
    ]


def _measure(bench: Bench, model: _Model, deployments: Deployments, *, alone: bool) -> Measured:
    """Measure one model; odd prompts and speed are asked of the first one alone."""
    first = model.role == "model-0"
    if model.record is None or model.runtime is None or model.deployed is None:
        return bench.endpoint(model.role, model.label, model.endpoint, model.parallel, extras=first)
    record, runtime = model.record, model.runtime
    measured = bench.deployment(model.role, model.label, record, runtime, model.deployed, extras=first)
    if not alone and not deployments.promoted(record):  # its memory may be what the next one needs
        quietly(lambda: runtime.unload(record))
    return measured
