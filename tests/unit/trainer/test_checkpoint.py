from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from web4lora_chassis.errors import InvalidInput
from web4lora_trainer.checkpoint import read_checkpoint


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


def test_shapes_come_from_the_headers(tiny_base: Path) -> None:
    checkpoint = read_checkpoint(tiny_base)
    assert (checkpoint.layers, checkpoint.hidden_size, checkpoint.vocabulary) == (2, 32, 300)
    assert sorted(checkpoint.layer_shapes) == sorted(
        [(32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)]
    )
    assert checkpoint.layer_parameters == 32 * 32 * 3 + 64 * 32 * 3
    assert checkpoint.linear_shapes(("k_proj", "down_proj"), last_layers=1) == [(16, 32), (32, 64)]
    assert len(checkpoint.linear_shapes(("q_proj",), last_layers=0)) == 2


def test_an_unknown_module_is_refused_with_those_there_are(tiny_base: Path) -> None:
    with pytest.raises(InvalidInput, match="no linear layer 'c_attn'") as caught:
        read_checkpoint(tiny_base).linear_shapes(("q_proj", "c_attn"), 0)
    assert "gate_proj" in caught.value.fix


def test_pickles_are_never_read(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(InvalidInput, match="only pickled weights"):
        read_checkpoint(copy)


def test_remote_code_is_never_run(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(InvalidInput, match="remote code is never run"):
        read_checkpoint(copy)


def test_quantized_bases_and_missing_tokenizers_are_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    with pytest.raises(InvalidInput, match="quantized"):
        read_checkpoint(copy)
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "tokenizer.json").unlink()
    with pytest.raises(InvalidInput, match=r"no tokenizer\.json"):
        read_checkpoint(copy)


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 100, b"\x10\0\0\0\0\0\0\0not json at all.", b"\x02\0\0\0\0\0\0\0[]"]
)
def test_broken_weights_are_refused(copy: Path, data: bytes) -> None:
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(InvalidInput, match="can't be read as safetensors"):
        read_checkpoint(copy)
