"""A client of an OpenAI-compatible /v1/chat/completions that streams, measures and bounds everything."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import httpx2
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, Unavailable
from web4lora_chassis.graders.check import shorten

from web4lora_deployer.suite.result import Reply
from web4lora_deployer.suite.stream import Bounds, Garbled, read_answer, read_error

_ATTEMPTS = 4
_FIRST_PAUSE_SECONDS = 0.5
_TRANSIENT = frozenset([408, 409, 425, 429, 502, 503, 504])
_PROMPT_AT_FAULT = frozenset([400, 413, 422])
# llama-server answers so when it can't take a model's answer apart, which is that answer's fault.
_ANSWER_AT_FAULT = 500


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
        self._timeout_seconds = timeout_seconds
        self._pause_seconds = pause_seconds
        self._url = endpoint.url.rstrip("/") + "/chat/completions"
        if not endpoint.url.startswith(("http://", "https://")):
            raise InvalidInput(f"{endpoint.url} is no address of an API.", fix="Give http://HOST:PORT/v1.")
        # Not packed: some kilobytes could become gigabytes here.
        headers = {"Accept-Encoding": "identity"}
        if endpoint.api_key:
            headers["Authorization"] = f"Bearer {endpoint.api_key}"
        # Proxies of the environment are for the outside world, not for a model on this machine.
        self._http = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(timeout_seconds, connect=10.0),
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
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
            max_tokens: Where the answer is cut off, thinking included; also when the server doesn't do so.
            json_schema: The server may only give an answer that fits it; None leaves it free.

        Returns:
            The reply; `refused` is set when the server takes this prompt for invalid, for example too long,
            or breaks down over its answer at each of several attempts. That is this prompt's failure alone.

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
            schema = {"name": "answer", "strict": True, "schema": dict(json_schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        bounds = Bounds.of(max_tokens, self._timeout_seconds)
        problem: Exception = _Transient()
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return replace(self._ask_once(body, bounds), attempts=attempt)
            except (httpx2.TransportError, _Transient, Garbled) as error:
                problem = error
            if attempt < _ATTEMPTS:
                time.sleep(self._pause_seconds * 2 ** (attempt - 1))
        said = shorten(str(problem) or type(problem).__name__, 300)
        if isinstance(problem, Garbled) and self._answers_others(body, bounds):
            return Reply(refused=f"{_ATTEMPTS} times in a row: {said}", attempts=_ATTEMPTS)
        raise Unavailable(
            f"The model at {self._endpoint.url} failed {_ATTEMPTS} times in a row: {said}.",
            fix="See that its server still runs (web4lora deployments list), then test again.",
            reason="MODEL_UNAVAILABLE",
        )

    def _answers_others(self, body: Mapping[str, Any], bounds: Bounds) -> bool:
        """Tell whether the server answers something else: then it is well, and one prompt's answer is not."""
        other = dict(body, messages=[{"role": "user", "content": "Say yes."}], max_tokens=1)
        other.pop("response_format", None)
        try:
            self._ask_once(other, bounds)
        except (httpx2.TransportError, _Transient, Garbled):
            return False
        return True

    def _ask_once(self, body: Mapping[str, Any], bounds: Bounds) -> Reply:
        started = time.perf_counter()
        with self._http.stream("POST", self._url, json=body) as response:
            if response.status_code != 200:
                return self._failed(response.status_code, read_error(response, started, bounds))
            try:
                return read_answer(response, started, bounds)
            except (AttributeError, TypeError, ValueError) as error:
                raise Garbled(f"an event of another form than expected: {error}") from error

    def _failed(self, status: int, said: str) -> Reply:
        if status in _PROMPT_AT_FAULT:
            return Reply(refused=f"HTTP {status}: {said}")
        if status == _ANSWER_AT_FAULT:
            raise Garbled(f"HTTP {status}: {said}")
        if status in _TRANSIENT:
            raise _Transient(f"HTTP {status}: {said}")
        raise FailedPrecondition(
            f"{self._endpoint.url} does not answer for {self._endpoint.model}: HTTP {status}: {said}",
            fix="Check the address, the model's name and the token.",
            reason="MODEL_REFUSES",
        )
