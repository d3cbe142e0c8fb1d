"""Makes GGUFs of a model or an adapter with llama.cpp's own converters, in a process of their own.

A converter sees links to the files that are known, an environment without ours, and a transformers that
runs no model's code: the converter itself would load tokenizers with trust_remote_code=True.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from web4lora_chassis import process
from web4lora_chassis.errors import Internal, InvalidInput
from web4lora_chassis.jobs import Progress
from web4lora_chassis.model_files.model_folder import MODEL_FILES, is_weights, refuse_remote_code
from web4lora_llamacpp import LlamaCpp, run_converter, tail

from web4lora_packager.adapter import ADAPTER_FILES

_PERCENT = re.compile(r"Writing:\s+(\d+)%")
_F16_MAX = 65504.0
_WITH_STOPS = Path(__file__).parent / "scripts" / "convert_with_stops.py"


def choose_type(wanted: str, max_abs_weight: float) -> str:
    """Return the GGUF's 16-bit type.

    "auto" takes F16 when every weight fits its range, which trained models' weights do. F16 holds every
    bfloat16 value above 6e-5 exactly, and processors without bfloat16 instructions are faster with it: by
    1.45 for prompts and 1.15 for answers on an AVX2 machine, measured with SmolLM2-135M and llama-bench.

    Args:
        wanted: auto, F16 or BF16.
        max_abs_weight: Largest absolute value of the weights.
    """
    if wanted != "auto":
        return wanted
    return "F16" if max_abs_weight <= _F16_MAX else "BF16"


def convert(
    llama: LlamaCpp,
    model: Path,
    target: Path,
    *,
    gguf_type: str,
    name: str,
    trained_as: str = "",
    stops: Sequence[int] = (),
    log: Path,
    report: Callable[[Progress], None],
) -> None:
    """Convert a model to one GGUF file.

    Args:
        llama: Brings the converter.
        model: Its folder.
        target: The file to write; replaced at once when done.
        gguf_type: F16 or BF16.
        name: The base's own name, for general.name: llama.cpp reads attributes of tokens from it.
        trained_as: The name of what was made of the base, for general.finetune.
        stops: Tokens that must end generation, by their ids, whatever the tokenizer's files say.
        log: The converter's output is appended here.
        report: Takes progress: phase "convert F16" or "convert BF16", in percent.

    Raises:
        InvalidInput: The model names code of its own, or a configuration can't be read.
        Internal: The converter failed; the message has its last lines.
        OutOfMemory: It was killed.
    """
    report(Progress(f"convert {gguf_type}", message="reading the model"))
    options: list[str | Path] = ["--outtype", gguf_type.lower(), "--model-name", name]
    if trained_as:
        metadata = target.with_name("metadata.json")
        metadata.write_text(json.dumps({"general.finetune": trained_as}), encoding="utf-8")
        options += ["--metadata", metadata]
    script, first = llama.converter, list[str | Path]()
    if stops:
        script, first = _WITH_STOPS, [",".join(str(token) for token in stops), llama.converter]
    shown = stage(model, target.with_name("shown"))
    _run(script, [*first, shown, *options], target, phase=f"convert {gguf_type}", log=log, report=report)
    shutil.rmtree(shown)


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


def stage(folder: Path, target: Path) -> Path:
    """Make a folder that shows a model's known files, each as a link, and nothing else.

    Args:
        folder: The model or adapter.
        target: The folder to make; what is there is removed first.

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
    """Run a converter."""
    part = target.with_name(f"part-{target.name}")
    started = 0.0

    def on_line(line: str) -> None:
        nonlocal started
        if found := _PERCENT.search(line):
            now, percent = time.monotonic(), int(found[1])
            started = started or now
            left = (now - started) / percent * (100 - percent) if percent else 0.0
            report(Progress(phase, percent, 100, "percent", left))

    code = run_converter(script, [*arguments, "--outfile", part], log=log, on_line=on_line)
    if code != 0 or not part.is_file():
        fix = f"The whole output: {log}"
        if code == 0:
            raise Internal(f"{script.name} wrote no file:{tail(log)}", fix=fix, reason="CONVERTER_FAILED")
        raise process.failure(script.name, code, f":{tail(log)}", fix=fix, reason="CONVERTER_FAILED")
    part.replace(target)
