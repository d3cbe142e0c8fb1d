"""Small bases of the odd kinds that users of other tools reported, weights random and few."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from tests.trained_base import CHATML, edit, write_base

NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system message here') }}{% endif %}" + CHATML
)
THINKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\\n' + m.content.split('</think>')[-1].lstrip() + '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def end_of_turn_is_not_eos(folder: Path) -> None:
    """Turns end with <|im_end|>, the tokenizer's eos is <|endoftext|>: a base model with a chat template."""
    ends = dict.fromkeys(("eos_token", "pad_token", "bos_token"), "<|endoftext|>")
    write_base(folder, **ends)
    ids = dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id"), 0)
    edit(folder / "config.json", lambda data: data.update(ids))
    edit(folder / "special_tokens_map.json", lambda data: data.update(ends))


def unknown_pre_tokenizer(folder: Path) -> None:
    """Words are split in a way that llama.cpp's converter does not know."""
    write_base(folder)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    steps: list[dict[str, Any]] = [{"type": "Punctuation", "behavior": "Isolated"}, byte_level]
    split = {"type": "Sequence", "pretokenizers": steps}
    edit(folder / "tokenizer.json", lambda data: data.update(pre_tokenizer=split))


def shard_missing(folder: Path) -> None:
    """Two shards by the index, the second never copied."""
    write_base(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    second = {name for name in tensors if ".layers.1." in name or name == "model.norm.weight"}
    first = {name: tensor for name, tensor in tensors.items() if name not in second}
    save_file(first, folder / _SHARDS[0], metadata={"format": "pt"})
    index = {name: _SHARDS[name in second] for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
