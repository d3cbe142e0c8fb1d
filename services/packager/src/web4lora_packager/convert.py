"""Makes GGUFs of a checkpoint or an adapter with llama.cpp's own converters, in a process of their own."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from web4lora_chassis.errors import Internal, OutOfMemory
from web4lora_chassis.jobs import Progress
from web4lora_llamacpp import LlamaCpp, follow, tail

_PERCENT = re.compile(r"Writing:\s+(\d+)%")
_F16_MAX = 65504.0


def choose_type(asked: str, max_abs_weight: float) -> str:
    """Return the GGUF's 16-bit type.

    "auto" takes F16 when every weight fits its range, which trained models' weights do. F16 holds every
    bfloat16 value above 6e-5 exactly, and processors without bfloat16 instructions are faster with it: by
    1.45 for prompts and 1.15 for answers on an AVX2 machine, measured with SmolLM2-135M and llama-bench.

    Args:
        asked: auto, F16 or BF16.
        max_abs_weight: Largest absolute value of the weights.
    """
    if asked != "auto":
        return asked
    return "F16" if max_abs_weight <= _F16_MAX else "BF16"


def convert(
    llama: LlamaCpp,
    model: Path,
    target: Path,
    *,
    gguf_type: str,
    name: str,
    log: Path,
    report: Callable[[Progress], None],
) -> None:
    """Convert a checkpoint to one GGUF file.

    Args:
        llama: Brings the converter.
        model: The checkpoint's folder.
        target: The file to write; replaced at once when done.
        gguf_type: F16 or BF16.
        name: The model's name in the GGUF.
        log: The converter's output is appended here.
        report: Takes progress: phase "convert F16" or "convert BF16", in percent.

    Raises:
        Internal: The converter failed; the message has its last lines.
        OutOfMemory: It was killed.
    """
    report(Progress(f"convert {gguf_type}", message="reading the checkpoint"))
    options: list[str | Path] = ["--outtype", gguf_type.lower(), "--model-name", name]
    _run(llama.converter, model, options, target, phase=f"convert {gguf_type}", log=log, report=report)


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
        Internal: The converter failed; the message has its last lines.
        OutOfMemory: It was killed.
    """
    report(Progress("convert adapter"))
    options: list[str | Path] = ["--base", base, "--outtype", "f32"]
    _run(llama.adapter_converter, adapter, options, target, phase="convert adapter", log=log, report=report)


def _run(
    script: Path,
    source: Path,
    options: list[str | Path],
    target: Path,
    *,
    phase: str,
    log: Path,
    report: Callable[[Progress], None],
) -> None:
    """Run a converter on a folder."""
    part = target.with_name(f"part-{target.name}")
    started = 0.0

    def on_line(line: str) -> None:
        nonlocal started
        if found := _PERCENT.search(line):
            now, percent = time.monotonic(), int(found[1])
            started = started or now
            left = (now - started) / percent * (100 - percent) if percent else 0.0
            report(Progress(phase, percent, 100, "percent", left))

    command: list[str | Path] = [sys.executable, script, source, "--outfile", part, *options]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    code = follow(command, log, on_line, env=env)
    if code == -9:
        raise OutOfMemory(f"{script.name} was killed, most likely because memory ran out.")
    if code != 0 or not part.is_file():
        raise Internal(
            f"{script.name} failed with exit code {code}:{tail(log)}",
            fix=f"The whole output: {log}",
            reason="CONVERTER_FAILED",
        )
    part.replace(target)
