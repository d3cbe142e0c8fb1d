"""The artifact store on a real MinIO."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from web4lora_chassis import errors
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore, open_store
from web4lora_chassis.artifacts.s3_upload import SHA256_HEADER
from web4lora_chassis.settings import Settings

from tests.servers.fixtures import MinioServer, free_port
from tests.servers.stores import PART_BYTES, left_uploads, noise, s3_store

HERE = Path(__file__).parent


@pytest.fixture
def store(minio: MinioServer, bucket: str) -> ArtifactStore:
    return s3_store(minio, bucket)


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_round_trip(store: ArtifactStore, minio: MinioServer, bucket: str, tmp_path: Path) -> None:
    content = {
        "config.json": b"{}",
        "empty": b"",
        "logs/é ü+&.csv": b"step,loss\n",
        "one-part.bin": noise(tmp_path / "a", PART_BYTES).read_bytes(),
        "model.safetensors": noise(tmp_path / "b", 40 << 20).read_bytes(),
    }
    files = {}
    for number, (path, data) in enumerate(content.items()):
        files[path] = tmp_path / "in" / str(number)
        files[path].parent.mkdir(exist_ok=True)
        files[path].write_bytes(data)
    moved: list[int] = []
    ref = store.put(
        "adapter", "web4", files, parameters={"rank": 16}, created_by="test", advance=moved.append
    )
    assert sum(moved) == ref.size_bytes == sum(len(data) for data in content.values())
    assert max(moved) <= PART_BYTES

    seen = {found.object_name: found.size for found in minio.client.list_objects(bucket, recursive=True)}
    assert seen.pop(f"artifacts/adapter/web4/{ref.digest[:12]}/manifest.json") > 0
    assert seen == {f"{ref.prefix}/{path}": len(data) for path, data in content.items()}
    assert left_uploads(minio, bucket, f"{ref.prefix}/model.safetensors") == 0
    etag = minio.client.stat_object(bucket, f"{ref.prefix}/model.safetensors").etag
    assert etag.endswith("-8")  # it did travel in parts

    moved.clear()
    manifest = store.get(ref, tmp_path / "out", advance=moved.append)
    assert manifest.ref == ref
    assert sum(moved) == ref.size_bytes
    assert files_below(tmp_path / "out") == content
    store.get(ref, tmp_path / "some", only=["config.json"])
    assert files_below(tmp_path / "some") == {"config.json": b"{}"}

    assert [found.ref for found in store.find("adapter", "web4", ref.digest[:8])] == [ref]
    assert [found.ref for found in store.find()] == [ref]
    assert store.find("gguf") == []
    store.delete(ref)
    assert store.find() == []
    assert list(minio.client.list_objects(bucket, recursive=True)) == []
    with pytest.raises(errors.NotFound):
        store.get(ref, tmp_path / "gone")


def test_publish_replaces_and_lists(store: ArtifactStore, tmp_path: Path) -> None:
    store.publish("run_1", {"run.json": noise(tmp_path / "a", 10), "logs/loss.csv": noise(tmp_path / "b", 9)})
    store.publish("run_1", {"run.json": noise(tmp_path / "c", 11, seed=1)})
    store.publish("run_10", {"run.json": noise(tmp_path / "a", 10)})
    assert store.published("run_1") == ["logs/loss.csv", "run.json"]


def test_the_settings_open_it(minio: MinioServer, bucket: str, tmp_path: Path) -> None:
    settings = Settings(
        store=f"s3+http://{minio.endpoint}/{bucket}",
        s3_access_key=minio.access_key,  # type: ignore[arg-type]
        s3_secret_key=minio.secret_key,  # type: ignore[arg-type]
    )
    store = open_store(settings)
    ref = store.put("report", "r", {"eval.json": noise(tmp_path / "a", 5)})
    assert store.manifest(ref).ref == ref
    assert minio.secret_key not in store.url


@pytest.mark.parametrize("size_bytes", [1000, 12 << 20])
def test_changed_bytes_in_the_bucket(
    store: ArtifactStore, minio: MinioServer, bucket: str, tmp_path: Path, size_bytes: int
) -> None:
    ref = store.put("gguf", "demo", {"m/model.gguf": noise(tmp_path / "a", size_bytes)})
    key = f"{ref.prefix}/m/model.gguf"
    for size in (size_bytes, size_bytes - 1, size_bytes + 1, 0):
        data = noise(tmp_path / "b", size, seed=1).read_bytes()
        minio.client.put_object(bucket, key, io.BytesIO(data), len(data))
        with pytest.raises(errors.DataLoss, match=r"model\.gguf"):
            store.get(ref, tmp_path / "out")
        assert files_below(tmp_path / "out") == {}
    minio.client.remove_object(bucket, key)
    with pytest.raises(errors.NotFound, match=r"model\.gguf"):
        store.get(ref, tmp_path / "out")
    assert files_below(tmp_path / "out") == {}


def test_a_changed_manifest(store: ArtifactStore, minio: MinioServer, bucket: str, tmp_path: Path) -> None:
    ref = store.put("gguf", "demo", {"model.gguf": noise(tmp_path / "a", 10)}, parameters={"type": "Q4_K_M"})
    key = f"{ref.prefix}/manifest.json"
    data = minio.client.get_object(bucket, key).data.replace(b"Q4_K_M", b"Q8_0")
    minio.client.put_object(bucket, key, io.BytesIO(data), len(data))
    with pytest.raises(errors.DataLoss, match="manifest"):
        store.get(ref, tmp_path / "out")


@pytest.mark.parametrize("size_bytes", [1000, 24 << 20])
def test_a_file_that_changes_meanwhile_is_never_seen(
    store: ArtifactStore, minio: MinioServer, bucket: str, tmp_path: Path, size_bytes: int
) -> None:
    first, second = noise(tmp_path / "a", 10), noise(tmp_path / "b", size_bytes)

    def change(_: int) -> None:
        """Change the second file once the first is stored: after it was hashed, before it is sent."""
        with second.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(bytes([(file.read(1) or b"\0")[0] ^ 255]))

    with pytest.raises(errors.DataLoss, match="changed"):
        store.put("gguf", "demo", {"a": first, "b": second}, advance=change)
    assert store.find() == []
    keys = [found.object_name for found in minio.client.list_objects(bucket, recursive=True)]
    assert [key.rsplit("/", 1)[1] for key in keys] == ["a"]
    assert left_uploads(minio, bucket, keys[0].removesuffix("a") + "b") == 0


def test_what_others_left_of_a_key_is_cleaned_up(
    store: ArtifactStore, minio: MinioServer, bucket: str, tmp_path: Path
) -> None:
    """Two stale uploads of other content: their parts must not get into the object."""
    source = noise(tmp_path / "a", 12 << 20)
    for seed in (1, 2):
        upload = minio.client._create_multipart_upload(bucket, "runs/r/model.gguf", {SHA256_HEADER: "0" * 64})
        other = noise(tmp_path / "b", PART_BYTES, seed=seed).read_bytes()
        minio.client._upload_part(bucket, "runs/r/model.gguf", other, None, upload, 1)
    assert left_uploads(minio, bucket, "runs/r/model.gguf") == 2
    store.publish("r", {"model.gguf": source})
    assert minio.client.get_object(bucket, "runs/r/model.gguf").data == source.read_bytes()
    assert left_uploads(minio, bucket, "runs/r/model.gguf") == 0


def test_two_processes_put_the_same_artifact(minio: MinioServer, bucket: str, tmp_path: Path) -> None:
    source = noise(tmp_path / "model", 32 << 20)
    command = [sys.executable, HERE / "put_artifact.py", minio.endpoint, bucket, source]
    env = {**os.environ, "KEY": minio.access_key, "SECRET": minio.secret_key}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    writers = [subprocess.Popen(command, env=env, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for writer in writers:
        writer.stdin.write(b"go\n")
        writer.stdin.flush()
    outputs = [writer.communicate()[0].decode() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], outputs
    assert outputs[0] == outputs[1]
    (manifest,) = s3_store(minio, bucket).find()
    s3_store(minio, bucket).get(manifest.ref, tmp_path / "out")
    assert (tmp_path / "out" / "model.gguf").read_bytes() == source.read_bytes()
    assert left_uploads(minio, bucket, f"{manifest.ref.prefix}/model.gguf") == 0


def test_downloads_to_the_same_place_do_not_mix(store: ArtifactStore, tmp_path: Path) -> None:
    source = noise(tmp_path / "model", 24 << 20)
    ref = store.put("gguf", "demo", {"model.gguf": source})
    failures: list[Exception] = []

    def download() -> None:
        try:
            store.get(ref, tmp_path / "out")
        except errors.Web4Error as error:
            failures.append(error)

    threads = [threading.Thread(target=download) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert files_below(tmp_path / "out") == {"model.gguf": source.read_bytes()}


def test_a_wrong_beginning_left_by_a_crash_is_not_believed(store: ArtifactStore, tmp_path: Path) -> None:
    source = noise(tmp_path / "model", 12 << 20)
    ref = store.put("gguf", "demo", {"model.gguf": source})
    sha256 = store.manifest(ref).file("model.gguf").sha256
    for size_bytes in (1 << 20, 12 << 20, 13 << 20):
        noise(tmp_path / "out" / f".part-{sha256[:32]}", size_bytes, seed=1)
        moved: list[int] = []
        store.get(ref, tmp_path / "out", advance=moved.append)
        assert files_below(tmp_path / "out") == {"model.gguf": source.read_bytes()}
        assert sum(moved) == ref.size_bytes
        (tmp_path / "out" / "model.gguf").unlink()


def test_full_disk_on_download(store: ArtifactStore, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the same refused write."""
    ref = store.put("gguf", "demo", {"model.gguf": noise(tmp_path / "model", 12 << 20)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, hard))
    try:
        with pytest.raises(errors.ResourceExhausted, match="disk is full") as caught:
            store.get(ref, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.reason == "DISK_FULL"
    assert files_below(tmp_path / "out") == {}


def every_call(store: ArtifactStore, source: Path, target: Path) -> list[errors.Web4Error]:
    """Return the error of each way to use a store that can't be used."""
    ref = ArtifactRef("gguf", "demo", "a" * 64)
    calls = [
        lambda: store.put("gguf", "demo", {"model.gguf": source}),
        lambda: store.publish("r", {"model.gguf": source}),
        lambda: store.get(ref, target),
        lambda: store.find(),
        lambda: store.delete(ref),
    ]
    caught = []
    for call in calls:
        with pytest.raises(errors.Web4Error) as error:
            call()
        caught.append(error.value)
    return caught


@pytest.mark.parametrize(
    "options", [{"secret_key": "wrong-secret"}, {"access_key": "nobody"}, {"access_key": ""}]
)
@pytest.mark.parametrize("size_bytes", [10, 12 << 20])
def test_wrong_keys(
    minio: MinioServer, bucket: str, tmp_path: Path, options: dict[str, str], size_bytes: int
) -> None:
    store = s3_store(minio, bucket, **options)
    for error in every_call(store, noise(tmp_path / "a", size_bytes), tmp_path / "out"):
        assert type(error) is errors.Unauthenticated
        assert minio.endpoint in error.message
        assert "WEB4LORA_S3_ACCESS_KEY" in error.fix
        assert minio.secret_key not in str(error) + repr(error.metadata)


@pytest.mark.parametrize("size_bytes", [10, 12 << 20])
def test_missing_bucket(minio: MinioServer, tmp_path: Path, size_bytes: int) -> None:
    store = s3_store(minio, "no-such-bucket")
    for error in every_call(store, noise(tmp_path / "a", size_bytes), tmp_path / "out"):
        assert type(error) is errors.NotFound
        assert "no-such-bucket" in error.message
        assert "Create it" in error.fix


def test_nobody_listens(minio: MinioServer, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    store = s3_store(minio, "bucket", address)
    for error in every_call(store, noise(tmp_path / "a", 10), tmp_path / "out"):
        assert type(error) is errors.Unavailable
        assert address in error.message
        assert "refused" in error.message


@pytest.fixture
def web_page() -> Iterator[str]:
    """A web server that is no S3 store, as the console's port is."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>not found</html>")

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_port_that_is_no_store(minio: MinioServer, web_page: str, tmp_path: Path) -> None:
    store = s3_store(minio, "bucket", web_page)
    for error in every_call(store, noise(tmp_path / "a", 10), tmp_path / "out"):
        assert type(error) is errors.FailedPrecondition
        assert error.reason == "NOT_S3"


def test_tls_on_a_plain_port(minio: MinioServer, bucket: str, tmp_path: Path) -> None:
    store = s3_store(minio, bucket, secure=True)
    with pytest.raises(errors.Unavailable, match=minio.endpoint) as caught:
        store.find()
    assert caught.value.reason == "TLS_FAILED"
