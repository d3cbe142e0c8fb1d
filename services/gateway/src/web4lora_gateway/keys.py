"""The key of a stage's result: one digest over everything that went in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def stage_key(stage: str, inputs: Mapping[str, Any]) -> str:
    """Return the key of a stage's result.

    Args:
        stage: The stage's name.
        inputs: JSON data: digests, parameters with defaults filled in, versions of deciding tools.

    Returns:
        SHA-256 over the canonical JSON, 64 lower-case hex digits.
    """
    text = json.dumps(
        {"stage": stage, "inputs": inputs}, sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
