"""A pipeline as the gateway runs it: every value checked, every default filled in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from web4.lora.v1 import artifacts_pb2, deployer_pb2, gateway_pb2, packager_pb2, trainer_pb2
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore
from web4lora_chassis.earlier_adapter import adapter_of, start_problems
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.pipeline.check import fill, problems_of
from web4lora_chassis.pipeline.rules import Problem, error_of
from web4lora_chassis.pipeline.train import TrainSettings
from web4lora_chassis.rpc import from_json, ref_of, to_json

SUITE = "verify.suite"
"""Where a pipeline names its suite."""


@dataclass(frozen=True)
class Pipeline:
    """What a run does.

    Attributes:
        name: Names the artifacts and the deployed model.
        dataset: The data.
        base: The base model as the user named it.
        base_revision: Its revision as the user named it.
        suite: The test suite; None tests nothing.
        quantizations: The types to quantize to; the first one is deployed.
        train: How to train.
        package: How to package.
        deploy: How to deploy.
        verify: How to test.
    """

    name: str
    dataset: ArtifactRef
    base: str
    base_revision: str
    suite: ArtifactRef | None
    quantizations: tuple[str, ...]
    train: trainer_pb2.TrainSettings
    package: packager_pb2.PackageSettings
    deploy: deployer_pb2.DeploySettings
    verify: deployer_pb2.VerifySettings

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read a checked pipeline from JSON data of the contract's message."""
        message = from_json(gateway_pb2.Pipeline, data)
        return cls(
            name=message.name,
            dataset=ref_of(message.dataset.artifact),
            base=message.base.model,
            base_revision=message.base.revision,
            suite=ref_of(message.verify.suite) if message.verify.suite.digest else None,
            quantizations=tuple(message.package.quantizations),
            train=message.train,
            package=message.package,
            deploy=message.deploy,
            verify=message.verify,
        )


def pipeline_problems(given: gateway_pb2.Pipeline) -> list[Problem]:
    """Return all that is wrong with a pipeline's values, without a look at what it names."""
    problems = problems_of(given)
    problems += _ref_problems(given.dataset.artifact, "dataset.artifact", "dataset")
    if given.verify.suite.digest or given.verify.suite_file:
        problems += _ref_problems(given.verify.suite, SUITE, "suite")
    return problems


def check_pipeline(given: gateway_pb2.Pipeline) -> dict[str, Any]:
    """Check a pipeline's values and fill its defaults.

    Args:
        given: As the client sent it; unchanged.

    Returns:
        JSON data of the filled message.

    Raises:
        InvalidInput: Values are wrong, all of them listed; `field` in its metadata names theirs.
    """
    if problems := pipeline_problems(given):
        raise error_of(problems)
    message = gateway_pb2.Pipeline()
    message.CopyFrom(given)
    fill(message)
    return to_json(message)


def artifact_problems(store: ArtifactStore, pipeline: Pipeline) -> Iterator[Problem]:
    """Yield what is wrong with the artifacts that a pipeline starts from, by the names of their files.

    Raises:
        NotFound: The dataset, the suite or the adapter to go on from is not in the store.
    """
    paths = [entry.path for entry in store.manifest(pipeline.dataset).files]
    if not any(path.startswith("train/") and path.endswith(".jsonl") for path in paths):
        text = f"{pipeline.dataset} has no file train/*.jsonl."
        yield Problem("dataset.artifact", text, "Name dataset.train_files.")
    if start := getattr(pipeline.train, "from"):
        yield from start_problems(TrainSettings.of(pipeline.train), adapter_of(store, start))
    if pipeline.suite is None:
        return
    if "suite.yaml" not in [entry.path for entry in store.manifest(pipeline.suite).files]:
        yield Problem(SUITE, f"{pipeline.suite} has no suite.yaml.")


def _ref_problems(ref: artifacts_pb2.ArtifactRef, field: str, kind: str) -> Iterator[Problem]:
    if not ref.digest:
        yield Problem(field, f"no stored {kind} is named.", "The client stores it and names it here.")
        return
    try:
        found = ref_of(ref).kind
    except InvalidInput as error:
        yield Problem(field, error.message, error.fix)
        return
    if found != kind:
        yield Problem(field, f"{ref_of(ref)} is a {found}, not a {kind}.")
