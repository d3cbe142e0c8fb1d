"""HTTP to a runtime on this machine: one way to make a client, one way to say that it is out of reach."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import httpx
from web4lora_chassis.errors import FailedPrecondition, ResourceExhausted, Unavailable, Web4Error

PROBE_SECONDS = 1.5
_FULL = ("no space left", "disk full", "disk quota exceeded", "not enough space")


def client(address: str, seconds: float) -> httpx.Client:
    """Return a client of a runtime.

    Args:
        address: Its address; http:// may be left out.
        seconds: How long to wait for each answer, and for each piece of it.
    """
    base = address if "://" in address else f"http://{address}"
    # Proxies of the environment are for the outside world, not for a runtime on this machine.
    return httpx.Client(
        base_url=base.rstrip("/"), timeout=httpx.Timeout(seconds, connect=5.0), trust_env=False
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


def refused(what: str, doing: str, status: int, said: str) -> Web4Error:
    """Return the error for an answer that says that the runtime is busy or full, or else failed."""
    text = f"{what} could not {doing}: {said.strip()[:500] or f'HTTP {status}'}"
    if any(sign in said.lower() for sign in _FULL) or status == httpx.codes.INSUFFICIENT_STORAGE:
        return ResourceExhausted(
            text, fix=f"Free disk space where {what} keeps its models, then try again.", reason="DISK_FULL"
        )
    if status in (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE):
        return Unavailable(text, fix=f"{what} is busy; try again later.", reason="RUNTIME_BUSY")
    return FailedPrecondition(text, fix=f"The log of {what} may say more.", reason="RUNTIME_FAILED")
