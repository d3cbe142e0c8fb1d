import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter, LlamaFileType
from web4lora_chassis.errors import InvalidInput
from web4lora_deployer.gguf_file import read_facts, require_model


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
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_llama_cpps_own_writer_wrote_is_read(gguf: Path) -> None:
    facts = read_facts(gguf)
    assert (facts.architecture, facts.context_tokens, facts.quantization) == ("llama", 8192, "Q4_K_M")
    assert (facts.chat_template, facts.bos, facts.eos) == ("{{ bos_token }}…", "<s>", "</s>")
    assert facts.parameters == 12
    assert facts.values["tokenizer.ggml.add_bos_token"] is False


def test_the_cache_grows_with_the_context(gguf: Path) -> None:
    # 30 layers, 3 heads of 64, keys and values, 2 bytes each: 23,040 bytes a token
    assert read_facts(gguf).cache_bytes(1000) == 23_040_000


def test_every_beginning_of_a_file_is_refused_in_words(gguf: Path) -> None:
    data = gguf.read_bytes()
    end = data.index(b"token_embd.weight") + len(b"token_embd.weight")
    for length in range(0, end, 7):
        gguf.write_bytes(data[:length])
        with pytest.raises(InvalidInput, match=r"tiny\.gguf can't be read as a GGUF file"):
            read_facts(gguf)


def test_sizes_are_not_believed(gguf: Path) -> None:
    gguf.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 60))
    with pytest.raises(InvalidInput, match="not believable"):
        read_facts(gguf)


def test_a_whole_model_is_taken(gguf: Path) -> None:
    facts = read_facts(gguf)
    assert facts.end_bytes <= gguf.stat().st_size
    require_model(gguf, facts)


@pytest.mark.parametrize("lost_bytes", [1 << 5, 48])
def test_a_model_that_is_cut_off_is_refused_with_both_sizes(gguf: Path, lost_bytes: int) -> None:
    end = read_facts(gguf).end_bytes
    gguf.write_bytes(gguf.read_bytes()[: end - lost_bytes])
    with pytest.raises(InvalidInput, match=f"is cut off: it has {end - lost_bytes} of {end} bytes"):
        require_model(gguf, read_facts(gguf))


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
        require_model(path, read_facts(path))
    assert caught.value.fix
