"""HTTP to a runtime on this machine: one way to make a client, one way to say that it is out of reach."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import httpx
from web4lora_chassis.errors import FailedPrecondition, ResourceExhausted, Unavailable, Web4Error

PROBE_SECONDS = 1.5
SEND_SECONDS = 60.0
_NO_MEMORY = ("requires more system memory", "out of memory", "insufficient memory", "unable to allocate")
_FULL = ("no space left", "disk full", "disk quota exceeded", "not enough space")


def client(address: str, seconds: float) -> httpx.Client:
    """Return a client of a runtime.

    Args:
        address: Its address; http:// may be left out.
        seconds: How long to wait for each answer, and for each piece of it. What we send must be taken within
            a minute, piece by piece, however long the answer may take.
    """
    base = address if "://" in address else f"http://{address}"
    # Proxies of the environment are for the outside world, not for a runtime on this machine.
    return httpx.Client(
        base_url=base.rstrip("/"),
        timeout=httpx.Timeout(seconds, connect=5.0, write=min(seconds, SEND_SECONDS)),
        trust_env=False,
    )


@contextlib.contextmanager
def reaching(what: str, address: str) -> Iterator[None]:
    """Turn a failed connection into an error that says who is out of reach.

    Raises:
        Unavailable: It can't be reached, went away, or did not answer in time.
    """
    try:
        yield
    except httpx.TimeoutException as error:
        raise Unavailable(
            f"{what} at {address} did not answer in time ({type(error).__name__}).",
            fix=f"Is {what} busy or out of memory? Its log tells; then try again.",
            reason="RUNTIME_TIMEOUT",
        ) from error
    except httpx.HTTPError as error:
        raise Unavailable(
            f"{what} at {address} is out of reach, or went away: {error or type(error).__name__}",
            fix=f"See that {what} runs, then try again: what was done so far is not done twice.",
            reason="RUNTIME_UNAVAILABLE",
        ) from error


def prompt_tokens(
    what: str, endpoint: str, model: str, messages: Sequence[Mapping[str, str]], seconds: float
) -> int:
    """Return how many tokens a conversation was for the model that answers it, with one token.

    Args:
        what: The runtime.
        endpoint: Of its OpenAI-compatible API, ending in /v1.
        model: The model's name there.
        messages: The conversation.
        seconds: How long to wait; the model may have to be loaded first.

    Raises:
        Unavailable: The runtime is out of reach or busy.
        FailedPrecondition: It does not answer with a count.
    """
    body = {"model": model, "messages": list(messages), "max_tokens": 1, "temperature": 0}
    with reaching(what, endpoint), client(endpoint, seconds) as http:
        answer = http.post("/chat/completions", json=body)
    if answer.status_code != httpx.codes.OK:
        raise refused(what, "answer", answer.status_code, answer.text)
    try:
        return int(answer.json()["usage"]["prompt_tokens"])
    except (ValueError, KeyError, TypeError) as error:
        raise refused(what, "say how long a prompt was", answer.status_code, answer.text) from error


def refused(what: str, doing: str, status: int, said: str) -> Web4Error:
    """Return the error for an answer that says that the runtime is busy or full, or else failed."""
    text = f"{what} could not {doing}: {said.strip()[:500] or f'HTTP {status}'}"
    if any(sign in said.lower() for sign in _FULL) or status == httpx.codes.INSUFFICIENT_STORAGE:
        return ResourceExhausted(
            text, fix=f"Free disk space where {what} keeps its models, then try again.", reason="DISK_FULL"
        )
    if any(sign in said.lower() for sign in _NO_MEMORY):
        return ResourceExhausted(
            text,
            fix="Lower context_tokens, choose a smaller quantization, or free memory; then try again.",
            reason="NOT_ENOUGH_MEMORY",
        )
    if status in (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE):
        return Unavailable(text, fix=f"{what} is busy; try again later.", reason="RUNTIME_BUSY")
    return FailedPrecondition(text, fix=f"The log of {what} may say more.", reason="RUNTIME_FAILED")
