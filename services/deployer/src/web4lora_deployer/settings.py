"""Settings of the deployer."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from web4lora_chassis.settings import Settings


class DeployerSettings(Settings):
    """What the deployer reads besides what all services share."""

    target: str = Field(default="auto", description="Runtime of deployments that name none")
    ollama: str = Field(default="http://127.0.0.1:11434", description="Address of Ollama")
    docker_model_runner: str = Field(
        default="", description="Address of Docker Model Runner; its usual addresses are tried when empty"
    )
    llama_server_host: str = Field(default="127.0.0.1", description="Address that llama-server listens on")
    llama_server_first_port: int = Field(default=8480, ge=1, le=65535)
    keep_candidates: int = Field(
        default=2, ge=1, description="Candidates kept of one name, the one that serves included"
    )
    guard_interval_seconds: float = Field(
        default=10.0, gt=0, description="Time between two looks at the models that names stand for"
    )

    @property
    def deployer_home(self) -> Path:
        """Folder of the deployer's state."""
        return self.home / "deployer"
