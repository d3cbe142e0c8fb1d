"""The packager's own settings, on top of those that every process shares."""

from __future__ import annotations

from pydantic import Field
from web4lora_chassis.settings import Settings


class PackagerSettings(Settings):
    """What the packager reads from the environment."""

    packager_load_timeout_seconds: float = Field(
        default=600.0, gt=0, description="How long a load check waits for llama-server to load a model"
    )
