"""Makes the store's bucket and its key on a MinIO server: `python -m web4lora_chassis.artifacts.provision`.

The stack runs it at every start, with the root key, which nothing else has. It may be repeated: what is there
stays, and a secret key that was changed is set anew. The key it makes can do what the artifact store does in
this one bucket, and nothing else.

Variables: WEB4LORA_STORE; WEB4LORA_S3_ACCESS_KEY and WEB4LORA_S3_SECRET_KEY, the key to make; and
WEB4LORA_S3_ROOT_USER and WEB4LORA_S3_ROOT_PASSWORD. Each secret may be a file, with `_FILE` behind its name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.credentials.providers import StaticProvider
from minio.error import MinioAdminException, MinioException
from minio.minioadmin import MinioAdmin
from pydantic import SecretStr

from web4lora_chassis.errors import FailedPrecondition, InvalidInput, Unavailable, Web4Error
from web4lora_chassis.settings import Settings, load

_POLICY = "web4lora-{bucket}"
_TIMEOUT_SECONDS = 10.0


class ProvisionSettings(Settings):
    """What making the bucket needs besides what all services share."""

    s3_root_user: SecretStr = SecretStr("")
    s3_root_password: SecretStr = SecretStr("")


def policy(bucket: str) -> dict[str, Any]:
    """Return what the store's key may do: list its bucket; read, write and delete in it."""
    return {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Action": ["s3:GetBucketLocation", "s3:ListBucket", "s3:ListBucketMultipartUploads"],
                "Resource": [f"arn:aws:s3:::{bucket}"],
            },
            {
                "Effect": "Allow",
                "Action": [
                    "s3:AbortMultipartUpload",
                    "s3:DeleteObject",
                    "s3:GetObject",
                    "s3:ListMultipartUploadParts",
                    "s3:PutObject",
                ],
                "Resource": [f"arn:aws:s3:::{bucket}/*"],
            },
        ],
    }


def provision(settings: ProvisionSettings) -> str:
    """Make bucket, policy and key; return what was done in one line.

    Raises:
        InvalidInput: The store is no S3 address, or a key is missing.
        FailedPrecondition: The server refused.
        Unavailable: The server is out of reach.
    """
    parts = urlsplit(settings.store)
    bucket = parts.path.strip("/")
    if parts.scheme not in ("s3+http", "s3+https") or not bucket:
        raise InvalidInput(
            f"WEB4LORA_STORE: {settings.store!r} has no bucket to make.",
            fix="Use s3+http://host:port/bucket (s3+https for TLS).",
        )
    root_user, root_password, access_key, secret_key = (
        _required(settings, name)
        for name in ("s3_root_user", "s3_root_password", "s3_access_key", "s3_secret_key")
    )
    secure = parts.scheme == "s3+https"
    provider = StaticProvider(root_user, root_password)
    client = Minio(
        parts.netloc, credentials=provider, secure=secure, region=settings.s3_region, http_client=_http()
    )
    admin = MinioAdmin(endpoint=parts.netloc, credentials=provider, secure=secure, http_client=_http())
    name = _POLICY.format(bucket=bucket)

    def work() -> bool:
        made = not client.bucket_exists(bucket)
        if made:
            client.make_bucket(bucket)
        admin.policy_add(name, policy=policy(bucket))
        admin.user_add(access_key, secret_key)
        _attach(admin, name, access_key)
        return made

    made = _called(work, settings.store)
    return f"bucket {bucket} {'made' if made else 'is there'}; key {access_key} may use it, and nothing else"


def _required(settings: ProvisionSettings, name: str) -> str:
    value: str = getattr(settings, name).get_secret_value()
    if not value:
        variable = f"WEB4LORA_{name.upper()}"
        raise InvalidInput(f"{variable} is not set.", fix=f"Set {variable} or {variable}_FILE.")
    return value


def _http() -> urllib3.PoolManager:
    """Return a client that gives up in time; the caller repeats, so it need not."""
    return urllib3.PoolManager(timeout=_TIMEOUT_SECONDS, retries=urllib3.Retry(total=2, backoff_factor=0.5))


def _attach(admin: MinioAdmin, name: str, access_key: str) -> None:
    """Attach the policy; one that is attached already is what we want."""
    try:
        admin.attach_policy([name], user=access_key)
    except MinioAdminException as error:
        if "PolicyChangeAlreadyApplied" not in str(error):
            raise


def _called(work: Callable[[], bool], store: str) -> bool:
    """Do the work; say what an error of the SDK means."""
    try:
        return work()
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise Unavailable(
            f"The object store of {store} is out of reach: {error}.", fix="Is MinIO running?"
        ) from error
    except (MinioException, MinioAdminException) as error:
        raise FailedPrecondition(
            f"The object store of {store} refused: {error}.",
            fix="Are WEB4LORA_S3_ROOT_USER and WEB4LORA_S3_ROOT_PASSWORD those of the server?",
        ) from error


def main() -> int:
    """Run the command; return its exit code."""
    try:
        print(provision(load(ProvisionSettings)))  # noqa: T201
    except Web4Error as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
