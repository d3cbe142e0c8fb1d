"""What interceptors of a server do to the handlers of calls: wrap them, and turn our errors into statuses."""

from __future__ import annotations

import inspect
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc_status import rpc_status

from web4lora_chassis.errors import Internal, Web4Error
from web4lora_chassis.rpc.errors import status_of

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Behavior = Callable[[Any, Context], Any]
"""Answers a call: a coroutine function for one answer, an asynchronous generator function for a stream."""

_MAKERS = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


def wrapped(
    handler: Any, single: Callable[[Behavior], Behavior], stream: Callable[[Behavior], Behavior]
) -> Any:
    """Return a handler whose behavior is wrapped.

    Args:
        handler: As the continuation of an interceptor gives it.
        single: Wraps a coroutine function; what it returns is one too.
        stream: Wraps an asynchronous generator function; what it returns is one too. A handler of streams may
            write its answers by itself, as the health service's does: then it is a coroutine function, and
            `single` wraps it.
    """
    name, make = _MAKERS[bool(handler.request_streaming), bool(handler.response_streaming)]
    behavior = getattr(handler, name)
    wrap = stream if inspect.isasyncgenfunction(behavior) else single
    return make(wrap(behavior), handler.request_deserializer, handler.response_serializer)


class ErrorStatuses(grpc.aio.ServerInterceptor):
    """Turns our errors into statuses; an exception nobody foresaw is logged and told without its text."""

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """See gRPC."""
        handler = await continuation(details)
        return None if handler is None else wrapped(handler, _single, _stream)


def _single(behavior: Behavior) -> Behavior:
    async def call(request: Any, context: Context) -> Any:
        try:
            return await behavior(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - the last resort: logged with its trace
            await abort(context, error)

    return call


def _stream(behavior: Behavior) -> Behavior:
    async def call(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            async for message in behavior(request, context):
                yield message
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - the last resort: logged with its trace
            await abort(context, error)

    return call


async def abort(context: Context, error: Exception) -> None:
    """End a call with the status of an error."""
    known = error if isinstance(error, Web4Error) else _defect(error)
    await context.abort_with_status(rpc_status.to_status(status_of(known)))


def _defect(error: Exception) -> Internal:
    """Log an exception nobody foresaw; its text, which may hold SQL, paths or data, is not for callers."""
    reference = secrets.token_hex(4)
    log.error("defect %s while answering a call", reference, exc_info=error)
    return Internal(
        f"An error that was not foreseen ({type(error).__name__}).",
        fix=f"This is a defect; the service's log has the details, under {reference}.",
        metadata={"reference": reference},
    )
