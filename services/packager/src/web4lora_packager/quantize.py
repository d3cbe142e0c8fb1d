"""Quantizes a 16-bit GGUF with llama-quantize, and makes the importance matrix it may use."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

from web4lora_chassis import process
from web4lora_chassis.dataset import Problem, Row, check_rows
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.jobs import Progress
from web4lora_llamacpp import LlamaCpp, run_tool, tail
from web4lora_llamacpp.converter import environment

from web4lora_packager.chat_template import Tokenizer
from web4lora_packager.hybrid import write_hybrid

_TENSOR = re.compile(r"\[\s*(\d+)/\s*(\d+)\]\s+\S+\s+-\s+\[([\d,\s]+)\]")
_CHUNKS = re.compile(r"computing over (\d+) chunks.*n_seq=(\d+)")
_PASS = re.compile(r"([\d.]+) seconds per pass")
_CHUNK_TOKENS = 512
_MOST_CHARACTERS_PER_TOKEN = 8  # of a large vocabulary, over a whole text


def quantize(
    llama: LlamaCpp,
    reference: Path,
    target: Path,
    *,
    quantization: str,
    parameters: int,
    matrix: Path | None,
    taken: Mapping[str, Path] | None = None,
    log: Path,
    report: Callable[[Progress], None],
) -> None:
    """Quantize a GGUF file.

    Args:
        llama: Brings llama-quantize.
        reference: The 16-bit GGUF.
        target: The file to write; replaced at once when done.
        quantization: A type that `web4lora_chassis.pipeline.package` knows.
        parameters: Number of weights in the file, for the time left.
        matrix: An importance matrix, if any.
        taken: Tensors that another GGUF has as quantizing would make them, each with that file: see `reuse`.
        log: Its output is appended here.
        report: Takes progress: phase "quantize <type>", in tensors.

    Raises:
        Internal: llama-quantize failed; the message has its last lines.
        OutOfMemory: It was killed.
    """
    phase = f"quantize {quantization}"
    report(Progress(phase))
    started, elements = time.monotonic(), 0

    def on_line(line: str) -> None:
        nonlocal elements
        if found := _TENSOR.search(line):
            # Printed when a tensor starts: those before it are done, and time goes by weights.
            left = (time.monotonic() - started) / elements * (parameters - elements) if elements else 0.0
            report(Progress(phase, int(found[1]) - 1, int(found[2]), "tensors", max(0.0, left)))
            elements += prod(int(size) for size in found[3].split(","))

    part, hybrid = target.with_name(f"part-{target.name}"), target.with_name(f"hybrid-{target.name}")
    source = reference
    if taken:
        write_hybrid(reference, taken, hybrid)
        source = hybrid
    # By its name alone: llama-quantize writes that into the file, and our folders are nobody else's business.
    options = ["--imatrix", matrix.name] if matrix else []
    command: list[str | Path] = [
        llama.quantize, *options, source.absolute(), part.absolute(), quantization,
    ]  # fmt: skip
    cwd = matrix.parent if matrix else None
    code = run_tool(command, log, on_line, env=environment(target.parent), cwd=cwd)
    _check(code, "llama-quantize", log)
    hybrid.unlink(missing_ok=True)
    part.replace(target)


def importance_matrix(
    llama: LlamaCpp,
    reference: Path,
    text: Path,
    target: Path,
    *,
    chunks: int,
    log: Path,
    report: Callable[[Progress], None],
) -> None:
    """Measure which weights matter for a text.

    Args:
        llama: Brings llama-imatrix.
        reference: The 16-bit GGUF.
        text: Conversations as the model reads them, see `calibration_text`.
        target: The file to write; replaced at once when done.
        chunks: How much of the text is read, in chunks of 512 tokens.
        log: Its output is appended here.
        report: Takes progress: phase "importance matrix", in chunks of 512 tokens, with
            the time left as it was after the first ones.

    Raises:
        Internal: llama-imatrix failed; the message has its last lines.
        OutOfMemory: It was killed.
    """
    phase = "importance matrix"
    report(Progress(phase))
    total, chunks_per_pass = 0, 1

    def on_line(line: str) -> None:
        nonlocal total, chunks_per_pass
        if found := _CHUNKS.search(line):
            total, chunks_per_pass = int(found[1]), int(found[2])
            report(Progress(phase, 0, total, "chunks"))
        elif found := _PASS.search(line):  # told once, after the first pass
            left = float(found[1]) * (total / chunks_per_pass - 1)
            report(Progress(phase, chunks_per_pass, total, "chunks", left))

    part = target.with_name(f"part-{target.name}")
    command: list[str | Path] = [
        llama.imatrix, "-m", reference.absolute(), "-f", text.name, "-o", part.absolute(),
        "--parse-special", "--no-ppl", "-c", str(_CHUNK_TOKENS), "--chunks", str(chunks),
    ]  # fmt: skip
    # The text by its name alone, which the matrix keeps.
    code = run_tool(command, log, on_line, env=environment(target.parent), cwd=text.parent)
    _check(code, "llama-imatrix", log)
    part.replace(target)


def calibration_text(tokenizer: Tokenizer, files: Iterable[Path], chunks: int) -> str:
    """Return training conversations as the model reads them, spread over all files.

    Args:
        tokenizer: Brings the chat template.
        files: The training data's JSON Lines files; evaluation data stays out.
        chunks: Chunks of 512 tokens that the text should suffice for.

    Raises:
        InvalidInput: There is nothing to render, or a row is wrong.
    """
    rows = [_conversations(path) for path in files]
    pieces: list[str] = []
    characters = 0
    wanted = chunks * _CHUNK_TOKENS * _MOST_CHARACTERS_PER_TOKEN
    while rows and characters < wanted:  # a row of each file in turn
        row = rows.pop(0)
        conversation = next(row, None)
        if conversation is None:
            continue
        rows.append(row)
        messages = [message.to_json() for message in conversation.messages]
        pieces.append(tokenizer.render(messages, conversation.tools, answer_next=False))
        characters += len(pieces[-1])
    if not pieces:
        raise InvalidInput("The dataset has no training rows to make an importance matrix from.")
    return "".join(pieces)


def _conversations(path: Path) -> Iterator[Row]:
    """Yield the rows that were trained on, by the reader that the trainer reads them with."""
    for item in check_rows(path, path.name):
        if isinstance(item, Problem):
            raise InvalidInput(f"{item}.", reason="DATASET_INVALID")
        yield item


def _check(code: int, program: str, log: Path) -> None:
    if code != 0:
        raise process.failure(
            program, code, f":{tail(log)}", fix=f"The whole output: {log}", reason="QUANTIZE_FAILED"
        )
