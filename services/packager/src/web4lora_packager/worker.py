"""The child process of a packager's job: fetches base and adapter, packages, and stores what came of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from web4.lora.v1 import packager_pb2
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore, Manifest, open_store
from web4lora_chassis.errors import FailedPrecondition
from web4lora_chassis.jobs import JobContext, Progress
from web4lora_chassis.jobs.byte_progress import byte_progress
from web4lora_chassis.model_files.trained_conversations import TRAINED_CONVERSATIONS
from web4lora_chassis.rpc import job_process, ref_message
from web4lora_chassis.settings import load
from web4lora_llamacpp import LlamaCpp, ensure_built, general_name

from web4lora_packager.adapter import ADAPTER_FILES
from web4lora_packager.base_gguf import BaseGgufs
from web4lora_packager.next_tokens import Gate, summary
from web4lora_packager.package import REFERENCE_NAME, GgufReport, Package, Packaging
from web4lora_packager.reuse import Reuse
from web4lora_packager.settings import PackagerSettings
from web4lora_packager.specs import PackageSpec, spec_of
from web4lora_packager.versions import tool_versions

_CREATED_BY = "packager"


def run_package(message: packager_pb2.PackageSpec, context: JobContext) -> packager_pb2.PackageResult:
    """Merge, convert, quantize and check, going on behind the last finished step of an earlier attempt."""
    settings = load(PackagerSettings)
    store = open_store(settings)
    spec = spec_of(message)
    require_base(spec, store.manifest(spec.adapter))
    llama = ensure_built(settings.cache, context.report)
    context.report(Progress("fetch"))
    base_folder = settings.cache / "artifacts" / spec.base.prefix  # shared with the trainer on this machine
    base = _fetch(store, spec.base, base_folder, context)
    adapter_folder = context.work_dir / "adapter"
    stored = {entry.path for entry in store.manifest(spec.adapter).files}
    wanted = [*ADAPTER_FILES, *stored & {TRAINED_CONVERSATIONS}]
    _fetch(store, spec.adapter, adapter_folder, context, only=wanted)
    name = general_name(base_folder, own_name(base))
    names = (spec.name, spec.base.name)
    reuse = Reuse(store, spec.base, names, llama.version, context.work_dir, context.report)
    bases = BaseGgufs(store, spec.base, base_folder, llama, context.work_dir, name, reuse, context.report)
    package = Packaging(
        spec, base_folder, adapter_folder, bases, reuse, _training(store, spec, context), _licence(base),
        name, llama, context.work_dir, settings.packager_load_timeout_seconds, context.report,
    ).run()  # fmt: skip
    result = _store(store, spec, llama, package, reuse, context)
    if spec.base_gguf:
        result.base_gguf.CopyFrom(ref_message(bases.reference(package.reference.type)))
    return result


def require_base(spec: PackageSpec, adapter: Manifest) -> None:
    """Refuse to merge an adapter into a base that it was not trained on.

    Raises:
        FailedPrecondition: The adapter's manifest names another base, or none.
    """
    bases = [ref for ref in adapter.inputs if ref.kind == "base_model"]
    if not bases:
        raise FailedPrecondition(
            f"{adapter.ref} does not say which base model it was trained on.",
            fix="Train again with this trainer, which writes that down.",
            reason="BASE_UNKNOWN",
        )
    if spec.base.digest not in {ref.digest for ref in bases}:
        raise FailedPrecondition(
            f"The adapter was trained on base model {bases[0].digest[:4]}…, "
            f"this is {spec.base.digest[:4]}….  Merging would give a model nobody trained.",
            fix=f"Use {bases[0]}, or train again on this one.",
            reason="BASE_MISMATCH",
            metadata={"trained_on": str(bases[0]), "asked_for": str(spec.base)},
        )


def own_name(base: Manifest) -> str:
    """Return the base's own name: the hub's, else its artifact's, which is that of file or folder."""
    source = json.loads(base.parameters.get("source", '""'))
    return source.rpartition("/")[2] if isinstance(source, str) and "/" in source else base.ref.name


def _fetch(
    store: ArtifactStore,
    ref: ArtifactRef,
    folder: Path,
    context: JobContext,
    only: Iterable[str] | None = None,
) -> Manifest:
    """Bring an artifact's files into a folder, with progress."""
    advance = byte_progress(context.report, "fetch", ref.size_bytes, str(ref))
    return store.get(ref, folder, only=only, advance=advance)


def _training(store: ArtifactStore, spec: PackageSpec, context: JobContext) -> Iterable[Path]:
    """Return the training files for an importance matrix; the evaluation data is not even fetched."""
    if spec.dataset is None or not spec.importance_matrix:
        return []
    paths = [entry.path for entry in store.manifest(spec.dataset).files if entry.path.startswith("train/")]
    folder = context.work_dir / "dataset"
    store.get(spec.dataset, folder, only=paths)
    return [folder / path for path in paths]


def _licence(base: Manifest) -> str:
    """Return the name of the licence that the base's manifest gives, if any."""
    value = json.loads(base.parameters.get("licence", '""'))
    return value if isinstance(value, str) else ""


def _store(
    store: ArtifactStore,
    spec: PackageSpec,
    llama: LlamaCpp,
    package: Package,
    reuse: Reuse,
    context: JobContext,
) -> packager_pb2.PackageResult:
    """Put everything into the store and tell of it in the contract's words."""
    merged_files = {path.name: path for path in package.merged.iterdir()} if package.merged else {}
    ggufs = [package.reference, *package.quantized]
    switchable = package.switchable
    alone = [switchable.adapter] if switchable else []
    paths = [*merged_files.values(), *(gguf.path for gguf in (*ggufs, *alone)), *package.files.values()]
    total = sum(path.stat().st_size for path in paths)
    advance = byte_progress(context.report, "store", total)

    def put(
        kind: str, files: Mapping[str, Path], inputs: Iterable[ArtifactRef], **parameters: object
    ) -> ArtifactRef:
        return store.put(
            kind, spec.name, files, inputs=inputs, parameters=parameters,
            tools=tool_versions() | {"llama.cpp": llama.version}, created_by=_CREATED_BY, advance=advance,
        )  # fmt: skip

    kept = {TRAINED_CONVERSATIONS: package.conversations} if package.conversations else {}
    context.report(Progress("store", 0, total, "bytes"))
    made_of = [spec.base, spec.adapter]
    whole = package.reference
    refs = [put("gguf", {REFERENCE_NAME: whole.path, **kept}, made_of, type=whole.type)]
    calibration = [package.matrix, spec.dataset] if package.matrix and spec.dataset else []
    for gguf in package.quantized:
        inputs = [refs[0], package.tensors, *calibration]
        parameters = reuse.parameters(gguf.type, whole.type, package.matrix)
        refs.append(put("gguf", {gguf.path.name: gguf.path, **kept}, inputs, **parameters))
    adapters = [put("gguf", {gguf.path.name: gguf.path, **kept}, made_of, type=gguf.type) for gguf in alone]
    bases = [switchable.base_ref] if switchable else []
    files = put("report", package.files, [*refs, *adapters, *bases])
    reference, *quantized = [
        _gguf_message(gguf, ref, package.reference) for gguf, ref in zip(ggufs, refs, strict=True)
    ]
    result = packager_pb2.PackageResult(
        merge=packager_pb2.MergeReport(
            adapter_tensors=package.merge.adapter_tensors,
            merged_tensors=package.merge.merged_tensors,
            max_abs_error=package.max_abs_error,
            relative_effect=package.merge.relative_effect,
            rounding_error=package.merge.rounding_error,
            gates=[_gate_message(gate) for gate in package.gates],
            changed_at=summary(package.gates),
        ),
        reference=reference,
        quantized=quantized,
        files=ref_message(files),
        llama_cpp_version=llama.version,
    )
    if merged_files:
        result.merged.CopyFrom(ref_message(put("merged_model", merged_files, made_of)))
    if switchable:
        result.adapter_gguf.CopyFrom(_gguf_message(switchable.adapter, adapters[0], whole))
        result.adapter_base.CopyFrom(_gguf_message(switchable.base, bases[0], whole))
    return result


def _gate_message(gate: Gate) -> packager_pb2.StageGate:
    changed = [packager_pb2.ChangedAnswer(**vars(each)) for each in gate.changed]
    return packager_pb2.StageGate(**vars(gate) | {"changed": changed})


def _gguf_message(gguf: GgufReport, ref: ArtifactRef, reference: GgufReport) -> packager_pb2.GgufFile:
    return packager_pb2.GgufFile(
        artifact=ref_message(ref),
        file_name=gguf.path.name,
        type=gguf.type,
        size_bytes=gguf.size_bytes,
        size_reduction=gguf.reduction(reference),
        bits_per_weight=gguf.header.bits_per_weight,
        weights_by_type=gguf.header.weights_by_type,
        contents=gguf.contents,
        loads=True,  # else its check would have failed the job
        load_seconds=gguf.loaded.load_seconds,
        sample=gguf.loaded.sample,
    )


if __name__ == "__main__":
    sys.exit(job_process({"package": run_package}))
