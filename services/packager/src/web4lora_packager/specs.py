"""The packager's spec, checked before a job is accepted and read again by its worker."""

from __future__ import annotations

from dataclasses import dataclass

from web4.lora.v1 import artifacts_pb2, packager_pb2
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.pipeline.package import DEFAULT_CONTEXT_TOKENS, PackageSettings
from web4lora_chassis.rpc import ref_of


@dataclass(frozen=True, kw_only=True)
class PackageSpec(PackageSettings):
    """What to package, and how: see `PackageSettings`.

    Attributes:
        name: Name of the artifacts to make.
        base: The base model.
        adapter: The adapter.
        dataset: The training data, for an importance matrix; else None.
        base_gguf: Also convert the untrained base.
    """

    name: str
    base: ArtifactRef
    adapter: ArtifactRef
    dataset: ArtifactRef | None
    base_gguf: bool

    def context_for(self, model_tokens: int) -> int:
        """Return the context length for a model that was trained for `model_tokens`, 0 when unknown.

        Raises:
            InvalidInput: More was asked for than the model has.
        """
        wanted = self.context_tokens or min(DEFAULT_CONTEXT_TOKENS, model_tokens or DEFAULT_CONTEXT_TOKENS)
        if model_tokens and wanted > model_tokens:
            raise _invalid("context_tokens", f"{wanted} is more than the {model_tokens} that the model has")
        return wanted


def spec_of(message: packager_pb2.PackageSpec) -> PackageSpec:
    """Return a checked spec, defaults filled in.

    Raises:
        InvalidInput: A value is missing or out of bounds; the message names the field.
    """
    settings = PackageSettings.checked(message.package, "package")
    adapter = _reference("adapter", message.adapter, "adapter")
    dataset = _reference("dataset", message.dataset, "dataset") if message.HasField("dataset") else None
    ArtifactRef("gguf", message.name, adapter.digest)  # refuses a name that an artifact can't have
    if settings.importance_matrix and dataset is None:
        raise _invalid("importance_matrix", "it is made from the training data: name the dataset too")
    return PackageSpec(
        name=message.name,
        base=_reference("base", message.base, "base_model"),
        adapter=adapter,
        dataset=dataset,
        base_gguf=message.base_gguf,
        **vars(settings),
    )


def _reference(field: str, message: artifacts_pb2.ArtifactRef, kind: str) -> ArtifactRef:
    ref = ref_of(message)
    if ref.kind != kind:
        raise _invalid(field, f"{ref} is of kind {ref.kind}, not {kind}")
    return ref


def _invalid(field: str, why: str) -> InvalidInput:
    return InvalidInput(
        f"package.{field}: {why}.", fix=f"Correct {field}.", metadata={"field": f"package.{field}"}
    )
