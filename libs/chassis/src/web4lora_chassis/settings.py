"""Settings every process shares, read once, at the edge, from the environment.

Each is the upper-case name behind `WEB4LORA_`: `WEB4LORA_HOME`, `WEB4LORA_STORE`. A secret may also be
given as the path of a file that holds it, with `_FILE` behind its name. `WEB4LORA_ENV_FILE` names a file of
such variables, the stack's `.env` for one; what the environment itself says wins over it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self, TypeVar

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from web4lora_chassis.errors import InvalidInput

PREFIX = "WEB4LORA_"
ENV_FILE = f"{PREFIX}ENV_FILE"


class Settings(BaseSettings):
    """What every service, the command and the client share."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    home: Path = Field(
        default_factory=lambda: Path.home() / ".web4lora",
        description="State of a native stack: jobs, database, logs",
    )
    cache: Path = Field(
        default_factory=lambda: Path.home() / ".cache" / "web4lora",
        description="What took long to make: llama.cpp, base models",
    )
    store: str = Field(
        default="", description="Artifact store: file:///folder or s3+http(s)://host:port/bucket"
    )
    s3_access_key: SecretStr = SecretStr("")
    s3_secret_key: SecretStr = SecretStr("")
    s3_region: str = "us-east-1"
    console: str = Field(default="", description="Address of the object store's web console, for people")

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

    @field_validator("token")
    @classmethod
    def _sendable(cls, token: SecretStr) -> SecretStr:
        if any(not "!" <= letter <= "~" for letter in token.get_secret_value()):
            raise ValueError("a token may hold ASCII letters, digits and signs only, no blanks")
        return token

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
    take_env_file()
    given = dict(overrides)
    secrets = [name for name, field in kind.model_fields.items() if field.annotation is SecretStr]
    for name in secrets:
        variable = f"{PREFIX}{name.upper()}_FILE"
        path = os.environ.get(variable)
        if path and name not in given:
            given[name] = _secret(variable, Path(path))
    try:
        return kind(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = PREFIX + "_".join(str(part) for part in first["loc"]).upper()
        raise InvalidInput(f"{name}: {first['msg']}", fix=f"Correct the variable {name}.") from None
    except SettingsError as error:
        raise InvalidInput(f"{PREFIX}…: {error}", fix="Correct that variable.") from None


def _secret(variable: str, path: Path) -> str:
    """Return the secret in a file. An empty one is a mistake: it would open what should be locked."""
    try:
        secret = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InvalidInput(f"{variable}: can't read {path}: {why}", fix="Name a readable file.") from error
    if not secret:
        raise InvalidInput(f"{variable}: {path} is empty.", fix="Put the secret into it.")
    return secret


def read_pem(path: Path) -> bytes:
    """Return the bytes of a certificate's or key's file.

    Raises:
        InvalidInput: It can't be read, or holds no PEM text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInput(
            f"TLS: can't read {path}: {error.strerror}",
            fix="Correct the WEB4LORA_TLS_… variable that names it.",
        ) from error
    if b"-----BEGIN " not in data:
        raise InvalidInput(f"TLS: {path} holds no PEM text.", fix="Convert it to PEM.")
    return data


def take_env_file() -> None:
    """Give the environment, and so our child processes, what the file in WEB4LORA_ENV_FILE adds to it."""
    path = os.environ.get(ENV_FILE)
    if not path:
        return
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(
            f"{ENV_FILE}: can't read {path}: {error.strerror}.",
            fix="docker/make-env writes one; or unset the variable.",
        ) from error
    words = (line.strip().partition("=") for line in text.splitlines())
    values = {name: value.strip().strip("'\"") for name, _, value in words if name.startswith(PREFIX)}
    for name, value in values.items():
        os.environ.setdefault(name, value)
