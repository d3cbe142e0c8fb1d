"""The spec: defaults, bounds, and that errors name the field."""

from __future__ import annotations

from typing import Any

import pytest
from web4.lora.v1 import artifacts_pb2, packager_pb2
from web4lora_chassis.artifacts import ArtifactRef, Manifest
from web4lora_chassis.artifacts.manifest import FileEntry
from web4lora_chassis.errors import FailedPrecondition, InvalidInput
from web4lora_packager.specs import spec_of
from web4lora_packager.worker import require_base

BASE, ADAPTER, DATASET = (
    artifacts_pb2.ArtifactRef(kind=kind, name="x", digest=digit * 64)
    for kind, digit in (
        (artifacts_pb2.ARTIFACT_KIND_BASE_MODEL, "9"),
        (artifacts_pb2.ARTIFACT_KIND_ADAPTER, "a"),
        (artifacts_pb2.ARTIFACT_KIND_DATASET, "d"),
    )
)


def _message(name: str = "demo", **package: Any) -> packager_pb2.PackageSpec:
    settings = packager_pb2.PackageSettings(**package)
    return packager_pb2.PackageSpec(name=name, base=BASE, adapter=ADAPTER, package=settings)


def test_defaults() -> None:
    spec = spec_of(packager_pb2.PackageSpec(name="demo", base=BASE, adapter=ADAPTER))
    assert spec.quantizations == ("Q4_K_M",)
    assert (spec.gguf_type, spec.temperature, spec.importance_matrix, spec.dataset) == (
        "auto",
        0.0,
        False,
        None,
    )
    assert spec.matrix_chunks == 100
    assert (spec.formats, spec.importance_matrix_from) == (("gguf",), "base")
    assert spec.context_for(8192) == 4096
    assert spec.context_for(2048) == 2048
    assert spec.context_for(0) == 4096


def test_types_are_taken_as_they_are_written_in_a_pipeline() -> None:
    assert spec_of(_message(quantizations=["Q8_0", "Q5_K_M"])).quantizations == ("Q8_0", "Q5_K_M")
    with pytest.raises(InvalidInput, match="did you mean Q8_0"):
        spec_of(_message(quantizations=["q8_0"]))


def test_a_context_beyond_the_model_is_refused() -> None:
    spec = spec_of(_message(context_tokens=4096))
    assert spec.context_for(4096) == 4096
    with pytest.raises(InvalidInput, match="context_tokens"):
        spec.context_for(2048)


@pytest.mark.parametrize(
    ("package", "field"),
    [
        ({"quantizations": ["Q4_K_M", "q4_k_m"]}, "quantizations"),
        ({"quantizations": ["Q4"]}, "quantizations"),
        ({"quantizations": ["IQ2_XS"]}, "quantizations"),
        ({"gguf_type": "Q8_0"}, "gguf_type"),
        ({"context_tokens": 0}, "context_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"importance_matrix": True}, "importance_matrix"),
        ({"importance_matrix_chunks": 0}, "importance_matrix_chunks"),
        ({"importance_matrix_from": "adapter"}, "importance_matrix_from"),
        ({"formats": ["safetensors"]}, "formats"),
        ({"formats": ["gguf", "bin"]}, "formats"),
    ],
)
def test_errors_name_the_field(package: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        spec_of(_message(**package))
    assert caught.value.metadata["field"] == f"package.{field}"
    assert field in caught.value.message


def test_types_that_need_a_matrix_are_taken_with_one() -> None:
    message = _message(quantizations=["IQ2_XS"], importance_matrix=True)
    message.dataset.CopyFrom(DATASET)
    assert spec_of(message).quantizations == ("IQ2_XS",)


def test_the_base_under_an_adapter_has_no_matrix() -> None:
    assert not spec_of(_message()).adapter_gguf
    assert spec_of(_message(adapter_gguf=True)).adapter_gguf
    message = _message(quantizations=["IQ2_XS"], importance_matrix=True, adapter_gguf=True)
    message.dataset.CopyFrom(DATASET)
    with pytest.raises(InvalidInput, match="Put another type first") as caught:
        spec_of(message)
    assert caught.value.metadata["field"] == "package.adapter_gguf"
    message.package.quantizations[:] = ["Q4_K_M", "IQ2_XS"]
    assert spec_of(message).adapter_gguf


def test_artifacts_of_another_kind_are_refused() -> None:
    message = _message()
    message.base.CopyFrom(ADAPTER)
    with pytest.raises(InvalidInput, match="not base_model"):
        spec_of(message)


def test_names_that_artifacts_can_not_have_are_refused() -> None:
    with pytest.raises(InvalidInput, match="Not A Name"):
        spec_of(_message(name="Not A Name"))


def _adapter_made_from(*inputs: ArtifactRef) -> Manifest:
    return Manifest("adapter", "x", (FileEntry("f", "0" * 64, 1),), inputs=inputs)


def test_the_adapter_must_have_been_trained_on_this_base() -> None:
    spec = spec_of(_message())
    data, right, other = (
        ArtifactRef("dataset", "x", "d" * 64),
        ArtifactRef("base_model", "x", "9" * 64),
        ArtifactRef("base_model", "y", "4" * 64),
    )
    require_base(spec, _adapter_made_from(data, right))
    with pytest.raises(FailedPrecondition) as caught:
        require_base(spec, _adapter_made_from(data, other))
    assert caught.value.reason == "BASE_MISMATCH"
    assert caught.value.message == (
        "The adapter was trained on base model 4444…, this is 9999….  "
        "Merging would give a model nobody trained."
    )
    assert str(other) in caught.value.fix
    with pytest.raises(FailedPrecondition, match="does not say"):
        require_base(spec, _adapter_made_from(data))
