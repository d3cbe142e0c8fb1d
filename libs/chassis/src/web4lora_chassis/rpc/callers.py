"""What a caller on another machine may ask of this one's files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import grpc

from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.settings import Settings, is_loopback

_PATH_SIGNS = ("/", "~", ".", "\\")


def is_here(context: grpc.aio.ServicerContext[Any, Any]) -> bool:
    """Say whether a call comes from this machine. One through a tunnel or a proxy on it does."""
    kind, _, address = context.peer().partition(":")
    return kind == "unix" or is_loopback(address.replace("%5B", "[").replace("%5D", "]"))


def require_open_base(model: str, settings: Settings, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Refuse a path as a base model to callers on other machines, but below the folders opened for them.

    A hub id and an alias are no paths, unless such a file or folder is in the working folder.

    Args:
        model: As a pipeline names it.
        settings: Names the folders.
        context: The call's.

    Raises:
        InvalidInput: It is such a path. Whether there is anything at it is not told.
    """
    name = model.partition("@")[0].strip()
    named = name.startswith(_PATH_SIGNS) or name.lower().endswith(".gguf") or os.path.lexists(name)
    if not (name and named) or is_here(context) or _below(name, settings.base_folder_paths):
        return
    raise InvalidInput(
        "base.model: a path on the trainer's machine can't be named from another machine.",
        fix="Name a hub id; or put the model below a folder that WEB4LORA_BASE_FOLDERS names, for gateway "
        "and trainer alike.",
        reason="PATH_NOT_OPEN",
        metadata={"field": "base.model"},
    )


def _below(name: str, folders: tuple[Path, ...]) -> bool:
    """Say whether a path, its links followed, lies below one of the folders; what is no path does not."""
    try:
        place = Path(name).expanduser().resolve()
        return any(place.is_relative_to(folder.expanduser().resolve()) for folder in folders)
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, a loop of links, ~ of nobody
        return False
