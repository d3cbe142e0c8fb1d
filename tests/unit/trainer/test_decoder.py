from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.pipeline.train import LoraSettings
from web4lora_trainer.decoder import read_decoder


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


def test_shapes_come_from_the_headers(tiny_base: Path) -> None:
    checkpoint = read_decoder(tiny_base)
    assert (checkpoint.layers, checkpoint.hidden_size, checkpoint.vocabulary) == (2, 32, 300)
    assert sorted(checkpoint.layer_shapes) == sorted(
        [(32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)]
    )
    assert checkpoint.layer_parameters == 32 * 32 * 3 + 64 * 32 * 3
    assert checkpoint.adapted(LoraSettings(target_modules=("k_proj", "down_proj"), last_layers=1)) == {
        "model.layers.1.self_attn.k_proj": (16, 32), "model.layers.1.mlp.down_proj": (32, 64),
    }  # fmt: skip
    assert len(checkpoint.adapted(LoraSettings(target_modules=("q_proj",)))) == 2
    assert len(checkpoint.adapted(LoraSettings(target_modules=("all-linear",)))) == 14


def test_an_unknown_module_is_refused_with_those_there_are(tiny_base: Path) -> None:
    with pytest.raises(InvalidInput, match="no linear layer 'c_attn'") as caught:
        read_decoder(tiny_base).adapted(LoraSettings(target_modules=("q_proj", "c_attn")))
    assert "gate_proj" in caught.value.fix


def test_pickles_are_never_read(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(InvalidInput, match="only pickled weights"):
        read_decoder(copy)


def test_remote_code_is_never_run(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(InvalidInput, match="remote code is never run"):
        read_decoder(copy)


def test_quantized_bases_and_missing_tokenizers_are_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    with pytest.raises(InvalidInput, match="quantized"):
        read_decoder(copy)
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "tokenizer.json").unlink()
    with pytest.raises(InvalidInput, match=r"no tokenizer\.json"):
        read_decoder(copy)


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 100, b"\x10\0\0\0\0\0\0\0not json at all.", b"\x02\0\0\0\0\0\0\0[]"]
)
def test_broken_weights_are_refused(copy: Path, data: bytes) -> None:
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(InvalidInput, match="can't be read as safetensors"):
        read_decoder(copy)


def test_weights_that_are_no_part_of_the_model_are_not_counted(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    shutil.copy(tmp_path / "base" / "model.safetensors", tmp_path / "base" / "consolidated.safetensors")
    ours, theirs = read_decoder(tmp_path / "base"), read_decoder(tiny_base)
    assert (ours.size_bytes, ours.parameters) == (theirs.size_bytes, theirs.parameters)


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_no_adapted_layer_matches_is_refused(tiny_base: Path, setting: str) -> None:
    decoder = read_decoder(tiny_base)
    decoder.adapted(LoraSettings(**{setting: {"v_proj": 4, "layers.1.self_attn.q_proj": 2}}))
    with pytest.raises(
        InvalidInput, match=f"train.lora.{setting}: no adapted layer's name ends with 'up_proj'"
    ):
        decoder.adapted(LoraSettings(**{setting: {"up_proj": 4}}))
