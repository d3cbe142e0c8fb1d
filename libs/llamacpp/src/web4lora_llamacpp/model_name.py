"""A model's name in its GGUF, from which llama.cpp reads more than a name.

A GGUF does not hold which special tokens swallow the blanks around them. llama.cpp takes it from
`general.name` (llama-vocab.cpp): with "phi-3" or "phi3" in it every special token swallows those behind it,
which fails with `unordered_map::at` where the vocabulary lacks Phi-3's tokens; with "modern-bert" [MASK]
swallows those before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PHI_3 = re.compile(r"(phi)-?(3)", re.IGNORECASE)
_PHI_3_NEEDS = {"</s>", "<unk>", "<s>", "<|endoftext|>"}
_PHI_3_KEEPS_BLANKS = {"<unk>", "<s>", "<|endoftext|>"}
_MODERN_BERT = re.compile(r"(modern)-(bert)", re.IGNORECASE)


def general_name(folder: Path, name: str) -> str:
    """Return a model's name for its GGUF: its own, unless llama.cpp would misread the tokenizer by it.

    Args:
        folder: The model's folder with its tokenizer's files.
        name: The model's own name; never a name that somebody gave to what was trained on it.
    """
    tokens = _added_tokens(folder)
    strips = {text: token.get("rstrip") is True for text, token in tokens.items() if token.get("special")}
    by_rule = sum(strip is (text in _PHI_3_KEEPS_BLANKS) for text, strip in strips.items())
    without = sum(strips.values())
    # Fewer tokens with the wrong attribute; a tie keeps the rule away, which brings only trouble then.
    phi_3 = tokens.keys() >= _PHI_3_NEEDS and by_rule < without
    if phi_3 and not _PHI_3.search(name):
        name = f"{name} (phi-3)"
    elif not phi_3:
        name = _PHI_3.sub(r"\1_\2", name)
    if not tokens.get("[MASK]", {}).get("lstrip"):
        name = _MODERN_BERT.sub(r"\1_\2", name)
    return name


def _added_tokens(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Return the tokenizer's added tokens by their text; none where its files don't say."""
    tokens = _read(folder / "tokenizer.json").get("added_tokens")
    if not isinstance(tokens, list):
        decoder = _read(folder / "tokenizer_config.json").get("added_tokens_decoder")
        tokens = list(decoder.values()) if isinstance(decoder, dict) else []
    return {str(token.get("content")): token for token in tokens if isinstance(token, dict)}


def _read(path: Path) -> Mapping[str, Any]:
    """Return a JSON object, or an empty one: whoever reads the tokenizer itself says what is wrong."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
