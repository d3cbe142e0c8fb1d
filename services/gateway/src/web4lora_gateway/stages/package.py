"""Package: base and adapter merged, converted, quantized and checked. llama.cpp's version decides too."""

from __future__ import annotations

from web4.lora.v1 import packager_pb2, trainer_pb2
from web4lora_chassis.rpc import ref_message

from web4lora_gateway.stages.base import Inputs, Ref, Stage


def _spec(inputs: Inputs) -> packager_pb2.PackageSpec:
    pipeline = inputs.pipeline
    spec = packager_pb2.PackageSpec(
        name=pipeline.name,
        base=inputs.result("prepare", trainer_pb2.PrepareResult()).base,
        adapter=inputs.result("train", trainer_pb2.TrainResult()).adapter,
        package=pipeline.package,
        base_gguf=pipeline.suite is not None and pipeline.verify.compare_base,
    )
    if pipeline.package.importance_matrix:
        spec.dataset.CopyFrom(ref_message(pipeline.dataset))
    return spec


def _files(result: packager_pb2.PackageResult) -> tuple[Ref, ...]:
    switchable = (result.adapter_gguf, result.adapter_base) if result.HasField("adapter_gguf") else ()
    ggufs = (result.reference, *result.quantized, *switchable)
    return (*(gguf.artifact for gguf in ggufs), result.files)


def _artifacts(result: packager_pb2.PackageResult) -> tuple[Ref, ...]:
    base = (result.base_gguf,) if result.HasField("base_gguf") else ()
    return (result.merged, *_files(result), *base)


STAGE = Stage(
    name="package",
    worker="packager",
    spec=_spec,
    result=packager_pb2.PackageResult,
    key_tools=("llama.cpp",),
    artifacts=_artifacts,
    files=_files,
)
