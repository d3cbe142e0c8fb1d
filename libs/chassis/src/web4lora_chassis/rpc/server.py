"""The gRPC server of every service: health, reflection, a token beyond the loopback, TLS, our errors."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import inspect
import ipaddress
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from web4lora_chassis.errors import FailedPrecondition, Internal, Unauthenticated, Web4Error
from web4lora_chassis.rpc.errors import status_of
from web4lora_chassis.settings import Settings, read_pem

log = logging.getLogger(__name__)

_STOP_GRACE_SECONDS = 2.0
_OPEN_TO_ALL = ("/grpc.health.v1.Health/",)
_OPTIONS = [
    ("grpc.so_reuseport", 0),  # two services on one port would share its calls by chance
    ("grpc.max_receive_message_length", 16 << 20),
    # Our clients ask every 30 s whether a quiet Watch still stands; the default takes that for abuse.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]


@dataclass(frozen=True)
class Registration:
    """A servicer and how it joins a server.

    Attributes:
        name: The service's full name, for example web4.lora.v1.TrainerService.
        add: The generated function add_<Service>Servicer_to_server.
        servicer: What answers the calls.
    """

    name: str
    add: Callable[[Any, grpc.aio.Server], None]
    servicer: object


async def serve(
    address: str,
    registrations: Sequence[Registration],
    settings: Settings,
    *,
    ready: Callable[[int], Awaitable[None]] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, or until `stop` is set.

    Args:
        address: Host and port to listen on; port 0 takes a free one.
        registrations: What to serve.
        settings: Token and TLS files.
        ready: Called with the port once calls are answered.
        stop: Ends the server when set; made here when absent.

    Raises:
        FailedPrecondition: The address is beyond the loopback and no token is set, or it can't be bound.
    """
    _require_token(address, settings)
    server = grpc.aio.server(interceptors=[_Guard(settings.token.get_secret_value())], options=_OPTIONS)
    for registration in registrations:
        registration.add(registration.servicer, server)
    health = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = [registration.name for registration in registrations]
    reflection.enable_server_reflection([*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
                                         reflection.SERVICE_NAME], server)  # fmt: skip
    credentials = _credentials(settings)
    try:
        port = (
            server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        )
    except RuntimeError as error:
        raise FailedPrecondition(
            f"{address} can't be listened on: another program has it, or it is no address of this machine.",
            fix="`web4lora status` shows ours; else choose another address, WEB4LORA_<SERVICE>_ADDRESS.",
            reason="ADDRESS_IN_USE",
        ) from error
    stop = stop or asyncio.Event()
    await server.start()
    for name in ("", *names):
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    with _stopped_by_signals(stop):
        log.info("serving on %s, port %d", address, port)
        if ready:
            await ready(port)
        await stop.wait()
    await health.enter_graceful_shutdown()
    await server.stop(_STOP_GRACE_SECONDS)


@contextlib.contextmanager
def _stopped_by_signals(stop: asyncio.Event) -> Any:
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        for number in numbers:
            loop.add_signal_handler(number, stop.set)
    except (ValueError, RuntimeError):  # not the main thread: a test runs us
        yield
        return
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _require_token(address: str, settings: Settings) -> None:
    host = address.rsplit(":", 1)[0].strip("[]")
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not settings.token.get_secret_value():
        raise FailedPrecondition(
            f"{address} is beyond the loopback, and no token is set.",
            fix="Set WEB4LORA_TOKEN_FILE, for every service and client alike, or listen on 127.0.0.1.",
            reason="TOKEN_REQUIRED",
        )


def _credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """Return the credentials that the settings ask for; never plain text by half a setting."""
    files = (settings.tls_certificate_file, settings.tls_key_file)
    if not any(files) and not settings.tls_client_required:
        return None
    certificate, key = files
    if not (certificate and key) or (settings.tls_client_required and not settings.tls_authority_file):
        raise FailedPrecondition(
            "TLS is set by halves.",
            fix="Set WEB4LORA_TLS_CERTIFICATE_FILE and WEB4LORA_TLS_KEY_FILE; with "
            "WEB4LORA_TLS_CLIENT_REQUIRED also WEB4LORA_TLS_AUTHORITY_FILE.",
            reason="TLS_INCOMPLETE",
        )
    return grpc.ssl_server_credentials(
        [(read_pem(key), read_pem(certificate))],
        root_certificates=read_pem(settings.tls_authority_file) if settings.tls_authority_file else None,
        require_client_auth=settings.tls_client_required,
    )


class _Guard(grpc.aio.ServerInterceptor):
    """Refuses calls without the token, and turns our errors into statuses."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode() if token else b""

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        allowed = not self._expected or details.method.startswith(_OPEN_TO_ALL) or self._shown(details)
        if handler.response_streaming:
            behavior = handler.stream_stream if handler.request_streaming else handler.unary_stream
            wrapped = _stream(behavior, allowed)
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
        else:
            behavior = handler.stream_unary if handler.request_streaming else handler.unary_unary
            wrapped = _single(behavior, allowed)
            make = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
        return make(wrapped, handler.request_deserializer, handler.response_serializer)

    def _shown(self, details: grpc.HandlerCallDetails) -> bool:
        shown = dict(details.invocation_metadata or ()).get("authorization", "")
        return hmac.compare_digest(shown.encode() if isinstance(shown, str) else shown, self._expected)


def _check(allowed: bool) -> None:
    if not allowed:
        raise Unauthenticated(
            "This call needs the services' token.", fix="Set WEB4LORA_TOKEN or WEB4LORA_TOKEN_FILE."
        )


def _single(behavior: Any, allowed: bool) -> Any:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            _check(allowed)
            return await behavior(request, context)
        except Web4Error as error:
            await context.abort_with_status(rpc_status.to_status(status_of(error)))
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            log.exception("defect while answering a call")
            await context.abort_with_status(rpc_status.to_status(status_of(_defect(error))))

    return call


def _stream(behavior: Any, allowed: bool) -> Any:
    if not inspect.isasyncgenfunction(behavior):
        return _single(behavior, allowed)  # it writes its answers by itself, as the health service does

    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            _check(allowed)
            async for message in behavior(request, context):
                yield message
        except Web4Error as error:
            await context.abort_with_status(rpc_status.to_status(status_of(error)))
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            log.exception("defect while answering a call")
            await context.abort_with_status(rpc_status.to_status(status_of(_defect(error))))

    return call


def _defect(error: Exception) -> Internal:
    return Internal(
        f"{type(error).__name__}: {error}", fix="This is a defect; the service's log has the details."
    )
