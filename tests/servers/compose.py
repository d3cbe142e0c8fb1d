"""The stack in containers under a name of its own: built, started, looked into and removed by the tests."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from web4lora_chassis.errors import Web4Error
from web4lora_chassis.process import run
from web4lora_chassis.settings import Settings, load
from web4lora_llamacpp import find

from tests.servers.build import build

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
IMAGES = ROOT / "tests" / "e2e" / "images"
MODEL_PORTS = 8
WANTED = "WEB4LORA_TEST_COMPOSE"
"""Set to 1, the test runs outside CI too; set to "all", the images compile llama.cpp too."""
_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
_NOT_TESTED = "THE STACK IN CONTAINERS IS NOT TESTED"
_IMAGES_BYTES = 25_000_000_000  # with the builder's cache; most of it torch with CUDA, thrice
_RUN_BYTES = 8_000_000_000
_BUILDER_CACHE = "12GB"
_IMAGES_LIBC = (2, 36)
_BUILD_SECONDS = 4000.0
_CALL_SECONDS = 600.0


def require_engine() -> None:
    """Skip, loudly, where no engine can be had, and on a contributor's machine unless asked for.

    On a Debian machine where we are root, as in CI, an engine is installed and started.
    """
    if os.environ.get("CI") != "true" and not os.environ.get(WANTED):
        pytest.skip(f"{_NOT_TESTED}: it builds images for some 10 minutes; set {WANTED}=1")
    try:
        if os.getuid() == 0 and Path("/etc/debian_version").exists():
            run([HERE / "docker-engine"], timeout_seconds=900)
        root = run(["docker", "info", "--format", "{{.DockerRootDir}}"], timeout_seconds=60).strip()
        run(["docker", "compose", "version"], timeout_seconds=60)
        built = "web4lora-packager" in run(["docker", "images", "--format", "{{.Repository}}"]).split()
    except (Web4Error, OSError) as error:
        pytest.skip(f"{_NOT_TESTED}: no Docker Engine with Compose can be had here: {error}")
    needed = _RUN_BYTES if built else _IMAGES_BYTES
    free = shutil.disk_usage(root).free if Path(root).exists() else needed  # Docker Desktop's is in a VM
    if free < needed:
        pytest.skip(f"{_NOT_TESTED}: it needs {needed / 1e9:.0f} GB of disk, {free / 1e9:.0f} are free")


class ComposeStack:
    """The stack of `compose.yaml`, with ports and a project of its own.

    It starts as on a fresh clone, with no file of secrets. `take_secrets` then makes .env and .secrets out of
    what the stack has made, as people do who want programs on this machine to reach it.

    Args:
        folder: Where its .env, secrets and the trainer's state go.
        project: Name of the Compose project.

    Attributes:
        env_file: What Compose is given: the ports alone, then .env.
        model_port: The first port of models that its llama-server serves.
    """

    def __init__(self, folder: Path, project: str) -> None:
        self.folder = folder
        self.project = project
        self.env_file = folder / "ports.env"
        self.env_file.touch()
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

    def take_secrets(self) -> None:
        """Make .env and .secrets with the secrets that the stack has, and go on with them."""
        make_env = [sys.executable, ROOT / "docker" / "make-env", "--folder", self.folder]
        run([*make_env, "--project", self.project], timeout_seconds=_CALL_SECONDS)
        set_before = dict(
            line.split("=", 1) for line in self.env_file.read_text(encoding="utf-8").splitlines()
        )
        self.env_file = self.folder / ".env"
        self.set(**set_before)

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
        self._build("postgres", IMAGES)
        self._build("chromium", IMAGES)
        if os.environ.get(WANTED) != "all":
            self._take_ready_llama_cpp()
        self.compose("build", timeout_seconds=_BUILD_SECONDS)
        build("grpcurl", _silent)
        self._build("ollama", build("ollama", _silent).parent)

    def _take_ready_llama_cpp(self) -> None:
        """Let the images take the llama.cpp that this machine has compiled from the same source.

        It runs in Debian 12 when what compiled it has no newer C library; else the images compile.
        """
        llama = find(load(Settings).cache)
        if llama is None or _libc() > _IMAGES_LIBC:
            return
        ready = self.folder / "llama.cpp"
        run([sys.executable, ROOT / "docker" / "copy_llama_cpp.py", load(Settings).cache, ready])
        self._build("llama-cpp", ready)
        self.set(LLAMA_CPP_IMAGE="web4lora-test-llama-cpp")

    def _build(self, name: str, context: Path) -> None:
        """Build one of the tests' own images."""
        self.docker("build", "--quiet", "--tag", f"web4lora-test-{name}", "--file",
                    str(IMAGES / f"{name}.Dockerfile"), str(context))  # fmt: skip

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
        """Stop the trainer, remove containers and volumes; images stay.

        In CI what later builds have replaced goes: every change of the packager leaves 5 GB.
        """
        self.web4lora("trainer", "stop", ok=False)
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "10")
        if os.environ.get("CI") == "true":
            self.docker("image", "prune", "--force")
            self.docker("builder", "prune", "--force", "--keep-storage", _BUILDER_CACHE)

    def _env(self) -> dict[str, str]:
        """Return our environment without what would win over the stack's .env."""
        return {name: value for name, value in os.environ.items() if not name.startswith("WEB4LORA_")} | {
            name: os.environ[name] for name in ("WEB4LORA_CACHE",) if name in os.environ
        }


def _libc() -> tuple[int, ...]:
    """Return the version of this machine's C library; a very high one when it isn't glibc."""
    name, version = platform.libc_ver()
    return tuple(int(part) for part in version.split(".")) if name == "glibc" else (99,)


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
