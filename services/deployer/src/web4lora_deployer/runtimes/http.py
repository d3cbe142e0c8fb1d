"""HTTP to a runtime on this machine: one way to make a client, one way to say that it is out of reach."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx2
from web4lora_chassis import process
from web4lora_chassis.errors import FailedPrecondition, ResourceExhausted, Unavailable, Web4Error

PROBE_SECONDS = 1.5
SEND_SECONDS = 60.0
_ALONE = 1e6  # of the logarithm of a likelihood: nothing a model computes comes near it
_NO_MEMORY = ("requires more system memory", "out of memory", "insufficient memory", "unable to allocate")
# What Ollama and Docker Model Runner say when the process that they run for a model crashes or can't load it.
_CRASHED = (
    "process has terminated", "process no longer running", "terminated unexpectedly", "unexpectedly stopped",
    "signal: ", "segmentation fault", "illegal instruction", "core dumped",
)  # fmt: skip
_NOT_LOADED = ("failed to load model", "unable to load model", "error loading model", "unable to load runner")
NOT_LOADABLE = "MODEL_NOT_LOADABLE"
"""Reason of errors of a runtime that is there and can't load a model."""
_FULL = ("no space left", "disk full", "disk quota exceeded", "not enough space")


def client(address: str, seconds: float) -> httpx2.Client:
    """Return a client of a runtime.

    Args:
        address: Its address; http:// may be left out.
        seconds: How long to wait for each answer, and for each piece of it. What we send must be taken within
            a minute, piece by piece, however long the answer may take.
    """
    base = address if "://" in address else f"http://{address}"
    # Proxies of the environment are for the outside world, not for a runtime on this machine.
    return httpx2.Client(
        base_url=base.rstrip("/"),
        timeout=httpx2.Timeout(seconds, connect=5.0, write=min(seconds, SEND_SECONDS)),
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
    except httpx2.TimeoutException as error:
        raise Unavailable(
            f"{what} at {address} did not answer in time ({type(error).__name__}).",
            fix=f"Is {what} busy or out of memory? Its log tells; then try again.",
            reason="RUNTIME_TIMEOUT",
        ) from error
    except httpx2.HTTPError as error:
        raise Unavailable(
            f"{what} at {address} is out of reach, or went away: {error or type(error).__name__}",
            fix=f"See that {what} runs, then try again: what was done so far is not done twice.",
            reason="RUNTIME_UNAVAILABLE",
        ) from error


def conversation(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a conversation as OpenAI's chat API takes it: the arguments of calls are JSON text there."""
    body: dict[str, Any] = {"messages": [_as_sent(message) for message in messages]}
    return {**body, "tools": list(tools)} if tools else body


def _as_sent(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = []
    for call in message.get("tool_calls") or ():
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls} if calls else dict(message)


def prompt_tokens(
    what: str,
    endpoint: str,
    model: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    seconds: float,
) -> int:
    """Return how many tokens a conversation was for the model that answers it, with one token.

    Args:
        what: The runtime.
        endpoint: Of its OpenAI-compatible API, ending in /v1.
        model: The model's name there.
        messages: The conversation.
        tools: What the assistant may call.
        seconds: How long to wait; the model may have to be loaded first.

    Raises:
        Unavailable: The runtime is out of reach or busy.
        FailedPrecondition: It does not answer with a count.
    """
    body = {"model": model, **conversation(messages, tools), "max_tokens": 1, "temperature": 0}
    with reaching(what, endpoint), client(endpoint, seconds) as http:
        answer = http.post("/chat/completions", json=body)
    if answer.status_code != httpx2.codes.OK:
        raise refused(what, "answer", answer.status_code, answer.text)
    try:
        return int(answer.json()["usage"]["prompt_tokens"])
    except (ValueError, KeyError, TypeError) as error:
        raise refused(what, "say how long a prompt was", answer.status_code, answer.text) from error


def ends_answer(
    what: str, endpoint: str, model: str, token: int, seconds: float, stop: Sequence[str] = ()
) -> bool:
    """Say whether a token ends an answer: it is made the only one that can be chosen, twice if it does not.

    Args:
        what: The runtime.
        endpoint: Of its OpenAI-compatible API, ending in /v1.
        model: The model's name there.
        token: The token.
        seconds: How long to wait; the model may have to be loaded first.
        stop: Texts that end an answer besides.

    Raises:
        Unavailable: The runtime is out of reach or busy.
        FailedPrecondition: It does not answer.
    """
    body = {
        "model": model, "prompt": ".", "max_tokens": 2, "temperature": 0, "stop": list(stop),
        "logit_bias": {str(token): _ALONE},
    }  # fmt: skip
    with reaching(what, endpoint), client(endpoint, seconds) as http:
        answer = http.post("/completions", json=body)
    if answer.status_code != httpx2.codes.OK:
        raise refused(what, "answer", answer.status_code, answer.text)
    try:
        return bool(answer.json()["choices"][0]["finish_reason"] == "stop")
    except (ValueError, LookupError, TypeError) as error:
        raise refused(what, "say how an answer ended", answer.status_code, answer.text) from error


def refused(what: str, doing: str, status: int, said: str) -> Web4Error:
    """Return the error for an answer that says that the runtime is busy, full or broken, or else failed."""
    text = f"{what} could not {doing}: {said.strip()[:500] or f'HTTP {status}'}"
    if any(sign in said.lower() for sign in _FULL) or status == httpx2.codes.INSUFFICIENT_STORAGE:
        return ResourceExhausted(
            text, fix=f"Free disk space where {what} keeps its models, then try again.", reason="DISK_FULL"
        )
    if any(sign in said.lower() for sign in _NO_MEMORY):
        return ResourceExhausted(
            text,
            fix="Lower context_tokens, choose a smaller quantization, or free memory; then try again.",
            reason="NOT_ENOUGH_MEMORY",
        )
    other = "Deploy to another runtime."
    if any(sign in said.lower() for sign in _CRASHED):
        return FailedPrecondition(
            text,
            fix=f"What {what} runs for a model crashes on this machine, and would again: most likely it was "
            f"compiled for instructions that this processor or kernel doesn't take. {other}",
            reason=process.CRASHED,
        )
    if any(sign in said.lower() for sign in _NOT_LOADED):
        return FailedPrecondition(text, fix=f"Its log may say why. {other}", reason=NOT_LOADABLE)
    if status in (httpx2.codes.TOO_MANY_REQUESTS, httpx2.codes.SERVICE_UNAVAILABLE):
        return Unavailable(text, fix=f"{what} is busy; try again later.", reason="RUNTIME_BUSY")
    return FailedPrecondition(text, fix=f"The log of {what} may say more.", reason="RUNTIME_FAILED")
