"""The untrained base as a 16-bit GGUF, for tests to compare with: made once for each base, then kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore
from web4lora_chassis.jobs import Progress
from web4lora_llamacpp import LlamaCpp

from web4lora_packager.convert import convert
from web4lora_packager.steps import Steps

_FILE = "base_model.gguf"


def base_gguf(
    store: ArtifactStore,
    base: ArtifactRef,
    folder: Path,
    llama: LlamaCpp,
    work: Path,
    *,
    gguf_type: str,
    tools: Mapping[str, str],
    report: Callable[[Progress], None],
) -> ArtifactRef:
    """Return the base's GGUF: the one in the store, else a new one.

    Args:
        store: Where it is kept.
        base: The base model.
        folder: Its files.
        llama: Brings the converter.
        work: The job's working folder.
        gguf_type: F16 or BF16: that of the merged model, so that both are compared alike.
        tools: Versions of the tools; a GGUF that another llama.cpp made is not taken.
        report: Takes progress.

    Raises:
        Internal: The converter failed.
        OutOfMemory: It was killed.
        Unavailable: The store is out of reach.
    """
    for manifest in store.find("gguf", base.name):
        made_of = [ref.digest for ref in manifest.inputs] == [base.digest]
        same_way = manifest.tools.get("llama.cpp") == tools.get("llama.cpp")
        same_type = manifest.parameters.get("type") == f'"{gguf_type}"'
        if made_of and same_way and same_type and [entry.path for entry in manifest.files] == [_FILE]:
            return manifest.ref
    target = work / _FILE

    def make() -> Mapping[str, object]:
        convert(
            llama, folder, target,
            gguf_type=gguf_type, name=base.name, log=work / "tools.log", report=report,
        )  # fmt: skip
        return {}

    Steps(work).do(f"convert-base-{gguf_type}", target, make)
    report(Progress("store base"))
    return store.put(
        "gguf", base.name, {_FILE: target},
        inputs=[base], parameters={"type": gguf_type}, tools=tools, created_by="packager",
    )  # fmt: skip
