"""A pipeline as the gateway runs it: every value checked, every default filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from google.protobuf.json_format import ParseDict
from web4.lora.v1 import artifacts_pb2, deployer_pb2, gateway_pb2, packager_pb2, trainer_pb2
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.rpc import ref_of
from web4lora_chassis.rpc.jobs import to_json

from web4lora_gateway.bounds import Choice, Flag, Number, Rule, fill, wrong

_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")
_LAYER = re.compile(r"[A-Za-z0-9_.]{1,100}")
_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
_QUANTIZATIONS = (
    "Q2_K", "Q2_K_S", "Q3_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_1", "Q4_K", "Q4_K_S", "Q4_K_M",
    "Q5_0", "Q5_1", "Q5_K", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M",
    "IQ4_NL", "IQ4_XS",
)  # fmt: skip
_MAX_QUANTIZATIONS = 8

_LORA: Mapping[str, Rule] = {
    "rank": Number(16, low=1, high=512),
    "alpha": Number(above=0, high=1e5),
    "dropout": Number(0, low=0, below=1),
    "last_layers": Number(0, low=0, high=10_000),
}
_TRAIN: Mapping[str, Rule] = {
    "epochs": Number(1, above=0, high=1000),
    "max_steps": Number(0, low=0),
    "learning_rate": Number(2e-4, above=0, high=1),
    "schedule": Choice("cosine", ("linear", "cosine", "constant")),
    "warmup_ratio": Number(0.03, low=0, high=1),
    "max_length_tokens": Number(2048, low=8, high=1 << 20),
    "tokens_per_batch": Number(low=1, high=1 << 22),  # its default depends on the trainer's device
    "gradient_accumulation": Number(1, low=1, high=4096),
    "gradient_checkpointing": Choice("auto", ("auto", "on", "off")),
    "dtype": Choice("auto", ("auto", "bf16", "fp16", "fp32")),
    "seed": Number(17, low=0, high=(1 << 32) - 1),
    "checkpoint_steps": Number(0, low=0),
    "held_out_evaluations": Number(4, low=0, high=1000),
    "write_bin": Flag(True),
    "max_grad_norm": Number(1, above=0, high=1e6),
}
_LOSS_BAND: Mapping[str, Rule] = {"low": Number(0.6, low=0), "high": Number(1.0, above=0)}
_PACKAGE: Mapping[str, Rule] = {
    "gguf_type": Choice("auto", ("auto", "F16", "BF16")),
    "context_tokens": Number(4096, low=128, high=1 << 20),
    "temperature": Number(0, low=0, high=2),
    "importance_matrix": Flag(False),
    "importance_matrix_chunks": Number(100, low=1, high=10_000),
    "adapter_gguf": Flag(False),
}
_DEPLOY: Mapping[str, Rule] = {
    "target": Choice("auto", ("auto", "ollama", "docker", "llama-server")),
    "context_tokens": Number(4096, low=128, high=1 << 20),
    "parallel": Number(4, low=1, high=64),
    "promote": Choice("passed", ("passed", "always", "never")),
}
_VERIFY: Mapping[str, Rule] = {"compare_base": Flag(False)}
_BUDGETS: Mapping[str, Rule] = {
    "max_score_drop_points": Number(2, low=0, high=100),
    "min_size_reduction": Number(low=0, high=1),
    "min_tokens_per_second": Number(low=0),
    "max_memory_bytes": Number(low=1),
}


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
        message = ParseDict(dict(data), gateway_pb2.Pipeline(), ignore_unknown_fields=True)
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


def check_pipeline(given: gateway_pb2.Pipeline) -> dict[str, Any]:
    """Check a pipeline's values and fill its defaults.

    Args:
        given: As the client sent it; unchanged.

    Returns:
        JSON data of the filled message.

    Raises:
        InvalidInput: A value is out of bounds; `field` in its metadata names it.
    """
    message = gateway_pb2.Pipeline()
    message.CopyFrom(given)
    if not _NAME.fullmatch(message.name):
        raise wrong(
            "name",
            f"{message.name!r} is not a pipeline name.",
            "Use 1 to 63 characters of a-z, 0-9 and dash, the first one a letter.",
        )
    _check_ref(message.dataset.artifact, "dataset.artifact", "dataset")
    if not message.base.model.strip():
        raise wrong(
            "base.model", "no base model is named.", "Name an alias, a hub id, a folder or a GGUF file."
        )
    _check_train(message.train)
    _check_package(message.package)
    fill(message.deploy, "deploy", _DEPLOY)
    _check_verify(message.verify)
    return to_json(message)


def check_artifacts(store: ArtifactStore, pipeline: Pipeline) -> None:
    """Check that what a pipeline starts from is in the store.

    Raises:
        NotFound: The dataset or the suite is not in the store.
        InvalidInput: The dataset has nothing to train on, or the suite has no suite.yaml.
    """
    paths = [entry.path for entry in store.manifest(pipeline.dataset).files]
    if not any(path.startswith("train/") and path.endswith(".jsonl") for path in paths):
        raise wrong(
            "dataset.artifact", f"{pipeline.dataset} has no file train/*.jsonl.", "Name dataset.train_files."
        )
    if pipeline.suite is None:
        return
    if "suite.yaml" not in [entry.path for entry in store.manifest(pipeline.suite).files]:
        raise wrong("verify.suite", f"{pipeline.suite} has no suite.yaml.")


def _check_ref(ref: artifacts_pb2.ArtifactRef, field: str, kind: str) -> None:
    if not ref.digest:
        raise wrong(field, f"no stored {kind} is named.", "The client stores it and names it here.")
    try:
        found = ref_of(ref).kind
    except InvalidInput as error:
        raise wrong(field, error.message, error.fix) from error
    if found != kind:
        raise wrong(field, f"{ref_of(ref)} is a {found}, not a {kind}.")


def _check_train(train: trainer_pb2.TrainSettings) -> None:
    fill(train, "train", _TRAIN)
    fill(train.lora, "train.lora", _LORA)
    if not train.lora.HasField("alpha"):
        train.lora.alpha = 2.0 * train.lora.rank
    if not train.lora.target_modules:
        train.lora.target_modules.extend(_TARGET_MODULES)
    names = list(train.lora.target_modules)
    if len(set(names)) != len(names) or not all(_LAYER.fullmatch(name) for name in names):
        raise wrong("train.lora.target_modules", f"{names} must be names of layers, each once.")
    fill(train.loss_band, "train.loss_band", _LOSS_BAND)
    low, high = train.loss_band.low, train.loss_band.high
    if low >= high:
        raise wrong("train.loss_band", f"low {low:g} must be below high {high:g} (defaults 0.6 and 1.0).")


def _check_package(package: packager_pb2.PackageSettings) -> None:
    fill(package, "package", _PACKAGE)
    if not package.quantizations:
        package.quantizations.append("Q4_K_M")
    names = list(package.quantizations)
    for name in names:
        if name not in _QUANTIZATIONS:
            raise wrong(
                "package.quantizations",
                f"{name!r} is not a quantization type.",
                f"The types are {', '.join(_QUANTIZATIONS)}; the 16-bit GGUF is made anyway.",
            )
    if len(set(names)) != len(names) or len(names) > _MAX_QUANTIZATIONS:
        raise wrong("package.quantizations", f"name at most {_MAX_QUANTIZATIONS} types, each once.")


def _check_verify(verify: deployer_pb2.VerifySettings) -> None:
    if verify.suite.digest or verify.suite_file:
        _check_ref(verify.suite, "verify.suite", "suite")
    fill(verify, "verify", _VERIFY)
    fill(verify.budgets, "verify.budgets", _BUDGETS)
    for name, percent in sorted(verify.budgets.min_score_percent.items()):
        problem = Number(low=0, high=100).problem(percent)
        if problem:
            raise wrong(f"verify.budgets.min_score_percent.{name}", f"{percent!r} {problem}.")
