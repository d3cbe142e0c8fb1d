"""Settings every process shares, read once, at the edge, from the environment.

Each is the upper-case name behind `WEB4LORA_`: `WEB4LORA_HOME`, `WEB4LORA_STORE`. A secret may also be
given as the path of a file that holds it, with `_FILE` behind its name. `WEB4LORA_ENV_FILE` names a file of
such variables, the stack's `.env` for one; what the environment itself says wins over it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import secrets
import stat
from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import SettingsConfigDict, SettingsError

from web4lora_chassis.errors import FailedPrecondition, InvalidInput, disk_error
from web4lora_chassis.keeping import Keeping

PREFIX = "WEB4LORA_"
ENV_FILE = f"{PREFIX}ENV_FILE"
TOKEN_FILE = "token"  # noqa: S105 - a file's name
"""Of a stack on this machine, in its home: made by `web4lora up`, read by all that know the home."""

log = logging.getLogger(__name__)


class Settings(Keeping):
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
        default=SecretStr(""),
        description="Opens all calls of a service, needed beyond the loopback; of a client: its own",
    )
    trainer_token: SecretStr = Field(
        default=SecretStr(""), description="What the gateway shows the trainer; empty: the shared one"
    )
    packager_token: SecretStr = Field(
        default=SecretStr(""), description="What the gateway shows the packager; empty: the shared one"
    )
    deployer_token: SecretStr = Field(
        default=SecretStr(""), description="What the gateway shows the deployer; empty: the shared one"
    )
    calls_per_second: float = Field(
        default=500.0, gt=0, description="Calls of one principal that a service answers, in the long run"
    )
    calls_at_once: int = Field(
        default=2000, ge=1, description="Calls of one principal that may come at once after a pause"
    )
    streams_at_once: int = Field(
        default=500, ge=1, description="Watches of one principal at the same time at one service"
    )
    call_seconds: float = Field(
        default=1800.0, gt=0, description="When a call is ended whose caller set no deadline; not of watches"
    )
    tls_certificate_file: Path | None = None
    tls_key_file: Path | None = None
    tls_authority_file: Path | None = Field(
        default=None, description="CA that signed the peers' certificates"
    )
    tls_client_required: bool = Field(
        default=False, description="Mutual TLS: clients must show a certificate too"
    )

    insecure: bool = Field(
        default=False,
        description="Allow plain text beyond the loopback: token, data and logins can be read on the way",
    )

    base_folders: str = Field(
        default="",
        description="Folders of base models that callers on other machines may name, separated as in PATH",
    )

    log_format: Literal["text", "json"] = Field(
        default="text", description="json: each line of the log is an object, with the ids of run and job"
    )
    metrics_address: str = Field(
        default="",
        description="host:port of the gateway's metrics, for Prometheus; the others take the three ports "
        "behind it; empty: none are shown",
    )
    traces_endpoint: str = Field(
        default="",
        description="Address of a collector of traces, OTLP over gRPC: http://127.0.0.1:4317; empty: none",
    )

    gateway_address: str = "127.0.0.1:8461"
    trainer_address: str = "127.0.0.1:8462"
    packager_address: str = "127.0.0.1:8463"
    deployer_address: str = "127.0.0.1:8464"

    @field_validator("token", "trainer_token", "packager_token", "deployer_token")
    @classmethod
    def _sendable(cls, token: SecretStr) -> SecretStr:
        if any(not "!" <= letter <= "~" for letter in token.get_secret_value()):
            raise ValueError("a token may hold ASCII letters, digits and signs only, no blanks")
        return token

    @field_validator("gateway_address", "trainer_address", "packager_address", "deployer_address")
    @classmethod
    def _with_port(cls, address: str) -> str:
        return check_address(address)

    @field_validator("metrics_address")
    @classmethod
    def _with_port_or_empty(cls, address: str) -> str:
        return cls._with_port(address) if address else address

    @field_validator("traces_endpoint")
    @classmethod
    def _with_scheme(cls, address: str) -> str:
        if address and not address.startswith(("http://", "https://")):
            raise ValueError(f"{address!r} is no address of a collector; write http://host:port")
        return address

    @model_validator(mode="after")
    def _absolute(self) -> Self:
        home = self.home.expanduser().absolute()
        object.__setattr__(self, "home", home)
        object.__setattr__(self, "cache", self.cache.expanduser().absolute())
        if not self.store:
            object.__setattr__(self, "store", (home / "store").as_uri())
        return self

    @property
    def base_folder_paths(self) -> tuple[Path, ...]:
        """The folders of `base_folders`."""
        return tuple(Path(folder) for folder in self.base_folders.split(os.pathsep) if folder)

    @property
    def shared_token(self) -> str:
        """The token that services ask for and clients show: the one set, else that of the stack's home.

        Read when needed, because `web4lora up` makes it after the settings were read; empty without one.
        """
        return self.token.get_secret_value() or _token_in(self.home / TOKEN_FILE)

    def worker_token(self, name: str) -> str:
        """The token that a worker asks the gateway for: the one set, else that of the stack's home.

        Args:
            name: trainer, packager or deployer.

        Returns:
            The token; empty when the worker has none of its own, and the shared one counts.
        """
        given: SecretStr = getattr(self, f"{name}_token")
        if given.get_secret_value() or self.token.get_secret_value():
            return given.get_secret_value()
        return _token_in(self.home / f"{name}.{TOKEN_FILE}")


WORKERS = ("trainer", "packager", "deployer")
"""The services that the gateway calls."""

S = TypeVar("S", bound=Settings)


def _token_in(path: Path) -> str:
    """Return the token in a file of a stack's home; empty when there is none."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def check_address(address: str) -> str:
    """Return an address that has the form of one.

    Raises:
        ValueError: It is not host:port.
    """
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and int(port[:6]) < 1 << 16):
        raise ValueError(f"{address!r} is no address; write host:port, for example 127.0.0.1:8461")
    return address


def is_loopback(address: str) -> bool:
    """Say whether `host:port`, or a host alone, can be reached from this machine only."""
    host = address.rsplit(":", 1)[0] if address.count(":") == 1 or "]:" in address else address
    host = host.strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def make_private(home: Path) -> None:
    """Close a stack's state, what is there and what is still to be written, to other users of this machine.

    It holds models, datasets, job records with paths, and the token.

    Raises:
        ResourceExhausted, FailedPrecondition: The folder can't be made, or all users share it.
    """
    os.umask(0o077)
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, home) from error
    mode = stat.S_IMODE(home.stat().st_mode)
    if mode & stat.S_ISVTX:  # a folder that all share, /tmp for one: closing it would take it from them
        raise FailedPrecondition(
            f"{home} is shared with other users, and a stack's state is for one alone.",
            fix="Set WEB4LORA_HOME to a folder of its own.",
        )
    if mode & 0o077:
        try:
            home.chmod(0o700)
        except OSError as error:  # a mounted volume that belongs to somebody else
            log.warning("%s is open to other users, and can't be closed: %s", home, error.strerror)


def make_native_tokens(settings: Settings) -> None:
    """Give a stack on this machine its tokens, unless it has one: else every local user could command it.

    One for people, and one for the gateway at each worker. A stack whose shared token was set gets none.
    """
    if settings.token.get_secret_value():
        return
    for name in (TOKEN_FILE, *(f"{worker}.{TOKEN_FILE}" for worker in WORKERS)):
        place = settings.home / name
        if place.exists():
            continue
        part = place.with_name(f"{name}.{os.getpid()}.part")
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        try:
            with contextlib.suppress(FileExistsError):  # two at once agree on the first
                os.link(part, place)
        finally:
            part.unlink(missing_ok=True)


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
    for name in [name for name, field in kind.model_fields.items() if field.annotation is SecretStr]:
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


def load_service(kind: type[S]) -> S:
    """Read a service's settings, and close its state to other users of this machine; see `load`."""
    settings = load(kind)
    make_private(settings.home)
    return settings


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
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InvalidInput(
            f"{ENV_FILE}: can't read {path}: {why}.",
            fix="docker/make-env writes one; or unset the variable.",
        ) from error
    words = (line.strip().partition("=") for line in text.splitlines())
    values = {name: value.strip().strip("'\"") for name, _, value in words if name.startswith(PREFIX)}
    for name, value in values.items():
        os.environ.setdefault(name, value)
