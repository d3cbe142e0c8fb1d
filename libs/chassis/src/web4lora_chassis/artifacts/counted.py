"""Counts what is asked of an artifact store, whichever back end it has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from web4lora_chassis.artifacts.backend import Advance, Backend
from web4lora_chassis.artifacts.manifest import FileEntry
from web4lora_chassis.errors import Web4Error
from web4lora_chassis.telemetry.metrics import STORE_BYTES, STORE_CALLS

OK = "ok"


def counted_backend(backend: Backend) -> Backend:
    """Return a back end that does what this one does, and counts it."""
    return cast(Backend, _Counted(backend))


class _Counted:
    """Passes every call on. A call counts when it ends, one that yields when its last key was taken."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        return functools.partial(_call, name, found) if callable(found) else found

    def put_file(self, key: str, source: Path, entry: FileEntry, advance: Advance, *, link: bool) -> None:
        _call("put_file", self._backend.put_file, key, source, entry, _measured("in", advance), link=link)

    def get_file(self, key: str, target: Path, entry: FileEntry, advance: Advance) -> None:
        _call("get_file", self._backend.get_file, key, target, entry, _measured("out", advance))


def _call(name: str, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
    try:
        result = method(*args, **options)
    except Exception as error:
        _count(name, error)
        raise
    if isinstance(result, Iterator):
        return _each(name, result)
    _count(name)
    return result


def _each(name: str, found: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from found
    except Exception as error:
        _count(name, error)
        raise
    _count(name)


def _count(name: str, error: Exception | None = None) -> None:
    outcome = OK if error is None else error.reason if isinstance(error, Web4Error) else type(error).__name__
    STORE_CALLS.labels(name, outcome).inc()


def _measured(direction: str, advance: Advance) -> Advance:
    def moved(size_bytes: int) -> None:
        STORE_BYTES.labels(direction).inc(size_bytes)
        advance(size_bytes)

    return moved
