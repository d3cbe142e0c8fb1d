"""Bucket and key, made on the real MinIO."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

import pytest
from minio import Minio
from minio.error import S3Error
from pydantic import SecretStr
from web4lora_chassis.artifacts import open_store
from web4lora_chassis.artifacts.provision import ProvisionSettings, provision
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, Unavailable

from tests.servers.fixtures import MinioServer


@pytest.fixture
def settings(minio: MinioServer) -> ProvisionSettings:
    bucket = f"made-{secrets.token_hex(4)}"
    return ProvisionSettings(
        store=f"s3+http://{minio.endpoint}/{bucket}",
        s3_access_key=f"key{secrets.token_hex(6)}",
        s3_secret_key=secrets.token_hex(16),
        s3_root_user=minio.access_key,
        s3_root_password=minio.secret_key,
    )  # type: ignore[arg-type]


def _client(minio: MinioServer, settings: ProvisionSettings) -> Minio:
    return Minio(
        minio.endpoint,
        settings.s3_access_key.get_secret_value(),
        settings.s3_secret_key.get_secret_value(),
        secure=False,
        region="us-east-1",
    )


def test_the_key_serves_the_store_and_no_other_bucket(
    minio: MinioServer, settings: ProvisionSettings, bucket: str, tmp_path: Path
) -> None:
    assert "made" in provision(settings)
    (tmp_path / "a.txt").write_text("a")
    store = open_store(settings)
    ref = store.put("report", "report", {"a.txt": tmp_path / "a.txt"})
    assert [manifest.digest for manifest in store.find()] == [ref.digest]
    assert store.touch(ref)
    assert store.cut_off(time.time() + 3600) == []
    store.publish("run_1", {"a.txt": tmp_path / "a.txt"})
    store.unpublish("run_1")
    assert store.published("run_1") == []
    store.delete(ref)
    client = _client(minio, settings)
    with pytest.raises(S3Error, match="AccessDenied"):
        list(client.list_objects(bucket))
    with pytest.raises(S3Error, match="AccessDenied"):
        client.make_bucket(f"more-{secrets.token_hex(4)}")


def test_again_it_changes_only_the_secret(minio: MinioServer, settings: ProvisionSettings) -> None:
    provision(settings)
    renewed = settings.model_copy(update={"s3_secret_key": SecretStr(secrets.token_hex(16))})
    assert "is there" in provision(renewed)
    assert list(open_store(renewed).find()) == []
    bucket = settings.store.rsplit("/", 1)[1]
    with pytest.raises(S3Error):
        list(_client(minio, settings).list_objects(bucket))


def test_a_wrong_root_key_and_a_server_that_is_away_are_told_apart(settings: ProvisionSettings) -> None:
    wrong = settings.model_copy(update={"s3_root_password": SecretStr("wrong-password")})
    with pytest.raises(FailedPrecondition, match="refused"):
        provision(wrong)
    away = settings.model_copy(update={"store": "s3+http://127.0.0.1:1/bucket"})
    with pytest.raises(Unavailable, match="out of reach"):
        provision(away)
    with pytest.raises(InvalidInput, match="no bucket"):
        provision(settings.model_copy(update={"store": "file:///tmp"}))
