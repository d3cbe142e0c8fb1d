"""Makes GGUFs of a model or an adapter with llama.cpp's own converters, in a process of their own.

A converter sees links to the files that are known, an environment without ours, and a transformers that
runs no model's code: the converter itself would load tokenizers with trust_remote_code=True.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from web4lora_chassis import process
from web4lora_chassis.errors import Internal, InvalidInput
from web4lora_chassis.jobs import Progress
from web4lora_chassis.model_files.model_folder import MODEL_FILES, is_weights, refuse_remote_code
from web4lora_llamacpp import LlamaCpp, run_converter, tail

from web4lora_packager.adapter import ADAPTER_FILES
from web4lora_packager.child import raise_error
from web4lora_packager.merge import Merge, Merged

_PERCENT = re.compile(r"Writing:\s+(\d+)%")
_SCRIPTS = Path(__file__).parent / "scripts"
_CONVERT, _PROVE = _SCRIPTS / "convert.py", _SCRIPTS / "prove.py"
_PROOF = "compare with PEFT"


@dataclass(frozen=True)
class Converted:
    """What a conversion made.

    Attributes:
        tensors: SHA-256 of each tensor's data in the file, by its name there; one that was written in chunks
            is left out.
        merged: What was merged into the model; None when nothing was.
    """

    tensors: Mapping[str, str]
    merged: Merged | None


def convert(
    llama: LlamaCpp,
    model: Path,
    target: Path,
    *,
    gguf_type: str,
    name: str,
    trained_as: str = "",
    stops: Sequence[int] = (),
    merge: Merge | None = None,
    require_f16: bool = False,
    log: Path,
    report: Callable[[Progress], None],
) -> Converted | None:
    """Convert a model to one GGUF file.

    Args:
        llama: Brings the converter.
        model: Its folder.
        target: The file to write; replaced at once when done.
        gguf_type: F16 or BF16.
        name: The base's own name, for general.name: llama.cpp reads attributes of tokens from it.
        trained_as: The name of what was made of the base, for general.finetune.
        stops: Tokens that must end generation, by their ids, whatever the tokenizer's files say.
        merge: Merged into the model on the way, in float32, rounded once to `gguf_type`.
        require_f16: Make no file when a weight does not fit F16; only with `merge`.
        log: The converter's output is appended here.
        report: Takes progress: phase "convert F16" or "convert BF16", in percent.

    Returns:
        What it made; None when a weight does not fit F16 and `require_f16` is set.

    Raises:
        InvalidInput: The model names code of its own, or a file can't be read.
        FailedPrecondition: The adapter changes nothing, or gives numbers that are not finite.
        Internal: The converter failed; the message has its last lines.
        OutOfMemory: It was killed.
    """
    phase = f"convert {gguf_type}"
    report(Progress(phase, message="reading the model"))
    part = target.with_name(f"part-{target.name}")
    with _shown(target.parent, model, merge) as (shown, folder):
        options: list[str | Path] = ["--outtype", gguf_type.lower(), "--model-name", name, "--outfile", part]
        if trained_as:
            metadata = folder / "metadata.json"
            metadata.write_text(json.dumps({"general.finetune": trained_as}), encoding="utf-8")
            options += ["--metadata", metadata]
        asked = merge and {
            "base": str(model), "adapter": str(merge.adapter), "layout": merge.layout.to_json()
        }  # fmt: skip
        request = folder / "request.json"
        wanted = {"stops": list(stops), "merge": asked, "type": gguf_type, "require_f16": require_f16}
        request.write_text(json.dumps(wanted), encoding="utf-8")
        arguments: list[str | Path] = [request, llama.converter, shown, *options]
        _finish(_CONVERT, arguments, phase=phase, log=log, report=report)
        told = _told(folder)
    if "too_large" in told:
        part.unlink(missing_ok=True)
        return None
    part.replace(target)
    return Converted(told["tensors"], Merged(**told["merged"]) if "merged" in told else None)


def prove(
    llama: LlamaCpp,
    merge: Merge,
    gguf: Path,
    *,
    log: Path,
    report: Callable[[Progress], None],
) -> float:
    """Compare a merged 16-bit GGUF with what PEFT's own layers make of base and adapter: see `gguf_proof`.

    Args:
        llama: Brings the converter, which says where in the GGUF each value belongs.
        merge: What was merged; of it the folders and the parted ties are used, no value.
        gguf: The file.
        log: The converter's output is appended here.
        report: Takes progress: phase "compare with PEFT", in percent.

    Returns:
        The largest difference between a value and the one expected.

    Raises:
        DataLoss: The GGUF is not base plus adapter, or nothing could be compared.
        Internal: The converter failed; the message has its last lines.
        OutOfMemory: It was killed.
    """
    report(Progress(_PROOF))
    with _shown(gguf.parent, merge.base, merge) as (shown, folder):
        request = folder / "request.json"
        wanted = {"base": str(merge.base), "adapter": str(merge.adapter), "gguf": str(gguf)}
        request.write_text(json.dumps(wanted), encoding="utf-8")
        options = ["--outtype", "f32", "--outfile", str(folder / "none.gguf")]
        _finish(_PROVE, [request, llama.converter, shown, *options], phase=_PROOF, log=log, report=report)
        return float(_told(folder)["max_abs_error"])


def convert_adapter(
    llama: LlamaCpp,
    adapter: Path,
    base: Path,
    target: Path,
    *,
    log: Path,
    report: Callable[[Progress], None],
) -> None:
    """Convert an adapter to a GGUF file of its own, in 32 bit, which holds every value exactly.

    Args:
        llama: Brings the converter.
        adapter: The adapter's folder.
        base: The folder of its base; its configuration alone is read.
        target: The file to write; replaced at once when done.
        log: The converter's output is appended here.
        report: Takes progress: phase "convert adapter", in percent.

    Raises:
        InvalidInput: The model names code of its own, or a configuration can't be read.
        Internal: The converter failed; the message has its last lines.
        OutOfMemory: It was killed.
    """
    report(Progress("convert adapter"))
    shown = stage(adapter, target.with_name("shown"))
    arguments: list[str | Path] = [
        shown, "--base", stage(base, target.with_name("shown-base")), "--outtype", "f32",
    ]  # fmt: skip
    _run(llama.adapter_converter, arguments, target, phase="convert adapter", log=log, report=report)
    for folder in (shown, target.with_name("shown-base")):
        shutil.rmtree(folder)


def stage(folder: Path, target: Path, texts: Mapping[str, str] | None = None) -> Path:
    """Make a folder that shows a model's known files, each as a link, and nothing else.

    Args:
        folder: The model or adapter.
        target: The folder to make; what is there is removed first.
        texts: Files to show another text of, by name.

    Returns:
        The target.

    Raises:
        InvalidInput: The model names code of its own, a configuration can't be read, or there is no model.
    """
    refuse_remote_code(folder)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    shown = 0
    for path in sorted(folder.iterdir()):
        if path.is_file() and (path.name in (*MODEL_FILES, *ADAPTER_FILES) or is_weights(path.name)):
            (target / path.name).symlink_to(path.resolve())
            shown += 1
    for name, text in (texts or {}).items():
        (target / name).unlink()
        (target / name).write_text(text, encoding="utf-8")
    if not shown:
        raise InvalidInput(f"{folder} holds no model.", fix="Fetch it again.")
    return target


def _run(
    script: Path,
    arguments: Sequence[str | Path],
    target: Path,
    *,
    phase: str,
    log: Path,
    report: Callable[[Progress], None],
) -> None:
    """Run a converter that makes a file."""
    part = target.with_name(f"part-{target.name}")
    _finish(script, [*arguments, "--outfile", part], phase=phase, log=log, report=report)
    if not part.is_file():
        fix = f"The whole output: {log}"
        raise Internal(f"{script.name} wrote no file:{tail(log)}", fix=fix, reason="CONVERTER_FAILED")
    part.replace(target)


def _finish(
    script: Path,
    arguments: Sequence[str | Path],
    *,
    phase: str,
    log: Path,
    report: Callable[[Progress], None],
) -> None:
    """Run a converter to its end."""
    started = 0.0

    def on_line(line: str) -> None:
        nonlocal started
        if found := _PERCENT.search(line):
            now, percent = time.monotonic(), int(found[1])
            started = started or now
            left = (now - started) / percent * (100 - percent) if percent else 0.0
            report(Progress(phase, percent, 100, "percent", left))

    code = run_converter(script, arguments, log=log, on_line=on_line)
    if code != 0:
        fix = f"The whole output: {log}"
        raise process.failure(script.name, code, f":{tail(log)}", fix=fix, reason="CONVERTER_FAILED")


@contextmanager
def _shown(work: Path, model: Path, merge: Merge | None) -> Iterator[tuple[Path, Path]]:
    """Show a converter a model, and give the folder for what else it reads and tells; both go afterwards."""
    folder = work / "conversion"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield stage(model, folder / "shown", merge.untied() if merge else {}), folder
    shutil.rmtree(folder)


def _told(folder: Path) -> dict[str, Any]:
    """Return what one of our scripts told of its work.

    Raises:
        Web4Error: What it raised.
    """
    told: dict[str, Any] = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
    raise_error(told)
    return told
