"""Settings every process shares, read once, at the edge, from the environment.

Each is the upper-case name behind `WEB4LORA_`: `WEB4LORA_HOME`, `WEB4LORA_STORE`. A secret may also be
given as the path of a file that holds it, with `_FILE` behind its name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self, TypeVar

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from web4lora_chassis.errors import InvalidInput

PREFIX = "WEB4LORA_"
_SECRETS = ("token", "s3_access_key", "s3_secret_key")


class Settings(BaseSettings):
    """What every service, the command and the client share."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    home: Path = Field(
        default=Path.home() / ".web4lora", description="State of a native stack: jobs, database, logs"
    )
    cache: Path = Field(
        default=Path.home() / ".cache" / "web4lora",
        description="What took long to make: llama.cpp, base models",
    )
    store: str = Field(
        default="", description="Artifact store: file:///folder or s3+http(s)://host:port/bucket"
    )
    s3_access_key: SecretStr = SecretStr("")
    s3_secret_key: SecretStr = SecretStr("")
    s3_region: str = "us-east-1"

    token: SecretStr = Field(
        default=SecretStr(""), description="Shared secret of the services; needed beyond the loopback"
    )
    tls_certificate_file: Path | None = None
    tls_key_file: Path | None = None
    tls_authority_file: Path | None = Field(
        default=None, description="CA that signed the peers' certificates"
    )
    tls_client_required: bool = Field(
        default=False, description="Mutual TLS: clients must show a certificate too"
    )

    gateway_address: str = "127.0.0.1:8461"
    trainer_address: str = "127.0.0.1:8462"
    packager_address: str = "127.0.0.1:8463"
    deployer_address: str = "127.0.0.1:8464"

    @model_validator(mode="after")
    def _absolute(self) -> Self:
        home = self.home.expanduser().absolute()
        object.__setattr__(self, "home", home)
        object.__setattr__(self, "cache", self.cache.expanduser().absolute())
        if not self.store:
            object.__setattr__(self, "store", (home / "store").as_uri())
        return self


S = TypeVar("S", bound=Settings)


def load(kind: type[S], **overrides: object) -> S:
    """Read the settings from the environment.

    Args:
        kind: The settings class to fill, `Settings` or a service's own.
        overrides: Values that win over the environment, from command-line options.

    Returns:
        The frozen settings.

    Raises:
        InvalidInput: A value has the wrong form; the message names the variable.
    """
    given = dict(overrides)
    for name in _SECRETS:
        path = os.environ.get(f"{PREFIX}{name.upper()}_FILE")
        if path and name not in given:
            try:
                given[name] = Path(path).read_text(encoding="utf-8").strip()
            except OSError as error:
                raise InvalidInput(
                    f"{PREFIX}{name.upper()}_FILE: can't read {path}: {error.strerror}",
                    fix="Name a readable file.",
                ) from error
    try:
        return kind(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(str(part) for part in first["loc"]).upper()
        raise InvalidInput(
            f"{PREFIX}{name}: {first['msg']}", fix=f"Correct the variable {PREFIX}{name}."
        ) from error
