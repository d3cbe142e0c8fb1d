"""gRPC channels to our services: token, TLS, keep-alive, and retries of what is safe to repeat."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import grpc

from web4lora_chassis.errors import FailedPrecondition
from web4lora_chassis.rpc.telemetry import AsyncCalls, AsyncStreamCalls, ClientCalls
from web4lora_chassis.settings import Settings, is_loopback, read_pem

_NOT_REPEATABLE = (
    {"service": "web4.lora.v1.GatewayService", "method": "RetryRun"},
    {"service": "web4.lora.v1.DeploymentService", "method": "RollbackDeployment"},
)
"""What does more when done twice, unless its request says otherwise: the channel does not look into it."""

# All others are safe to repeat (Create by its request_id), so we retry an unreachable service.
_SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {"name": _NOT_REPEATABLE},
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            },
        ]
    }
)
PLAIN_TEXT_RISK = "the token, data and registry logins could be read on the way"
PLAIN_TEXT_FIX = (
    "Set WEB4LORA_TLS_AUTHORITY_FILE, and on the service WEB4LORA_TLS_CERTIFICATE_FILE and …_KEY_FILE. "
    "WEB4LORA_INSECURE=true allows plain text where nobody else can read the network, as between the "
    "containers of one machine."
)
_OPTIONS = [
    ("grpc.service_config", _SERVICE_CONFIG),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.max_metadata_size", 64 << 10),
    ("grpc.absolute_max_metadata_size", 128 << 10),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_http_proxy", 0),
]


class _Token(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Shows the token with every call of a blocking channel."""

    def __init__(self, token: str) -> None:
        self._metadata = (("authorization", f"Bearer {token}"),)

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(_with(details, self._metadata), request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(_with(details, self._metadata), request)

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        """Reflection is such a call."""
        return continuation(_with(details, self._metadata), requests)


class _AsyncToken(grpc.aio.UnaryUnaryClientInterceptor):
    """Shows the token with every single-answer call of an asyncio channel."""

    def __init__(self, token: str) -> None:
        self._metadata = (("authorization", f"Bearer {token}"),)

    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], details: Any, request: Any
    ) -> Any:
        return await continuation(_with(details, self._metadata), request)


class _AsyncStreamToken(grpc.aio.UnaryStreamClientInterceptor):
    """Shows the token with every streaming call of an asyncio channel."""

    def __init__(self, token: str) -> None:
        self._metadata = (("authorization", f"Bearer {token}"),)

    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], details: Any, request: Any
    ) -> Any:
        return await continuation(_with(details, self._metadata), request)


def channel(address: str, settings: Settings) -> grpc.Channel:
    """Return a blocking channel to a service.

    Raises:
        FailedPrecondition: The service is beyond the loopback, and what is sent could be read on the way.
    """
    credentials = _credentials(address, settings)
    plain = (
        grpc.secure_channel(address, credentials, options=_OPTIONS)
        if credentials
        else grpc.insecure_channel(address, options=_OPTIONS)
    )
    token = settings.shared_token
    return grpc.intercept_channel(plain, ClientCalls(), *([_Token(token)] if token else []))


def async_channel(address: str, settings: Settings, token: str = "") -> grpc.aio.Channel:
    """Return an asyncio channel to a service; see `channel`.

    Args:
        address: Host and port.
        settings: The token and TLS files.
        token: Shown in place of the settings' shared one.

    Raises:
        FailedPrecondition: What is sent could be read on the way.
    """
    token = token or settings.shared_token
    interceptors: list[grpc.aio.ClientInterceptor] = [AsyncCalls(), AsyncStreamCalls()]
    if token:
        interceptors += [_AsyncToken(token), _AsyncStreamToken(token)]
    credentials = _credentials(address, settings)
    if credentials:
        return grpc.aio.secure_channel(address, credentials, options=_OPTIONS, interceptors=interceptors)
    return grpc.aio.insecure_channel(address, options=_OPTIONS, interceptors=interceptors)


def _with(details: Any, metadata: tuple[tuple[str, str], ...]) -> Any:
    return details._replace(metadata=(*(details.metadata or ()), *metadata))


def _credentials(address: str, settings: Settings) -> grpc.ChannelCredentials | None:
    if not settings.tls_authority_file:
        if not is_loopback(address) and not settings.insecure:
            raise FailedPrecondition(
                f"{address} is beyond the loopback, and without TLS {PLAIN_TEXT_RISK}.",
                fix=PLAIN_TEXT_FIX,
                reason="TLS_REQUIRED",
            )
        return None
    certificate, key = settings.tls_certificate_file, settings.tls_key_file
    own = (read_pem(key), read_pem(certificate)) if key and certificate else (None, None)
    return grpc.ssl_channel_credentials(read_pem(settings.tls_authority_file), *own)
