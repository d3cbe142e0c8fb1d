"""Package: base and adapter merged, converted, quantized and checked. llama.cpp's version decides too."""

from __future__ import annotations

from web4.lora.v1 import packager_pb2
from web4lora_chassis.rpc import ref_message

from web4lora_gateway.stages.base import Inputs, JobStage, Ref
from web4lora_gateway.stages.prepare import Prepare
from web4lora_gateway.stages.train import Train


class Package(JobStage[packager_pb2.PackageSpec, packager_pb2.PackageResult]):
    """A package job."""

    name = "package"
    worker = "packager"
    made = packager_pb2.PackageResult
    revision = 3  # merged in 32 bit and rounded once; the checkpoint only when asked for
    key_tools = ("llama.cpp",)
    asks_first = True

    def spec(self, inputs: Inputs) -> packager_pb2.PackageSpec:
        """Merge base and adapter, and also convert the base when the tests compare with it."""
        pipeline = inputs.pipeline
        spec = packager_pb2.PackageSpec(
            name=pipeline.name,
            base=inputs.of_stage(Prepare).base,
            adapter=inputs.of_stage(Train).adapter,
            package=pipeline.package,
            base_gguf=pipeline.suite is not None and pipeline.verify.compare_base,
        )
        if pipeline.package.importance_matrix:
            spec.dataset.CopyFrom(ref_message(pipeline.dataset))
        return spec

    def artifacts(self, result: packager_pb2.PackageResult) -> tuple[Ref, ...]:
        """Return all that was made."""
        base = (result.base_gguf,) if result.HasField("base_gguf") else ()
        merged = (result.merged,) if result.HasField("merged") else ()
        return (*merged, *self.files(result), *base)

    def files(self, result: packager_pb2.PackageResult) -> tuple[Ref, ...]:
        """Return the GGUF files and what goes with them; the merged checkpoint is for nobody's eyes."""
        switchable = (result.adapter_gguf, result.adapter_base) if result.HasField("adapter_gguf") else ()
        ggufs = (result.reference, *result.quantized, *switchable)
        return (*(gguf.artifact for gguf in ggufs), result.files)
