"""What is wrong with a suite, told all at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from web4lora_chassis.errors import InvalidInput, NotFound

_SHOWN = 20


class Problems:
    """Takes problems while there is more to look at; the first 20 are kept, the others counted."""

    def __init__(self) -> None:
        self._errors: list[InvalidInput | NotFound] = []
        self._lines: list[str] = []
        self._count = 0

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Take what is raised inside, and go on behind it."""
        try:
            yield
        except (InvalidInput, NotFound) as error:
            lines = error.message.splitlines()
            self._errors = [*self._errors, error][:2]
            self._lines += lines[: _SHOWN - len(self._lines)]
            self._count += len(lines)

    def refuse_any(self) -> None:
        """Raise what was noted, if anything was.

        Raises:
            NotFound: One thing is wrong: a file is missing.
            InvalidInput: Anything else: a line a problem.
        """
        if not self._errors:
            return
        if len(self._errors) == 1 and self._count <= _SHOWN:
            raise self._errors[0]
        more = self._count - len(self._lines)
        lines = [*self._lines, f"… and {more} more, {self._count} in all"] if more else self._lines
        raise InvalidInput("\n".join(lines), fix="Correct the suite.")
