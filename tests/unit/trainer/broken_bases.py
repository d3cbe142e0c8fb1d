"""Ways in which a base model contradicts itself, each made from a whole one by a change of its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Break = Callable[[Path], object]
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(
        json.dumps({key: value for key, value in {**data, **changes}.items() if value is not None})
    )


def tensors(change: Callable[[dict[str, Any]], object]) -> Break:
    def apply(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def sharded(change: Callable[[Path, dict[str, str]], object]) -> Break:
    """Two shards and an index, then a change of the folder or of the index's map."""

    def apply(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        found = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        weight_map = {name: SECOND if ".layers.1." in name else FIRST for name in found}
        for file in (FIRST, SECOND):
            save_file(
                {name: tensor for name, tensor in found.items() if weight_map[name] == file},
                folder / file,
                metadata={"format": "pt"},
            )
        change(folder, weight_map)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return apply


def config(**changes: Any) -> Break:
    return lambda folder: edit(folder / "config.json", **changes)


def add_token(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    entry = {**data["added_tokens"][0], "id": 300, "content": "<|tool|>"}
    data["added_tokens"].append(entry)
    (folder / "tokenizer.json").write_text(json.dumps(data))


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def fill(name: str, value: float) -> Break:
    return tensors(lambda found: found[name].fill_(value))


def poison(found: dict[str, Any]) -> None:
    found["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")


def other_head(found: dict[str, Any]) -> None:
    found["lm_head.weight"] = found["model.embed_tokens.weight"].clone() * 2


def twice(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / SECOND).write_bytes((folder / FIRST).read_bytes())
    weight_map.update({name: FIRST for name in weight_map})
    weight_map["model.norm.weight"] = SECOND


def swapped(_: Path, weight_map: dict[str, str]) -> None:
    weight_map["model.norm.weight"] = SECOND


def no_index(folder: Path) -> None:
    sharded(lambda _, __: None)(folder)
    (folder / INDEX).unlink()


def drop(name: str) -> Break:
    return tensors(lambda found: found.pop(name))


def rename(found: dict[str, Any]) -> None:
    found["model.layers.0.self_attn.query.weight"] = found.pop("model.layers.0.self_attn.q_proj.weight")


def shorten(found: dict[str, Any]) -> None:
    found["model.embed_tokens.weight"] = found["model.embed_tokens.weight"][:290].clone()


def narrow(found: dict[str, Any]) -> None:
    found["model.layers.0.self_attn.q_proj.weight"] = found["model.layers.0.self_attn.q_proj.weight"][
        :16
    ].clone()


def to_bytes(found: dict[str, Any]) -> None:
    import torch

    found["model.norm.weight"] = found["model.norm.weight"].to(torch.int8)


BROKEN: dict[str, tuple[Break, str]] = {
    "shard missing": (
        sharded(lambda folder, _: (folder / SECOND).unlink()),
        rf"names {SECOND}, which .* lacks",
    ),
    "shard not in the index": (
        sharded(lambda folder, _: (folder / "model-00003-of-00003.safetensors").write_bytes(b"x")),
        "model-00003-of-00003.safetensors, which .* does not name",
    ),
    "no index": (no_index, "no model.safetensors.index.json"),
    "index beside a single file": (
        sharded(lambda folder, _: (folder / "model.safetensors").write_bytes(b"x")),
        "holds model.safetensors, which .* does not name",
    ),
    "tensor of the index not in its shard": (
        sharded(lambda _, names: names.update({"model.layers.9.mlp.up_proj.weight": FIRST})),
        "model.layers.9.mlp.up_proj.weight; model-00001.* has no such tensor",
    ),
    "tensor not in the index": (
        sharded(lambda _, names: names.pop("model.norm.weight")),
        "model.norm.weight, which",
    ),
    "index names the other shard": (sharded(swapped), "says that model.norm.weight lies in"),
    "tensor in two shards": (sharded(twice), "lies in two files"),
    "index names a file elsewhere": (
        sharded(lambda _, names: names.update({"model.norm.weight": "../model.safetensors"})),
        "no safetensors file here",
    ),
    "file cut off": (cut, "model.safetensors was cut off"),
    "tensor missing": (
        drop("model.layers.1.self_attn.k_proj.weight"),
        "lack model.layers.1.self_attn.k_proj.weight",
    ),
    "embedding missing": (drop("model.embed_tokens.weight"), "lack the embedding"),
    "tensor left over": (tensors(rename), "query|q_proj"),
    "fewer layers than stored": (config(num_hidden_layers=1), r"hold model.layers.1.*no place"),
    "more layers than stored": (config(num_hidden_layers=3), r"lack model.layers.2"),
    "matrix of another shape": (tensors(narrow), r"q_proj.weight has the shape \[16, 32\]; "),
    "vocab_size of others": (config(vocab_size=400), "vocab_size 400, .* has 300 rows"),
    "embedding of others": (tensors(shorten), "vocab_size 300, .* has 290 rows"),
    "untied, and no head": (config(tie_word_embeddings=False), "lack lm_head.weight"),
    "tied by the class alone": (config(tie_word_embeddings=None), "lack lm_head.weight"),
    "tied, with a head of its own": (tensors(other_head), "lm_head.weight has other values"),
    "token beyond the embedding": (add_token, r"'<\|tool\|>' has the id 300"),
    "eos beyond the embedding": (
        config(eos_token_id=300),
        "eos_token_id 300; the model has the tokens 0 to 299",
    ),
    "pad below zero": (config(pad_token_id=-3), "pad_token_id -3"),
    "generation's eos beyond": (
        lambda folder: edit(folder / "generation_config.json", eos_token_id=[2, 999]),
        "generation_config.json says eos_token_id 999",
    ),
    "eos that is no token": (
        lambda folder: edit(folder / "tokenizer_config.json", eos_token="<|end|>"),
        r"<\|end\|>",
    ),
    "not a number": (tensors(poison), "up_proj.weight holds weights that are infinite or not a number"),
    "infinite": (fill("model.norm.weight", float("inf")), "norm.weight holds weights that are infinite"),
    "embedding of zeros": (
        fill("model.embed_tokens.weight", 0.0),
        "embed_tokens.weight holds nothing but zeros",
    ),
    "matrix of zeros": (
        fill("model.layers.0.mlp.gate_proj.weight", 0.0),
        "gate_proj.weight holds nothing but zeros",
    ),
    "bytes for numbers": (tensors(to_bytes), "of type I8"),
    "unknown architecture": (config(model_type="nobody"), "can't make a model of"),
    "another class": (
        config(architectures=["MistralForCausalLM"]),
        "MistralForCausalLM, and its model_type 'llama'",
    ),
    "no architecture": (config(architectures=None), "names no `architectures`"),
    "a classifier": (
        config(architectures=["LlamaForSequenceClassification"]),
        "LlamaForSequenceClassification",
    ),
    "heads that don't divide": (
        config(num_key_value_heads=3, head_dim=None),
        "k_proj|num_key_value|can't make",
    ),
    "config that is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "can't be read as JSON",
    ),
    "tokenizer that is no JSON": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer"),
}
REMOTE = (
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
