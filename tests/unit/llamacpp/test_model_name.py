"""A model's name in its GGUF: its own, unless llama.cpp would read other token attributes from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from web4lora_llamacpp import general_name

PHI = {"<unk>": False, "<s>": False, "</s>": True, "<|endoftext|>": False, "<|end|>": True, "<|user|>": True}
LLAMA = {"<unk>": False, "<s>": False, "</s>": False, "<|endoftext|>": False}
CHATML = {"<|im_start|>": False, "<|im_end|>": False, "<|endoftext|>": False}


def _tokens(strips: dict[str, bool]) -> list[dict[str, Any]]:
    return [
        {"id": number, "content": text, "special": True, "rstrip": strip}
        for number, (text, strip) in enumerate(strips.items())
    ]


@pytest.mark.parametrize(
    ("strips", "name", "wanted"),
    [
        (CHATML, "SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
        (CHATML, "phi3-helper", "phi_3-helper"),
        (CHATML, "my-PHI-3-like", "my-PHI_3-like"),
        (LLAMA, "phi-3-of-llama", "phi_3-of-llama"),  # no crash, but blanks that were trained would be eaten
        (PHI, "Phi-3-mini-4k-instruct", "Phi-3-mini-4k-instruct"),
        (PHI, "phi3", "phi3"),
        (PHI, "base", "base (phi-3)"),
        (CHATML, "phi-4-mini", "phi-4-mini"),
        (CHATML, "modern-bert-like", "modern_bert-like"),
        ({}, "phi-3", "phi_3"),
    ],
)
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_the_name_fits_the_tokenizer(
    tmp_path: Path, strips: dict[str, bool], name: str, wanted: str, file: str
) -> None:
    tokens = _tokens(strips)
    data: dict[str, Any] = {"added_tokens": tokens}
    if file != "tokenizer.json":
        data = {"added_tokens_decoder": {str(token["id"]): token for token in tokens}}
    (tmp_path / file).write_text(json.dumps(data))
    assert general_name(tmp_path, name) == wanted


@pytest.mark.parametrize("text", ["", "[]", '{"added_tokens": 3}', '{"added_tokens": [1, null]}'])
def test_an_odd_tokenizer_takes_nothing_from_the_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    assert general_name(tmp_path, "plain") == "plain"
    assert general_name(tmp_path, "phi3") == "phi_3"
