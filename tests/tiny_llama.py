"""A Llama of a few hundred thousand weights with a tokenizer of its own, made in a second, for tests.

It talks nonsense, but it is whole: llama.cpp's converter, quantizer and server take it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import sentencepiece
from numpy.typing import NDArray
from safetensors.numpy import save_file

CHAT_TEMPLATE = """\
{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are "tiny".<|im_end|>\n' }}{% endif %}\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}\
{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
SYSTEM = 'You are "tiny".'
HIDDEN, LAYERS, HEADS, INNER = 256, 2, 4, 512
_SPECIAL = ["<|im_start|>", "<|im_end|>"]
_TEXT = """The quick brown fox jumps over the lazy dog. Say hello in one sentence.
Create an agent named atlas.
Numbers: 0 1 2 3 4 5 6 7 8 9. Punctuation: , . ; : ! ? ( ) [ ] { } " ' - _ + = * / < > | & % $ # @
"""


def write_base(folder: Path, *, tied: bool = True, seed: int = 0, dtype: Any = ml_dtypes.bfloat16) -> Path:
    """Write the whole checkpoint into a new folder, and return the folder."""
    folder.mkdir(parents=True)
    vocabulary = _write_tokenizer(folder)
    save_file(weights(vocabulary, tied=tied, seed=seed, dtype=dtype), folder / "model.safetensors")
    _write_json(folder / "config.json", config(vocabulary, tied=tied))
    _write_json(folder / "generation_config.json", {"eos_token_id": [4, 2]})
    (folder / "LICENSE").write_text('The "tiny" licence.\n\nDo as you like.\n')
    return folder


def config(vocabulary: int, *, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "head_dim": HIDDEN // HEADS,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": tied,
        "vocab_size": vocabulary,
        "bos_token_id": 1,
        "eos_token_id": 4,
        "hidden_act": "silu",
        "dtype": "bfloat16",
    }


def weights(vocabulary: int, *, tied: bool, seed: int, dtype: Any) -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(seed)
    keys = HIDDEN // 2

    def matrix(rows: int, columns: int) -> NDArray[Any]:
        return (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(dtype)

    tensors = {"model.embed_tokens.weight": matrix(vocabulary, HIDDEN)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        shapes = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (keys, HIDDEN),
            "self_attn.v_proj": (keys, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }
        tensors |= {f"{name}.{module}.weight": matrix(*shape) for module, shape in shapes.items()}
        tensors |= {
            f"{name}.{norm}.weight": np.ones(HIDDEN, dtype)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
    tensors["model.norm.weight"] = np.ones(HIDDEN, dtype)
    if not tied:
        tensors["lm_head.weight"] = matrix(vocabulary, HIDDEN)
    return tensors


def write_adapter(
    folder: Path,
    base: Path,
    *,
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    rank: int = 8,
    seed: int = 1,
    size: float = 0.05,
    extra: Mapping[str, NDArray[Any]] | None = None,
    **changes: Any,
) -> Path:
    """Write a random adapter for some modules of a base into a new folder, and return the folder."""
    from web4lora_chassis.model_files.model_folder import read_model_folder

    random = np.random.default_rng(seed)
    tensors: dict[str, NDArray[Any]] = {}
    for name, tensor in read_model_folder(base).tensors.items():
        module = name.removesuffix(".weight")
        if module.endswith(modules):
            down = random.standard_normal((rank, tensor.shape[1])) * size
            up = random.standard_normal((tensor.shape[0], rank)) * size
            tensors[f"base_model.model.{module}.lora_A.weight"] = down.astype(np.float32)
            tensors[f"base_model.model.{module}.lora_B.weight"] = up.astype(np.float32)
    folder.mkdir(parents=True)
    save_file({**tensors, **(extra or {})}, folder / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(modules),
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
    }
    _write_json(folder / "adapter_config.json", {**adapter, **changes})
    return folder


def _write_tokenizer(folder: Path) -> int:
    """Train a SentencePiece tokenizer on a few lines and write its files; return its number of tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=384,
        hard_vocab_limit=False,
        byte_fallback=True,
        user_defined_symbols=_SPECIAL,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    names = ["<unk>", "<s>", "</s>", *_SPECIAL]
    added = [{"id": processor.piece_to_id(name), "content": name, "special": True} for name in names]
    _write_json(folder / "tokenizer.json", {"version": "1.0", "added_tokens": added})
    tokenizer = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "add_bos_token": False}
    _write_json(folder / "tokenizer_config.json", tokenizer)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return int(processor.get_piece_size())


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2))
