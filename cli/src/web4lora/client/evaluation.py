"""Makes what `web4lora eval` asks of the deployer: models, suite and limits, from words of people."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from google.protobuf.json_format import ParseDict
from web4.lora.v1 import deployer_pb2, jobs_pb2
from web4lora_chassis.errors import InvalidInput, NotFound

from web4lora.pipeline_file import read_pipeline
from web4lora.schema import check_value

SUITE = Path("examples/web4/suite.yaml")
_AT = "@http"
_UNFIT = re.compile(r"[^a-z0-9]+")
_NAME_LENGTH = 75


@dataclass(frozen=True)
class EvalModel:
    """A model to evaluate, and how it is reached.

    Attributes:
        model: A deployment's name or id; with an endpoint, the model's name there.
        endpoint: Address of an OpenAI-compatible API; empty for a deployment.
        api_key: Its key; empty sends none. Never shown.
        context_tokens: Longest prompt and answer there; 0 when unknown.
        parallel: Requests at once; 0 takes the deployer's default.
    """

    model: str
    endpoint: str = ""
    api_key: str = field(default="", repr=False)
    context_tokens: int = 0
    parallel: int = 0

    @classmethod
    def of(cls, text: str) -> EvalModel:
        """Read `NAME`, or `MODEL@http://HOST:PORT/v1`."""
        model, at, rest = text.partition(_AT)
        return cls(model, f"{_AT[1:]}{rest}" if at else "")


def evaluate_request(
    model: EvalModel, spec: deployer_pb2.EvaluateSpec, against: Iterable[EvalModel], request_id: str
) -> jobs_pb2.CreateJobRequest:
    """Return the request that evaluates a model.

    Args:
        model: The model.
        spec: Name, suite and limits; the models are filled in.
        against: Models to compare with.
        request_id: Makes the call repeatable.
    """
    request = jobs_pb2.CreateJobRequest(request_id=request_id, spec=jobs_pb2.JobSpec(evaluate=spec))
    request.spec.evaluate.model.CopyFrom(_message(model, "model", request))
    for number, other in enumerate(against):
        request.spec.evaluate.against.append(_message(other, f"against-{number}", request))
    return request


def report_name(model: EvalModel) -> str:
    """Return a name for a model's reports; its own reports apart from those of its runs."""
    plain = _UNFIT.sub("-", model.model.lower()).strip("-")[:_NAME_LENGTH].strip("-")
    return f"{plain or 'model'}-eval"


def suite_file(given: Path | None, pipeline: Path | None, name: str = str(SUITE)) -> Path:
    """Return the suite to run: the one given, the pipeline's, or the sample's of the checkout around us.

    Raises:
        NotFound: There is none.
    """
    if given is not None:
        return given
    if pipeline is not None:
        found = read_pipeline(pipeline).suite_file
        if found is None:
            raise NotFound(f"{pipeline} names no verify.suite_file.", fix="Name a suite: --suite FILE.")
        return found
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / name).is_file():
            return folder / name
    raise NotFound(f"There is no {name} here or above.", fix="Name a suite: --suite FILE.")


def budgets_of(limits: Iterable[str], pipeline: Path | None) -> deployer_pb2.Budgets:
    """Return the limits of the verdict: those of the pipeline file, then those given one by one.

    Args:
        limits: `min_tokens_per_second=20`, `min_score_percent.tool_call.valid=95`.
        pipeline: A pipeline file, of which `verify.budgets` is taken.

    Raises:
        InvalidInput: There is no such limit, or its value has the wrong form.
    """
    budgets = deployer_pb2.Budgets()
    if pipeline is not None:
        budgets.CopyFrom(read_pipeline(pipeline).pipeline.verify.budgets)
    for limit in limits:
        key, equals, value = limit.partition("=")
        if not equals or not key:
            raise InvalidInput(
                f"--limit {limit}: write KEY=VALUE.",
                fix="For example --limit min_score_percent.tool_call.valid=95",
            )
        budgets.MergeFrom(ParseDict(_nested(limit, key, value), deployer_pb2.Budgets()))
    return budgets


def _nested(limit: str, key: str, value: str) -> dict[str, Any]:
    try:
        node = yaml.compose(value, Loader=yaml.SafeLoader) or yaml.ScalarNode("tag:yaml.org,2002:str", "")
    except yaml.YAMLError as error:
        raise InvalidInput(f"--limit {limit}: {value!r} is not a value.") from error
    keys, found, problems = check_value(node, deployer_pb2.Budgets.DESCRIPTOR, key)
    if problems:
        raise InvalidInput(f"--limit {limit}: {problems[0]}")
    for part in reversed(keys):
        found = {part: found}
    nested: dict[str, Any] = found
    return nested


def _message(
    model: EvalModel, secret: str, request: jobs_pb2.CreateJobRequest
) -> deployer_pb2.EvaluatedModel:
    """Return a model as the contract has it; its key goes into the request's secrets."""
    if not model.endpoint:
        return deployer_pb2.EvaluatedModel(deployment=model.model)
    if model.api_key:
        request.secrets[secret] = model.api_key
    return deployer_pb2.EvaluatedModel(
        endpoint=model.endpoint,
        model=model.model,
        secret=secret if model.api_key else "",
        context_tokens=model.context_tokens,
        parallel=model.parallel,
    )
