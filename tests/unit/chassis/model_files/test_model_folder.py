"""A model's folder: which files belong to it, code that it asks for, index and headers that disagree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.model_files.model_folder import (
    INDEX_NAME,
    SINGLE_NAME,
    is_model_file,
    is_weights,
    named,
    read_json,
    read_model_folder,
    refuse_remote_code,
)

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def _with(folder: Path, name: str, data: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / name).write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "generation_config.json", "tokenizer_config.json", "processor_config.json",
        "preprocessor_config.json", "special_tokens_map.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "data",
    [
        {"auto_map": {"AutoTokenizer": ["a.B", None]}},
        {"auto_map": None},
        {"text_config": {"auto_map": {}}},
        {"a": [{"b": [[{"auto_map": "x--y.Z"}]]}]},
    ],
)
def test_auto_map_is_refused_wherever_it_stands(tmp_path: Path, name: str, data: Any) -> None:
    folder = _with(tmp_path / "m", name, data)
    with pytest.raises(InvalidInput, match=name) as caught:
        refuse_remote_code(folder)
    assert caught.value.reason == "REMOTE_CODE"


def test_a_deep_configuration_is_searched_or_refused(tmp_path: Path) -> None:
    folder = _with(tmp_path / "m", "config.json", {})
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(InvalidInput, match=r"config\.json"):
        refuse_remote_code(folder)


def test_a_token_of_that_name_is_no_code(tmp_path: Path) -> None:
    folder = _with(tmp_path / "m", "vocab.json", {"auto_map": 3})
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"auto_map": 3}}}')
    refuse_remote_code(folder)


@pytest.mark.parametrize("name", ["LICENSE", "LICENCE.txt", "NOTICE.md", "LICENSE-MIT", "merges.txt"])
def test_what_belongs_to_a_model(name: str) -> None:
    assert is_model_file(name)


@pytest.mark.parametrize(
    "name", ["LICENSE_tok.py", "LICENSE.py", "LICENSE.pyc", "a.py", "model.py", "x.json"]
)
def test_what_does_not(name: str) -> None:
    assert not is_model_file(name)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        (SINGLE_NAME, True), (FIRST, True), ("a b.safetensors", False), ("-x.safetensors", False),
        ("../x.safetensors", False), ("a\n.safetensors", False), ("x.safetensors.py", False), ("", False),
        ("x" * 300 + ".safetensors", False), ("*.safetensors", False),
    ],
)  # fmt: skip
def test_a_name_of_weights_is_plain(name: str, ours: bool) -> None:
    assert is_weights(name) is ours


def test_many_names_are_shortened() -> None:
    assert named(["b", "a"]) == "a, b"
    assert named("fedcba") == "a, b, c, d and 2 more"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "can't be read as JSON"),
        (b"[]", "holds no JSON object"),
        (b"\xff\xfe{}", "can't be read as JSON"),
        (b"[" * 100_000, "can't be read as JSON"),
    ],
)
def test_what_is_no_json_object_is_said(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(InvalidInput, match=said) as caught:
        read_json(tmp_path / "config.json")
    assert "\n" not in caught.value.message


def test_json_too_large_to_be_any_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(InvalidInput, match="more than 64 MB"):
        read_json(tmp_path / "config.json")
    with pytest.raises(InvalidInput, match=r"has no generation_config\.json"):
        read_json(tmp_path / "generation_config.json")


def weights(folder: Path, **files: dict[str, list[int]]) -> Path:
    """Write a model's folder: for each file its tensors, by their shapes."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 7}))
    for name, shapes in files.items():
        tensors = {tensor: np.zeros(shape, np.float16) for tensor, shape in shapes.items()}
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def test_a_folder_of_one_file(tmp_path: Path) -> None:
    folder = weights(tmp_path / "m", model={"a": [2, 3], "b": [4]})
    (folder / "LICENSE").write_text("free")
    (folder / "modeling.py").write_text("raise SystemExit")
    model = read_model_folder(folder)
    assert {name: tensor.shape for name, tensor in model.tensors.items()} == {"a": (2, 3), "b": (4,)}
    assert (model.size_bytes, model.parameters) == (20, 10)
    assert sorted(model.files()) == ["LICENSE", "config.json", SINGLE_NAME]
    assert model.text_config == {"vocab_size": 7}


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    folder = weights(
        tmp_path / "m", **{Path(FIRST).stem: {"a": [2]}, Path(SECOND).stem: {"b": [3]}, "other": {"c": [1]}}
    )
    with pytest.raises(InvalidInput, match="whether any is missing can't be told"):
        read_model_folder(folder)
    index = {"weight_map": {"a": FIRST, "b": SECOND}}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    model = read_model_folder(folder)
    assert [shard.path.name for shard in model.shards] == [FIRST, SECOND]
    assert sorted(model.files()) == ["config.json", FIRST, SECOND, INDEX_NAME]
    for name in ("../a.safetensors", "a.bin", 3, None):
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(InvalidInput, match="no safetensors file here"):
            read_model_folder(folder)


def test_weights_under_another_name_are_not_guessed(tmp_path: Path) -> None:
    folder = weights(tmp_path / "m", other={"a": [2]})
    with pytest.raises(InvalidInput, match=r"only other\.safetensors"):
        read_model_folder(folder)
    with pytest.raises(InvalidInput, match="is not a folder"):
        read_model_folder(folder / "config.json")
