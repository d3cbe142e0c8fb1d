"""Settings of the deployer."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, field_validator
from web4lora_chassis.pipeline.deploy import TARGET
from web4lora_chassis.settings import Settings

_OLLAMA_PORT = 11434
_MODEL_RUNNER_PORT = 12434


class DeployerSettings(Settings):
    """What the deployer reads besides what all services share."""

    target: str = Field(default=TARGET.words[0], description="Runtime of deployments that name none")
    ollama: str = Field(default="http://127.0.0.1:11434", description="Address of Ollama")
    docker_model_runner: str = Field(
        default="", description="Address of Docker Model Runner; its usual addresses are tried when empty"
    )
    evaluate_hosts: str = Field(
        default="",
        description="Hosts, or host:port, with commas between them, whose models may be evaluated besides "
        "those on this machine and the runtimes'",
    )
    llama_server_host: str = Field(default="127.0.0.1", description="Address that llama-server listens on")
    llama_server_first_port: int = Field(default=8480, ge=1, le=65535)
    keep_deployments: int = Field(
        default=2, ge=1, description="Deployments kept of one name, the one that serves included"
    )
    guard_interval_seconds: float = Field(
        default=10.0, gt=0, description="Time between two looks at the models that names stand for"
    )

    @field_validator("target")
    @classmethod
    def _known(cls, target: str) -> str:
        for _, text, _ in TARGET.wrong(target):
            raise ValueError(text)
        return target

    @field_validator("ollama")
    @classmethod
    def _ollama(cls, text: str) -> str:
        return address(text, _OLLAMA_PORT)

    @field_validator("docker_model_runner")
    @classmethod
    def _model_runner(cls, text: str) -> str:
        return address(text, _MODEL_RUNNER_PORT) if text.strip() else ""

    @property
    def deployer_home(self) -> Path:
        """Folder of the deployer's state."""
        return self.home / "deployer"


def address(text: str, port: int) -> str:
    """Return the address that a text means, read as Ollama reads its OLLAMA_HOST.

    Args:
        text: `host`, `host:port`, `:port`, or either behind `http://` or `https://`, with a path or without;
            empty for this machine. An address to listen on, such as 0.0.0.0, means this machine too.
        port: Where it listens unless the text says otherwise; behind a scheme that scheme's own port.

    Raises:
        ValueError: It is no such text.
    """
    given = text.strip().strip("\"'").strip()
    named = "://" in given
    if given.count(":") > 1 and not named and not given.startswith("["):
        given = f"[{given}]"  # IPv6 alone, without a port
    try:
        parts = urlsplit(given if named else f"http://{given}")
        host, number = parts.hostname or "", parts.port
    except ValueError as error:
        raise ValueError(
            f"{text!r} is not an address ({error}); write host:port or http://host:port"
        ) from error
    odd = parts.query or parts.fragment or "@" in parts.netloc or given.isdigit() or re.search(r"\s", given)
    if parts.scheme not in ("http", "https") or odd:
        raise ValueError(f"{text!r} is not an address; write host:port or http://host:port")
    if host in ("", "0.0.0.0", "::"):  # noqa: S104 - nothing is bound here
        host = "127.0.0.1"
    host = f"[{host}]" if ":" in host else host
    if number is None and not named:
        number = port
    return f"{parts.scheme}://{host}{'' if number is None else f':{number}'}{parts.path.rstrip('/')}"
