"""What a caller may ask of a service: calls in a time, watches at once, and how long a call may take."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from web4lora_chassis.errors import ResourceExhausted
from web4lora_chassis.rpc.errors import RETRY_AFTER
from web4lora_chassis.rpc.handlers import Behavior, Context, wrapped


class Bucket:
    """Tokens that come back at a steady rate, up to a number: one is taken for each call.

    Args:
        rate: Tokens that come back in a second.
        size: The most there are.
        clock: Seconds of a steady clock.
    """

    def __init__(self, rate: float, size: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._size = size
        self._clock = clock
        self._left = float(size)
        self._at = clock()

    def take(self) -> float:
        """Take a token; return 0, or when there is none the seconds until there is one."""
        now = self._clock()
        self._left = min(self._size, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return (1 - self._left) / self._rate
        self._left -= 1
        return 0.0


class Limits:
    """Bounds what each principal asks of one service.

    Args:
        calls_per_second: Calls of one principal in the long run.
        calls_at_once: Calls of one principal after a pause.
        streams_at_once: Watches of one principal at the same time.
    """

    def __init__(self, calls_per_second: float, calls_at_once: int, streams_at_once: int) -> None:
        self._rate = calls_per_second
        self._size = calls_at_once
        self._streams_at_once = streams_at_once
        self._buckets: dict[str, Bucket] = {}
        self._streams: dict[str, int] = {}

    def take(self, name: str) -> None:
        """Count a call of a principal.

        Raises:
            ResourceExhausted: There were too many; the metadata says when the next one may come.
        """
        bucket = self._buckets.setdefault(name, Bucket(self._rate, self._size))
        if wait := bucket.take():
            raise ResourceExhausted(
                f"Too many calls of {name}: this service answers {self._rate:g} a second.",
                fix=f"Call again in {wait:.3f} s; WEB4LORA_CALLS_PER_SECOND sets the limit.",
                reason="RATE_LIMIT",
                metadata={RETRY_AFTER: f"{wait:.3f}"},
            )

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator[None]:
        """Count a watch of a principal while it lasts.

        Raises:
            ResourceExhausted: There are too many.
        """
        if self._streams.get(name, 0) >= self._streams_at_once:
            raise ResourceExhausted(
                f"{name} has {self._streams_at_once} watches at this service already.",
                fix="End one; WEB4LORA_STREAMS_AT_ONCE sets the limit.",
                reason="TOO_MANY_STREAMS",
            )
        self._streams[name] = self._streams.get(name, 0) + 1
        try:
            yield
        finally:
            self._streams[name] -= 1


class Deadlines(grpc.aio.ServerInterceptor):
    """Ends calls for one answer whose caller set no deadline.

    Args:
        seconds: After this long.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """See gRPC."""
        handler = await continuation(details)
        if handler is None or handler.response_streaming:
            return handler
        return wrapped(handler, self._single, lambda behavior: behavior)

    def _single(self, behavior: Behavior) -> Behavior:
        async def call(request: Any, context: Context) -> Any:
            if context.time_remaining() is not None:
                return await behavior(request, context)
            try:
                async with asyncio.timeout(self._seconds) as limit:
                    return await behavior(request, context)
            except TimeoutError:
                if not limit.expired():
                    raise
                await context.abort(
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    f"The call was not done in {self._seconds:g} s; a deadline of its own may be longer.",
                )

        return call
