"""What belongs to the untrained base alone: its GGUFs and its importance matrix, made once, then kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore, Manifest
from web4lora_chassis.jobs import Progress
from web4lora_llamacpp import LlamaCpp

from web4lora_packager.check import read_made
from web4lora_packager.convert import convert
from web4lora_packager.quantize import importance_matrix, quantize
from web4lora_packager.reuse import TENSORS, Reuse
from web4lora_packager.steps import Steps
from web4lora_packager.versions import tool_versions

MATRIX_NAME = "importance_matrix.gguf"


class BaseGgufs:
    """The GGUFs of one base. Those in the store are taken, unless another llama.cpp made them.

    Args:
        store: Where they are kept.
        base: The base model.
        folder: Its files.
        llama: Brings the converter and llama-quantize.
        work: The job's working folder.
        name: The base's own name, for its GGUF.
        reuse: Finds what earlier runs quantized.
        report: Takes progress.
    """

    def __init__(
        self,
        store: ArtifactStore,
        base: ArtifactRef,
        folder: Path,
        llama: LlamaCpp,
        work: Path,
        name: str,
        reuse: Reuse,
        report: Callable[[Progress], None],
    ) -> None:
        self._store = store
        self._base = base
        self._folder = folder
        self._llama = llama
        self._work = work
        self._name = name
        self._reuse = reuse
        self._report = report
        self._tools = tool_versions() | {"llama.cpp": llama.version}
        self._steps = Steps(work)

    def reference(self, gguf_type: str, stops: Sequence[int] = ()) -> ArtifactRef:
        """Return the 16-bit one.

        Args:
            gguf_type: F16 or BF16: that of the merged model, so that both are compared alike.
            stops: Tokens that must end generation, whatever the base says: those that adapters were trained
                with.

        Raises:
            Internal: The converter failed.
            OutOfMemory: It was killed.
            Unavailable: The store is out of reach.
        """
        return self._reference(gguf_type, stops)[0]

    def quantized(
        self, quantization: str, gguf_type: str, stops: Sequence[int] = ()
    ) -> tuple[ArtifactRef, Path]:
        """Return a quantized one, and where it lies in the working folder.

        Args:
            quantization: The type.
            gguf_type: Of the 16-bit one that it is made from.
            stops: As for `reference`.

        Raises:
            Internal: The converter or llama-quantize failed.
            OutOfMemory: It was killed.
            DataLoss: What the store has is not what its digest says.
            Unavailable: The store is out of reach.
        """
        target = self._work / f"base.{quantization}.gguf"
        parameters = {
            **self._reuse.parameters(quantization, gguf_type, None),
            "name": self._name,
            **_stops_parameter(stops),
        }
        if found := self._kept("gguf", target.name, [self._base], parameters):
            self._store.get(found.ref, self._work)
            return found.ref, target
        reference, noted = self._reference(gguf_type, stops)
        whole = self._work / _file(stops)

        def make() -> Mapping[str, object]:
            self._store.get(reference, self._work)
            self._store.get(noted, self._work / "base")
            header = read_made(whole)
            digests = json.loads((self._work / "base" / TENSORS).read_text(encoding="utf-8"))
            quantize(
                self._llama, whole, target,
                quantization=quantization, parameters=header.parameters, matrix=None,
                taken=self._reuse.take(quantization, gguf_type, None, header, digests),
                log=self._work / "tools.log", report=self._report,
            )  # fmt: skip
            self._reuse.clear()
            return {}

        self._steps.do(f"quantize-base-{quantization}", target, make)
        return self._put("gguf", target, [self._base, noted], parameters), target

    def matrix(
        self, gguf_type: str, dataset: ArtifactRef | None, chunks: int, text: Callable[[], str]
    ) -> tuple[ArtifactRef, Path]:
        """Return the base's importance matrix for some data, and where it lies in the working folder.

        It belongs to the base, not to an adapter: files that were quantized with the same one can give
        each other what training left alone.

        Args:
            gguf_type: Of the base's 16-bit GGUF that it is measured with.
            dataset: The training data.
            chunks: How much of it is read.
            text: Renders it.

        Raises:
            Internal: A tool failed.
            OutOfMemory: It was killed.
            DataLoss: What the store has is not what its digest says.
            Unavailable: The store is out of reach.
        """
        inputs = [self._base, *([dataset] if dataset else [])]
        parameters = {"chunks": chunks, "from": gguf_type}
        target = self._work / MATRIX_NAME
        if found := self._kept("report", target.name, inputs, parameters):
            self._report(Progress("importance matrix", message=f"taken from {found.ref}"))
            self._store.get(found.ref, self._work)
            return found.ref, target
        reference, _ = self._reference(gguf_type, ())
        whole = self._work / _file(())
        self._measure(whole, target, chunks, text, lambda: self._store.get(reference, self._work))
        return self._put("report", target, inputs, parameters), target

    def matrix_of(
        self,
        whole: Path,
        adapter: ArtifactRef,
        dataset: ArtifactRef | None,
        chunks: int,
        text: Callable[[], str],
    ) -> tuple[ArtifactRef, Path]:
        """Return an importance matrix of a merged model's own, and where it lies in the working folder.

        Args:
            whole: The merged 16-bit GGUF.
            adapter: What was merged.
            dataset: The training data.
            chunks: How much of it is read.
            text: Renders it.

        Raises:
            Internal: llama-imatrix failed.
            OutOfMemory: It was killed.
            Unavailable: The store is out of reach.
        """
        target = self._work / MATRIX_NAME
        self._measure(whole, target, chunks, text, lambda: None)
        inputs = [self._base, adapter, *([dataset] if dataset else [])]
        return self._put("report", target, inputs, {"chunks": chunks}), target

    def _measure(
        self, whole: Path, target: Path, chunks: int, text: Callable[[], str], fetch: Callable[[], object]
    ) -> None:
        def make() -> Mapping[str, object]:
            fetch()
            calibration = self._work / "calibration.txt"
            calibration.write_text(text(), encoding="utf-8")
            importance_matrix(
                self._llama, whole, calibration, target,
                chunks=chunks, log=self._work / "tools.log", report=self._report,
            )  # fmt: skip
            return {}

        self._steps.do("importance-matrix", target, make)

    def _reference(self, gguf_type: str, stops: Sequence[int]) -> tuple[ArtifactRef, ArtifactRef]:
        """Return the 16-bit one and the digests of its tensors."""
        target = self._work / _file(stops)
        parameters = {"type": gguf_type, "name": self._name, **_stops_parameter(stops)}
        if found := self._kept("gguf", target.name, [self._base], parameters):
            noted = next((ref for ref in found.inputs if ref.kind == "report"), None)
            if noted:
                return found.ref, noted

        def make() -> Mapping[str, object]:
            made = convert(
                self._llama, self._folder, target,
                gguf_type=gguf_type, name=self._name, stops=stops, log=self._work / "tools.log",
                report=self._report,
            )  # fmt: skip
            return {"tensors": dict(made.tensors) if made else {}}

        step = self._steps.do(f"convert-{target.stem}-{gguf_type}", target, make)
        noted = self._reuse.note(step.data["tensors"], [self._base])
        return self._put("gguf", target, [self._base, noted], parameters), noted

    def _kept(
        self, kind: str, file_name: str, inputs: Sequence[ArtifactRef], parameters: Mapping[str, object]
    ) -> Manifest | None:
        """Return what is in the store and was made the same way from the same."""
        digests = {ref.digest for ref in inputs}
        same = {key: json.dumps(value) for key, value in parameters.items()}
        for manifest in self._store.find(kind, self._base.name):
            made_of = {ref.digest for ref in manifest.inputs if ref.kind != "report"} == digests
            same_way = manifest.tools.get("llama.cpp") == self._tools["llama.cpp"]
            if not (made_of and same == dict(manifest.parameters)):
                continue
            if [entry.path for entry in manifest.files] != [file_name]:
                continue
            if same_way:
                return manifest
            other = manifest.tools.get("llama.cpp")
            self._report(
                Progress(
                    "store base", message=f"{manifest.ref} not taken: another llama.cpp made it, {other}"
                )
            )
        return None

    def _put(
        self, kind: str, target: Path, inputs: Sequence[ArtifactRef], parameters: Mapping[str, object]
    ) -> ArtifactRef:
        self._report(Progress("store base"))
        return self._store.put(
            kind, self._base.name, {target.name: target},
            inputs=inputs, parameters=parameters, tools=self._tools, created_by="packager",
        )  # fmt: skip


def _file(stops: Sequence[int]) -> str:
    return f"base_model{'-stops' if stops else ''}.gguf"


def _stops_parameter(stops: Sequence[int]) -> dict[str, str]:
    """Return what tells a base with stops of its own from the others."""
    return {"stops": ",".join(map(str, stops))} if stops else {}
