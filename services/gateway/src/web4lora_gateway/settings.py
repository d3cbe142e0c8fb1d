"""The gateway's own settings, beside those every process shares."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from web4lora_chassis.settings import Settings


class GatewaySettings(Settings):
    """What the gateway reads from the environment once, at its start."""

    database: SecretStr = Field(
        default=SecretStr(""),
        description="postgresql://user:password@host/name; empty: SQLite in the gateway's state folder",
    )
    outputs: str = Field(default="", description="Folder of the runs' folders; empty: none is written")

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
