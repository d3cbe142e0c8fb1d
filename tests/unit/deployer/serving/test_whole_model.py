"""What no runtime could answer with is refused as what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.model_files.gguf import read_gguf
from web4lora_deployer.serving.whole_model import require_model

from tests.unit.chassis.model_files.test_gguf_hostile import WITHOUT_A_MODEL


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((3, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_whole_model_is_taken(model: Path) -> None:
    header = read_gguf(model)
    assert header.end_bytes <= model.stat().st_size
    require_model(model, header)


@pytest.mark.parametrize("lost_bytes", [1 << 5, 48])
def test_a_model_that_is_cut_off_is_refused_with_both_sizes(model: Path, lost_bytes: int) -> None:
    end = read_gguf(model).end_bytes
    model.write_bytes(model.read_bytes()[: end - lost_bytes])
    with pytest.raises(InvalidInput, match=f"is cut off: it has {end - lost_bytes} of {end} bytes"):
        require_model(model, read_gguf(model))


@pytest.mark.parametrize(
    ("keys", "tensors", "why"),
    [
        ({"general.type": "adapter", "adapter.type": "lora"}, 1, "is a LoRA adapter"),
        ({"general.type": "mmproj"}, 1, "is no language model: it holds mmproj data"),
        ({"general.type": "imatrix"}, 1, "is no language model: it holds imatrix data"),
        ({"split.count": 3, "split.no": 1}, 1, "is file 2 of 3 of a split model"),
        ({}, 0, "holds a vocabulary and no weights"),
    ],
)
def test_a_part_of_a_model_is_refused_as_what_it_is(
    tmp_path: Path, keys: dict[str, str | int], tensors: int, why: str
) -> None:
    path = tmp_path / "part.gguf"
    writer = GGUFWriter(path, "llama")
    for key, value in keys.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint16(key, value)
    for number in range(tensors):
        writer.add_tensor(f"t{number}", np.zeros((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InvalidInput, match=why) as caught:
        require_model(path, read_gguf(path))
    assert caught.value.fix


@pytest.mark.parametrize("name", WITHOUT_A_MODEL)
def test_what_can_be_read_is_no_whole_model(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(WITHOUT_A_MODEL[name])
    with pytest.raises(InvalidInput):
        require_model(path, read_gguf(path))
