"""Reads a streamed answer within bounds, and times it by what was seen to arrive.

Whatever a server sends ends as an answer that can be graded, or as `Garbled`; it can't make the reader wait
or collect without end.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2
from web4lora_chassis.graders.check import shorten, well_formed

from web4lora_deployer.suite.result import Reply

MAX_ERROR_BYTES = 2**16
_MAX_LINE_BYTES = 2**20
# An event of a token has some hundred bytes, the longest token some hundred characters.
_BYTES_PER_TOKEN, _CHARACTERS_PER_TOKEN = 4096, 256
_SPARE_TOKENS = 16
# A server slower than this is not waited for.
_SLOWEST_TOKENS_PER_SECOND = 0.25
# What comes closer together than this came in one piece over the network: its speed is not the model's.
_ARRIVAL_SECONDS = 0.001
_PIECES_PER_ARRIVAL = 4
_MOST_TOKENS = 10**9
# llama-server and DeepSeek call it the first, Ollama and vLLM the second.
_THOUGHT = ("reasoning_content", "reasoning")


class Garbled(Exception):
    """The server's stream is broken: no answer can be read from it."""


@dataclass(frozen=True)
class Bounds:
    """Where an answer is cut off, also when the server does not do so.

    Attributes:
        max_tokens: Tokens, those of thinking included.
        seconds: From sending the request; longer than any answer takes that is still worth waiting for.
    """

    max_tokens: int
    seconds: float

    @classmethod
    def of(cls, max_tokens: int, timeout_seconds: float) -> Bounds:
        """Return the bounds of an answer whose server may be silent for so long."""
        return cls(max_tokens, timeout_seconds + max_tokens / _SLOWEST_TOKENS_PER_SECOND)

    @property
    def pieces(self) -> int:
        """Most pieces of text or thinking."""
        return self.max_tokens + _SPARE_TOKENS

    @property
    def events(self) -> int:
        """Most events, those without text included: a token of half a character has none."""
        return 4 * self.pieces

    @property
    def characters(self) -> int:
        """Longest text."""
        return _CHARACTERS_PER_TOKEN * self.pieces

    @property
    def size_bytes(self) -> int:
        """Most bytes received."""
        return _MAX_LINE_BYTES + _BYTES_PER_TOKEN * self.pieces


class _Overrun(Exception):
    """A bound was reached; says which."""


def read_answer(response: httpx2.Response, started: float, bounds: Bounds) -> Reply:
    """Read a stream of server-sent events to its end, or to the first bound.

    Args:
        response: Its body is not read yet.
        started: When the request was sent, by time.perf_counter().
        bounds: Where it is cut off.

    Raises:
        Garbled: The stream is broken: an event of no known form, an error, or an end without a reason.
        httpx2.TransportError: The server is gone or silent.
    """
    seen = _Seen(bounds)
    try:
        for event in _events(response, started, bounds):
            seen.take(event)
    except _Overrun as overrun:
        seen.cut(str(overrun))
    except httpx2.DecodingError as error:
        raise Garbled(f"its packing can't be undone: {error}") from error
    return seen.reply(started)


def read_error(response: httpx2.Response, started: float, bounds: Bounds) -> str:
    """Return what a server says in a response that is no answer; the beginning of it when it is long."""
    body = b""
    for piece in response.iter_bytes():
        body += piece
        if len(body) > MAX_ERROR_BYTES or time.perf_counter() - started > bounds.seconds:
            break
    return shorten(_error_text(body[:MAX_ERROR_BYTES]), 300)


class _Seen:
    """What arrived of an answer so far."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._pieces: list[str] = []
        self._characters = self._thought = self._count = self._events = self._arrivals = 0
        self._first_at = self._last_at = 0.0
        self._finish_reason = self._cut = ""
        self._usage: Mapping[str, Any] = {}
        self._timings: Mapping[str, Any] = {}

    def take(self, event: Mapping[str, Any]) -> None:
        """Take an event in."""
        self._usage = _mapping(event.get("usage")) or self._usage
        self._timings = _mapping(event.get("timings")) or self._timings
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            text = delta.get("content") or ""
            thought = next((delta[key] for key in _THOUGHT if delta.get(key)), "")
            if not isinstance(text, str) or not isinstance(thought, str):
                raise Garbled("an event whose content is no text")
            if text or thought:
                self._arrived()
                self._thought += bool(thought)
                self._pieces.append(text)
                self._characters += len(text)
            self._finish_reason = shorten(choice.get("finish_reason") or "", 40) or self._finish_reason
        self._events += 1
        bounds = self._bounds
        if (
            self._count > bounds.pieces
            or self._events > bounds.events
            or self._characters > bounds.characters
        ):
            raise _Overrun("length")

    def _arrived(self) -> None:
        now = time.perf_counter()
        self._arrivals += now - self._last_at >= _ARRIVAL_SECONDS
        self._first_at, self._last_at = self._first_at or now, now
        self._count += 1

    def cut(self, reason: str) -> None:
        """Note that the answer was cut off here, whatever the server says.

        Raises:
            httpx2.ReadTimeout: Nothing of an answer has come in all that time.
        """
        if reason == "time" and not self._count:
            raise httpx2.ReadTimeout(f"no word of an answer in {self._bounds.seconds:.0f} s")
        self._finish_reason = reason

    def reply(self, started: float) -> Reply:
        """Return the whole answer.

        Raises:
            Garbled: It broke off.
        """
        if not self._finish_reason:
            raise Garbled("the answer broke off")
        ended = time.perf_counter()
        tokens = _count(self._usage.get("completion_tokens")) or self._count
        speed = _positive(self._timings.get("predicted_per_second"))
        return Reply(
            text=well_formed("".join(self._pieces))[: self._bounds.characters],
            finish_reason=self._finish_reason,
            prompt_tokens=_count(self._usage.get("prompt_tokens")) or 0,
            output_tokens=tokens,
            first_token_seconds=(self._first_at or ended) - started,
            seconds=ended - started,
            tokens_per_second=speed or self._measured(tokens),
            timed_by_server=speed > 0,
            cached_tokens=self._cached_tokens(),
            thought_pieces=self._thought,
        )

    def _measured(self, tokens: int) -> float:
        """Return the speed as seen from here; 0 when it can't be told.

        Only tokens that were seen to arrive count: a server may tell of more, thought in silence before the
        first one came. Many that came at once tell how fast the network is, not the model.
        """
        counted = min(tokens, self._count)
        if counted < 2 or self._last_at <= self._first_at:
            return 0.0
        if self._count > _PIECES_PER_ARRIVAL * self._arrivals:
            return 0.0
        return (counted - 1) / (self._last_at - self._first_at)

    def _cached_tokens(self) -> int | None:
        cached = _mapping(self._usage.get("prompt_tokens_details")).get("cached_tokens")
        return _count(self._timings.get("cache_n") if cached is None else cached)


def _events(response: httpx2.Response, started: float, bounds: Bounds) -> Iterator[dict[str, Any]]:
    """Yield the JSON events of a stream of server-sent events."""
    rest = b""
    received = 0
    # Not iter_lines(): it splits at all that Unicode calls a line end, U+2028 within a JSON string too.
    for piece in response.iter_bytes():
        received += len(piece)
        if received > bounds.size_bytes:
            raise _Overrun("length")
        if time.perf_counter() - started > bounds.seconds:
            raise _Overrun("time")
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > _MAX_LINE_BYTES:
            raise _Overrun("length")
        for line in lines:
            data = line.strip().removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or not data:
                continue
            if data == b"[DONE]":
                return
            yield _event(data)


def _event(data: bytes) -> dict[str, Any]:
    text = data.decode("utf-8", errors="replace")
    try:
        event = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Garbled("an event that is no JSON") from error
    if not isinstance(event, dict):
        raise Garbled("an event that is no JSON object")
    if event.get("error"):
        raise Garbled(shorten(_error_text(data), 300))
    return event


def _error_text(body: bytes) -> str:
    """Return the message of an API's error. Another body is not repeated: it may be some server's data."""
    try:
        error = json.loads(body.decode("utf-8", errors="replace"))["error"]
        message = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError, RecursionError):
        message = None
    return message if isinstance(message, str) else "an answer that is no error of such an API"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int | None:
    """Return a number of tokens; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST_TOKENS:
        return None
    return int(value)


def _positive(value: Any) -> float:
    """Return a finite speed; 0 for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MOST_TOKENS:
        return 0.0
    return float(value) if math.isfinite(value) else 0.0
