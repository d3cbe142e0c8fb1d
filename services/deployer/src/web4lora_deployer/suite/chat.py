"""A client of an OpenAI-compatible /v1/chat/completions that streams, measures and bounds everything."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import httpx
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, Unavailable

from web4lora_deployer.suite.check import shorten
from web4lora_deployer.suite.result import Reply

_ATTEMPTS = 4
_FIRST_PAUSE_SECONDS = 0.5
_TRANSIENT = frozenset([408, 409, 425, 429, 500, 502, 503, 504])
_PROMPT_AT_FAULT = frozenset([400, 413, 422])
_MAX_LINE_BYTES = 2**20


@dataclass(frozen=True)
class Endpoint:
    """Where a model answers.

    Attributes:
        url: Base address of the API, for example http://127.0.0.1:8480/v1.
        model: The name of the model in requests.
        context_tokens: Longest prompt and answer of one request; 0 when unknown.
        api_key: Sent as a bearer token; empty sends none.
    """

    url: str
    model: str
    context_tokens: int = 0
    api_key: str = ""


class _Transient(Exception):
    """Something that another attempt may heal."""


class ChatClient:
    """Asks one model. Safe to use from several threads."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        seed: int,
        timeout_seconds: float,
        connections: int,
        pause_seconds: float = _FIRST_PAUSE_SECONDS,
    ) -> None:
        self._endpoint = endpoint
        self._seed = seed
        self._pause_seconds = pause_seconds
        self._url = endpoint.url.rstrip("/") + "/chat/completions"
        if not endpoint.url.startswith(("http://", "https://")):
            raise InvalidInput(f"{endpoint.url} is no address of an API.", fix="Give http://HOST:PORT/v1.")
        headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
        # Proxies of the environment are for the outside world, not for a model on this machine.
        self._http = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(timeout_seconds, connect=10.0),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            trust_env=False,
        )

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close its connections."""
        self.close()

    def close(self) -> None:
        """Close all connections; requests under way fail."""
        self._http.close()

    def ask(
        self,
        messages: Sequence[Mapping[str, str]],
        max_tokens: int,
        json_schema: Mapping[str, Any] | None = None,
    ) -> Reply:
        """Send one conversation and read the answer to its end.

        Args:
            messages: Role and content, in order.
            max_tokens: Where the answer is cut off; also when the server doesn't do so.
            json_schema: The server may only give an answer that fits it; None leaves it free.

        Returns:
            The reply; `refused` is set when the server takes this prompt for invalid, for example too long.

        Raises:
            Unavailable: It could not be reached, or failed, at each of several attempts.
            FailedPrecondition: It refuses every request: unknown model, wrong token, no such API.
        """
        body: dict[str, Any] = {
            "model": self._endpoint.model,
            "messages": [dict(message) for message in messages],
            "max_tokens": max_tokens,
            # In the request, since servers differ in their defaults and some ignore the model's own.
            "temperature": 0,
            "seed": self._seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if json_schema is not None:
            form = {"name": "answer", "strict": True, "schema": dict(json_schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        problem = ""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return replace(self._ask_once(body, max_tokens), attempts=attempt)
            except (httpx.TransportError, _Transient) as error:
                problem = str(error) or type(error).__name__
            if attempt < _ATTEMPTS:
                time.sleep(self._pause_seconds * 2 ** (attempt - 1))
        raise Unavailable(
            f"The model at {self._endpoint.url} failed {_ATTEMPTS} times in a row: {shorten(problem, 300)}.",
            fix="See that its server still runs (web4lora deployments list), then test again.",
            reason="MODEL_UNAVAILABLE",
        )

    def _ask_once(self, body: Mapping[str, Any], max_tokens: int) -> Reply:
        started = time.perf_counter()
        with self._http.stream("POST", self._url, json=body) as response:
            if response.status_code != 200:
                return self._failed(response)
            try:
                return _read_stream(_events(response), started, max_tokens)
            except (AttributeError, TypeError, ValueError) as error:
                raise _Transient(f"an event of another form than expected: {error}") from error

    def _failed(self, response: httpx.Response) -> Reply:
        status = response.status_code
        said = shorten(_error_text(response.read()), 300)
        if status in _PROMPT_AT_FAULT:
            return Reply(refused=f"HTTP {status}: {said}")
        if status in _TRANSIENT:
            raise _Transient(f"HTTP {status}: {said}")
        raise FailedPrecondition(
            f"{self._endpoint.url} does not answer for {self._endpoint.model}: HTTP {status}: {said}",
            fix="Check the address, the model's name and the token.",
            reason="MODEL_REFUSES",
        )


def _error_text(body: bytes) -> str:
    text = body.decode("utf-8", errors="replace")
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return text
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yield the JSON events of a stream of server-sent events."""
    rest = b""
    # Not iter_lines(): it splits at all that Unicode calls a line end, U+2028 within a JSON string too.
    for piece in response.iter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > _MAX_LINE_BYTES:
            raise _Transient("an event longer than 1 MiB")
        for line in lines:
            data = line.strip().removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or not data:
                continue
            if data == b"[DONE]":
                return
            yield _event(data)


def _event(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError as error:
        raise _Transient(f"an event that is no JSON: {shorten(data.decode(errors='replace'))}") from error
    if not isinstance(event, dict):
        raise _Transient("an event that is no JSON object")
    if "error" in event:
        raise _Transient(_error_text(data))
    return event


def _well_formed(text: str) -> str:
    """Join pairs of surrogates that came in two events; half a pair becomes U+FFFD."""
    return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


def _read_stream(events: Iterator[dict[str, Any]], started: float, max_tokens: int) -> Reply:
    pieces: list[str] = []
    finish_reason = ""
    first_at = last_at = 0.0
    usage: Mapping[str, Any] = {}
    timings: Mapping[str, Any] = {}
    for event in events:
        usage = event.get("usage") or usage
        timings = event.get("timings") or timings
        for choice in event.get("choices") or []:
            text = (choice.get("delta") or {}).get("content")
            if text:
                last_at = time.perf_counter()
                first_at = first_at or last_at
                pieces.append(text)
            finish_reason = choice.get("finish_reason") or finish_reason
        if len(pieces) > max_tokens + 16:
            # A server that ignores max_tokens would talk for ever.
            finish_reason = "length"
            break
    if not finish_reason:
        raise _Transient("the answer broke off")
    ended = time.perf_counter()
    output_tokens = int(usage.get("completion_tokens") or len(pieces))
    speed = float(timings.get("predicted_per_second") or 0.0)
    measured = (output_tokens - 1) / (last_at - first_at) if last_at > first_at and output_tokens > 1 else 0.0
    return Reply(
        text=_well_formed("".join(pieces)),
        finish_reason=finish_reason,
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        output_tokens=output_tokens,
        first_token_seconds=(first_at or ended) - started,
        seconds=ended - started,
        tokens_per_second=speed or measured,
        timed_by_server=speed > 0,
        cached_tokens=_cached_tokens(usage, timings),
    )


def _cached_tokens(usage: Mapping[str, Any], timings: Mapping[str, Any]) -> int | None:
    """Return how many of the prompt's tokens were not read anew; None when the server doesn't tell."""
    told = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    told = timings.get("cache_n") if told is None else told
    return None if told is None else int(told)
