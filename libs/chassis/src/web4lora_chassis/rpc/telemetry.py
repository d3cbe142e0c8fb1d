"""What a call carries of the work it is for, and what is measured of it, on both sides."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import grpc

from web4lora_chassis.rpc.handlers import Behavior, Context, wrapped
from web4lora_chassis.telemetry import traces
from web4lora_chassis.telemetry.metrics import RPC_SECONDS, RPCS_AT_WORK
from web4lora_chassis.telemetry.work import RUN, TRACEPARENT, belongs_to, origin

_METADATA = {RUN: "web4lora-run", TRACEPARENT: "traceparent"}
_LONGEST = 128
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}
_UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED.name


class ServerCalls(grpc.aio.ServerInterceptor):
    """Measures every call of a server; what it is for comes from the caller. The outermost interceptor."""

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """See gRPC."""
        handler = await continuation(details)
        if handler is None:
            return None
        shown = dict(details.invocation_metadata or ())
        given = {name: _text(shown.get(key, "")) for name, key in _METADATA.items()}

        def single(behavior: Behavior) -> Behavior:
            async def call(request: Any, context: Context) -> Any:
                with _served(details.method, given, context):
                    return await behavior(request, context)

            return call

        def stream(behavior: Behavior) -> Behavior:
            async def call(request: Any, context: Context) -> AsyncIterator[Any]:
                with _served(details.method, given, context):
                    async for message in behavior(request, context):
                        yield message

            return call

        return wrapped(handler, single, stream)


@contextlib.contextmanager
def _served(method: str, given: Mapping[str, str], context: Context) -> Iterator[None]:
    name = method.removeprefix("/")
    began = time.monotonic()
    code = ""
    RPCS_AT_WORK.inc()
    try:
        with (
            belongs_to(run=given[RUN], traceparent=given[TRACEPARENT]),
            traces.span(name, "SERVER", rpc__system="grpc"),
        ):
            yield
    except (asyncio.CancelledError, GeneratorExit):
        code = grpc.StatusCode.CANCELLED.name
        raise
    finally:
        RPCS_AT_WORK.dec()
        code = code or _code(context)
        # Whoever has no token could fill our memory with names.
        RPC_SECONDS.labels("" if code == _UNAUTHENTICATED else name, code).observe(time.monotonic() - began)


def _code(context: Context) -> str:
    """Return the status that a call ended with; gRPC has it as a number or as its own value."""
    code: Any = context.code()
    return code.name if isinstance(code, grpc.StatusCode) else _CODES.get(code or 0, "UNKNOWN")


def _text(value: str | bytes) -> str:
    """Return what a caller says of itself, if it can stand in a log: it need not be one of ours."""
    return value if isinstance(value, str) and len(value) <= _LONGEST else ""


def metadata() -> tuple[tuple[str, str], ...]:
    """Return what a call says of the work that it is for."""
    return tuple((_METADATA[name], value) for name, value in origin().items())


class ClientCalls(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Says with every call of a blocking channel what it is for."""

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        """See gRPC."""
        with traces.span(_name(details), "CLIENT", rpc__system="grpc"):
            return continuation(_with(details), request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        """See gRPC."""
        return continuation(_with(details), request)

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        """See gRPC."""
        return continuation(_with(details), requests)


class AsyncCalls(grpc.aio.UnaryUnaryClientInterceptor):
    """Says with every single-answer call of an asyncio channel what it is for."""

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        """See gRPC."""
        with traces.span(_name(details), "CLIENT", rpc__system="grpc"):
            call = await continuation(_with(details), request)
            await call.code()  # so that the span ends with the call
            return call


class AsyncStreamCalls(grpc.aio.UnaryStreamClientInterceptor):
    """Says with every streaming call of an asyncio channel what it is for."""

    async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        """See gRPC."""
        return await continuation(_with(details), request)


def _name(details: Any) -> str:
    method: str | bytes = details.method
    return (method.decode() if isinstance(method, bytes) else method).removeprefix("/")


def _with(details: Any) -> Any:
    return details._replace(metadata=(*(details.metadata or ()), *metadata()))
