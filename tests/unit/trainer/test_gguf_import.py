"""A GGUF as a model folder; that its import takes the file apart once."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from web4lora_trainer.gguf_import import _parsed_once


def test_a_file_is_taken_apart_once_and_the_package_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with _parsed_once():
        reader = gguf.GGUFReader(str(path))
        assert gguf.GGUFReader(str(path)) is reader
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is names
    with pytest.raises(FileNotFoundError), _parsed_once():
        gguf.GGUFReader(str(tmp_path / "b.gguf"))
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
    assert gguf.GGUFReader(str(path)) is not reader
