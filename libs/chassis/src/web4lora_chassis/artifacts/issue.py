"""Issues keys to an S3 store that end by themselves and delete nothing, for clients, by its STS."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import urllib3
from minio.credentials.providers import AssumeRoleProvider

from web4lora_chassis.artifacts.s3_client import translated
from web4lora_chassis.errors import FailedPrecondition
from web4lora_chassis.settings import Settings

KEY_SECONDS = 3600
_TIMEOUT_SECONDS = 10.0
_READ = ("artifacts", "runs")
_WRITE = ("artifacts",)


@dataclass(frozen=True)
class IssuedKey:
    """A key to the store; `expires_at` is seconds since 1970."""

    access_key: str
    secret_key: str = field(repr=False)
    session_token: str = field(repr=False)
    expires_at: float


def issued_policy(bucket: str, *, write: bool) -> dict[str, Any]:
    """Return what an issued key may do: list the bucket and read in it; to write, add artifacts.

    What the key that issues it may not do, it may not either.
    """

    def below(prefixes: tuple[str, ...]) -> list[str]:
        return [f"arn:aws:s3:::{bucket}/{prefix}/*" for prefix in prefixes]

    statements = [
        {
            "Effect": "Allow",
            "Action": ["s3:GetBucketLocation", "s3:ListBucket"],
            "Resource": [f"arn:aws:s3:::{bucket}"],
        },
        {"Effect": "Allow", "Action": ["s3:GetObject"], "Resource": below(_READ)},
    ]
    if write:
        statements += [
            {
                "Effect": "Allow",
                "Action": ["s3:ListBucketMultipartUploads"],
                "Resource": [f"arn:aws:s3:::{bucket}"],
            },
            {
                "Effect": "Allow",
                "Action": ["s3:PutObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"],
                "Resource": below(_WRITE),
            },
        ]
    return {"Version": "2012-10-17", "Statement": statements}


def issue(settings: Settings, *, write: bool) -> IssuedKey:
    """Issue a key for an hour.

    Args:
        settings: Name the store, and the key that issues.
        write: It may add artifacts.

    Raises:
        FailedPrecondition: The store issues none.
        Unavailable: It is out of reach.
    """
    parts = urlsplit(settings.store)
    access_key = settings.s3_access_key.get_secret_value()
    if parts.scheme not in ("s3+http", "s3+https") or not access_key:
        raise _none_issued(settings.store, "it has no keys")
    scheme = parts.scheme.removeprefix("s3+")
    provider = AssumeRoleProvider(
        sts_endpoint=f"{scheme}://{parts.netloc}",
        access_key=access_key,
        secret_key=settings.s3_secret_key.get_secret_value(),
        duration_seconds=KEY_SECONDS,
        policy=json.dumps(issued_policy(parts.path.strip("/"), write=write)),
        region=settings.s3_region,
        http_client=urllib3.PoolManager(timeout=_TIMEOUT_SECONDS, retries=urllib3.Retry(total=2)),
    )
    try:
        with translated(settings.store):
            made = provider.retrieve()
    except ValueError as error:  # so the SDK tells of an answer that is no key
        raise _none_issued(settings.store, str(error)) from error
    if made.session_token is None or made.expiration is None:
        raise _none_issued(settings.store, "its answer names no end")
    return IssuedKey(made.access_key, made.secret_key, made.session_token, made.expiration.timestamp())


def _none_issued(store: str, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"The artifact store {store} issues no keys: {why}.",
        fix="Give the client a key of its own, WEB4LORA_S3_ACCESS_KEY_FILE and WEB4LORA_S3_SECRET_KEY_FILE.",
        reason="NO_ISSUED_KEYS",
    )
