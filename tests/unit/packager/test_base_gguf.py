"""What belongs to the base is made once: its GGUFs, and the importance matrix for some data."""

from __future__ import annotations

from pathlib import Path

import pytest
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore, open_store
from web4lora_chassis.settings import Settings, load
from web4lora_llamacpp import LlamaCpp
from web4lora_packager import base_gguf
from web4lora_packager.base_gguf import BaseGgufs
from web4lora_packager.reuse import Reuse

from tests import tiny_llama

pytestmark = pytest.mark.timeout(600)


class Job:
    """A job on one base, with a working folder of its own."""

    def __init__(
        self, store: ArtifactStore, base: ArtifactRef, folder: Path, llama: LlamaCpp, work: Path
    ) -> None:
        work.mkdir()
        self.told: list[str] = []

        def report(progress: object) -> None:
            self.told.append(progress.message)  # type: ignore[attr-defined]

        reuse = Reuse(store, base, ("demo", base.name), llama.version, work, report)
        self.bases = BaseGgufs(store, base, folder, llama, work, "tiny", reuse, report)


def _text() -> str:
    return "The quick brown fox jumps over the lazy dog. " * 400


def _not_again(*_: object, **__: object) -> None:
    raise AssertionError("made again")


def test_each_is_made_once_for_all_jobs(
    llama_cpp: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_llama.write_base(tmp_path / "base")
    store = open_store(load(Settings, store=(tmp_path / "store").as_uri()))

    def put(kind: str, name: str) -> ArtifactRef:
        files = {path.name: path for path in folder.iterdir()}
        return store.put(kind, name, files, link=False)

    base, dataset, other = put("base_model", "tiny"), put("dataset", "data"), put("dataset", "other")
    first = Job(store, base, folder, llama_cpp, tmp_path / "first")
    matrix, path = first.bases.matrix("F16", dataset, 2, _text)
    assert path.is_file()
    quant, _ = first.bases.quantized("Q8_0", "F16")
    whole = first.bases.reference("F16")
    assert store.manifest(matrix).inputs == (base, dataset)
    assert store.manifest(quant).inputs[0] == store.manifest(whole).inputs[0] == base

    monkeypatch.setattr(base_gguf, "convert", _not_again)
    third = Job(store, base, folder, llama_cpp, tmp_path / "third")
    another, _ = third.bases.matrix("F16", other, 2, _text)  # of other data: measured, nothing converted
    assert another != matrix
    own, _ = Job(store, base, folder, llama_cpp, tmp_path / "own").bases.matrix_of(
        tmp_path / "first" / "base_model.gguf", whole, dataset, 2, _text
    )
    assert store.manifest(own).inputs == (base, whole, dataset)

    for name in ("importance_matrix", "quantize"):
        monkeypatch.setattr(base_gguf, name, _not_again)
    second = Job(store, base, folder, llama_cpp, tmp_path / "second")
    assert second.bases.matrix("F16", dataset, 2, _text)[0] == matrix
    assert (tmp_path / "second" / "importance_matrix.gguf").read_bytes() == path.read_bytes()
    assert second.bases.quantized("Q8_0", "F16")[0] == quant
    assert second.bases.reference("F16") == whole

    fourth = Job(store, base, folder, llama_cpp, tmp_path / "fourth")
    fourth.bases._tools["llama.cpp"] = "another"
    with pytest.raises(AssertionError, match="made again"):
        fourth.bases.reference("F16")
    assert fourth.told[-1].endswith(f"not taken: another llama.cpp made it, {llama_cpp.version}")
