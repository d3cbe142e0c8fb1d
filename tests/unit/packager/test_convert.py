"""A model's own code: never shown to the converter, and never run by it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from web4lora_chassis.errors import InvalidInput, Web4Error
from web4lora_llamacpp import LlamaCpp
from web4lora_packager import convert as converting
from web4lora_packager.convert import convert, stage

from tests import tiny_base

CODE = """
import os, pathlib
pathlib.Path({mark!r}).write_text("ran with " + os.environ.get("WEB4LORA_TOKEN", "nothing"))
class Evil: pass
"""


def _with(folder: Path, name: str, data: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / name).write_text(json.dumps(data))
    return folder


def test_the_converter_sees_known_files_alone(tmp_path: Path) -> None:
    folder = _with(tmp_path / "m", "tokenizer_config.json", {})
    for name in (
        "LICENSE_tok.py", "modeling_x.py", "x.safetensors.py", "pytorch_model.bin", "params.json", "LICENSE",
        "model.safetensors", "tokenizer.json", "modules.json", "tekken.json", "setup.cfg",
    ):  # fmt: skip
        (folder / name).write_text("")
    (folder / "custom_generate").mkdir()
    shown = stage(folder, tmp_path / "shown")
    assert sorted(path.name for path in shown.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_a_model_with_code_is_not_shown(tmp_path: Path) -> None:
    folder = _with(tmp_path / "m", "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a.B", None]}})
    with pytest.raises(InvalidInput, match="remote code is never run"):
        stage(folder, tmp_path / "shown")
    assert not (tmp_path / "shown").exists()


def test_a_folder_without_a_model_is_said(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(InvalidInput, match="holds no model"):
        stage(tmp_path / "m", tmp_path / "shown")


@pytest.mark.parametrize("guard", ["auto_map refused", "not refused", "not refused, and shown"])
def test_a_models_code_never_runs(
    llama_cpp: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guard: str
) -> None:
    source = llama_cpp.source
    folder, mark = tmp_path / "base", tmp_path / "ran"
    tiny_base.make_base(folder)
    for name, change in (
        ("config.json", {"architectures": ["DreamModel"]}),  # loads its tokenizer with trust_remote_code=True
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["LICENSE_tok.Evil", None]}}),
    ):
        data = json.loads((folder / name).read_text())
        data.pop("tokenizer_class", None)
        (folder / name).write_text(json.dumps({**data, **change}))
    (folder / "LICENSE_tok.py").write_text(CODE.format(mark=str(mark)))
    monkeypatch.setenv("WEB4LORA_TOKEN", "secret")
    if guard != "auto_map refused":
        monkeypatch.setattr(converting, "refuse_remote_code", lambda _: None)
    if guard == "not refused, and shown":
        monkeypatch.setattr(converting, "stage", lambda folder, *_: folder)
    with pytest.raises(Web4Error):
        convert(
            LlamaCpp(source, source, "0"), folder, tmp_path / "model.gguf",
            gguf_type="F16", name="x", log=tmp_path / "log", report=lambda _: None,
        )  # fmt: skip
    assert not mark.exists()
    assert sys.modules.get("LICENSE_tok") is None
