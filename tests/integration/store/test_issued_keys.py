"""Keys that end by themselves, issued by the real MinIO: what they may do, and what they may not."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

import pytest
from minio import Minio
from minio.credentials.providers import StaticProvider
from minio.error import S3Error
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore, open_store
from web4lora_chassis.artifacts.issue import KEY_SECONDS, issue
from web4lora_chassis.artifacts.provision import ProvisionSettings, provision
from web4lora_chassis.errors import FailedPrecondition, Unauthenticated, Unavailable
from web4lora_chassis.settings import Settings

from tests.servers.fixtures import MinioServer


@pytest.fixture
def settings(minio: MinioServer) -> Settings:
    """A bucket and the key of the services."""
    made = ProvisionSettings(
        store=f"s3+http://{minio.endpoint}/issued-{secrets.token_hex(4)}",
        s3_access_key=f"key{secrets.token_hex(6)}",
        s3_secret_key=secrets.token_hex(16),
        s3_root_user=minio.access_key,
        s3_root_password=minio.secret_key,
    )  # type: ignore[arg-type]
    provision(made)
    return made


def provider(settings: Settings, *, write: bool) -> StaticProvider:
    key = issue(settings, write=write)
    return StaticProvider(key.access_key, key.secret_key, key.session_token)


def opened(settings: Settings, *, write: bool) -> ArtifactStore:
    return open_store(Settings(store=settings.store), provider(settings, write=write))


def put(store: ArtifactStore, folder: Path, size_bytes: int) -> ArtifactRef:
    (folder / "train.jsonl").write_bytes(secrets.token_bytes(size_bytes))
    return store.put("dataset", "data", {"train/train.jsonl": folder / "train.jsonl"})


def test_one_reads_the_other_adds_and_neither_deletes(settings: Settings, tmp_path: Path) -> None:
    reads, writes, ours = opened(settings, write=False), opened(settings, write=True), open_store(settings)
    ref = put(writes, tmp_path, 40 << 20)  # in parts, as models are
    for store in (reads, writes):
        assert [manifest.ref for manifest in store.find()] == [ref]
        store.get(ref, tmp_path / str(id(store)))
        with pytest.raises(Unauthenticated, match="AccessDenied"):
            store.delete(ref)
    with pytest.raises(Unauthenticated, match="AccessDenied"):
        put(reads, tmp_path, 10)
    assert [manifest.ref for manifest in ours.find()] == [ref]


def test_it_writes_below_its_prefix_alone(minio: MinioServer, settings: Settings, bucket: str) -> None:
    client = Minio(
        minio.endpoint, credentials=provider(settings, write=True), secure=False, region="us-east-1"
    )
    ours = settings.store.rpartition("/")[2]
    for place, key in ((ours, "runs/run_1/run.json"), (ours, "artifacts"), (bucket, "artifacts/x")):
        with pytest.raises(S3Error, match="AccessDenied"):
            client.fput_object(place, key, __file__)
    client.fput_object(ours, "artifacts/x", __file__)
    with pytest.raises(S3Error, match="AccessDenied"):
        client.remove_object(ours, "artifacts/x")


def test_it_ends(settings: Settings) -> None:
    key = issue(settings, write=False)
    assert 0 < key.expires_at - time.time() <= KEY_SECONDS + 5
    assert key.secret_key not in repr(key)
    assert key.session_token not in repr(key)
    with pytest.raises(Unauthenticated):  # without the token that says so, it is no key
        list(
            open_store(Settings(store=settings.store), StaticProvider(key.access_key, key.secret_key)).find()
        )


def test_a_store_that_issues_none_says_so(settings: Settings, tmp_path: Path) -> None:
    wrong = settings.model_copy(update={"s3_access_key": settings.s3_secret_key})
    for store in (Settings(store=tmp_path.as_uri()), Settings(store=settings.store), wrong):
        with pytest.raises(FailedPrecondition, match="issues no keys") as caught:
            issue(store, write=False)
        assert settings.s3_secret_key.get_secret_value() not in str(caught.value)


def test_a_store_that_is_away_is_unavailable(settings: Settings) -> None:
    away = settings.model_copy(update={"store": "s3+http://127.0.0.1:1/bucket"})
    with pytest.raises(Unavailable, match="out of reach"):
        issue(away, write=True)
