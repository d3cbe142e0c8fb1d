"""What llama.cpp makes of a base model, asked before training: its converter writes the vocabulary alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from web4lora_chassis.errors import FailedPrecondition, OutOfMemory
from web4lora_chassis.model_files.gguf import read_gguf
from web4lora_llamacpp import SDIST, run_converter

from web4lora_trainer.decoder import Decoder

_HASH = re.compile(r"chkhsh:\s+([0-9a-f]{8})")
_ARCHITECTURE = re.compile(r"Model (\S+) is not supported")
_CAUSE = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception))\b:? ?(.*)")
_NO_SUCH_TOKENIZER = "BPE pre-tokenizer was not recognized"
_LINES_KEPT = 400
_VOCABULARIES_KEPT = 20


def kept_vocabulary(source: Path, decoder: Decoder, name: str, work_dir: Path, kept: Path) -> Path:
    """Return the GGUF of `write_vocabulary`, made once for a base, its name and a version of llama.cpp.

    Args:
        source: See `write_vocabulary`.
        decoder: See there.
        name: See there.
        work_dir: See there.
        kept: Folder in which they are kept; a few megabytes each, the last used of them.
    """
    path = kept / f"{_digest(decoder, name)}.gguf"
    if path.is_file():
        path.touch()
        return path
    made = write_vocabulary(source, decoder, name, work_dir)
    kept.mkdir(parents=True, exist_ok=True)
    other = path.with_name(f"{path.name}.{os.getpid()}")
    shutil.move(made, other)
    other.replace(path)
    for old in sorted(kept.glob("*.gguf"), key=lambda found: found.stat().st_mtime)[:-_VOCABULARIES_KEPT]:
        old.unlink(missing_ok=True)
    return path


def write_vocabulary(source: Path, decoder: Decoder, name: str, work_dir: Path) -> Path:
    """Let llama.cpp's converter read a base model and write its tokenizer as a GGUF.

    Args:
        source: llama.cpp's source.
        decoder: The base model; the converter sees those of its files alone that make up the model.
        name: The base model's name: llama.cpp takes the properties of some tokens from it.
        work_dir: Where the GGUF, and the converter's log, are written.

    Returns:
        The GGUF: a tokenizer and no weights.

    Raises:
        FailedPrecondition: llama.cpp knows no such architecture or tokenizer, or can't read it.
        OutOfMemory: The converter was killed.
    """
    folder = work_dir / "vocabulary"
    shutil.rmtree(folder, ignore_errors=True)
    model = folder / "base"
    model.mkdir(parents=True)
    for file_name, path in decoder.files().items():
        (model / file_name).symlink_to(path.resolve())
    target, lines = folder / "vocabulary.gguf", list[str]()
    code = run_converter(
        source / "convert_hf_to_gguf.py",
        [model, "--vocab-only", "--outfile", target, "--model-name", name],
        log=work_dir / "converter.log",
        on_line=lambda line: lines.append(line) if len(lines) < _LINES_KEPT else None,
    )
    if code == -9:
        raise OutOfMemory("llama.cpp's converter was killed, most likely because memory ran out.")
    if code != 0 or not target.is_file():
        raise _unknown(lines, work_dir / "converter.log")
    return target


def _digest(decoder: Decoder, name: str) -> str:
    """Return the digest of all that the converter reads for a vocabulary: no weights, but their headers."""
    weights = {shard.path.name for shard in decoder.shards}
    files = {
        file_name: hashlib.sha256(path.read_bytes()).hexdigest()
        for file_name, path in decoder.files().items()
        if file_name not in weights
    }
    tensors = sorted((tensor.name, tensor.dtype, tensor.shape) for tensor in decoder.tensors.values())
    read = [SDIST.commit, name, sorted(weights), files, tensors]
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def require_place_for_head(vocabulary: Path, head: str) -> None:
    """Refuse a base whose output head llama.cpp has no tensor for: it would use the embedding in its place.

    Args:
        vocabulary: The base's vocabulary, as the converter wrote it.
        head: Name of the head's tensor, which is not the embedding.

    Raises:
        FailedPrecondition: The architecture has one tensor for both.
    """
    from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSOR, MODEL_TENSORS

    name = read_gguf(vocabulary).architecture
    known = {MODEL_ARCH_NAMES[kind]: tensors for kind, tensors in MODEL_TENSORS.items()}
    if MODEL_TENSOR.OUTPUT not in known.get(name, [MODEL_TENSOR.OUTPUT]):
        raise FailedPrecondition(
            f"The base has an output head of its own, {head}, and llama.cpp's {name} has one tensor for head "
            "and embedding: its GGUF would be another model than is trained.",
            fix="Choose a base model whose head is its embedding, as its makers published it.",
            reason="HEAD_NOT_CONVERTIBLE",
            metadata={"field": "base.model"},
        )


def _unknown(lines: Iterable[str], log: Path) -> FailedPrecondition:
    """Say in words why the converter gave up."""
    output = "\n".join(lines)
    version = f"llama.cpp {SDIST.commit}"
    if found := _ARCHITECTURE.search(output):
        text = f"{version} does not know the architecture {found[1]}."
        fix = "Choose a base model of an architecture that llama.cpp's converter knows."
    elif _NO_SUCH_TOKENIZER in output:
        found = _HASH.search(output)
        text = f"{version} does not know this tokenizer (pre-tokenizer hash {found[1] if found else '?'}…)"
        text += ": how tokenizer.json splits words, or which tokens it holds, is that of no model it knows."
        fix = "Take tokenizer.json as the model's makers publish it, or choose another base model."
    else:
        causes = [found for line in output.splitlines() if (found := _CAUSE.match(line))]
        cause = f"{causes[-1][1]}: {causes[-1][2]}"[:300] if causes else "it gives no reason"
        text = f"{version} can't convert this base model's tokenizer: {cause}"
        fix = f"Fetch the model's files again, or choose another base model. The converter's output: {log}"
    return FailedPrecondition(
        text, fix=fix, reason="BASE_NOT_CONVERTIBLE", metadata={"field": "base.model", "log": log}
    )
