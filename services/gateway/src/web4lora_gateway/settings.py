"""The gateway's own settings, beside those every process shares."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field, SecretStr, field_validator
from web4lora_chassis.settings import Settings, check_address

FIRST_TRAINER = "trainer"
"""Name of the trainer at WEB4LORA_TRAINER_ADDRESS."""

_TRAINER_NAME = re.compile(r"[a-z][a-z0-9-]{0,15}")


class GatewaySettings(Settings):
    """What the gateway reads from the environment once, at its start."""

    database: SecretStr = Field(
        default=SecretStr(""),
        description="postgresql://user:password@host/name; empty: SQLite in the gateway's state folder",
    )
    trainers: str = Field(
        default="",
        description="Further trainers beside that of WEB4LORA_TRAINER_ADDRESS: NAME=host:port, separated by "
        "commas",
    )
    trainer_grace_seconds: float = Field(
        default=120.0,
        ge=0,
        description="How long a trainer may be out of reach before its work is given to another one",
    )
    outputs: str = Field(default="", description="Folder of the runs' folders; empty: none is written")

    @field_validator("trainers")
    @classmethod
    def _named(cls, text: str) -> str:
        _trainers(text)
        return text

    @property
    def trainer_addresses(self) -> dict[str, str]:
        """The addresses of all trainers by their names, in the order in which work is given to them."""
        return {FIRST_TRAINER: self.trainer_address, **_trainers(self.trainers)}

    @property
    def state_dir(self) -> Path:
        """The gateway's own folder."""
        return self.home / "gateway"

    @property
    def database_url(self) -> str:
        """Address of the database of runs and workflows; may hold a password."""
        return self.database.get_secret_value() or f"sqlite:///{self.state_dir / 'gateway.sqlite'}"

    @property
    def outputs_dir(self) -> Path | None:
        """Where the runs' folders are written, or None."""
        return Path(self.outputs).expanduser().absolute() if self.outputs else None


def _trainers(text: str) -> dict[str, str]:
    """Return the addresses of further trainers by name.

    Raises:
        ValueError: Not of the form NAME=host:port, or a name twice.
    """
    found: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, address = entry.partition("=")
        if not equals or not _TRAINER_NAME.fullmatch(name):
            raise ValueError(
                f"{entry!r} is no trainer; write NAME=host:port, for example gpu-1=10.0.0.5:8462, with a "
                "name of 1 to 16 of a-z, 0-9 and dashes"
            )
        if name in found or name == FIRST_TRAINER:
            raise ValueError(f"the name {name!r} is given to two trainers")
        found[name] = check_address(address)
    return found
