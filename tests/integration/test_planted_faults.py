"""Faults planted one at a time into what is packaged: each is laid at its stage; a clean run raises none."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from web4lora_chassis.model_files.gguf import read_gguf
from web4lora_llamacpp import LlamaCpp

from tests import trained_base
from tests.planted import Trained

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def trained(llama_cpp: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(llama_cpp, tmp_path_factory.mktemp("trained")).write()


@pytest.fixture(scope="module")
def right(trained: Trained) -> Path:
    return trained.merge(trained.folder / "right.gguf")


def _alpha(trained: Trained, right: Path, work: Path) -> Path:
    wrong = shutil.copytree(trained.adapter, work / "wrong")
    config = json.loads((wrong / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2
    (wrong / "adapter_config.json").write_text(json.dumps(config))
    return trained.merge(work / "wrong.gguf", adapter=wrong)


def _zeroed(trained: Trained, right: Path, work: Path) -> Path:
    return shutil.copyfile(trained_base.gguf_of(trained.llama, trained.base), work / "wrong.gguf")


def _revision(trained: Trained, right: Path, work: Path) -> Path:
    other = shutil.copytree(trained.base, work / "other")
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"  # which no adapter touches
    tensors[name] = (tensors[name].astype(np.float32) * 1.01).astype(tensors[name].dtype)
    save_file(tensors, other / "model.safetensors")
    return trained.merge(work / "wrong.gguf", base=other)


def _flipped(trained: Trained, right: Path, work: Path) -> Path:
    wrong = shutil.copyfile(right, work / "wrong.gguf")
    header = read_gguf(right)
    place = next(each for each in header.tensors if each.name == "blk.1.ffn_down.weight")
    with wrong.open("r+b") as file:
        file.seek(header.data_at + place.offset + 1)
        file.write(b"\x3f")
    return wrong


def _ends(trained: Trained, right: Path, work: Path) -> Path:
    key = b"tokenizer.ggml.eos_token_id" + struct.pack("<I", 4)
    data = right.read_bytes()
    assert data.count(key + struct.pack("<I", 2)) == 1
    (work / "wrong.gguf").write_bytes(data.replace(key + struct.pack("<I", 2), key + struct.pack("<I", 1)))
    return work / "wrong.gguf"


def _template(trained: Trained, right: Path, work: Path) -> Path:
    dropped = trained_base.PIPES.replace("eos_token + '\\n'", "eos_token")
    return trained_base.with_template(right, trained.base, dropped, work / "wrong.gguf")


def _begins_twice(trained: Trained, right: Path, work: Path) -> Path:
    """The base's own template begins so too: packaging compares with it, so only training's record tells."""
    doubled = "{{ bos_token }}" + trained_base.PIPES
    base = shutil.copytree(trained.base, work / "base")
    wrong = trained_base.with_template(right, trained.base, doubled, work / "wrong.gguf")
    (base / "chat_template.jinja").write_text(read_gguf(wrong).chat_template)
    return wrong


def _resaved(trained: Trained, right: Path, work: Path) -> Path:
    """Two tokens of a prompt change places in the vocabulary."""
    one, other = (struct.pack("<Q", 1) + sign for sign in (b"W", b"S"))
    data = bytearray(right.read_bytes())
    at, to = data.index(one), data.index(other)
    data[at : at + len(one)], data[to : to + len(other)] = other, one
    (work / "wrong.gguf").write_bytes(data)
    return work / "wrong.gguf"


FAULTS: dict[str, tuple[Callable[[Trained, Path, Path], Path], str, str]] = {
    "alpha doubled": (_alpha, "merge", "is off by"),
    "adapter zeroed": (_zeroed, "merge", "is off by"),
    "another base revision": (_revision, "merge", "ffn_up.weight is off by"),
    "one tensor's bytes flipped": (_flipped, "merge", "blk.1.ffn_down.weight is off by"),
    "EOS swapped": (_ends, "convert", "its eos_token has the id 1"),
    "a template line dropped": (_template, "convert", "its chat template is not the base's"),
    "BOS doubled": (_begins_twice, "deploy", "token 1"),
    "tokenizer re-saved": (_resaved, "deploy", "token "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_laid_at_its_stage(
    trained: Trained, right: Path, tmp_path: Path, fault: str
) -> None:
    plant, stage, why = FAULTS[fault]
    wrong = plant(trained, right, tmp_path)
    base = tmp_path / "base" if (tmp_path / "base").is_dir() else None
    found = trained.stopped_at(wrong, base)
    assert found[0] == stage, found
    assert why in found[1]


def test_a_clean_run_raises_no_alarm(trained: Trained, right: Path) -> None:
    assert trained.stopped_at(right) == ("", "")


def test_nor_does_another_one(llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    trained = Trained(llama_cpp, tmp_path).write(seed=2)
    assert trained.stopped_at(trained.merge(tmp_path / "right.gguf")) == ("", "")
