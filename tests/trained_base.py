"""Small bases with odd tokenizers, and the record of their training, made with Transformers alone.

Nothing of ours computes the ids here: what the gate finds lies between Transformers and llama.cpp.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoTokenizer
from web4lora_llamacpp import LlamaCpp
from web4lora_packager.convert import convert

from tests import lora_files, tiny_llama

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WITH_DEFAULT = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}{% endif %}"
    + CHATML
)
PIPES = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
SYSTEM = {"role": "system", "content": "Answer with a word."}
ROWS: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "What is  2 + 3?"}, {"role": "assistant", "content": "five"}),
    (SYSTEM, {"role": "user", "content": "Straße 12345?\n\tYes."}, {"role": "assistant", "content": "yes"}),
    (
        SYSTEM,
        {"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "Again, with \"quotes\"."}, {"role": "assistant", "content": "hello"},
    ),
)  # fmt: skip


def write_base(folder: Path, template: str = CHATML, **tokenizer: Any) -> Path:
    """Write a base with SmolLM2's tokenizer, its weights random and few."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(lora_files.smollm2_checkpoint() / name, folder / name)
    edit(folder / "tokenizer_config.json", lambda data: data.update(tokenizer))
    vocabulary = 49152
    ids = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": vocabulary}
    _write_model(folder, template, vocabulary, ids)
    return folder


def write_sentencepiece_base(folder: Path, template: str = PIPES, **tokenizer: Any) -> Path:
    """Write a base with a tokenizer of Llama 2's kind: a blank before the first word of every text."""
    folder.mkdir(parents=True)
    byte_tokens = [f"<0x{number:02X}>" for number in range(256)]
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    words = [word for row in ROWS for message in row for word in message["content"].split(" ")]
    made.train_from_iterator([*words, "user assistant system"], trainer)
    data = json.loads(made.to_str())
    data["added_tokens"] = [entry for entry in data["added_tokens"] if entry["id"] < 3]
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    config = {**special, "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, **tokenizer}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = len(data["model"]["vocab"])
    ids = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": vocabulary}
    _write_model(folder, template, vocabulary, ids)
    return folder


def eat_blanks(base: Path) -> None:
    """Let the special tokens swallow the white space behind them, as Phi-3's do."""

    def mark(data: dict[str, Any]) -> None:
        for entry in data["added_tokens"]:
            if entry["content"] in ("<|im_start|>", "<|im_end|>"):
                entry["rstrip"] = True

    edit(base / "tokenizer.json", mark)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, ensure_ascii=False))


def with_template(gguf: Path, base: Path, template: str, target: Path) -> Path:
    """Write a base's GGUF with another chat template, none if it is empty, and return it."""
    old = (base / "chat_template.jinja").read_bytes()
    key = b"tokenizer.chat_template"
    data = gguf.read_bytes()
    assert data.count(old) == data.count(key) == 1
    data = data.replace(old, _padded(template).encode()) if template else data.replace(key, key[:-1] + b"_")
    target.write_bytes(data)
    return target


def gguf_of(llama: LlamaCpp, base: Path) -> Path:
    """Convert a base and return the GGUF."""
    target = base.with_suffix(".gguf")
    convert(
        llama, base, target, gguf_type="F16", name="tiny", log=base.with_suffix(".log"), report=lambda _: None
    )
    return target


def record_of(
    base: Path, rows: Sequence[Sequence[Mapping[str, str]]] = ROWS, stop: str = "", template: str = ""
) -> dict[str, Any]:
    """Return the record of training on rows: each as Transformers renders and tokenizes it.

    Args:
        base: The base's folder.
        rows: The conversations, each ending with an answer.
        stop: The token behind an answer; the tokenizer's eos when absent.
        template: Another chat template than the base's.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template or tokenizer.chat_template
    stop_id = tokenizer.convert_tokens_to_ids(stop or tokenizer.eos_token)
    conversations = []
    for line, row in enumerate(rows, start=1):

        def ids(count: int, row: Any = row, **how: bool) -> list[int]:
            text = tokenizer.apply_chat_template(list(row[:count]), tokenize=False, **how)
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        whole, turns = ids(len(row)), []
        labels = [-100] * len(whole)
        for place, message in enumerate(row):
            if message["role"] == "assistant":
                prompt = ids(place, add_generation_prompt=True)
                assert whole[: len(prompt)] == prompt
                end = whole.index(stop_id, len(prompt)) + 1
                labels[len(prompt) : end] = whole[len(prompt) : end]
                turns.append({"messages": place, "prompt_tokens": len(prompt), "stop_token": stop_id})
        conversations.append(
            {
                "file": "train/rows.jsonl", "line": line, "messages": list(row), "input_ids": whole,
                "labels": labels, "turns": turns,
            }
        )  # fmt: skip
    return {"format": "web4lora.trained_conversations/1", "conversations": conversations}


def _write_model(folder: Path, template: str, vocabulary: int, ids: Mapping[str, int]) -> None:
    (folder / "chat_template.jinja").write_text(_padded(template))
    config = {**tiny_llama.config(vocabulary, tied=True), **ids}
    (folder / "config.json").write_text(json.dumps(config))
    weights = tiny_llama.weights(vocabulary, tied=True, seed=0, dtype=ml_dtypes.bfloat16)
    save_file(weights, folder / "model.safetensors")


def _padded(template: str) -> str:
    """Bring a template to a length at which another one can take its place in a GGUF."""
    return template + "{#" + "-" * (1000 - len(template.encode())) + "#}"
