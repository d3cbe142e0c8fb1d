"""The artifact store on a real MinIO, with the connection in between cut, stalled and slowed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from web4lora_chassis.artifacts import ArtifactStore
from web4lora_chassis.errors import Unavailable

from tests.servers.fixtures import MinioServer, Proxy
from tests.servers.stores import PART_BYTES, left_uploads, noise, s3_store

SIZE_BYTES = 32 << 20
SLACK_BYTES = 256 << 10  # requests, answers, headers


@pytest.fixture
def store(minio: MinioServer, bucket: str, minio_proxy: Proxy) -> ArtifactStore:
    return s3_store(minio, bucket, minio_proxy.address)


def after(limit_bytes: int, act: Callable[[], None]) -> Callable[[int], None]:
    """Return a progress callback that acts once so many bytes were moved."""
    moved = 0
    done = False

    def advance(size_bytes: int) -> None:
        nonlocal moved, done
        moved += size_bytes
        if moved >= limit_bytes and not done:
            done = True
            act()

    return advance


def test_cut_upload_is_resumed(
    store: ArtifactStore, minio: MinioServer, bucket: str, minio_proxy: Proxy, tmp_path: Path
) -> None:
    files = {"model.gguf": noise(tmp_path / "model", SIZE_BYTES)}
    with pytest.raises(Unavailable, match=minio_proxy.address):
        store.put("gguf", "demo", files, advance=after(3 * PART_BYTES, minio_proxy.cut))
    direct = s3_store(minio, bucket)
    assert direct.find() == []
    assert list(minio.client.list_objects(bucket, recursive=True)) == []

    (upload,) = minio.client._list_multipart_uploads(bucket).uploads
    there = minio.client._list_parts(bucket, upload.object_name, upload.upload_id).parts
    missing_bytes = SIZE_BYTES - sum(part.size for part in there)
    assert 0 < missing_bytes <= SIZE_BYTES - 3 * PART_BYTES

    minio_proxy.heal()
    before = minio_proxy.received_bytes()
    moved: list[int] = []
    ref = store.put("gguf", "demo", files, advance=moved.append)
    sent = minio_proxy.received_bytes() - before
    assert missing_bytes <= sent <= missing_bytes + SLACK_BYTES
    assert sum(moved) == SIZE_BYTES
    assert left_uploads(minio, bucket, f"{ref.prefix}/model.gguf") == 0
    direct.get(ref, tmp_path / "out")
    assert (tmp_path / "out" / "model.gguf").read_bytes() == files["model.gguf"].read_bytes()


def test_what_is_there_is_not_sent_again(store: ArtifactStore, minio_proxy: Proxy, tmp_path: Path) -> None:
    files = {"model.gguf": noise(tmp_path / "model", SIZE_BYTES)}
    ref = store.put("gguf", "demo", files)
    before = minio_proxy.received_bytes()
    assert store.put("gguf", "demo", files) == ref
    store.publish("r", files)
    published = minio_proxy.received_bytes() - before
    store.publish("r", files)
    again = minio_proxy.received_bytes() - before - published
    assert SIZE_BYTES <= published <= SIZE_BYTES + SLACK_BYTES
    assert again < SLACK_BYTES


def test_cut_upload_goes_on_with_other_content(
    store: ArtifactStore, minio: MinioServer, bucket: str, minio_proxy: Proxy, tmp_path: Path
) -> None:
    """A run's file may change between the tries: no byte of the old one may get into the new one."""
    with pytest.raises(Unavailable):
        store.publish(
            "r",
            {"model.gguf": noise(tmp_path / "old", SIZE_BYTES)},
            advance=after(3 * PART_BYTES, minio_proxy.cut),
        )
    minio_proxy.heal()
    old = (tmp_path / "old").read_bytes()
    new = old[:PART_BYTES] + noise(tmp_path / "new", SIZE_BYTES - PART_BYTES, seed=1).read_bytes()
    (tmp_path / "new").write_bytes(new)
    store.publish("r", {"model.gguf": tmp_path / "new"})
    assert minio.client.get_object(bucket, "runs/r/model.gguf").data == new
    before = minio_proxy.received_bytes()
    store.publish("r", {"model.gguf": tmp_path / "new"})
    assert minio_proxy.received_bytes() - before < SLACK_BYTES  # it carries its own digest, not the old one


def test_cut_download_is_resumed(store: ArtifactStore, minio_proxy: Proxy, tmp_path: Path) -> None:
    source = noise(tmp_path / "model", SIZE_BYTES)
    ref = store.put("gguf", "demo", {"model.gguf": source})
    target = tmp_path / "out" / "model.gguf"
    with pytest.raises(Unavailable, match=minio_proxy.address):
        store.get(ref, tmp_path / "out", advance=after(SIZE_BYTES // 2, minio_proxy.cut))
    assert not target.exists()
    (part,) = target.parent.iterdir()
    there = part.stat().st_size
    assert there >= SIZE_BYTES // 2

    minio_proxy.heal()
    before = minio_proxy.received_bytes("downstream")
    moved: list[int] = []
    store.get(ref, tmp_path / "out", advance=moved.append)
    received = minio_proxy.received_bytes("downstream") - before
    assert SIZE_BYTES - there <= received <= SIZE_BYTES - there + SLACK_BYTES
    assert sum(moved) == SIZE_BYTES
    assert target.read_bytes() == source.read_bytes()
    assert list(target.parent.iterdir()) == [target]


def test_connections_that_keep_breaking_are_survived(
    store: ArtifactStore, minio_proxy: Proxy, tmp_path: Path
) -> None:
    source = noise(tmp_path / "model", SIZE_BYTES)
    minio_proxy.cut_after(8 << 20, "upstream")  # each connection carries one part, the second breaks it
    ref = store.put("gguf", "demo", {"model.gguf": source})
    minio_proxy.heal()
    minio_proxy.cut_after(7 << 20, "downstream")
    store.get(ref, tmp_path / "out")
    assert (tmp_path / "out" / "model.gguf").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("size_bytes", [SIZE_BYTES, PART_BYTES + 1000])
def test_stalled_upload_is_ended(
    minio: MinioServer, bucket: str, minio_proxy: Proxy, tmp_path: Path, size_bytes: int
) -> None:
    """A large part is not taken any more; a small one, which the buffers hold, gets no answer."""
    store = s3_store(minio, bucket, minio_proxy.address, stall_timeout_seconds=0.5)
    files = {"model.gguf": noise(tmp_path / "model", size_bytes)}
    with pytest.raises(Unavailable, match=minio_proxy.address):
        store.put("gguf", "demo", files, advance=after(PART_BYTES, minio_proxy.stall))


def test_stalled_download_is_ended(
    minio: MinioServer, bucket: str, minio_proxy: Proxy, tmp_path: Path
) -> None:
    files = {"model.gguf": noise(tmp_path / "model", SIZE_BYTES)}
    ref = s3_store(minio, bucket).put("gguf", "demo", files)
    store = s3_store(minio, bucket, minio_proxy.address, stall_timeout_seconds=0.5)
    with pytest.raises(Unavailable, match=minio_proxy.address):
        store.get(ref, tmp_path / "out", advance=after(1, minio_proxy.stall))


def test_a_slow_line_is_no_stall(minio: MinioServer, bucket: str, minio_proxy: Proxy, tmp_path: Path) -> None:
    """A part takes longer than the stall timeout, but bytes flow all the time."""
    size_bytes = 24 << 20  # more than the system's buffers on the way hold
    patient = s3_store(
        minio,
        bucket,
        minio_proxy.address,
        part_bytes=size_bytes,
        connect_timeout_seconds=2.0,
        stall_timeout_seconds=2.0,
    )
    source = noise(tmp_path / "model", size_bytes)
    minio_proxy.slow(6000, "upstream")
    patient.put("gguf", "demo", {"model.gguf": source})
    sent = minio_proxy.received_bytes()
    assert size_bytes <= sent <= size_bytes + SLACK_BYTES  # nothing had to be sent twice


def test_every_possible_cut_leaves_all_or_nothing(
    store: ArtifactStore, minio: MinioServer, bucket: str, minio_proxy: Proxy, tmp_path: Path
) -> None:
    """Several files, cut after each: the artifact is seen whole or not at all, and is finished later."""
    files = {f"{number}.bin": noise(tmp_path / str(number), 1000, seed=number) for number in range(4)}
    direct = s3_store(minio, bucket)
    for cut in range(1, len(files) + 1):
        with pytest.raises(Unavailable):
            store.put("adapter", "a", files, advance=after(cut * 1000, minio_proxy.cut))
        assert direct.find() == []
        assert len(list(minio.client.list_objects(bucket, recursive=True))) == cut
        minio_proxy.heal()
    ref = store.put("adapter", "a", files)
    assert [manifest.ref for manifest in direct.find()] == [ref]
    direct.get(ref, tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == len(files)
