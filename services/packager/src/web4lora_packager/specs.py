"""The packager's spec, checked before a job is accepted and read again by its worker."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import Message
from web4.lora.v1 import packager_pb2
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.rpc import ref_of

from web4lora_packager.quantize import NEED_MATRIX, TYPES

_GGUF_TYPES = ("auto", "F16", "BF16")
_DEFAULT_CONTEXT_TOKENS = 4096
_MAX_TEMPERATURE = 2.0
_DEFAULT_MATRIX_CHUNKS = 100
_MAX_MATRIX_CHUNKS = 10_000


@dataclass(frozen=True)
class PackageSpec:
    """What to package, and how.

    Attributes:
        name: Name of the artifacts to make.
        base: The base model.
        adapter: The adapter.
        dataset: The training data, for an importance matrix; else None.
        quantizations: Quantization types, each once, in the order asked for.
        gguf_type: auto, F16 or BF16.
        context_tokens: Context length for the Modelfile; None takes 4096, or the model's own when shorter.
        temperature: Sampling temperature for the Modelfile.
        importance_matrix: Quantize with an importance matrix.
        importance_matrix_chunks: Its calibration text, in chunks of 512 tokens.
        base_gguf: Also convert the untrained base.
        adapter_gguf: Also make the adapter's own GGUF, and its base's, quantized to the first type.
    """

    name: str
    base: ArtifactRef
    adapter: ArtifactRef
    dataset: ArtifactRef | None
    quantizations: tuple[str, ...]
    gguf_type: str
    context_tokens: int | None
    temperature: float
    importance_matrix: bool
    importance_matrix_chunks: int
    base_gguf: bool
    adapter_gguf: bool

    def context_for(self, model_tokens: int | None) -> int:
        """Return the context length for a model that was trained for `model_tokens`.

        Raises:
            InvalidInput: More was asked for than the model has.
        """
        asked = self.context_tokens or min(_DEFAULT_CONTEXT_TOKENS, model_tokens or _DEFAULT_CONTEXT_TOKENS)
        if model_tokens and asked > model_tokens:
            raise _invalid("context_tokens", f"{asked} is more than the {model_tokens} that the model has")
        return asked


def check(kind: str, spec: Message) -> None:
    """Refuse a spec that could never be done.

    Raises:
        InvalidInput: Names the field.
    """
    if not isinstance(spec, packager_pb2.PackageSpec):
        raise InvalidInput(f"The packager does no {kind!r} jobs.", fix="Set package.")
    spec_of(spec)


def spec_of(message: packager_pb2.PackageSpec) -> PackageSpec:
    """Return a checked spec, defaults filled in.

    Raises:
        InvalidInput: A value is missing or out of bounds; the message names the field.
    """
    asked = message.package
    adapter = _reference("adapter", message.adapter, "adapter")
    dataset = _reference("dataset", message.dataset, "dataset") if message.HasField("dataset") else None
    ArtifactRef("gguf", message.name, adapter.digest)  # refuses a name that an artifact can't have
    quantizations = tuple(name.upper() for name in asked.quantizations) or ("Q4_K_M",)
    gguf_type = asked.gguf_type if asked.HasField("gguf_type") else "auto"
    temperature = asked.temperature if asked.HasField("temperature") else 0.0
    chunks = (
        asked.importance_matrix_chunks
        if asked.HasField("importance_matrix_chunks")
        else _DEFAULT_MATRIX_CHUNKS
    )
    for name in quantizations:
        if name not in TYPES:
            raise _invalid("quantizations", f"{name!r} is none of {', '.join(TYPES)}")
        if name in NEED_MATRIX and not asked.importance_matrix:
            raise _invalid("quantizations", f"{name} needs importance_matrix: true")
    if len(set(quantizations)) != len(quantizations):
        raise _invalid("quantizations", "each type once")
    if gguf_type not in _GGUF_TYPES:
        raise _invalid("gguf_type", f"{gguf_type!r} is none of {', '.join(_GGUF_TYPES)}")
    if asked.HasField("context_tokens") and asked.context_tokens < 1:
        raise _invalid("context_tokens", f"{asked.context_tokens} is less than 1")
    if not 0.0 <= temperature <= _MAX_TEMPERATURE:
        raise _invalid("temperature", f"{temperature:g} is not within 0 and {_MAX_TEMPERATURE:g}")
    if not 1 <= chunks <= _MAX_MATRIX_CHUNKS:
        raise _invalid("importance_matrix_chunks", f"{chunks} is not within 1 and {_MAX_MATRIX_CHUNKS}")
    if asked.importance_matrix and dataset is None:
        raise _invalid("importance_matrix", "it is made from the training data: name the dataset too")
    if asked.adapter_gguf and quantizations[0] in NEED_MATRIX:
        raise _invalid(
            "adapter_gguf",
            f"the base is quantized to {quantizations[0]} too, without an importance matrix, which that type "
            "needs: put another type first",
        )
    return PackageSpec(
        name=message.name,
        base=_reference("base", message.base, "base_model"),
        adapter=adapter,
        dataset=dataset,
        quantizations=quantizations,
        gguf_type=gguf_type,
        context_tokens=asked.context_tokens if asked.HasField("context_tokens") else None,
        temperature=temperature,
        importance_matrix=asked.importance_matrix,
        importance_matrix_chunks=chunks,
        base_gguf=message.base_gguf,
        adapter_gguf=asked.adapter_gguf,
    )


def _reference(field: str, message: Message, kind: str) -> ArtifactRef:
    ref = ref_of(message)  # type: ignore[arg-type]
    if ref.kind != kind:
        raise _invalid(field, f"{ref} is of kind {ref.kind}, not {kind}")
    return ref


def _invalid(field: str, why: str) -> InvalidInput:
    return InvalidInput(f"package.{field}: {why}.", fix=f"Correct {field}.", metadata={"field": field})
