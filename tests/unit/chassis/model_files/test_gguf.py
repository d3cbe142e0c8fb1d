"""The GGUF reader against files that llama.cpp's own writer wrote."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.model_files.gguf import GgufTensor, read_gguf


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(576)
    writer.add_block_count(30)
    writer.add_head_count(9)
    writer.add_head_count_kv(3)
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_chat_template("{{ bos_token }}…")
    writer.add_token_list(["<unk>", "<s>", "</s>"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_tensor("token_embd.weight", np.zeros((3, 4), dtype=np.float32))
    writer.add_tensor("output.weight", np.zeros((5, 288), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_llama_cpps_own_writer_wrote_is_read(gguf: Path) -> None:
    header = read_gguf(gguf)
    assert (header.architecture, header.context_tokens, header.quantization) == ("llama", 8192, "Q4_K_M")
    assert header.chat_template == "{{ bos_token }}…"
    assert header.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert (header.token_id("bos"), header.token_id("eos"), header.token_id("eot")) == (1, 2, None)
    assert header.end_ids == (2,)
    assert header.values["tokenizer.ggml.add_bos_token"] is False
    assert (header.kind, header.alpha) == ("model", None)


def test_tensors_are_as_the_gguf_package_reads_them(gguf: Path) -> None:
    header, theirs = read_gguf(gguf), GGUFReader(gguf).tensors
    assert [(t.name, t.shape, t.type, t.size_bytes) for t in header.tensors] == [
        (t.name, tuple(t.shape.tolist()), t.tensor_type.name, t.n_bytes) for t in theirs
    ]
    assert header.parameters == 12 + 1440
    assert header.weight_bytes == 4 * 12 + 2 * 1440
    assert header.bits_per_weight == 8 * (4 * 12 + 2 * 1440) / 1452
    assert header.weights_by_type == {"F16": 1440, "F32": 12}
    assert list(header.weights_by_type) == ["F16", "F32"]
    assert header.odd_rows == (288,)
    last = theirs[-1]
    assert header.end_bytes == last.data_offset + last.n_bytes


@pytest.mark.parametrize("kind", GGMLQuantizationType)
def test_every_type_of_the_gguf_package_is_known(kind: GGMLQuantizationType) -> None:
    weights, size = GGML_QUANT_SIZES[kind]
    tensor = GgufTensor("t", (weights, 3), kind.value)
    assert (tensor.type, tensor.size_bytes) == (kind.name, 3 * size)


def test_a_type_newer_than_we_are_has_a_number_and_no_size() -> None:
    tensor = GgufTensor("t", (32, 3), 999)
    assert (tensor.type, tensor.size_bytes) == ("999", 0)


def test_an_adapter_says_its_alpha(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_string("general.type", "adapter")
    writer.add_float32("adapter.lora.alpha", 32.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    header = read_gguf(tmp_path / "a.gguf")
    assert (header.kind, header.alpha, header.parameters) == ("adapter", 32.0, 0)


def test_the_cache_grows_with_the_context(gguf: Path) -> None:
    # 30 layers, 3 heads of 64, keys and values, 2 bytes each: 23,040 bytes a token
    assert read_gguf(gguf).cache_bytes(1000) == 23_040_000


def test_every_beginning_of_a_file_is_refused_in_words(gguf: Path) -> None:
    data = gguf.read_bytes()
    end = data.index(b"token_embd.weight") + len(b"token_embd.weight")
    for length in range(0, end, 7):
        gguf.write_bytes(data[:length])
        with pytest.raises(InvalidInput, match=r"tiny\.gguf can't be read as a GGUF file"):
            read_gguf(gguf)


def test_sizes_are_not_believed(gguf: Path) -> None:
    gguf.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 60))
    with pytest.raises(InvalidInput, match="says what can't be"):
        read_gguf(gguf)
