from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from gguf import GGUFWriter
from web4lora_chassis.errors import FailedPrecondition, Web4Error
from web4lora_trainer.base_check import check_base, context_tokens, own_head
from web4lora_trainer.base_model import load_tokenizer
from web4lora_trainer.decoder import read_decoder
from web4lora_trainer.vocabulary import require_place_for_head

from tests.unit.trainer.broken_bases import BROKEN, REMOTE, Break, edit, fill, sharded, tensors


def check(folder: Path) -> list[str]:
    return check_base(read_decoder(folder), load_tokenizer(folder))


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


@pytest.mark.parametrize(("change", "words"), BROKEN.values(), ids=BROKEN)
def test_a_base_that_contradicts_itself_is_refused_by_name(copy: Path, change: Break, words: str) -> None:
    change(copy)
    with pytest.raises(Web4Error, match=words) as caught:
        check(copy)
    assert caught.value.metadata["field"] == "base.model"
    assert caught.value.fix
    assert "\n" not in caught.value.message


def test_a_whole_base_passes_in_one_file_and_in_two(copy: Path) -> None:
    fill("model.norm.weight", 1.0)(copy)
    check(copy)
    sharded(lambda folder, _: None)(copy)
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == len(read_decoder(copy).tensors)
    check(copy)
    assert context_tokens(copy) == 256


def test_a_head_stored_beside_the_embedding_it_is_tied_to_passes(copy: Path) -> None:
    tensors(lambda found: found.update({"lm_head.weight": found["model.embed_tokens.weight"].clone()}))(copy)
    check(copy)


def test_a_head_is_its_own_where_it_is_not_the_embedding(copy: Path) -> None:
    assert own_head(read_decoder(copy)) is None
    tensors(lambda found: found.update({"lm_head.weight": found["model.embed_tokens.weight"].clone()}))(copy)
    assert own_head(read_decoder(copy)) is None
    tensors(lambda found: found["lm_head.weight"].add_(1))(copy)
    head = own_head(read_decoder(copy))
    assert head is not None
    assert head.name == "lm_head.weight"


@pytest.mark.parametrize("architecture", ["gemma", "gemma2", "command-r"])
def test_a_head_that_llama_cpp_has_no_place_for_is_refused(tmp_path: Path, architecture: str) -> None:
    with pytest.raises(FailedPrecondition, match=f"llama.cpp's {architecture} has one tensor") as caught:
        require_place_for_head(vocabulary(tmp_path / "a.gguf", architecture), "lm_head.weight")
    assert caught.value.reason == "HEAD_NOT_CONVERTIBLE"


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "one-of-next-year"])
def test_a_head_that_llama_cpp_has_a_place_for_passes(tmp_path: Path, architecture: str) -> None:
    require_place_for_head(vocabulary(tmp_path / "a.gguf", architecture), "lm_head.weight")


def vocabulary(path: Path, architecture: str) -> Path:
    writer = GGUFWriter(path, architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_tokens_of_the_template_that_were_never_trained_are_named(copy: Path) -> None:
    def same(found: dict) -> None:
        embedding = found["model.embed_tokens.weight"]
        embedding[2] = embedding[1]

    tensors(same)(copy)
    assert any(
        "<|im_end|>, whose embedding is the same as that of <|im_start|>" in note for note in check(copy)
    )


def test_zeros_in_a_block_put_between_others_are_only_told(copy: Path) -> None:
    fill("model.layers.1.self_attn.o_proj.weight", 0.0)(copy)
    assert any("o_proj.weight holds nothing but zeros" in note for note in check(copy))


@pytest.mark.parametrize("name", REMOTE)
def test_code_of_a_model_is_refused_wherever_it_is_asked_for(copy: Path, name: str) -> None:
    edit(copy / name, processor={"auto_map": {"AutoTokenizer": ["LICENSE_tok.Tokenizer", None]}})
    with pytest.raises(Web4Error, match="remote code is never run") as caught:
        check(copy)
    assert caught.value.reason == "REMOTE_CODE"


def test_only_the_files_of_the_model_are_stored(copy: Path) -> None:
    strangers = (
        "LICENSE_tok.py", "LICENSE.py", "modeling.py", "NOTICE.sh", "LICENSE.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors", "consolidated.safetensors", "trainer_state.json",
    )  # fmt: skip
    for name in (*strangers, "LICENSE", "Notice.txt", "LICENSE-2.0.txt"):
        (copy / name).write_text("{}")
    stored = set(read_decoder(copy).files())
    assert not stored & set(strangers)
    assert {"LICENSE", "Notice.txt", "LICENSE-2.0.txt", "config.json", "model.safetensors"} <= stored
