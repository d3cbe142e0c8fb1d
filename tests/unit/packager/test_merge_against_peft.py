"""Our merge against PEFT's own: the same weights, and the same answers as base plus adapter give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from web4lora_packager.assertion import assert_merged
from web4lora_packager.merge import merge

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "attention": ({}, {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "all linear layers": ({}, {"target_modules": "all-linear"}),
    "rank stabilized": ({}, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "patterns": (
        {},
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"v_proj": 2, "layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"q_proj": 3, r"layers\.0\..*up_proj": 9},
        },
    ),
    "head trained whole": ({}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied, head trained whole": (
        {"tie_word_embeddings": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "tied, embedding trained whole": (
        {"tie_word_embeddings": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "tied, LoRA on the head": ({"tie_word_embeddings": True}, {"target_modules": ["q_proj", "lm_head"]}),
    "GPT-2, weights the other way round": (
        {"model_type": "gpt2"},
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
}


def _model(dtype: Any, model_type: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    if model_type == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=96)
        return transformers.GPT2LMHeadModel(config).to(dtype).eval()
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, max_position_embeddings=64, **changes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def _trained(model: Any, lora: dict[str, Any]) -> Any:
    """Put an adapter on a model, every weight of it random."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=7, **lora)).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad:
                noise = torch.randn_like(weight, dtype=torch.float32) * 0.1
                weight.copy_(noise if "lora_" in name else weight.float() + noise)
    return adapted


def _merged(tmp_path: Path, adapted: Any) -> Path:
    base, adapter, target = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    adapted.save_pretrained(adapter, save_embedding_layers=False)
    merge(base, adapter, target, lambda _: None)
    return target


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_are_those_of_base_plus_adapter(tmp_path: Path, variant: str) -> None:
    shape, lora = VARIANTS[variant]
    model = _model(torch.float32, **shape)
    model.save_pretrained(tmp_path / "base")
    adapted = _trained(model, lora)
    tokens = torch.arange(40)[None] * 7 % 96
    with torch.no_grad():
        expected = adapted(tokens).logits
    target = _merged(tmp_path, adapted)
    merged = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        found, before = merged(tokens).logits, base(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 0.01  # the adapter shows
    assert assert_merged(tmp_path / "base", tmp_path / "adapter", target) < 1e-5


@pytest.mark.parametrize("variant", ["attention", "patterns"])
def test_bfloat16_weights_are_within_one_rounding_of_peft(tmp_path: Path, variant: str) -> None:
    shape, lora = VARIANTS[variant]
    model = _model(torch.bfloat16, **shape)
    model.save_pretrained(tmp_path / "base")
    adapted = _trained(model, lora)
    target = _merged(tmp_path, adapted)
    theirs = {
        name: tensor.float().numpy() for name, tensor in adapted.merge_and_unload().state_dict().items()
    }
    ours = load_file(target / "model.safetensors")
    assert ours
    for name, tensor in ours.items():
        step = 2.0**-7 * np.abs(theirs[name]) + 2.0**-10  # PEFT rounds the update, then the sum
        assert (np.abs(tensor.astype(np.float32) - theirs[name]) <= step).all(), name
