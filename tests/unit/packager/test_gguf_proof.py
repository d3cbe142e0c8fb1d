"""The proof of a merged GGUF: it tells base plus adapter from anything else, and nothing is not enough."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from web4lora_chassis.errors import DataLoss
from web4lora_chassis.model_files.gguf import read_gguf
from web4lora_llamacpp import LlamaCpp
from web4lora_packager.convert import convert, prove
from web4lora_packager.layout import read_layout
from web4lora_packager.merge import Merge

from tests import tiny_llama, trained_base

pytest.importorskip("torch")
pytest.importorskip("peft")
pytestmark = pytest.mark.timeout(600)
EMBEDDING = "model.embed_tokens.weight"


class Made:
    """A base whose head is its embedding, and an adapter that trained the embedding whole: so they part."""

    def __init__(self, llama: LlamaCpp, folder: Path) -> None:
        self.llama, self.folder = llama, folder
        self.base = tiny_llama.write_base(folder / "base")
        embedding = load_file(self.base / "model.safetensors")[EMBEDDING].astype(np.float32)
        self.adapter = tiny_llama.write_adapter(
            folder / "adapter", self.base,
            modules_to_save=["embed_tokens"], extra={f"base_model.model.{EMBEDDING}": embedding * 1.25},
        )  # fmt: skip
        self.layout = read_layout(self.base, self.adapter, folder)

    def convert(self, adapter: Path, target: Path, gguf_type: str = "F16") -> Any:
        return convert(
            self.llama, self.base, target,
            gguf_type=gguf_type, name="tiny", merge=Merge(self.base, adapter, self.layout),
            log=self.folder / "log", report=lambda _: None,
        )  # fmt: skip

    def prove(self, gguf: Path) -> float:
        merge = Merge(self.base, self.adapter, self.layout)
        return prove(self.llama, merge, gguf, log=self.folder / "log", report=lambda _: None)


@pytest.fixture(scope="module")
def made(llama_cpp: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(llama_cpp, tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def right(made: Made) -> Path:
    target = made.folder / "right.gguf"
    converted = made.convert(made.adapter, target)
    assert converted.merged.merged_tensors == 9
    assert 0 < converted.merged.rounding_error < 0.005
    return target


def test_base_plus_adapter_is_proved_a_parted_head_too(made: Made, right: Path) -> None:
    assert "output.weight" in read_gguf(right).shapes
    assert 0 < made.prove(right) < 0.005


@pytest.mark.parametrize("fault", ["alpha doubled", "adapter zeroed"])
def test_another_adapter_is_told(made: Made, tmp_path: Path, fault: str) -> None:
    wrong = shutil.copytree(made.adapter, tmp_path / "wrong")
    if fault == "alpha doubled":
        config = json.loads((wrong / "adapter_config.json").read_text())
        (wrong / "adapter_config.json").write_text(
            json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]})
        )
    else:
        tensors = load_file(wrong / "adapter_model.safetensors")
        zeroed = {name: value if "embed" in name else np.zeros_like(value) for name, value in tensors.items()}
        save_file(zeroed, wrong / "adapter_model.safetensors")
    made.convert(wrong, tmp_path / "wrong.gguf")
    with pytest.raises(DataLoss, match=r"attn_\w+\.weight is off by .* from what PEFT makes of it"):
        made.prove(tmp_path / "wrong.gguf")


@pytest.mark.parametrize("tensor", ["blk.1.attn_q.weight", "blk.0.ffn_up.weight", "output.weight"])
def test_bytes_that_were_changed_are_told(made: Made, right: Path, tmp_path: Path, tensor: str) -> None:
    shutil.copyfile(right, tmp_path / "changed.gguf")
    header = read_gguf(right)
    place = next(each for each in header.tensors if each.name == tensor)
    with (tmp_path / "changed.gguf").open("r+b") as file:
        file.seek(header.data_at + place.offset + 1)
        file.write(b"\x3f")  # the sign and exponent of the first value
    with pytest.raises(DataLoss, match=tensor):
        made.prove(tmp_path / "changed.gguf")


def test_a_comparison_of_nothing_fails(made: Made, right: Path) -> None:
    from web4lora_packager.gguf_proof import Expected

    expected = Expected(made.base, made.adapter)
    header = read_gguf(right)
    types = {"F16": np.float16, "F32": np.float32}
    # As if the converter had never asked for the expected tensors: the file's own data stand for them.
    own = {
        each.name: np.memmap(
            right, types[each.type], "r", header.data_at + each.offset, tuple(reversed(each.shape))
        ).astype(np.float32)
        for each in header.tensors
    }
    with pytest.raises(DataLoss, match="which nothing was compared with"):
        expected.compare(right, own, lambda lazy: lazy)


def test_a_weight_that_does_not_fit_f16_is_told_before_a_file_is_made(made: Made, tmp_path: Path) -> None:
    wide = shutil.copytree(made.adapter, tmp_path / "wide")
    tensors = load_file(wide / "adapter_model.safetensors")
    tensors[f"base_model.model.{EMBEDDING}"][0, 0] = 70000.0
    save_file(tensors, wide / "adapter_model.safetensors")
    target = tmp_path / "wide.gguf"
    converted = convert(
        made.llama, made.base, target,
        gguf_type="F16", name="tiny", merge=Merge(made.base, wide, made.layout), require_f16=True,
        log=tmp_path / "log", report=lambda _: None,
    )  # fmt: skip
    assert converted is None
    assert [path.name for path in tmp_path.iterdir() if "gguf" in path.name] == []
    assert made.convert(wide, target, "BF16").merged.max_abs_weight == 70000.0


_SIZES = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 4,
}  # fmt: skip
FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "qwen2": (_SIZES, ["q_proj", "k_proj", "o_proj", "down_proj"]),
    "mistral": ({**_SIZES, "tie_word_embeddings": False}, ["q_proj", "k_proj", "v_proj"]),
    "gemma": ({**_SIZES, "head_dim": 64}, ["q_proj", "o_proj", "down_proj"]),
    "phi3": ({**_SIZES, "pad_token_id": 2}, ["qkv_proj", "gate_up_proj"]),
    "gpt2": (
        {
            "n_embd": 256,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "n_ctx": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        ["c_attn", "c_proj", "c_fc"],
    ),
}
"""Sizes, and what is trained. Qwen2 has biases, which no adapter touches; Mistral has a head of its own here;
Gemma's norms are stored less one; Phi-3's projections are fused; GPT-2's weights are stored as (in, out)."""


@pytest.mark.parametrize("family", FAMILIES)
def test_it_holds_for_other_families_and_tells_a_changed_value(
    llama_cpp: LlamaCpp, tmp_path: Path, family: str
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    sizes, targets = FAMILIES[family]
    # llama.cpp knows no pre-tokenizer of the tiny one's, which GPT-2's kind needs.
    write = trained_base.write_base if family == "gpt2" else tiny_llama.write_base
    base, adapter = write(tmp_path / "base"), tmp_path / "adapter"
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", **tokenizer})  # Phi-3's converter looks for it
    )
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(family, **sizes, vocab_size=vocabulary)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(base)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(adapter)
    merge = Merge(base, adapter, read_layout(base, adapter, tmp_path))
    target = tmp_path / "merged.gguf"
    options: Any = {"log": tmp_path / "log", "report": lambda _: None}
    made = convert(llama_cpp, base, target, gguf_type="F16", name="tiny", merge=merge, **options)
    assert made is not None
    assert prove(llama_cpp, merge, target, **options) > 0
    header = read_gguf(target)
    touched = next(
        each for each in header.tensors if ".attn_q" in each.name and each.name.endswith(".weight")
    )
    values = np.memmap(
        target, np.float16, "r+", header.data_at + touched.offset, (int(np.prod(touched.shape)),)
    )
    values[:: touched.shape[0]] += np.float16(0.25)  # the first of each row
    values.flush()
    with pytest.raises(DataLoss, match=touched.name):
        prove(llama_cpp, merge, target, **options)
