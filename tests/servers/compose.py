"""The stack in containers under a name of its own: built, started, looked into and removed by the tests."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from web4lora_chassis.process import run

from servers.build import build

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
IMAGES = ROOT / "tests" / "e2e" / "images"
MODEL_PORTS = 8
WANTED = "WEB4LORA_TEST_COMPOSE"
_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
_BUILD_SECONDS = 3000.0
_CALL_SECONDS = 600.0


def require_engine() -> None:
    """Skip unless the test is asked for: it builds images for half an hour. Then an engine must be there.

    On a Debian machine where we are root, as in CI, one is installed and started.
    """
    if os.environ.get(WANTED) != "1":
        pytest.skip(
            f"THE STACK IN CONTAINERS IS NOT TESTED: it builds images for half an hour; set {WANTED}=1"
        )
    if os.getuid() == 0 and Path("/etc/debian_version").exists():
        run([HERE / "docker-engine"], timeout_seconds=900)
    run(["docker", "info"], timeout_seconds=60)
    run(["docker", "compose", "version"], timeout_seconds=60)


class ComposeStack:
    """The stack of `compose.yaml`, with ports and a project of its own.

    Args:
        folder: Where its .env, secrets and the trainer's state go.
        project: Name of the Compose project.

    Attributes:
        env_file: Its .env.
        model_port: The first port of models that its llama-server serves.
    """

    def __init__(self, folder: Path, project: str) -> None:
        self.folder = folder
        self.project = project
        self.env_file = folder / ".env"
        run([sys.executable, ROOT / "docker" / "make-env", "--folder", folder])
        gateway = _free_ports(4 + MODEL_PORTS)
        minio, console, self.trainer_port, self.model_port = (gateway + index for index in range(1, 5))
        self.console = f"http://127.0.0.1:{console}"
        self.gateway = f"127.0.0.1:{gateway}"
        self.ports = {"gateway": gateway, "minio": minio, "console": console}
        self.set(
            GATEWAY_PORT=gateway,
            MINIO_PORT=minio,
            MINIO_CONSOLE_PORT=console,
            MODEL_FIRST_PORT=self.model_port,
            MODEL_PORTS=f"{self.model_port}-{self.model_port + MODEL_PORTS - 1}",
            STACK_TRAINER=f"host.docker.internal:{self.trainer_port}",
            WEB4LORA_GATEWAY_ADDRESS=self.gateway,
            WEB4LORA_STORE=f"s3+http://127.0.0.1:{minio}/web4lora",
            WEB4LORA_CONSOLE=self.console,
            DEPLOY_TARGET="llama-server",
            STACK_OLLAMA="http://ollama:11434",
            OLLAMA_IMAGE="web4lora-test-ollama",
            POSTGRES_IMAGE="web4lora-test-postgres",
            TORCH_INDEX=_TORCH_INDEX if _reachable(_TORCH_INDEX) else "",
            WEB4LORA_BUILD_CA=os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE") or "/dev/null",
        )

    def set(self, **values: object) -> None:
        """Set variables of the .env, those that are only shown as a default too."""
        text = self.env_file.read_text(encoding="utf-8")
        for name, value in values.items():
            line = f"{name}={value}"
            text, found = re.subn(rf"(?m)^#?{name}=.*$", line, text, count=1)
            if not found:
                text += f"{line}\n"
        self.env_file.write_text(text, encoding="utf-8")

    def secret(self, name: str) -> str:
        """Return one of its secrets."""
        return (self.folder / ".secrets" / name).read_text(encoding="utf-8").strip()

    def build(self) -> None:
        """Build every image, the tests' own PostgreSQL, Ollama and Chromium included."""
        for name in ("postgres", "chromium"):
            self.docker("build", "--quiet", "--tag", f"web4lora-test-{name}", "--file",
                        str(IMAGES / f"{name}.Dockerfile"), str(IMAGES))  # fmt: skip
        self.compose("build", timeout_seconds=_BUILD_SECONDS)
        build("grpcurl", _silent)
        ollama = build("ollama", _silent)
        self.docker("build", "--quiet", "--tag", "web4lora-test-ollama", "--file",
                    str(IMAGES / "ollama.Dockerfile"), str(ollama.parent))  # fmt: skip

    def docker(self, *arguments: str, timeout_seconds: float = _CALL_SECONDS) -> str:
        """Run `docker`."""
        return run(["docker", *arguments], cwd=ROOT, env=self._env(), timeout_seconds=timeout_seconds)

    def compose(self, *arguments: str, timeout_seconds: float = _CALL_SECONDS) -> str:
        """Run `docker compose` on this stack."""
        given = ["--project-name", self.project, "--env-file", str(self.env_file)]
        return self.docker("compose", *given, *arguments, timeout_seconds=timeout_seconds)

    def web4lora(self, *arguments: str, ok: bool = True) -> str:
        """Run the command on this stack; return what it printed."""
        env = self._env() | {
            "WEB4LORA_ENV_FILE": str(self.env_file),
            "WEB4LORA_TRAINER_ADDRESS": f"{_reachable_host()}:{self.trainer_port}",
        }
        done = subprocess.run(
            [sys.executable, "-m", "web4lora", *arguments], cwd=self.folder, env=env, capture_output=True,
            text=True, timeout=1800, check=False,
        )  # fmt: skip
        if ok and done.returncode != 0:
            pytest.fail(
                f"web4lora {' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
            )
        return done.stdout

    def containers(self) -> Mapping[str, dict[str, Any]]:
        """Return what Docker knows of each service's container."""
        ids = self.compose("ps", "--all", "--quiet").split()
        found = json.loads(self.docker("inspect", *ids)) if ids else []
        return {each["Config"]["Labels"]["com.docker.compose.service"]: each for each in found}

    def crash(self, service: str) -> None:
        """Kill a container's first process as a crash would: Docker must not take it for a wish of ours."""
        pid = self.containers()[service]["State"]["Pid"]
        self.docker("run", "--rm", "--pid=host", "--user=0", "--entrypoint=sh", "web4lora-gateway",
                    "-c", f"kill -9 {pid}")  # fmt: skip

    def remove(self) -> None:
        """Stop the trainer, remove containers and volumes; images stay."""
        self.web4lora("trainer", "stop", ok=False)
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "10")

    def _env(self) -> dict[str, str]:
        """Return our environment without what would win over the stack's .env."""
        return {name: value for name, value in os.environ.items() if not name.startswith("WEB4LORA_")} | {
            name: os.environ[name] for name in ("WEB4LORA_CACHE",) if name in os.environ
        }


def _silent(_: str) -> None:
    """Take progress that nobody watches."""


def _free_ports(count: int) -> int:
    """Return the first of so many free ports in a row.

    They lie below those that the kernel gives to outgoing connections: while the stack is down for a moment,
    nothing else may take them.
    """
    for first in range(18480, 28480, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports in a row")


def _reachable(url: str) -> bool:
    try:
        with urlopen(f"{url}/torch/", timeout=10):  # noqa: S310 - a fixed https address
            return True
    except (URLError, OSError):
        return False


def _reachable_host() -> str:
    from web4lora.commands.trainer import reachable_host

    return reachable_host()
