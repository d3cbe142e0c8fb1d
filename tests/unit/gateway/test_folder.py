from __future__ import annotations

import errno
import shutil
import tempfile
from pathlib import Path

import pytest
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore
from web4lora_chassis.artifacts.folder import FolderBackend
from web4lora_chassis.errors import ResourceExhausted, Web4Error
from web4lora_gateway.folder import RunFolder, taken

RUN = "run_2026-11-22_2"


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(FolderBackend(tmp_path / "store"))


def put(store: ArtifactStore, tmp_path: Path, kind: str, *paths: str) -> ArtifactRef:
    files = {}
    for path in paths:
        files[path] = tmp_path / "made" / kind / path
        files[path].parent.mkdir(parents=True, exist_ok=True)
        files[path].write_text(path)
    return store.put(kind, "demo", files)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_files_are_linked_under_the_names_people_expect(store, tmp_path):
    folder = RunFolder(RUN, store, tmp_path / "outputs", tmp_path / "state")
    folder.begin()
    refs = [
        put(store, tmp_path, "adapter", "adapter_config.json", "logs/loss.csv"),
        put(store, tmp_path, "gguf", "model.Q4_K_M.gguf"),
        put(store, tmp_path, "report", "Modelfile", "modelfile.json", "run.json"),
    ]
    folder.place(refs)
    folder.place(refs)
    expected = {"adapter_config.json", "logs/loss.csv", "model.Q4_K_M.gguf", "Modelfile"}
    assert names(tmp_path / "outputs" / RUN) == expected
    stored = tmp_path / "store" / refs[1].prefix / "model.Q4_K_M.gguf"
    assert (tmp_path / "outputs" / RUN / "model.Q4_K_M.gguf").samefile(stored)


def test_without_outputs_only_small_files_are_gathered(store, tmp_path):
    folder = RunFolder(RUN, store, None, tmp_path / "state")
    folder.begin()
    folder.place([put(store, tmp_path, "report", "Modelfile"), put(store, tmp_path, "gguf", "a.gguf")])
    assert names(folder.path) == {"Modelfile"}


def test_facts_and_log_may_change_after_they_were_published(store, tmp_path):
    folder = RunFolder(RUN, store, tmp_path / "outputs", tmp_path / "state")
    folder.begin()
    for text in ("one", "two"):
        folder.log(text)
        folder.write_facts(text)
        folder.publish()
    published = tmp_path / "store" / "runs" / RUN
    assert names(published) == {"run.json", "logs/run.log"}
    assert (published / "run.json").read_text() == "two"
    lines = (published / "logs/run.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["one", "two"]
    assert (published / "logs/run.log").read_text() == (folder.path / "logs/run.log").read_text()


def test_no_room_for_the_copies_is_an_error_that_is_waited_for(store, tmp_path, monkeypatch):
    folder = RunFolder("run_2026-11-22_1", store, None, tmp_path / "gateway")
    folder.begin()
    folder.log("started")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ResourceExhausted, match="disk is full"):
        folder.publish()


def test_publishing_needs_no_folder_of_the_systems(store, tmp_path, monkeypatch):
    """That may be full, or none be found that isn't; a run's own disk is the one that is waited for."""
    folder = RunFolder(RUN, store, tmp_path / "outputs", tmp_path / "state")
    folder.begin()
    folder.log("started")

    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    folder.publish()
    assert "logs/run.log" in store.published(RUN)


def test_latest_leads_to_the_newest_run(store, tmp_path):
    outputs = tmp_path / "outputs"
    for run_id, leads_to in (
        ("run_2026-11-22_9", "run_2026-11-22_9"),
        ("run_2026-11-22_10", "run_2026-11-22_10"),
        ("run_2026-11-22_9", "run_2026-11-22_10"),
        ("run_2026-12-01_1", "run_2026-12-01_1"),
    ):
        RunFolder(run_id, store, outputs, tmp_path / "state").begin()
        assert (outputs / "latest").readlink() == Path(leads_to)


def test_somebodys_own_latest_stays(store, tmp_path):
    (tmp_path / "outputs" / "latest").mkdir(parents=True)
    RunFolder(RUN, store, tmp_path / "outputs", tmp_path / "state").begin()
    assert not (tmp_path / "outputs" / "latest").is_symlink()


def test_a_folder_that_cannot_be_made_is_named(store, tmp_path):
    (tmp_path / "outputs").write_text("a file")
    with pytest.raises(Web4Error, match="outputs"):
        RunFolder(RUN, store, tmp_path / "outputs", tmp_path / "state").begin()


def test_an_id_is_taken_by_a_folder_or_in_the_store(store, tmp_path):
    outputs = tmp_path / "outputs"
    assert not taken(RUN, store, outputs)
    assert not taken(RUN, store, None)
    (outputs / RUN).mkdir(parents=True)
    assert taken(RUN, store, outputs)
    other = RunFolder("run_2026-11-22_3", store, None, tmp_path / "state")
    other.write_facts("{}")
    other.publish()
    assert taken("run_2026-11-22_3", store, None)
