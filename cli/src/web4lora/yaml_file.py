"""Reads a YAML file of the user's as nodes, which know their lines; nothing in it is unfolded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml
from web4lora_chassis.errors import InvalidInput, NotFound, shown

from web4lora.home import short

_LIMIT_BYTES = 1 << 20


def compose(path: Path, what: str, example: str, reason: str = "") -> yaml.Node:
    """Return the root node of a YAML file.

    Args:
        path: The file.
        what: What it should be, for messages: "a pipeline file".
        example: A file that is one.
        reason: Of the error when it is not YAML.

    Raises:
        NotFound: It can't be read.
        InvalidInput: It is not YAML; one line with the file and, where there is one, the line.
    """
    name = short(path)
    fix = f"Correct the file; {example} is {what}."
    try:
        with path.open("rb") as file:
            data = file.read(_LIMIT_BYTES + 1)
    except OSError as error:
        raise NotFound(
            f"{name} can't be read: {error.strerror}.", fix=f"Name {what}, for example {example}."
        ) from error
    if len(data) > _LIMIT_BYTES:
        raise InvalidInput(f"{name} is larger than 1 MiB: it can't be {what}.", fix=f"Name {what}.")
    try:
        node = yaml.compose(data.decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name}: byte {error.start + 1} is not UTF-8.", fix=fix) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = shown(str(error.problem or error.context), 200)[1:-1]
        raise InvalidInput(f"{name}:{line}: not YAML: {problem}.", fix=fix, reason=reason) from error
    except (yaml.YAMLError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise InvalidInput(f"{name}: not YAML: {why}.", fix=fix, reason=reason) from error
    if node is None:
        raise InvalidInput(f"{name} is empty.", fix=f"{example} shows every key.")
    return node


def is_there(look: Callable[[], bool]) -> bool:
    """Look at a path that a file names; one that can't be looked at, say too long, is not there."""
    try:
        return look()
    except (OSError, ValueError):
        return False
