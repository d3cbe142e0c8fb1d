"""Packages an adapter: merge and convert in one, prove, quantize, check, and the files around the models.

Each step's files stay in the working folder; a job that starts again goes on behind its last finished step.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from web4lora_chassis.artifacts import ArtifactRef, hash_file
from web4lora_chassis.errors import DataLoss, FailedPrecondition, ResourceExhausted
from web4lora_chassis.jobs import Progress
from web4lora_chassis.jobs.record import write_json
from web4lora_chassis.model_files.gguf import GgufHeader
from web4lora_chassis.model_files.model_folder import ModelFolder, read_model_folder
from web4lora_chassis.model_files.modelfile import licence_of
from web4lora_chassis.model_files.trained_conversations import TRAINED_CONVERSATIONS
from web4lora_llamacpp import LlamaCpp

from web4lora_packager.adapter import Adapter
from web4lora_packager.adapter_gguf import ADAPTER_NAME, check_adapter, require_convertible, write_plain
from web4lora_packager.base_gguf import BaseGgufs
from web4lora_packager.chat_template import Tokenizer, read_tokenizer
from web4lora_packager.check import Loaded, check_header, check_loads, check_stops, contents, read_made
from web4lora_packager.child import ask
from web4lora_packager.convert import Converted, convert, convert_adapter, prove
from web4lora_packager.layout import Layout, read_layout
from web4lora_packager.merge import Merge, Merged
from web4lora_packager.merge import merge as merge_checkpoint
from web4lora_packager.modelfile import ModelParameters, default_system, modelfile, stop_texts
from web4lora_packager.next_tokens import LIMIT, Gate, Said, compare, kept_answers, summary
from web4lora_packager.quantize import calibration_text, quantize
from web4lora_packager.reuse import Reuse
from web4lora_packager.specs import PackageSpec
from web4lora_packager.steps import Step, Steps
from web4lora_packager.trained import read_kept, trained_stops

Report = Callable[[Progress], None]

REFERENCE_NAME = "merged_model.gguf"
# Upper bounds, as shares of the 16-bit file's size, by the type's first digit.
_QUANT_SHARE = {"8": 0.55, "6": 0.5, "5": 0.5}
_QUANT_SHARE_ELSE = 0.45
_HEADROOM_BYTES = 256 << 20


@dataclass(frozen=True)
class GgufReport:
    """One GGUF file and what was checked of it; see the contract's GgufFile."""

    path: Path
    type: str
    size_bytes: int
    header: GgufHeader
    loaded: Loaded

    @property
    def contents(self) -> str:
        """Which types it really has, where that is not what its type says."""
        return contents(self.header, self.type)

    def reduction(self, reference: GgufReport) -> float:
        """Return by which share it is smaller than the 16-bit file."""
        return 1 - self.size_bytes / reference.size_bytes


@dataclass(frozen=True)
class Switchable:
    """The adapter and its base as GGUFs, for llama-server to switch adapters.

    Attributes:
        adapter: The adapter.
        base: The quantized base.
        base_ref: The base's artifact.
    """

    adapter: GgufReport
    base: GgufReport
    base_ref: ArtifactRef


@dataclass(frozen=True)
class Package:
    """What packaging made, on disk.

    Attributes:
        merged: Folder of the merged checkpoint; None unless it was asked for.
        merge: What the merge did.
        max_abs_error: Largest difference between a merged weight in the 16-bit GGUF and what PEFT makes it.
        gates: What each stage was held against, in their order.
        tensors: The artifact that says what the 16-bit GGUF's tensors are, by digest.
        matrix: The importance matrix's artifact, if one was used.
        reference: The 16-bit GGUF.
        quantized: The quantized ones, in the order asked for.
        switchable: Adapter and base as GGUFs; None unless they were asked for.
        files: Modelfile, modelfile.json and SHA256SUMS, by name.
        conversations: What training kept of its data, to lie beside each GGUF; None when it kept nothing.
    """

    merged: Path | None
    merge: Merged
    max_abs_error: float
    gates: tuple[Gate, ...]
    tensors: ArtifactRef
    matrix: ArtifactRef | None
    reference: GgufReport
    quantized: tuple[GgufReport, ...]
    switchable: Switchable | None
    files: dict[str, Path]
    conversations: Path | None


class Packaging:
    """One packaging job.

    Args:
        spec: What to make.
        base: The base model's folder.
        adapter: The adapter's folder.
        bases: Makes the base's GGUFs and its importance matrix, where they are asked for.
        reuse: Finds what earlier runs quantized.
        training: The training data's files, for an importance matrix.
        licence: Name of the base's licence, for a base without a licence file.
        own_name: The base's own name, for the GGUF.
        llama: The tools.
        work: The working folder, kept from attempt to attempt.
        load_timeout_seconds: How long a load check may wait for llama-server.
        report: Takes progress.
    """

    def __init__(
        self,
        spec: PackageSpec,
        base: Path,
        adapter: Path,
        bases: BaseGgufs,
        reuse: Reuse,
        training: Iterable[Path],
        licence: str,
        own_name: str,
        llama: LlamaCpp,
        work: Path,
        load_timeout_seconds: float,
        report: Report,
    ) -> None:
        self._spec = spec
        self._base = base
        self._model = read_model_folder(base)
        self._adapter = adapter
        self._bases = bases
        self._reuse = reuse
        self._training = tuple(training)
        self._licence = licence
        self._own_name = own_name
        self._llama = llama
        self._work = work
        self._load_timeout_seconds = load_timeout_seconds
        self._report = report
        self._log = work / "tools.log"
        self._steps = Steps(work)
        self._tokenizer: Tokenizer = read_tokenizer(base)
        self._kept = read_kept(adapter)
        self._answers = kept_answers(self._kept)
        self._stops: tuple[int, ...] = ()
        self._gates: list[Gate] = []

    def run(self) -> Package:
        """Do the whole job.

        Raises:
            ResourceExhausted: The disk is too full, or memory ran out.
            InvalidInput: A file of base, adapter or dataset is missing or broken, or the spec does not fit.
            FailedPrecondition: The adapter is not one that is merged here, or can't be a GGUF of its own.
            DataLoss: A check found a wrong file, or one that answers otherwise than what was trained.
            Internal: A tool failed.
            Unavailable: The store is out of reach.
        """
        self._require_space()
        self._stops = trained_stops(self._kept, self._tokenizer, _vocabulary(self._model))
        layout = self._layout()
        if self._spec.adapter_gguf:
            require_convertible(Adapter(self._adapter), layout)
        merge = Merge(self._base, self._adapter, layout)
        gguf_type, reference_step, header = self._convert(merge)
        if merge.parted and "output.weight" not in header.shapes:
            raise FailedPrecondition(
                f"The adapter parts output head and embedding, and llama.cpp's {header.architecture} has one "
                "tensor for both: its GGUF would be another model than was trained.",
                fix="Train without the embedding and the output head.",
                reason="HEAD_NOT_CONVERTIBLE",
            )
        max_abs_error = self._prove(merge, reference_step)
        self._passed("merge", "base plus adapter", f"off by {max_abs_error:.2g}", f"rounding to {gguf_type}")
        reference = self._check(REFERENCE_NAME, gguf_type, None)
        self._compare("convert", self._expected(), reference, limit=LIMIT)
        merged = self._checkpoint(layout) if "safetensors" in self._spec.formats else None
        context_tokens = self._spec.context_for(header.context_tokens)
        matrix = self._matrix(gguf_type)
        digests = reference_step.data["tensors"]
        quantized_steps = [
            self._quantize(name, gguf_type, header, digests, matrix) for name in self._spec.quantizations
        ]
        quantized = [self._check(_file_name(name), name, header) for name in self._spec.quantizations]
        for gguf in quantized:
            self._compare(f"quantize {gguf.type}", reference.loaded.said, gguf)
        switchable = self._make_switchable(gguf_type) if self._spec.adapter_gguf else None
        sums = {
            path: digest for step in (reference_step, *quantized_steps) for path, digest in step.files.items()
        }
        for gguf in (switchable.adapter, switchable.base) if switchable else ():
            sums[gguf.path.name] = hash_file(gguf.path)
        files = self._write_files(context_tokens, sums)
        kept = self._adapter / TRAINED_CONVERSATIONS
        return Package(
            merged=merged,
            merge=Merged(**reference_step.data["merged"]),
            max_abs_error=max_abs_error,
            gates=tuple(self._gates),
            tensors=self._reuse.note(digests, [self._spec.base, self._spec.adapter]),
            matrix=matrix[0] if matrix else None,
            reference=reference,
            quantized=tuple(quantized),
            switchable=switchable,
            files=files,
            conversations=kept if kept.is_file() else None,
        )

    def _require_space(self) -> None:
        """Refuse before work starts what the disk can't hold at its end."""
        size = self._model.size_bytes
        shares = [
            _QUANT_SHARE.get(name.strip("IQ")[:1], _QUANT_SHARE_ELSE) for name in self._spec.quantizations
        ]
        made = sum(path.stat().st_size for path in self._work.rglob("*") if path.is_file())
        wanted = (self._spec.base_gguf, self._spec.adapter_gguf)
        bases = float(sum(wanted) if self._stops else any(wanted))  # with stops of training's, one of its own
        bases += shares[0] if self._spec.adapter_gguf else 0.0
        if self._spec.importance_matrix and self._spec.importance_matrix_from == "base":
            bases = max(bases, 1.0)
        checkpoint = 1.0 if "safetensors" in self._spec.formats else 0.0
        # While a file is quantized, that which tensors are taken from and the hybrid lie beside it.
        on_the_way = 1.0 + max(shares)
        needed = int(size * (1 + checkpoint + bases + sum(shares) + on_the_way)) + _HEADROOM_BYTES
        free = shutil.disk_usage(self._work).free
        if free + made < needed:
            raise ResourceExhausted(
                f"Packaging needs about {needed / 1e9:.1f} GB in {self._work}, {free / 1e9:.1f} GB are free.",
                fix="Free disk space, ask for fewer quantizations, or set WEB4LORA_HOME to another disk.",
                reason="DISK_FULL",
            )

    def _layout(self) -> Layout:
        self._report(Progress("read", message="reading the base's architecture and the adapter"))
        return read_layout(self._base, self._adapter, self._work)

    def _convert(self, merge: Merge) -> tuple[str, Step, GgufHeader]:
        """Merge and convert in one: return the 16-bit type, the step, and the file's header.

        F16 holds every bfloat16 value above 6e-5 exactly, and processors without bfloat16 instructions are
        faster with it: by 1.45 for prompts and 1.15 for answers on an AVX2 machine, measured with
        SmolLM2-135M and llama-bench. So "auto" takes it when every weight fits its range, as trained
        models' weights do.
        """
        target = self._work / REFERENCE_NAME

        def attempt(gguf_type: str, *, require_f16: bool) -> Converted | None:
            return convert(
                self._llama, self._base, target,
                gguf_type=gguf_type, name=self._own_name, trained_as=self._spec.name, stops=self._stops,
                merge=merge, require_f16=require_f16, log=self._log, report=self._report,
            )  # fmt: skip

        def make() -> dict[str, object]:
            wanted = self._spec.gguf_type
            gguf_type = "F16" if wanted == "auto" else wanted
            made = attempt(gguf_type, require_f16=gguf_type == "F16")
            if made is None and wanted == "F16":
                raise FailedPrecondition(
                    "A weight of the merged model is too large for F16: it would become infinite.",
                    fix="Set package.gguf_type to auto or BF16.",
                    reason="TOO_LARGE_FOR_F16",
                    metadata={"field": "package.gguf_type"},
                )
            if made is None:
                gguf_type = "BF16"
                made = attempt(gguf_type, require_f16=False)
            assert made is not None
            assert made.merged is not None
            return {"type": gguf_type, "merged": asdict(made.merged), "tensors": dict(made.tensors)}

        step = self._steps.do(f"convert-{self._spec.gguf_type}", target, make)
        gguf_type = str(step.data["type"])
        merged = Merged(**step.data["merged"])
        size = target.stat().st_size
        self._report(
            Progress(
                f"convert {gguf_type}", 1, 1, "files",
                figures={
                    "size_bytes": size,
                    "merged_tensors": merged.merged_tensors,
                    "adapter_tensors": merged.adapter_tensors,
                    "relative_effect": merged.relative_effect,
                    "rounding_error": merged.rounding_error,
                },
                message=f"{target.name} {size / 1e6:.0f} MB: {merged.merged_tensors} tensors changed, by "
                f"{merged.relative_effect:.2%}; rounding took {merged.rounding_error:.2%} of the change",
            )
        )  # fmt: skip
        return gguf_type, step, read_made(target)

    def _prove(self, merge: Merge, reference: Step) -> float:
        """Compare the 16-bit GGUF with what PEFT makes of base and adapter; return the largest difference."""
        target = self._work / "proof.json"

        def make() -> dict[str, object]:
            error = prove(self._llama, merge, self._work / REFERENCE_NAME, log=self._log, report=self._report)
            write_json(target, {"max_abs_error": error})
            return {"max_abs_error": error}

        # Of these very bytes: a file made anew is proved anew.
        step = self._steps.do(f"prove-{reference.files[REFERENCE_NAME][:16]}", target, make)
        return float(step.data["max_abs_error"])

    def _expected(self) -> Said | None:
        """Ask Transformers and PEFT how likely they make the answers that training kept."""
        if not self._answers:
            self._not_compared("training kept no answers beside the adapter")
            return None
        target = self._work / "expected.json"

        def make() -> dict[str, object]:
            self._report(Progress("compare answers", message="asking Transformers and PEFT"))
            write_json(target, ask("expect", self._work, self._base, self._adapter))
            return {}

        self._steps.do("expect", target, make)
        told = json.loads(target.read_text(encoding="utf-8"))
        if "left_out" in told:
            self._not_compared(f"Transformers can't be asked about this model: {told['left_out']}")
            return None
        return Said(tuple(tuple(dict(place) for place in answer) for answer in told["likely"]), {})

    def _compare(self, stage: str, before: Said | None, gguf: GgufReport, limit: float | None = None) -> None:
        """Hold a file's next tokens against those before the stage that made it."""
        if before is None or gguf.loaded.said is None:
            return
        gate = compare(stage, self._answers, before, gguf.loaded.said, limit=limit)
        if not gate.passed:
            raise DataLoss(
                f"{gguf.path.name} answers otherwise than base and adapter in Transformers: {gate.measured}; "
                f"allowed is a {gate.limit}.",
                fix="Package again; if it happens again, llama.cpp computes this model otherwise.",
                reason="STAGE_CHANGED_MODEL",
                metadata={"stage": stage},
            )
        self._gates.append(gate)
        self._report(Progress("compare answers", message=summary([gate])))

    def _not_compared(self, why: str) -> None:
        """Note that the 16-bit file was not held against Transformers: that is no gate passed."""
        self._gates.append(Gate("convert", "same next tokens", f"not compared: {why}", "none", passed=False))

    def _passed(self, stage: str, name: str, measured: str, limit: str) -> None:
        """Note a gate that was passed; else its check would have ended the job."""
        self._gates.append(Gate(stage, name, measured, limit))

    def _checkpoint(self, layout: Layout) -> Path:
        """Write the merged checkpoint, in the base's own types, and have it compared with PEFT's layers."""
        target = self._work / "merged"
        total = self._model.size_bytes
        started, done = time.monotonic(), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            left = (time.monotonic() - started) / done * (total - done)
            self._report(Progress("merge", done, total, "bytes", max(0.0, left)))

        def make() -> dict[str, object]:
            self._report(Progress("merge", 0, total, "bytes"))
            merged = merge_checkpoint(self._base, self._adapter, target, layout, advance)
            self._report(Progress("merge", total, total, "bytes", message="comparing with PEFT's own layers"))
            ask("prove", self._work, self._base, self._adapter, target)
            return asdict(merged)

        self._steps.do("merge", target, make)
        return target

    def _matrix(self, gguf_type: str) -> tuple[ArtifactRef, Path] | None:
        """Return the importance matrix to quantize with: the base's, unless the run wants its own."""
        if not self._spec.importance_matrix:
            return None
        chunks = self._spec.matrix_chunks

        def text() -> str:
            return calibration_text(self._tokenizer, self._training, chunks)

        if self._spec.importance_matrix_from == "merged":
            return self._bases.matrix_of(
                self._work / REFERENCE_NAME, self._spec.adapter, self._spec.dataset, chunks, text
            )
        return self._bases.matrix(gguf_type, self._spec.dataset, chunks, text)

    def _quantize(
        self,
        quantization: str,
        gguf_type: str,
        reference: GgufHeader,
        digests: Mapping[str, str],
        matrix: tuple[ArtifactRef, Path] | None,
    ) -> Step:
        target = self._work / _file_name(quantization)
        ref, path = matrix or (None, None)

        def make() -> dict[str, object]:
            taken = self._reuse.take(quantization, gguf_type, ref, reference, digests)
            quantize(
                self._llama, self._work / REFERENCE_NAME, target,
                quantization=quantization, parameters=reference.parameters, matrix=path, taken=taken,
                log=self._log, report=self._report,
            )  # fmt: skip
            self._reuse.clear()
            return {"taken": len(taken)}

        step = self._steps.do(f"quantize-{quantization}", target, make)
        self._sized(f"quantize {quantization}", target)
        return step

    def _make_switchable(self, gguf_type: str) -> Switchable:
        """Convert the adapter by itself, and see that it answers on the quantized base."""
        target = self._work / ADAPTER_NAME

        def make() -> dict[str, object]:
            config, plain = Adapter(self._adapter).config, self._adapter
            if config.rank_stabilized or config.alpha_pattern:
                plain = write_plain(self._adapter, self._work / "plain-adapter")
            convert_adapter(self._llama, plain, self._base, target, log=self._log, report=self._report)
            return {}

        self._steps.do("convert-adapter", target, make)
        adapter = check_adapter(target, Adapter(self._adapter))
        self._sized("convert adapter", target)
        quantization = self._spec.quantizations[0]
        ref, path = self._bases.quantized(quantization, gguf_type, self._stops)
        base = read_made(path)
        check_header(base, self._tokenizer, None, path.name)
        self._report(Progress("load check", message=f"{path.name} with {target.name}"))
        loaded = check_loads(
            self._llama, path,
            adapter=target, log=self._work / "server.log", timeout_seconds=self._load_timeout_seconds,
        )  # fmt: skip
        check_stops(loaded, self._stops, path.name)
        reports = [
            GgufReport(file, kind, file.stat().st_size, header, loaded)
            for file, kind, header in ((target, "F32", adapter), (path, quantization, base))
        ]
        return Switchable(reports[0], reports[1], ref)

    def _sized(self, phase: str, path: Path) -> None:
        """Tell a finished file's size."""
        size = path.stat().st_size
        message = f"{path.name} {size / 1e6:.0f} MB"
        self._report(Progress(phase, 1, 1, "files", figures={"size_bytes": size}, message=message))

    def _check(self, file_name: str, gguf_type: str, reference: GgufHeader | None) -> GgufReport:
        """Check a file's header and that it loads."""
        path = self._work / file_name
        self._report(Progress("load check", message=file_name))
        header = read_made(path)
        check_header(header, self._tokenizer, reference, file_name)
        loaded = check_loads(
            self._llama, path,
            log=self._work / "server.log", timeout_seconds=self._load_timeout_seconds, answers=self._answers,
        )  # fmt: skip
        check_stops(loaded, self._stops, file_name)
        stage = "convert" if reference is None else f"quantize {gguf_type}"
        of = "base's" if reference is None else "16-bit file's"
        self._passed(stage, "template, tokens, tensors", "the same", f"the {of}")
        ends = f"at {', '.join(map(str, sorted(loaded.end_ids)))}"
        wanted = ", ".join(map(str, self._stops)) or "where the base's do"
        self._passed(stage, "loads, answers, answers end", ends, wanted)
        return GgufReport(path, gguf_type, path.stat().st_size, header, loaded)

    def _write_files(self, context_tokens: int, sums: Mapping[str, str]) -> dict[str, Path]:
        """Write Modelfile, modelfile.json and SHA256SUMS: that of the Modelfile, and those given."""
        self._report(Progress("checksums"))
        parameters = ModelParameters(
            stop=stop_texts(self._tokenizer, self._stops),
            system=default_system(self._tokenizer, self._kept.rendered_at),
            temperature=self._spec.temperature,
            context_tokens=context_tokens,
            licence=licence_of(self._base.iterdir(), self._licence)[0],
        )
        model_file = self._write("Modelfile", modelfile(_file_name(self._spec.quantizations[0]), parameters))
        as_json = json.dumps(parameters.to_json(), indent=2, ensure_ascii=False) + "\n"
        every = {**sums, model_file.name: hash_file(model_file)}
        lines = [f"{digest}  {path}\n" for path, digest in sorted(every.items())]
        written = [
            model_file,
            self._write("modelfile.json", as_json),
            self._write("SHA256SUMS", "".join(lines)),
        ]
        return {path.name: path for path in written}

    def _write(self, name: str, text: str) -> Path:
        """Write a small file anew; an earlier attempt's may be read-only, shared with the store."""
        path = self._work / name
        path.unlink(missing_ok=True)
        path.write_text(text, encoding="utf-8")
        return path


def _file_name(quantization: str) -> str:
    return f"model.{quantization}.gguf"


def _vocabulary(model: ModelFolder) -> int | None:
    """Return a model's number of tokens, if its configuration says it."""
    value = model.text_config.get("vocab_size")
    return value if isinstance(value, int) else None
