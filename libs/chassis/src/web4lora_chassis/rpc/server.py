"""The gRPC server of every service: health, reflection, a token and TLS beyond the loopback."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from web4lora_chassis.errors import FailedPrecondition
from web4lora_chassis.rpc.auth import Guard
from web4lora_chassis.rpc.bounds import Bounds
from web4lora_chassis.rpc.client import PLAIN_TEXT_FIX, PLAIN_TEXT_RISK
from web4lora_chassis.rpc.handlers import ErrorStatuses
from web4lora_chassis.rpc.limits import Deadlines
from web4lora_chassis.rpc.telemetry import ServerCalls
from web4lora_chassis.rpc.tls import server_credentials
from web4lora_chassis.settings import WORKERS, Settings, is_loopback

log = logging.getLogger(__name__)

_STOP_GRACE_SECONDS = 2.0
_MAX_CALLS = 1024  # watches included
_MAX_MESSAGE_BYTES = 8 << 20  # more than any bound in `bounds`, so that what is too large is named
_OPTIONS = [
    ("grpc.so_reuseport", 0),  # two services on one port would share its calls by chance
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.max_concurrent_streams", 512),  # of one connection
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
    name: str,
    ready: Callable[[int], Awaitable[None]] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, or until `stop` is set.

    Args:
        address: Host and port to listen on; port 0 takes a free one.
        registrations: What to serve.
        settings: Tokens, limits and TLS files.
        name: Which service this is: trainer, packager, deployer or gateway.
        ready: Called with the port once calls are answered.
        stop: Ends the server when set; made here when absent.

    Raises:
        FailedPrecondition: The address is beyond the loopback and no token is set or no TLS, or it can't be
            bound.
    """
    credentials = server_credentials(settings)
    _require_safe(address, name, settings, encrypted=credentials is not None)
    names = [registration.name for registration in registrations]
    server = grpc.aio.server(
        interceptors=[
            ServerCalls(),
            ErrorStatuses(),
            Guard(name, names, settings),
            Deadlines(settings.call_seconds),
            Bounds(),
        ],
        options=_OPTIONS,
        maximum_concurrent_rpcs=_MAX_CALLS,
    )
    for registration in registrations:
        registration.add(registration.servicer, server)
    health = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection([*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
                                         reflection.SERVICE_NAME], server)  # fmt: skip
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
    for each in ("", *names):
        await health.set(each, health_pb2.HealthCheckResponse.SERVING)
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


def _require_safe(address: str, name: str, settings: Settings, *, encrypted: bool) -> None:
    if is_loopback(address):
        return
    if not (settings.shared_token or (name in WORKERS and settings.worker_token(name))):
        raise FailedPrecondition(
            f"{address} is beyond the loopback, and no token is set.",
            fix="Set WEB4LORA_TOKEN_FILE, for every service and client alike, or listen on 127.0.0.1.",
            reason="TOKEN_REQUIRED",
        )
    if not encrypted and not settings.insecure:
        raise FailedPrecondition(
            f"{address} is beyond the loopback, and without TLS {PLAIN_TEXT_RISK}.",
            fix=PLAIN_TEXT_FIX,
            reason="TLS_REQUIRED",
        )
