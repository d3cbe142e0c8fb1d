"""What is no model that a runtime could answer with: refused before it is moved anywhere."""

from __future__ import annotations

from pathlib import Path

from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.model_files.gguf import GgufHeader


def require_model(path: Path, header: GgufHeader) -> None:
    """Refuse a GGUF that no runtime could answer with, by what it is.

    Args:
        path: The file.
        header: Its header.

    Raises:
        InvalidInput: It is cut off, or a part of a model: an adapter, a vocabulary, one of several files.
    """
    kind = header.kind
    pieces = header.number("split.count")
    size = path.stat().st_size
    problem = fix = ""
    if kind == "adapter":
        problem = "is a LoRA adapter, not a model"
        fix = "Serve it on its base: `web4lora deploy BASE.gguf --name NAME --adapter NAME=ADAPTER.gguf`."
    elif kind in ("mmproj", "imatrix") or header.architecture == "clip":
        problem = f"is no language model: it holds {kind if kind != 'model' else header.architecture} data"
        fix = "Name the GGUF of the language model."
    elif pieces > 1:
        problem = f"is file {header.number('split.no') + 1} of {pieces} of a split model"
        fix = "Make one file of them first: llama-gguf-split --merge FIRST-FILE MERGED.gguf"
    elif not header.parameters:
        problem, fix = "holds a vocabulary and no weights", "Name the GGUF of the whole model."
    elif size < header.end_bytes:
        problem = f"is cut off: it has {size:,} of {header.end_bytes:,} bytes"
        fix = "Copy or download it again."
    if problem:
        raise InvalidInput(f"The GGUF {problem}.", fix=fix, reason="NOT_A_WHOLE_MODEL")
