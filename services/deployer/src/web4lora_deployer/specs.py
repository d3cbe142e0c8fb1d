"""The deployer's specs, checked before a job is accepted."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

from web4.lora.v1 import artifacts_pb2, deployer_pb2
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.pipeline.deploy import AUTO, DeploySettings
from web4lora_chassis.pipeline.package import TEMPERATURE
from web4lora_chassis.pipeline.verify import BudgetSettings, VerifySettings
from web4lora_chassis.rpc import Check, ref_of

from web4lora_deployer.records import names
from web4lora_deployer.registry import parse_reference
from web4lora_deployer.runtimes import llama_server
from web4lora_deployer.settings import DeployerSettings
from web4lora_deployer.testing.endpoints import require_allowed

_PARALLEL = (1, 64)
_MAX_AGAINST = 4
_MAX_ADAPTERS = 16


def checks(settings: DeployerSettings) -> dict[str, Check]:
    """Return what refuses a spec, by kind of job.

    Args:
        settings: Which hosts' models may be evaluated.
    """

    def evaluate(spec: deployer_pb2.EvaluateSpec) -> None:
        for number, model in enumerate((spec.model, *spec.against)):
            if model.endpoint:
                field = f"against[{number - 1}]" if number else "model"
                require_allowed(model.endpoint, settings, field)
        check_evaluate(spec)

    return {
        "deploy": lambda spec, _: check_deploy(spec),
        "verify": lambda spec, _: check_verify(spec),
        "evaluate": lambda spec, _: evaluate(spec),
        "push": lambda spec, _: check_push(spec),
    }


def check_deploy(spec: deployer_pb2.DeploySpec) -> None:
    """Refuse a spec out of bounds before its job is accepted.

    Raises:
        InvalidInput: The message names the field.
    """
    names.check_name(spec.name)
    check_ref("gguf", spec.gguf, "gguf")
    if spec.HasField("files"):
        check_ref("files", spec.files, "report")
    DeploySettings.checked(spec.deploy, "deploy")
    for _, text, _ in TEMPERATURE.wrong(spec.parameters.temperature):
        raise InvalidInput(f"parameters.temperature: {text}", metadata={"field": "parameters.temperature"})
    if not all(spec.parameters.stop):
        raise InvalidInput("parameters.stop holds an empty text.", metadata={"field": "parameters.stop"})
    _check_adapters(spec)


def _check_adapters(spec: deployer_pb2.DeploySpec) -> None:
    known: set[str] = set()
    for number, adapter in enumerate(spec.adapters):
        field, name = f"adapters[{number}]", adapter.name
        check_ref(f"{field}.gguf", adapter.gguf, "gguf")
        if not names.is_name(name) or name in known:
            why = "which another one has" if name in known else "which can't be a name"
            raise InvalidInput(
                f"{field}.name is {name!r}, {why}.",
                fix="Give each a name of its own, of a-z and 0-9, with single dots, dashes or underscores.",
                metadata={"field": f"{field}.name"},
            )
        known.add(name)
    if len(known) > _MAX_ADAPTERS:
        raise InvalidInput(
            f"adapters names {len(known)}; {_MAX_ADAPTERS} are the most.",
            fix="Leave out those that are not switched to, or deploy them under another name.",
            metadata={"field": "adapters"},
        )
    target = spec.deploy.target if spec.deploy.HasField("target") else AUTO
    if known and target not in (AUTO, llama_server.TARGET):
        raise llama_server.only_here(target)


def check_verify(spec: deployer_pb2.VerifySpec) -> None:
    """Refuse a spec out of bounds; see `check_deploy`."""
    names.check_name(spec.name)
    check_ref("verify.suite", spec.verify.suite, "suite")
    VerifySettings.checked(spec.verify, "verify")
    if spec.HasField("reference"):
        check_ref("reference", spec.reference, "gguf")
    if spec.HasField("base_gguf"):
        check_ref("base_gguf", spec.base_gguf, "gguf")
    try:
        run = json.loads(spec.run_json or "{}")
    except ValueError:
        run = None
    if not isinstance(run, dict):
        raise InvalidInput("run_json is not the text of a JSON object.", metadata={"field": "run_json"})
    if not spec.deployment:
        raise InvalidInput("deployment is empty; name what to test.", metadata={"field": "deployment"})


def check_evaluate(spec: deployer_pb2.EvaluateSpec) -> None:
    """Refuse a spec out of bounds; see `check_deploy`."""
    names.check_name(spec.name)
    check_ref("suite", spec.suite, "suite")
    BudgetSettings.checked(spec.budgets, "budgets")
    _check_model("model", spec.model)
    if len(spec.against) > _MAX_AGAINST:
        raise InvalidInput(
            f"against names {len(spec.against)} models; {_MAX_AGAINST} are the most.",
            metadata={"field": "against"},
        )
    for number, model in enumerate(spec.against):
        _check_model(f"against[{number}]", model)


def check_push(spec: deployer_pb2.PushSpec) -> None:
    """Refuse a spec out of bounds; see `check_deploy`."""
    if not spec.deployment:
        raise InvalidInput("deployment is empty; name what to push.", metadata={"field": "deployment"})
    parse_reference(spec.reference)


def _check_model(field: str, model: deployer_pb2.EvaluatedModel) -> None:
    problem = ""
    if bool(model.deployment) == bool(model.endpoint):
        problem = "names a deployment or an endpoint, one of both"
    elif model.endpoint:
        address = urlsplit(model.endpoint)
        if address.scheme not in ("http", "https") or not address.hostname:
            problem = f"has the endpoint {model.endpoint!r}, which is no http://HOST:PORT/v1"
        elif address.username or address.password or address.query:
            problem = "has a key in its endpoint, which reports show: hand it over as a secret"
        elif not model.model:
            problem = "has an endpoint and no name of the model there"
    elif model.model or model.secret:
        problem = "is a deployment, whose own name and address are used"
    if not problem and not (0 <= model.parallel <= _PARALLEL[1] and model.context_tokens >= 0):
        problem = f"needs parallel 0 to {_PARALLEL[1]}, and context_tokens from 0 on"
    if problem:
        raise InvalidInput(f"{field} {problem}.", metadata={"field": field})


def check_ref(field: str, message: artifacts_pb2.ArtifactRef, kind: str) -> None:
    """Refuse a reference that is none, or of another kind, by its field."""
    try:
        ref = ref_of(message)
    except InvalidInput as error:
        raise InvalidInput(f"{field}: {error.message}", fix=error.fix, metadata={"field": field}) from error
    if ref.kind != kind:
        raise InvalidInput(f"{field} names {ref}; it needs a {kind}.", metadata={"field": field})
