"""What is said of a base model that contradicts itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from web4lora_chassis.errors import InvalidInput

_FIELD = {"field": "base.model"}


def broken(text: str, fix: str = "Fetch the model again.", reason: str = "MODEL_BROKEN") -> InvalidInput:
    """Return the error for a base model that contradicts itself."""
    return InvalidInput(text, fix=fix, reason=reason, metadata=_FIELD)


@contextmanager
def of_the_base() -> Iterator[None]:
    """Let what a reader of model files refuses name the field that the base model comes from."""
    try:
        yield
    except InvalidInput as error:
        error.metadata = {**_FIELD, **error.metadata}
        raise


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, shortened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 300 else lines[0][:299] + "…"
