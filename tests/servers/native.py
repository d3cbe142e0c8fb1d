"""The native stack under a home and ports of its own, driven by the command as a person would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import psutil
from web4lora_chassis.rpc import channel
from web4lora_chassis.settings import Settings

SERVICES = ("trainer", "packager", "deployer", "gateway")
_CALL_SECONDS = 900.0


class Machine:
    """A home and ports of its own.

    Args:
        root: The folder in which commands run; the home lies in it.

    Attributes:
        home: The stack's state.
        env: The environment of its commands.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "home"
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("WEB4LORA_")}
        for name in ("CACHE", "LLAMA_CPP", "LLAMA_CPP_SOURCE"):
            if value := os.environ.get(f"WEB4LORA_{name}"):
                self.env[f"WEB4LORA_{name}"] = value
        self.env["WEB4LORA_HOME"] = str(self.home)
        for name, port in zip(SERVICES, _free_ports(len(SERVICES)), strict=True):
            self.env[f"WEB4LORA_{name.upper()}_ADDRESS"] = f"127.0.0.1:{port}"

    def address(self, service: str) -> str:
        """Return where a service listens."""
        return self.env[f"WEB4LORA_{service.upper()}_ADDRESS"]

    def channel(self, service: str) -> grpc.Channel:
        """Return a connection to a service, with the stack's token."""
        return channel(self.address(service), Settings(home=self.home))

    def command(self, *words: str) -> list[str]:
        """Return a `web4lora` command."""
        return [sys.executable, "-m", "web4lora", *words]

    def run(self, *words: str, code: int = 0) -> str:
        """Run a command to its end and return what it printed; its exit code must be `code`."""
        done = subprocess.run(
            self.command(*words), cwd=self.root, env=self.env, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=_CALL_SECONDS, check=False,
        )  # fmt: skip
        text = done.stdout + done.stderr
        assert done.returncode == code, text
        assert "Traceback" not in text
        return text

    def process(self, name: str) -> psutil.Process | None:
        """Return a service's process, if it was started."""
        noted = self.home / "run" / f"{name}.json"
        if not noted.exists():
            return None
        return psutil.Process(json.loads(noted.read_text("utf-8"))["pid"])

    def left_over(self) -> list[list[str]]:
        """Return the command lines of processes that still run on this home."""
        found = []
        for process in psutil.process_iter():
            try:
                told = process.environ().get("WEB4LORA_HOME") == str(self.home)
                ours = told or any(str(self.home) in word for word in process.cmdline())
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.cmdline())
            except psutil.Error:
                continue
        return found


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
