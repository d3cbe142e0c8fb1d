"""Open the store that the settings name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from web4lora_chassis.artifacts.counted import counted_backend
from web4lora_chassis.artifacts.folder import FolderBackend
from web4lora_chassis.artifacts.store import ArtifactStore
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.settings import Settings

if TYPE_CHECKING:
    from minio.credentials.providers import Provider

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def open_store(settings: Settings, provider: Provider | None = None) -> ArtifactStore:
    """Open the store that the settings name.

    Args:
        settings: Name the store and its key.
        provider: Gives a key to an S3 store in place of the settings' own, anew when it has ended.

    Raises:
        InvalidInput: The address is of no known form.
    """
    parts = urlsplit(settings.store)
    bucket = parts.path.strip("/")
    if "@" in parts.netloc:
        raise InvalidInput(
            "WEB4LORA_STORE: an address must not hold credentials.",
            fix="Use WEB4LORA_S3_ACCESS_KEY_FILE and WEB4LORA_S3_SECRET_KEY_FILE.",
        )
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and bucket:
        return ArtifactStore(counted_backend(FolderBackend(Path(url2pathname(parts.path)))))
    if parts.scheme in ("s3+http", "s3+https") and parts.hostname and _BUCKET.fullmatch(bucket):
        from web4lora_chassis.artifacts.s3 import S3Backend  # here, because it takes a while to import

        backend = S3Backend(
            endpoint=parts.netloc,
            bucket=bucket,
            access_key=settings.s3_access_key.get_secret_value(),
            secret_key=settings.s3_secret_key.get_secret_value(),
            region=settings.s3_region,
            secure=parts.scheme == "s3+https",
            provider=provider,
        )
        return ArtifactStore(counted_backend(backend))
    raise InvalidInput(
        f"WEB4LORA_STORE: {settings.store!r} is not the address of a store.",
        fix="Use file:///folder or s3+http://host:port/bucket (s3+https for TLS).",
    )
