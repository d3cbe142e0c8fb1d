"""The real OCI registry (CNCF Distribution), on a free loopback port: open, or asking for a login."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from tests.servers.fixtures import free_port, program, started

USER, PASSWORD = "atlas", "sesame"
_HTPASSWD = f"{USER}:$2b$05$abcdefghijklmnopqrstuuKcS.CYWVYVaLiiCKrrc0A5s3mGesJ9O\n"  # bcrypt of PASSWORD


@dataclass(frozen=True)
class RegistryServer:
    """A running registry.

    Attributes:
        host: Its host and port.
        root: Where it keeps its blobs.
        auth: User and password, for a registry that asks for them.
    """

    host: str
    root: Path
    auth: tuple[str, str] | None = None

    def digest(self, repository: str, tag: str) -> str:
        """Return the digest of what a tag stands for; empty when there is no such tag."""
        answer = httpx2.head(
            f"http://{self.host}/v2/{repository}/manifests/{tag}",
            headers={"Accept": "application/vnd.oci.image.manifest.v1+json"},
            auth=self.auth,
        )
        return str(answer.headers.get("Docker-Content-Digest", "")) if answer.is_success else ""


@contextmanager
def registry_server(folder: Path, auth: dict[str, object] | None = None) -> Iterator[RegistryServer]:
    """Run a registry until the block ends.

    Args:
        folder: Its own folder.
        auth: The section "auth" of its configuration; None lets everybody in.
    """
    port = free_port()
    config: dict[str, object] = {
        "version": 0.1,
        "log": {"accesslog": {"disabled": False}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        # "/" answers everybody; the API itself may ask for a login
        "http": {"addr": f"127.0.0.1:{port}", "secret": secrets.token_hex(16)},
    }
    if auth:
        config["auth"] = auth
    (folder / "config.yml").write_text(json.dumps(config), "utf-8")  # JSON is YAML
    command = [program("registry"), "serve", folder / "config.yml"]
    with started(command, f"http://127.0.0.1:{port}/", folder, {"OTEL_TRACES_EXPORTER": "none"}):
        login = (USER, PASSWORD) if auth and "htpasswd" in auth else None
        yield RegistryServer(f"localhost:{port}", folder / "data", login)


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """A registry of the session's own that lets everybody in."""
    with registry_server(tmp_path_factory.mktemp("registry")) as server:
        yield server


@pytest.fixture
def private_registry(tmp_path: Path) -> Iterator[RegistryServer]:
    """A registry that asks for a user and a password."""
    folder = tmp_path / "private-registry"
    folder.mkdir()
    (folder / "htpasswd").write_text(_HTPASSWD, "utf-8")
    auth: dict[str, object] = {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}
    with registry_server(folder, auth) as server:
        yield server
