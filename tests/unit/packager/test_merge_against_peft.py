"""Our merge against PEFT's own, over kinds of models: the same answers as base plus adapter give."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from web4lora_chassis.errors import DataLoss, FailedPrecondition
from web4lora_packager.adapter import Adapter, LoraConfig, LowRank
from web4lora_packager.layout import Layout, read_layout
from web4lora_packager.merge import merge

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from web4lora_packager.proof import prove  # noqa: E402 - only where torch is
from web4lora_packager.skeleton import describe  # noqa: E402

_SMALL = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64,
}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 96}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _SMALL,
    "llama, tied": {**_SMALL, "tie_word_embeddings": True},
    "gemma": {**_SMALL, "head_dim": 8, "pad_token_id": 0},
    "qwen2": {**_SMALL},
    "qwen2, tied": {**_SMALL, "tie_word_embeddings": True},
    "phi": _SMALL,
    "phi3": {**_SMALL, "pad_token_id": 0},
    "gpt2": {**_GPT2, "n_inner": 32},
}
_ALL = {"target_modules": "all-linear"}
ADAPTERS: dict[str, dict[str, Any]] = {
    "all linear": _ALL,
    "rank stabilized": {**_ALL, "use_rslora": True},
    "DoRA": {**_ALL, "use_dora": True},
    "patterns": {**_ALL, "rank_pattern": {r".*\.1\..*": 2}, "alpha_pattern": {r".*\.0\..*": 9}},
    "flag fan_in_fan_out": {**_ALL, "fan_in_fan_out": True},
    "no flag": {**_ALL, "fan_in_fan_out": False},
    "head whole": {"modules_to_save": ["lm_head"]},
    "embedding whole": {"modules_to_save": ["embed_tokens", "wte"]},
    "both whole": {"modules_to_save": ["embed_tokens", "wte", "lm_head"]},
    "LoRA on the head": {"extra_target": "lm_head"},
    "a norm whole": {**_ALL, "modules_to_save": ["norm", "final_layernorm", "ln_f"]},
}
_BASIC = {"gpt2": ["c_attn", "c_proj"], "phi3": ["qkv_proj", "o_proj"]}
CASES = [(family, kind) for family in FAMILIES for kind in ADAPTERS if (family, kind) != ("gpt2", "DoRA")]


def _model(family: str, dtype: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family.split(",")[0], **FAMILIES[family])
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


def _adapted(model: Any, family: str, kind: str) -> Any:
    """Put an adapter on a model, every weight of it random."""
    torch.manual_seed(1)
    options = dict(ADAPTERS[kind])
    extra = options.pop("extra_target", None)
    options.setdefault("target_modules", _BASIC.get(family, ["q_proj", "v_proj"]))
    if extra:
        options["target_modules"] = [*options["target_modules"], extra]
    if "modules_to_save" in options:
        there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        options["modules_to_save"] = [name for name in options["modules_to_save"] if name in there]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=7, **options)).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad:
                noise = torch.randn_like(weight, dtype=torch.float32) * 0.1
                weight.copy_(noise if "lora_A" in name or "lora_B" in name else weight.float() + noise)
    return adapted


def _train(folder: Path, family: str, kind: str, dtype: Any = None) -> Any:
    """Write base and adapter, and return the model with the adapter on it."""
    model = _model(family, dtype or torch.float32)
    model.save_pretrained(folder / "base")
    adapted = _adapted(model, family, kind)
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    written = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    written["fan_in_fan_out"] = ADAPTERS[kind].get("fan_in_fan_out", written["fan_in_fan_out"])
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(written))
    return adapted


def _merge(folder: Path, **changes: Any) -> None:
    layout = Layout.from_json(describe(folder / "base"))
    layout = dataclasses.replace(layout, **changes)
    merge(folder / "base", folder / "adapter", folder / "merged", layout, lambda _: None)


def _prove(folder: Path) -> dict[str, Any]:
    return prove(folder / "base", folder / "adapter", folder / "merged")


def _logits(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.arange(40)[None] * 7 % 96).logits


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_answers_are_those_of_base_plus_adapter(tmp_path: Path, family: str, kind: str) -> None:
    adapted = _train(tmp_path, family, kind)
    expected = _logits(adapted)
    _merge(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    found = _logits(load(tmp_path / "merged", dtype=torch.float32).eval())
    before = _logits(load(tmp_path / "base", dtype=torch.float32).eval())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 0.01  # the adapter shows
    assert _prove(tmp_path)["max_abs_error"] < 1e-5
    if kind != "LoRA on the head":  # merged in place, PEFT changes a tied embedding with its head
        torch.testing.assert_close(_logits(adapted.merge_and_unload()), found, rtol=1e-4, atol=1e-5)


def test_gpt2s_own_files_name_no_body(tmp_path: Path) -> None:
    expected = _logits(_train(tmp_path, "gpt2", "embedding whole"))
    file = tmp_path / "base" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    _merge(tmp_path)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(_logits(merged.eval()), expected, rtol=1e-4, atol=1e-5)
    assert _prove(tmp_path)["compared"] == 7


def test_dora_on_weights_stored_the_other_way_round_is_refused(tmp_path: Path) -> None:
    _train(tmp_path, "gpt2", "DoRA")
    with pytest.raises(FailedPrecondition, match=r"DoRA, and .*c_attn.weight is stored as \(in, out\)"):
        _merge(tmp_path)


@pytest.mark.parametrize("kind", ["all linear", "patterns", "DoRA"])
def test_bfloat16_weights_are_within_one_rounding_of_peft(tmp_path: Path, kind: str) -> None:
    adapted = _train(tmp_path, "llama", kind, torch.bfloat16)
    _merge(tmp_path)
    assert _prove(tmp_path)["compared"] == 14
    theirs = {
        name: tensor.float().numpy() for name, tensor in adapted.merge_and_unload().state_dict().items()
    }
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    assert ours
    for name, tensor in ours.items():
        step = 2.0**-7 * np.abs(theirs[name]) + 2.0**-10  # PEFT rounds the update, then the sum
        assert (np.abs(tensor.astype(np.float32) - theirs[name]) <= step).all(), name


@pytest.mark.parametrize(
    ("lost", "said"),
    [("layers.1.", "missing there"), ("layers.0.self_attn.q_proj.lora_", "q_proj.lora_A.weight is missing")],
)
def test_an_adapter_that_lacks_tensors_is_refused_when_it_is_read(
    tmp_path: Path, lost: str, said: str
) -> None:
    _train(tmp_path, "llama", "all linear")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    assert read_layout(base, adapter, tmp_path).tied == {}
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if lost not in name}, file)
    for weights in base.glob("*.safetensors"):  # headers are enough to tell
        header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
        size = weights.stat().st_size
        weights.write_bytes(weights.read_bytes()[:header] + bytes(size - header))
    with pytest.raises(FailedPrecondition, match=said) as caught:
        read_layout(base, adapter, tmp_path)
    assert caught.value.reason == "ADAPTER_MISFIT"


# Wrong merges, planted: the proof shares none of what is made wrong here.


def _caught(folder: Path) -> str:
    with pytest.raises(DataLoss) as caught:
        _prove(folder)
    assert caught.value.reason == "MERGE_WRONG"
    return caught.value.message


@pytest.mark.parametrize("family", ["gemma", "gpt2", "llama, tied"])
@pytest.mark.parametrize("kind", ["embedding whole"])
def test_an_embedding_merged_into_its_tied_head_is_caught(tmp_path: Path, family: str, kind: str) -> None:
    _train(tmp_path, family, kind)
    _merge(tmp_path, tied={})
    assert "lm_head.weight" in _caught(tmp_path)


def test_rows_of_another_length_than_dora_gave_them_are_caught(tmp_path: Path) -> None:
    _train(tmp_path, "llama", "DoRA")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    _merge(tmp_path)
    name = next(name for name in tensors if "magnitude" in name)
    save_file({**tensors, name: tensors[name] * 1.01}, file)
    assert name.split(".")[-2] in _caught(tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_square_weights_merged_the_wrong_way_round_are_caught(
    tmp_path: Path, family: str, dtype: str
) -> None:
    _train(tmp_path, family, "all linear", getattr(torch, dtype))
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(
            {
                **json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()),
                "target_modules": ["o_proj", "mlp.c_proj", "attn.c_proj"],
            }
        )
    )
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "o_proj" in n or "c_proj" in n}, path)
    layout = describe(tmp_path / "base")
    wrong = set(layout["names"]) - set(layout["transposed"])
    _merge(tmp_path, transposed=frozenset(wrong))
    assert "proj.weight is off by" in _caught(tmp_path)


def test_a_module_taken_twice_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _train(tmp_path, "llama", "all linear")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    bare = {name.removeprefix("base_model.model."): tensor * 2 for name, tensor in tensors.items()}
    save_file({**tensors, **bare}, path)
    with pytest.raises(FailedPrecondition, match="does not begin with"):
        _merge(tmp_path)

    def plan(self: Adapter) -> dict[str, LowRank]:
        modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in self.shapes}
        return {f"{m}.weight": self._low_rank(m, f"{m}.lora_A.weight", f"{m}.lora_B.weight") for m in modules}

    monkeypatch.setattr(Adapter, "plan", plan)
    _merge(tmp_path)
    with pytest.raises(FailedPrecondition, match="for PEFT no such tensor"):
        _prove(tmp_path)


def _scale(self: LoraConfig, module: str, rank: int) -> float:
    return self.alpha / rank


def _rank_of_other(plan: Callable[[Adapter], Any]) -> Callable[[Adapter], Any]:
    def swapped(self: Adapter) -> Any:
        changes = plan(self)
        one, other = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
        return {**changes, one: changes[other], other: changes[one]}

    return swapped


def test_a_wrong_scale_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _train(tmp_path, "llama", "rank stabilized")
    monkeypatch.setattr(LoraConfig, "scale", _scale)
    _merge(tmp_path)
    assert "is off by" in _caught(tmp_path)


def test_a_pair_on_another_layer_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _train(tmp_path, "llama", "all linear", torch.bfloat16)
    monkeypatch.setattr(Adapter, "plan", _rank_of_other(Adapter.plan))
    _merge(tmp_path)
    assert "q_proj.weight is off by" in _caught(tmp_path)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_one_changed_weight_is_caught(tmp_path: Path, name: str) -> None:
    _train(tmp_path, "llama", "all linear", torch.bfloat16)
    _merge(tmp_path)
    path = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(path)
    tensors[name].flat[-1] += tensors[name].dtype.type(0.25)
    save_file(tensors, path, metadata={"format": "pt"})
    assert name in _caught(tmp_path)


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_a_tensor_too_many_or_too_few_is_caught(tmp_path: Path, change: str) -> None:
    _train(tmp_path, "llama", "all linear")
    _merge(tmp_path)
    path = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(path)
    if change == "missing":
        del tensors["model.norm.weight"]
    else:
        tensors["model.more.weight"] = tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert "model." in _caught(tmp_path)


def test_half_an_adapter_is_refused(tmp_path: Path) -> None:
    _train(tmp_path, "llama", "all linear")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if ".layers.1." not in name}, path)
    _merge(tmp_path)
    with pytest.raises(FailedPrecondition, match=r"layers\.1.*missing there") as caught:
        _prove(tmp_path)
    assert caught.value.reason == "ADAPTER_MISFIT"
