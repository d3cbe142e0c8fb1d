"""A GGUF file as a plain model folder in bf16, with a tokenizer that others read as transformers does."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.model_files.gguf import read_gguf
from web4lora_chassis.model_files.model_folder import named

from web4lora_trainer.broken_base import broken, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DIGITS_THEN_BYTES = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
"""GGUF pre-tokenizers that split digits one by one before splitting words as GPT-2 does."""


def import_gguf(path: Path, target: Path) -> None:
    """Dequantize a GGUF file into a model folder in bf16.

    Args:
        path: The GGUF.
        target: The folder to make.

    Raises:
        InvalidInput: It is no GGUF, or one that transformers can't read, or it lacks tensors.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    fix = "Use the model's original weights (a folder or a hub id)."
    try:
        splits_words_as = str(read_gguf(path).values.get("tokenizer.ggml.pre", ""))
        with _parsed_once():
            tokenizer = AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, trust_remote_code=False
            )
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
                trust_remote_code=False,
                output_loading_info=True,
            )
        model, found = loaded
    except InvalidInput as error:
        raise broken(error.message, fix, "GGUF_BROKEN") from error
    except Exception as error:  # whatever transformers meets in a file that is not as it expects
        raise broken(
            f"{path.name} can't be imported: {first_line(error)}", fix, "GGUF_UNSUPPORTED"
        ) from error
    if lacking := [*found["missing_keys"], *(str(entry[0]) for entry in found["mismatched_keys"])]:
        raise broken(
            f"{path.name} lacks {named(lacking)}, or has it in another shape: it would be random.",
            "Fetch the file again, or use the model's original weights.",
        )
    # The weights are plain numbers now; without this, saving refuses.
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.__dict__.update(hf_quantizer=None, is_quantized=False)
    target.mkdir(parents=True)
    model.save_pretrained(target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("_model_name_or_path", None)
    _write_json(target / "config.json", config)
    _save_tokenizer(tokenizer, splits_words_as, target)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Have the gguf package do once what transformers asks it for again and again.

    That is the file, for configuration, tokenizer and weights, each token of the vocabulary taken apart in
    Python; and the table of tensor names, for each of the model's modules.
    """
    import gguf

    before = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, made in before.items():
        setattr(gguf, name, functools.lru_cache(maxsize=1)(made))
    try:
        yield
    finally:
        for name, made in before.items():
            setattr(gguf, name, made)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, pre: str, target: Path) -> None:
    """Write the tokenizer's files so that transformers 4 and 5 and llama.cpp's converter read the same."""
    from tokenizers import Tokenizer, pre_tokenizers

    fast: Tokenizer = tokenizer.backend_tokenizer
    if pre in _DIGITS_THEN_BYTES:
        # transformers' GGUF import forgets this step, and "   3" then gives other tokens than llama.cpp's.
        fast.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    fast.save(str(target / "tokenizer.json"))
    special = {
        name: str(getattr(tokenizer, name))
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        if getattr(tokenizer, name) is not None
    }
    config: dict[str, Any] = {
        **special,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _context_length(target),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(target / "tokenizer_config.json", config)
    _write_json(target / "special_tokens_map.json", special)
    if isinstance(tokenizer.chat_template, str):
        (target / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def _context_length(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config.get("max_position_embeddings", 2048))


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
