"""The store in a folder: links, verification, what is seen and when."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import pytest
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore, folder, open_store
from web4lora_chassis.artifacts.folder import FolderBackend
from web4lora_chassis.errors import DataLoss, InvalidInput, NotFound, ResourceExhausted
from web4lora_chassis.settings import Settings


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> ArtifactStore:
    return ArtifactStore(FolderBackend(root))


def write(folder_path: Path, **texts: str) -> dict[str, Path]:
    folder_path.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, text in texts.items():
        (folder_path / name).write_text(text)
        files[f"dir/{name}"] = folder_path / name
    return files


def test_round_trip_links_and_keeps_read_only(store: ArtifactStore, root: Path, tmp_path: Path) -> None:
    files = write(tmp_path / "in", a="alpha", b="beta")
    moved: list[int] = []
    ref = store.put("gguf", "demo", files, parameters={"rank": 16}, created_by="test", advance=moved.append)
    assert sum(moved) == ref.size_bytes == 9
    stored = root / ref.prefix / "dir" / "a"
    assert stored.samefile(files["dir/a"])
    assert stat.S_IMODE(stored.stat().st_mode) == 0o444

    manifest = store.get(ref, tmp_path / "out")
    assert manifest.ref == ref
    assert manifest.parameters == {"rank": "16"}
    assert (tmp_path / "out" / "dir" / "b").read_text() == "beta"
    assert (tmp_path / "out" / "dir" / "b").samefile(files["dir/b"])
    assert store.get(ref, tmp_path / "some", only=["dir/a"]) == manifest
    assert [p.name for p in (tmp_path / "some").rglob("*") if p.is_file()] == ["a"]


def test_files_of_the_user_are_copied_and_stay_writable(
    store: ArtifactStore, root: Path, tmp_path: Path
) -> None:
    files = write(tmp_path / "in", a="alpha")
    ref = store.put("dataset", "mine", files, link=False)
    assert not (root / ref.prefix / "dir" / "a").samefile(files["dir/a"])
    files["dir/a"].write_text("changed")
    store.get(ref, tmp_path / "out")
    assert (tmp_path / "out" / "dir" / "a").read_text() == "alpha"


def test_without_hard_links_files_are_copied(
    store: ArtifactStore, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    files = write(tmp_path / "in", a="alpha")
    ref = store.put("gguf", "demo", files)
    assert not (root / ref.prefix / "dir" / "a").samefile(files["dir/a"])
    store.get(ref, tmp_path / "out")
    assert (tmp_path / "out" / "dir" / "a").read_text() == "alpha"


def test_same_content_is_one_artifact(store: ArtifactStore, tmp_path: Path) -> None:
    first = store.put("gguf", "demo", write(tmp_path / "in", a="alpha"))
    again = store.put("gguf", "demo", write(tmp_path / "copy", a="alpha"))
    other = store.put("gguf", "demo", write(tmp_path / "other", a="beta"))
    assert first == again != other
    assert [m.ref for m in store.find()] == [other, first]
    assert [m.ref for m in store.find("gguf", "demo", first.digest[:8])] == [first]
    assert store.find("adapter") == store.find(name="none") == []


def test_changed_bytes_are_found_and_leave_nothing(store: ArtifactStore, root: Path, tmp_path: Path) -> None:
    ref = store.put("gguf", "demo", write(tmp_path / "in", a="alpha"))
    stored = root / ref.prefix / "dir" / "a"
    stored.chmod(0o644)
    stored.write_text("alphA")
    with pytest.raises(DataLoss):
        store.get(ref, tmp_path / "out")
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_a_changed_or_broken_manifest_is_found_and_healed_by_put(
    store: ArtifactStore, root: Path, tmp_path: Path
) -> None:
    files = write(tmp_path / "in", a="alpha")
    ref = store.put("gguf", "demo", files)
    good = store.put("gguf", "good", write(tmp_path / "good", a="x"))
    place = root / ref.prefix / "manifest.json"
    data = json.loads(place.read_text())
    data["parameters"] = {"rank": "1"}
    for text in (json.dumps(data), "{", "[]"):
        place.write_text(text)
        with pytest.raises(DataLoss):
            store.get(ref, tmp_path / "out")
        assert [m.ref for m in store.find()] == [good]  # one bad manifest doesn't hide the others
        assert store.put("gguf", "demo", files) == ref
        assert store.manifest(ref).ref == ref


def test_half_an_artifact_is_never_seen(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write(tmp_path / "in", a="alpha", b="beta")
    real = folder.hash_file

    def full_at_b(path: Path) -> str:
        if path.stat().st_size == 4:
            raise OSError(28, "No space left on device")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "hash_file", full_at_b)
        with pytest.raises(ResourceExhausted, match="disk is full") as caught:
            store.put("gguf", "demo", files)
    assert caught.value.reason == "DISK_FULL"
    assert store.find() == []
    assert not [p for p in (tmp_path / "store").rglob(".part-*")]
    store.put("gguf", "demo", files)
    assert len(store.find()) == 1


def test_a_file_that_changes_while_it_is_stored(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write(tmp_path / "in", a="alpha")
    real = FolderBackend.put_file

    def change_first(self: FolderBackend, key: str, source: Path, *args: object, **options: object) -> None:
        source.write_text("other")
        real(self, key, source, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(FolderBackend, "put_file", change_first)
    with pytest.raises(DataLoss):
        store.put("gguf", "demo", files)
    assert store.find() == []


def test_missing_things_are_named(store: ArtifactStore, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        store.put("gguf", "demo", {"a": tmp_path / "nowhere"})
    with pytest.raises(NotFound, match="gguf/demo@aaaaaaaaaaaa"):
        store.get(ArtifactRef("gguf", "demo", "a" * 64), tmp_path / "out")
    ref = store.put("gguf", "demo", write(tmp_path / "in", a="alpha"))
    with pytest.raises(DataLoss, match="no file"):
        store.get(ref, tmp_path / "out", only=["b"])


def test_delete_leaves_no_empty_folders(store: ArtifactStore, root: Path, tmp_path: Path) -> None:
    ref = store.put("gguf", "demo", write(tmp_path / "in", a="alpha"))
    store.delete(ref)
    store.delete(ref)
    assert store.find() == []
    assert list(root.iterdir()) == []


def test_publish_replaces_and_lists_in_order(store: ArtifactStore, root: Path, tmp_path: Path) -> None:
    store.publish("run_1", write(tmp_path / "in", z="1", b="2"))
    store.publish("run_1", {"dir/z": write(tmp_path / "new", z="3")["dir/z"], "dir-2": tmp_path / "in" / "b"})
    assert store.published("run_1") == ["dir-2", "dir/b", "dir/z"]
    assert (root / "runs" / "run_1" / "dir" / "z").read_text() == "3"
    for bad in ("..", "", "a/b", "../x"):
        with pytest.raises(InvalidInput):
            store.publish(bad, {})
        with pytest.raises(InvalidInput):
            store.published(bad)


def test_stale_parts_go_and_fresh_ones_stay(
    store: ArtifactStore, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = store.put("gguf", "demo", write(tmp_path / "in", a="alpha"))
    part = root / ref.prefix / ".part-left"
    part.write_text("half")
    assert ".part-left" not in " ".join(stored.key for stored in FolderBackend(root).stored(""))
    FolderBackend(root).write(f"{ref.prefix}/x", b"")
    assert part.exists()
    now = time.time()
    monkeypatch.setattr(folder.time, "time", lambda: now + 2 * 24 * 3600)
    FolderBackend(root).write(f"{ref.prefix}/x", b"")
    assert not part.exists()


def test_keys_cannot_leave_the_folder(root: Path) -> None:
    backend = FolderBackend(root)
    for key in ("../x", "a/../../x", "/etc/passwd"):
        with pytest.raises(InvalidInput):
            backend.read(key, 10)
        with pytest.raises(InvalidInput):
            backend.write(key, b"")


def test_small_objects_are_bounded(root: Path) -> None:
    backend = FolderBackend(root)
    backend.write("k", b"12345")
    assert backend.read("k", 5) == b"12345"
    with pytest.raises(DataLoss, match="larger"):
        backend.read("k", 4)


@pytest.mark.parametrize(
    "address",
    [
        "nowhere",
        "file://host/x",
        "http://127.0.0.1/x",
        "s3+http://127.0.0.1:9000",
        "s3+http://127.0.0.1:9000/Bad_Bucket",
        "s3+http://127.0.0.1:9000/bucket/prefix",
        "file:///",
    ],
)
def test_store_addresses_of_unknown_form(address: str) -> None:
    with pytest.raises(InvalidInput, match="WEB4LORA_STORE"):
        open_store(Settings(store=address))


def test_credentials_in_the_address_are_refused_and_not_repeated() -> None:
    with pytest.raises(InvalidInput) as caught:
        open_store(Settings(store="s3+http://key:s3cr3t@127.0.0.1:9000/bucket"))
    assert "s3cr3t" not in str(caught.value)


def test_open_store_takes_a_folder(tmp_path: Path) -> None:
    assert open_store(Settings(store=(tmp_path / "a b").as_uri())).url == (tmp_path / "a b").as_uri()


def test_an_odd_manifest_hides_no_other(tmp_path: Path) -> None:
    store = ArtifactStore(FolderBackend(tmp_path / "store"))
    (tmp_path / "a").write_bytes(b"a")
    good, other = (store.put("gguf", name, {"a": tmp_path / "a"}) for name in ("good", "other"))
    place = tmp_path / "store" / other.prefix / "manifest.json"
    whole = json.loads(place.read_text())
    odd: list[object] = [
        {**whole, "name": 7},
        {**whole, "kind": "virus"},
        {**whole, "parameters": {"a": "\ud800"}},
        {**whole, "created_at": float("nan")},
        {**whole, "files": [{**whole["files"][0], "size_bytes": float("inf")}]},
    ]
    for data in odd:
        place.write_text(json.dumps(data))
        assert [manifest.ref for manifest in store.find("gguf")] == [good]
    place.write_text("[" * 100_000)
    assert [manifest.ref for manifest in store.find("gguf")] == [good]
