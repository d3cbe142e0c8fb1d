"""The connection to an S3 store: timeouts that mean a stall, bounded retries, and errors in our words."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import certifi
from minio import Minio
from minio.credentials.providers import Provider
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager, Retry, Timeout
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, MaxRetryError, SSLError

from web4lora_chassis.artifacts.backend import BUCKET_MISSING, STORE
from web4lora_chassis.errors import (
    FailedPrecondition,
    Internal,
    InvalidInput,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Web4Error,
)

_RETRIES = 3
_SEND_BYTES = 256 << 10
_KEYS_WRONG = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "AccessDenied",
    "InvalidTokenId",
    "ExpiredToken",
    "AuthorizationHeaderMalformed",
}
_FULL = {"XMinioStorageFull", "InsufficientStorage", "XMinioAdminBucketQuotaExceeded", "EntityTooLarge"}
_PASSING = {
    "SlowDown",
    "ServiceUnavailable",
    "InternalError",
    "RequestTimeout",
    "OperationAborted",
    "IncompleteBody",
    "BadDigest",
    "XMinioServerNotInitialized",
}


def connect(
    endpoint: str,
    *,
    access_key: str,
    secret_key: str,
    provider: Provider | None = None,
    region: str,
    secure: bool,
    connections: int,
    connect_timeout_seconds: float,
    stall_timeout_seconds: float,
) -> Minio:
    """Return a client; nothing is sent yet.

    Args:
        endpoint: Host and port.
        access_key: Empty for anonymous access.
        secret_key: Its secret.
        provider: Gives the key in place of these two, anew when it has ended.
        region: The region that requests are signed for; given, so that no request has to ask for it.
        secure: TLS.
        connections: Kept open at once.
        connect_timeout_seconds: For a connection to stand.
        stall_timeout_seconds: Without a byte sent or received.

    Raises:
        InvalidInput: The endpoint is malformed.
    """
    http = PoolManager(
        timeout=Timeout(connect=connect_timeout_seconds, read=stall_timeout_seconds),
        maxsize=connections,
        cert_reqs="CERT_REQUIRED",
        ca_certs=os.environ.get("SSL_CERT_FILE") or certifi.where(),
        retries=Retry(
            total=_RETRIES,
            backoff_factor=0.2,
            status_forcelist=[500, 502, 503, 504],
            raise_on_status=False,  # the last answer says more than "too many 503"
            respect_retry_after_header=False,  # MinIO asks for a whole minute while it starts
        ),
    )
    http.pool_classes_by_scheme = _pools(stall_timeout_seconds)
    try:
        return Minio(
            endpoint,
            access_key=access_key or None,
            secret_key=secret_key if access_key else None,
            credentials=provider,
            secure=secure,
            region=region,
            http_client=http,
        )
    except ValueError as error:
        raise InvalidInput(f"WEB4LORA_STORE: {error}.", fix="Use s3+http://host:port/bucket.") from error


def _pools(stall_timeout_seconds: float) -> dict[str, Any]:
    """Return connection pools in which a slow line is no stall.

    urllib3 sends a body in one call under the connect timeout, so a 16 MiB part over a slow line would
    always time out. Here each slice of it has the stall timeout of its own.
    """

    class Stalling:
        sock: Any

        def connect(self) -> None:
            super().connect()  # type: ignore[misc]
            self.sock.settimeout(stall_timeout_seconds)

        def send(self, data: Any) -> None:
            if not isinstance(data, bytes):
                super().send(data)  # type: ignore[misc]
                return
            view = memoryview(data)
            for start in range(0, len(view), _SEND_BYTES):
                super().send(view[start : start + _SEND_BYTES])  # type: ignore[misc]

    class Plain(Stalling, HTTPConnection):
        pass

    class Secure(Stalling, HTTPSConnection):
        pass

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}


@contextlib.contextmanager
def translated(url: str, key: str = "") -> Iterator[None]:
    """Raise what goes wrong in the block as one of our errors.

    Args:
        url: The store's address, without credentials.
        key: What the block is about.
    """
    try:
        yield
    except S3Error as error:
        raise _s3_error(error, url, key) from error
    except (InvalidResponseError, ServerError) as error:
        code = error.status_code if isinstance(error, ServerError) else error._code
        if code >= 500:
            raise _unavailable(url, f"HTTP {code}") from error
        raise _not_s3(url, code) from error
    except MinioException as error:
        raise Internal(f"{url}: {error}") from error
    except HTTPError as error:
        cause = error.reason if isinstance(error, MaxRetryError) and error.reason else error
        if isinstance(cause, SSLError):
            raise Unavailable(
                f"{url} shows a certificate that isn't trusted: {_words(cause)}",
                fix="Name its CA's file in SSL_CERT_FILE, or use s3+http:// if it speaks no TLS.",
                reason="TLS_FAILED",
            ) from error
        raise _unavailable(url, _words(cause)) from error


def _unavailable(url: str, why: str) -> Unavailable:
    return Unavailable(
        f"The artifact store {url} is out of reach: {why}",
        fix="Is it running? The address is in WEB4LORA_STORE. The next try goes on from what was moved.",
        metadata={STORE: url},
    )


def _not_s3(url: str, status: int) -> FailedPrecondition:
    return FailedPrecondition(
        f"{url} answers, but not as an S3 store does (HTTP {status}).",
        fix="Check the port in WEB4LORA_STORE: the console has another one.",
        reason="NOT_S3",
        metadata={"store": url},
    )


def _words(error: BaseException) -> str:
    """Return urllib3's message without the names of its objects."""
    return str(error).rsplit(": ", 1)[-1].rstrip(".") + "."


def _s3_error(error: S3Error, url: str, key: str) -> Web4Error:
    code = error.code or "unknown"
    if code == "NoSuchBucket":
        return NotFound(
            f"The bucket of {url} is not there.",
            fix="Create it, in the store's console or with `mc mb`, or correct WEB4LORA_STORE.",
            reason=BUCKET_MISSING,
            metadata={"store": url},
        )
    if code in ("NoSuchKey", "NoSuchVersion", "ResourceNotFound"):
        return NotFound(f"{key} is not in the store {url}.", metadata={"key": key})
    if code in _KEYS_WRONG:
        return Unauthenticated(
            f"The artifact store {url} refuses the access key: {code}.",
            fix="Correct WEB4LORA_S3_ACCESS_KEY and WEB4LORA_S3_SECRET_KEY (or …_FILE), or the key's rights.",
            metadata={"store": url, "code": code},
        )
    if code in _FULL:
        return ResourceExhausted(
            f"The artifact store {url} has no room for {key}: {code}.",
            fix="Free space there, for example by deleting old artifacts.",
            reason="DISK_FULL",
            metadata={"store": url, "code": code},
        )
    if code == "RequestTimeTooSkewed":
        return Unavailable(  # after sleep a clock is wrong until it is set again, which fails no run
            f"The clocks of {url} and of this machine differ too much.",
            fix="Set the clocks.",
            reason="CLOCKS_DIFFER",
            metadata={"store": url},
        )
    if code == "MethodNotAllowed":
        return _not_s3(url, error.response.status)
    if code in _PASSING or error.response.status >= 500:
        return _unavailable(url, f"{code}: {error.message}")
    return Internal(f"The artifact store {url} answered {code} to {key}: {error.message}", reason="S3_ERROR")
