"""What uploads leave that were cut off: found by age, never while somebody writes, freed whole."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore
from web4lora_chassis.artifacts.folder import FolderBackend

SOON = time.time() + 3600


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> ArtifactStore:
    return ArtifactStore(FolderBackend(root))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    made = {}
    for name in ("a", "b"):
        made[name] = tmp_path / name
        made[name].write_text(name * 100)
    return made


def cut_off(store: ArtifactStore, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave an upload behind as a writer does that is killed before its manifest."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FolderBackend, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            store.put("gguf", "demo", files, link=False)


def test_what_a_cut_off_upload_left_is_found_by_age_and_freed(
    store: ArtifactStore, root: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = store.put("gguf", "whole", files, link=False)
    cut_off(store, files, monkeypatch)
    prefix = next((root / "artifacts" / "gguf" / "demo").iterdir())
    (prefix / ".part-left").write_bytes(b"x" * 50)
    (root / whole.prefix / ".part-left").write_bytes(b"x" * 7)
    assert store.cut_off(time.time() - 3600) == [], "it may have a writer"

    found = {upload.prefix: upload for upload in store.cut_off(SOON)}
    assert {name: upload.size_bytes for name, upload in found.items()} == {
        prefix.relative_to(root).as_posix(): 250,
        whole.prefix: 7,
    }
    for upload in found.values():
        store.free(upload)
    assert not prefix.exists()
    assert store.manifest(whole).size_bytes == 200
    assert sorted(path.name for path in (root / whole.prefix).iterdir()) == ["a", "b", "manifest.json"]
    assert store.cut_off(SOON) == []


def test_an_upload_that_is_finished_meanwhile_stays(
    store: ArtifactStore, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cut_off(store, files, monkeypatch)
    (upload,) = store.cut_off(SOON)
    ref = store.put("gguf", "demo", files, link=False)
    store.free(upload)
    store.get(ref, tmp_path / "out")


def test_who_takes_up_an_old_upload_makes_it_new(
    store: ArtifactStore, root: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(store, files, monkeypatch)
    time.sleep(0.05)
    before = time.time()
    time.sleep(0.05)
    cut_off(store, files, monkeypatch)
    assert store.cut_off(before) == []


def test_an_artifact_that_is_stored_again_is_in_use_as_of_now(
    store: ArtifactStore, root: Path, files: dict[str, Path]
) -> None:
    ref = store.put("gguf", "demo", files, link=False)
    place = root / ref.prefix / "manifest.json"
    text = place.read_bytes()
    os.utime(place, (1000, 1000))
    store.put("gguf", "demo", files, link=False)
    assert place.stat().st_mtime > 1000
    assert place.read_bytes() == text
    store.delete(ref)
    assert not store.touch(ref)
    assert not place.exists()


def test_an_artifact_that_goes_while_it_is_stored_again_is_stored_anew(
    store: ArtifactStore, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ref = store.put("gguf", "demo", files, link=False)

    def gone(self: ArtifactStore, ref: ArtifactRef) -> bool:
        store.delete(ref)
        return ArtifactStore.__dict__["_complete"](self, ref) and False

    with monkeypatch.context() as patch:
        patch.setattr(ArtifactStore, "touch", gone)
        assert store.put("gguf", "demo", files, link=False) == ref
    store.get(ref, tmp_path / "out")


def test_the_folder_of_a_run_goes_whole(store: ArtifactStore, root: Path, files: dict[str, Path]) -> None:
    store.publish("run_1", {"logs/a": files["a"], "b": files["b"]})
    store.publish("run_10", {"b": files["b"]})
    store.unpublish("run_1")
    store.unpublish("run_1")
    assert store.published("run_1") == []
    assert store.published("run_10") == ["b"]
    assert not (root / "runs" / "run_1").exists()
