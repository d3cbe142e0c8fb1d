"""The untrained base as GGUFs, to compare with and to serve under adapters: each made once, then kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore
from web4lora_chassis.jobs import Progress
from web4lora_llamacpp import LlamaCpp

from web4lora_packager.check import read_made
from web4lora_packager.convert import convert
from web4lora_packager.quantize import quantize
from web4lora_packager.steps import Steps
from web4lora_packager.versions import tool_versions


class BaseGgufs:
    """The GGUFs of one base. Those in the store are taken, unless another llama.cpp made them.

    Args:
        store: Where they are kept.
        base: The base model.
        folder: Its files.
        llama: Brings the converter and llama-quantize.
        work: The job's working folder.
        name: The base's own name, for its GGUF.
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
        report: Callable[[Progress], None],
    ) -> None:
        self._store = store
        self._base = base
        self._folder = folder
        self._llama = llama
        self._work = work
        self._name = name
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
        target = self._work / _file(stops)

        def make() -> Mapping[str, object]:
            convert(
                self._llama, self._folder, target,
                gguf_type=gguf_type, name=self._name, stops=stops, log=self._work / "tools.log",
                report=self._report,
            )  # fmt: skip
            return {}

        parameters = {"type": gguf_type, "name": self._name, **_stops_parameter(stops)}
        return self._kept(target.name, parameters) or self._made(
            f"convert-{target.stem}-{gguf_type}", target, make, parameters
        )

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
        parameters = {"type": quantization, "from": gguf_type, "name": self._name, **_stops_parameter(stops)}
        if ref := self._kept(target.name, parameters):
            self._store.get(ref, self._work)
            return ref, target
        reference, whole = self.reference(gguf_type, stops), self._work / _file(stops)

        def make() -> Mapping[str, object]:
            self._store.get(reference, self._work)
            quantize(
                self._llama, whole, target,
                quantization=quantization, parameters=read_made(whole).parameters, matrix=None,
                log=self._work / "tools.log", report=self._report,
            )  # fmt: skip
            return {}

        return self._made(f"quantize-base-{quantization}", target, make, parameters), target

    def _kept(self, file_name: str, parameters: Mapping[str, str]) -> ArtifactRef | None:
        """Return the one in the store that was made the same way."""
        for manifest in self._store.find("gguf", self._base.name):
            made_of = [ref.digest for ref in manifest.inputs] == [self._base.digest]
            same_way = manifest.tools.get("llama.cpp") == self._tools["llama.cpp"]
            same = {key: f'"{value}"' for key, value in parameters.items()} == dict(manifest.parameters)
            if made_of and same_way and same and [entry.path for entry in manifest.files] == [file_name]:
                return manifest.ref
        return None

    def _made(
        self,
        step: str,
        target: Path,
        make: Callable[[], Mapping[str, object]],
        parameters: Mapping[str, str],
    ) -> ArtifactRef:
        """Make one and put it into the store."""
        self._steps.do(step, target, make)
        self._report(Progress("store base"))
        return self._store.put(
            "gguf", self._base.name, {target.name: target},
            inputs=[self._base], parameters=parameters, tools=self._tools, created_by="packager",
        )  # fmt: skip


def _file(stops: Sequence[int]) -> str:
    return f"base_model{'-stops' if stops else ''}.gguf"


def _stops_parameter(stops: Sequence[int]) -> dict[str, str]:
    """Return what tells a base with stops of its own from the others."""
    return {"stops": ",".join(map(str, stops))} if stops else {}
