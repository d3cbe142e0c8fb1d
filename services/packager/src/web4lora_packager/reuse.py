"""What earlier runs quantized on the same base: a run takes every tensor of it that its training left alone.

In each GGUF's lineage is `tensors.json`, the SHA-256 of every tensor's 16-bit data. Where a run's own data
have the same digest, and the way to quantize them is the same, the earlier file has what quantizing would
give. So nothing is made or kept for it: what a run makes anyway serves the next one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore, Manifest
from web4lora_chassis.errors import DataLoss, InvalidInput, NotFound
from web4lora_chassis.jobs import Progress
from web4lora_chassis.model_files.gguf import GgufHeader, read_gguf

from web4lora_packager.versions import tool_versions

TENSORS = "tensors.json"
_MOST_FILES = 2  # taken from; each is fetched and verified whole


class Reuse:
    """Finds quantized tensors in the store.

    Args:
        store: Where earlier runs' GGUFs are.
        base: The base model.
        names: Under which names to look first: that of the run, that of the base.
        llama_version: The llama.cpp that quantizes here; another one's files are not taken.
        work: The job's working folder.
        report: Takes progress: which files tensors are taken from, or why from none.
    """

    def __init__(
        self,
        store: ArtifactStore,
        base: ArtifactRef,
        names: tuple[str, ...],
        llama_version: str,
        work: Path,
        report: Callable[[Progress], None],
    ) -> None:
        self._store = store
        self._base = base
        self._names = names
        self._llama_version = llama_version
        self._work = work
        self._report = report

    def parameters(self, quantization: str, gguf_type: str, matrix: ArtifactRef | None) -> dict[str, object]:
        """Return the parameters of a quantized GGUF's artifact, which a later run finds it by."""
        return {
            "type": quantization,
            "from": gguf_type,
            "base": self._base.digest,
            "matrix": matrix.digest if matrix else "",
        }

    def note(self, tensors: Mapping[str, str], inputs: list[ArtifactRef]) -> ArtifactRef:
        """Store the digests of a 16-bit GGUF's tensors, to be named as an input of what is quantized from it.

        Args:
            tensors: SHA-256 of each tensor's data, by name.
            inputs: What the GGUF was made of.
        """
        path = self._work / TENSORS
        path.unlink(missing_ok=True)  # may be a link into the store
        path.write_text(json.dumps(dict(sorted(tensors.items())), indent=0) + "\n", encoding="utf-8")
        return self._store.put(
            "report", self._base.name, {TENSORS: path},
            inputs=inputs, tools=tool_versions(), created_by="packager",
        )  # fmt: skip

    def take(
        self,
        quantization: str,
        gguf_type: str,
        matrix: ArtifactRef | None,
        header: GgufHeader,
        tensors: Mapping[str, str],
    ) -> dict[str, Path]:
        """Return the tensors that need not be quantized, each with the file in the work folder that has it.

        Args:
            quantization: The type to quantize to.
            gguf_type: F16 or BF16, of the whole file.
            matrix: The importance matrix, if any.
            header: The whole file's header.
            tensors: SHA-256 of its tensors' data, by name.
        """
        wanted = self.parameters(quantization, gguf_type, matrix)
        left = {tensor.name for tensor in header.tensors if len(tensor.shape) > 1} & tensors.keys()
        most, taken, reason = len(left), dict[str, Path](), ""
        for manifest in self._candidates(quantization):
            why = self._mismatch(manifest, wanted)
            if not why:
                found, why = self._same(manifest, header, left, tensors)
                if found:
                    taken.update(found)
                    left -= found.keys()
                    self._say(quantization, f"{len(found)} of {most} tensors taken from {manifest.ref}")
            reason = reason or f"{manifest.ref}: {why}"
            if not left or len(set(taken.values())) == _MOST_FILES:
                break
        if not taken and reason:
            self._say(quantization, f"no tensor taken from {reason}")
        return taken

    def clear(self) -> None:
        """Remove the files that tensors were taken from, once they are quantized."""
        shutil.rmtree(self._work / "taken", ignore_errors=True)

    def _say(self, quantization: str, message: str) -> None:
        self._report(Progress(f"quantize {quantization}", message=message))

    def _candidates(self, quantization: str) -> Iterator[Manifest]:
        """Yield the store's GGUFs of a type that say what they were made from, the likely ones first."""
        seen: set[str] = set()
        for name in (*dict.fromkeys(self._names), ""):  # the whole store last, and only if still needed
            for manifest in self._store.find("gguf", name):
                same_type = manifest.parameters.get("type") == json.dumps(quantization)
                if manifest.digest not in seen and same_type and "base" in manifest.parameters:
                    yield manifest
                seen.add(manifest.digest)

    def _mismatch(self, manifest: Manifest, wanted: Mapping[str, object]) -> str:
        """Return why a GGUF's tensors can't be ours, in words; empty when they may be."""
        if manifest.tools.get("llama.cpp") != self._llama_version:
            return f"another llama.cpp made it, {manifest.tools.get('llama.cpp')}"
        for key, words in (
            ("base", "another base model"),
            ("matrix", "another importance matrix"),
            ("from", "another 16-bit type"),
        ):
            if manifest.parameters.get(key) != json.dumps(wanted[key]):
                return f"it was made with {words}"
        return ""

    def _same(
        self, manifest: Manifest, header: GgufHeader, left: set[str], tensors: Mapping[str, str]
    ) -> tuple[dict[str, Path], str]:
        """Return the tensors that a GGUF has of ours and its file, and why there are none."""
        noted = next((ref for ref in manifest.inputs if ref.kind == "report"), None)
        file = next((entry.path for entry in manifest.files if entry.path.endswith(".gguf")), "")
        if noted is None or not file:
            return {}, "it does not say what it was made from"
        folder = self._work / "taken" / manifest.digest[:12]
        try:
            self._store.get(noted, folder, only=[TENSORS])
            theirs = json.loads((folder / TENSORS).read_text(encoding="utf-8"))
            same = {name for name in left if theirs.get(name) == tensors[name]}
            if not same:
                return {}, "training changed all of the same tensors"
            self._store.get(manifest.ref, folder, only=[file])
            found = read_gguf(folder / file)
        except (NotFound, DataLoss, InvalidInput) as error:
            return {}, error.message
        if found.shapes != header.shapes:  # then the types of all of them may be others
            return {}, "it has other tensors"
        own = {tensor.name: tensor.type_id for tensor in header.tensors}
        other = {tensor.name: tensor for tensor in found.tensors}
        # Of a type that is newer than we are the size is not known.
        fit = [name for name in same if other[name].type_id != own[name] and other[name].size_bytes]
        return dict.fromkeys(fit, folder / file), "" if fit else "none of its tensors are quantized"
