"""Artifact stores for tests: on the session's MinIO, with small parts and short timeouts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from web4lora_chassis.artifacts import ArtifactStore
from web4lora_chassis.artifacts.s3 import S3Backend
from web4lora_chassis.artifacts.s3_upload import unfinished

from tests.servers.fixtures import MinioServer

PART_BYTES = 5 << 20  # the smallest that S3 takes


def s3_store(server: MinioServer, bucket: str, address: str = "", **options: Any) -> ArtifactStore:
    """Return a store in a bucket, reached at another address when one is given."""
    values = {
        "endpoint": address or server.endpoint,
        "bucket": bucket,
        "access_key": server.access_key,
        "secret_key": server.secret_key,
        "region": "us-east-1",
        "secure": False,
        "part_bytes": PART_BYTES,
        **options,
    }
    return ArtifactStore(S3Backend(**values))


def noise(path: Path, size_bytes: int, seed: int = 0) -> Path:
    """Write a file of random bytes, the same for the same seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(random.Random(seed).randbytes(size_bytes))
    return path


def left_uploads(server: MinioServer, bucket: str, key: str) -> int:
    """Return how many unfinished uploads of a key the server keeps."""
    return len(unfinished(server.client, bucket, key))
