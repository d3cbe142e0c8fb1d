"""What cut-off uploads leave in a real MinIO, and artifacts that are stored again."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from web4lora_chassis.artifacts import ArtifactStore
from web4lora_chassis.artifacts.s3 import S3Backend
from web4lora_chassis.artifacts.s3_upload import MultipartUpload

from tests.servers.fixtures import MinioServer
from tests.servers.stores import left_uploads, noise, s3_store


@pytest.fixture
def store(minio: MinioServer, bucket: str) -> ArtifactStore:
    return s3_store(minio, bucket)


def test_files_without_a_manifest_are_found_and_freed(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "file"
    source.write_bytes(b"x" * 100)
    whole = store.put("gguf", "whole", {"file": source})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(S3Backend, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            store.put("gguf", "demo", {"file": source})
    assert store.cut_off(time.time() - 3600) == []
    (upload,) = store.cut_off(time.time() + 3600)
    assert upload.prefix.startswith("artifacts/gguf/demo/")
    assert upload.size_bytes == 100
    store.free(upload)
    assert store.cut_off(time.time() + 3600) == []
    assert store.manifest(whole).size_bytes == 100


def test_parts_on_their_way_are_freed_with_their_files(
    store: ArtifactStore, minio: MinioServer, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"x" * 100)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MultipartUpload, "_send_parts", killed)
    with pytest.raises(KeyboardInterrupt):
        store.put("gguf", "demo", {"a": small, "model": noise(tmp_path / "model", 24 << 20)})
    (upload,) = store.cut_off(time.time() + 3600)
    assert left_uploads(minio, bucket, f"{upload.prefix}/model") == 1
    store.free(upload)
    assert left_uploads(minio, bucket, f"{upload.prefix}/model") == 0
    assert store.cut_off(time.time() + 3600) == []


def test_an_artifact_that_is_stored_again_is_in_use_as_of_now(store: ArtifactStore, tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(b"x" * 100)
    ref = store.put("gguf", "demo", {"file": source})
    (before,) = store.manifests()
    manifest = store.manifest(ref)
    time.sleep(1.1)
    assert store.put("gguf", "demo", {"file": source}) == ref
    (after,) = store.manifests()
    assert after.stored_at > before.stored_at
    assert store.manifest(ref) == manifest
    store.delete(ref)
    assert not store.touch(ref)
    assert list(store.manifests()) == []
