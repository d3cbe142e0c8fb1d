"""Names, digests and what a manifest refuses."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from web4lora_chassis.artifacts import ArtifactRef, FileEntry, Manifest, hash_file
from web4lora_chassis.errors import DataLoss, InvalidInput

SHA = "a" * 64


def manifest(**fields: Any) -> Manifest:
    return Manifest(**{"kind": "gguf", "name": "demo", "files": (FileEntry("a", SHA, 1),), **fields})


def test_digest_names_content_and_origin_not_who_and_when() -> None:
    base = manifest()
    assert manifest(created_by="x", created_at=5.0).digest == base.digest
    others = [
        manifest(name="other"),
        manifest(kind="adapter"),
        manifest(files=(FileEntry("a", SHA, 2),)),
        manifest(parameters={"rank": "16"}),
        manifest(tools={"torch": "2"}),
        manifest(inputs=(base.ref,)),
    ]
    assert len({other.digest for other in [base, *others]}) == len(others) + 1


def test_json_round_trip() -> None:
    original = manifest(
        inputs=(ArtifactRef("adapter", "x", SHA, 3),),
        parameters={"é": '"ü"'},
        tools={"a": "1"},
        created_by="trainer",
        created_at=1.5,
    )
    assert Manifest.from_json(original.to_json()) == original
    assert Manifest.from_json(original.to_json()).digest == original.digest


@pytest.mark.parametrize("path", ["", "/a", "../a", "a/../b", "a//b", "./a", "a/", "a\\b", "a\0", "."])
def test_paths_that_could_leave_the_folder_are_refused(path: str) -> None:
    with pytest.raises(InvalidInput):
        FileEntry(path, SHA, 0)


@pytest.mark.parametrize("paths", [[], ["b", "a"], ["a", "a"], ["a", "a/b"], ["manifest.json"]])
def test_file_lists_that_cannot_be_stored_are_refused(paths: list[str]) -> None:
    with pytest.raises(InvalidInput):
        manifest(files=tuple(FileEntry(path, SHA, 0) for path in paths))


@pytest.mark.parametrize(
    ("kind", "name", "digest"),
    [
        ("model", "a", SHA),
        ("gguf", "A", SHA),
        ("gguf", "../a", SHA),
        ("gguf", "", SHA),
        ("gguf", "a", "b" * 12),
    ],
)
def test_references_are_safe_paths(kind: str, name: str, digest: str) -> None:
    with pytest.raises(InvalidInput):
        ArtifactRef(kind, name, digest)


@pytest.mark.parametrize(
    "change", [{"files": [{"path": "../x", "sha256": SHA, "size_bytes": 1}]}, {"files": 3}]
)
def test_a_malformed_manifest_is_data_loss(change: dict[str, Any]) -> None:
    with pytest.raises(DataLoss):
        Manifest.from_json({**manifest().to_json(), **change})


def test_hash_file_reports_every_byte(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000
    (tmp_path / "f").write_bytes(data)
    seen: list[int] = []
    assert hash_file(tmp_path / "f", seen.append) == hashlib.sha256(data).hexdigest()
    assert sum(seen) == len(data)
