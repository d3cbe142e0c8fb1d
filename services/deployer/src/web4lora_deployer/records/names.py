"""Names: what people call a model, and the immutable id of one candidate of that name."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping

from web4lora_chassis.errors import InvalidInput

_NAME = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")
_NAME_LENGTH = 80
_ID = re.compile(r"(?P<name>[a-z0-9._-]+):v(?P<digest>[0-9a-f]{8})")


def check_name(name: str) -> None:
    """Refuse a name that Ollama or an OCI registry would not take, so that one name serves all runtimes.

    Raises:
        InvalidInput: The name is not allowed.
    """
    if not is_name(name):
        raise InvalidInput(
            f"{name!r} can't be the name of a model.",
            fix=f"Use 1 to {_NAME_LENGTH} of a-z and 0-9, with single dots, dashes or underscores within.",
            metadata={"field": "name"},
        )


def is_name(text: str) -> bool:
    """Say whether a text can be the name of a model."""
    return _NAME.fullmatch(text) is not None and len(text) <= _NAME_LENGTH


def deployment_id_of(name: str, identity: Mapping[str, object]) -> str:
    """Return the id of a candidate: `name:v<first 8 digits of a SHA-256 over all that makes it what it is>`.

    Args:
        name: The name.
        identity: See `Deployment.identity`. The same gives the same id, anything else another one.
    """
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return f"{name}:v{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def is_deployment_id(text: str) -> bool:
    """Say whether a text is a candidate's id rather than a name."""
    return _ID.fullmatch(text) is not None


def file_name(deployment_id: str) -> str:
    """Return an id as the name of a file, without a colon, which not every file system takes."""
    return deployment_id.replace(":", "@") + ".json"
