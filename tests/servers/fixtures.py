"""Fixtures that start the built servers on free loopback ports and stop them.

A server that is not built skips its tests, by name, in the summary; with CI=true it fails them.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import urllib3
from minio import Minio
from minio.error import S3Error
from web4lora_chassis.process import start

from tests.servers.build import find

NOT_BUILT = " is not built"
"""What the reason of a skipped test says behind the name of the server that it wants."""

_READY_SECONDS = 60.0
_STOP_SECONDS = 10.0


def program(name: str) -> Path:
    """Return a server's program, or skip the test; in CI, fail it."""
    found = find(name)
    if not found or not found.is_file():
        missing(f"{name}{NOT_BUILT}: python tests/servers/build.py {name}")
    return found


def missing(why: str) -> NoReturn:
    """Skip a test whose server is not there; in CI, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


def free_port() -> int:
    """Return a port of the loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(
    command: list[str | Path], ready_url: str, folder: Path, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends; the block begins once `ready_url` answers 200.

    Raises:
        RuntimeError: It ended or did not get ready; the message ends with its last words.
    """
    log_path = folder / "server.log"
    with log_path.open("ab") as log:
        server = start(command, cwd=folder, env={**os.environ, **(env or {})}, stdout=log, new_session=True)
    try:
        deadline = time.monotonic() + _READY_SECONDS
        while not _answers(ready_url):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not get ready:\n{log_path.read_text()[-2000:]}")
            time.sleep(0.05)
        yield server
    finally:
        server.terminate()
        try:
            server.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _answers(url: str) -> bool:
    try:
        return urllib3.request("GET", url, timeout=1.0, retries=False).status == 200
    except urllib3.exceptions.HTTPError:
        return False


@dataclass(frozen=True)
class MinioServer:
    """A running MinIO.

    Attributes:
        endpoint: Host and port.
        access_key: Its root user.
        secret_key: Its root password.
    """

    endpoint: str
    access_key: str
    secret_key: str

    @property
    def client(self) -> Minio:
        return Minio(
            self.endpoint,
            self.access_key,
            self.secret_key,
            secure=False,
            region="us-east-1",
            http_client=urllib3.PoolManager(retries=False, timeout=30.0),
        )

    def wait(self) -> None:
        """Wait until it takes calls: for a moment it is alive and answers 503."""
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            try:
                self.client.list_buckets()
                return
            except S3Error:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


@pytest.fixture(scope="session")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MinioServer]:
    """A MinIO of the session's own."""
    command = program("minio")
    folder = tmp_path_factory.mktemp("minio")
    port = free_port()
    server = MinioServer(f"127.0.0.1:{port}", f"user{secrets.token_hex(4)}", secrets.token_hex(16))
    env = {
        "HOME": str(folder),
        "MINIO_ROOT_USER": server.access_key,
        "MINIO_ROOT_PASSWORD": server.secret_key,
        "MINIO_BROWSER": "off",
        "MINIO_UPDATE": "off",
    }
    arguments = ["server", folder / "data", "--address", server.endpoint, "--quiet"]
    with started([command, *arguments], f"http://{server.endpoint}/minio/health/live", folder, env):
        server.wait()
        yield server


@pytest.fixture
def bucket(minio: MinioServer) -> Iterator[str]:
    """A bucket of the test's own."""
    name = f"test-{secrets.token_hex(6)}"
    minio.client.make_bucket(name)
    yield name
    for found in minio.client.list_objects(name, recursive=True):
        minio.client.remove_object(name, found.object_name)


class Proxy:
    """A Toxiproxy of its own in front of a server, that can break, slow or stall the connections through it.

    Toxiproxy's control port hangs for good when a toxic comes to or goes from a connection whose receiver
    does not read (github.com/Shopify/toxiproxy/issues/558), as in a progress callback. So toxics are added
    only where nothing waits to be read; to cut and to stall, the process itself is ended or stopped, and to
    heal is to start another on the same port.

    Args:
        upstream: Host and port of the server.
        folder: Where the log goes.

    Attributes:
        address: Where to connect instead of the server.
    """

    def __init__(self, upstream: str, folder: Path) -> None:
        self._upstream = upstream
        self._folder = folder
        self.address = f"127.0.0.1:{free_port()}"
        self._start()

    def _start(self) -> None:
        port = free_port()
        self._api = f"http://127.0.0.1:{port}"
        command = [program("toxiproxy"), "-host", "127.0.0.1", "-port", str(port), "-proxy-metrics"]
        self._running = ExitStack()
        self._process = self._running.enter_context(started(command, f"{self._api}/version", self._folder))
        self._call("/proxies", {"name": "line", "listen": self.address, "upstream": self._upstream})

    def cut(self) -> None:
        """Break all connections and refuse new ones."""
        self._process.kill()
        self._running.close()

    def stall(self) -> None:
        """Let no byte through any more, in either direction; connections stay open."""
        self._process.send_signal(signal.SIGSTOP)

    def cut_after(self, size_bytes: int, stream: str) -> None:
        """Break each new connection after so many bytes of a stream: "upstream" or "downstream"."""
        self._toxic("limit_data", stream, {"bytes": size_bytes})

    def slow(self, kilobytes_per_second: int, stream: str) -> None:
        """Let a stream of new connections through slowly."""
        self._toxic("bandwidth", stream, {"rate": kilobytes_per_second})

    def heal(self) -> None:
        """Let everything through again, over new connections."""
        self.cut()
        self._start()

    def received_bytes(self, stream: str = "upstream") -> int:
        """Return how many bytes of a stream came since it was made or healed; breaks all connections.

        The proxy adds a connection's bytes up when it ends.
        """
        self._call("/proxies/line", {"enabled": False})
        before, now = -1, self._counted(stream)
        while now != before:
            time.sleep(0.1)
            before, now = now, self._counted(stream)
        self._call("/proxies/line", {"enabled": True})
        return now

    def _counted(self, stream: str) -> int:
        text = urllib3.request("GET", f"{self._api}/metrics").data.decode()
        for line in text.splitlines():
            if line.startswith("toxiproxy_proxy_received_bytes_total") and f'="{stream}"' in line:
                return int(float(line.rsplit(" ", 1)[1]))
        return 0

    def _toxic(self, kind: str, stream: str, attributes: Mapping[str, int]) -> None:
        self._call("/proxies/line/toxics", {"type": kind, "stream": stream, "attributes": attributes})

    def _call(self, path: str, body: Mapping[str, Any]) -> None:
        answer = urllib3.request("POST", self._api + path, json=body, timeout=30.0)
        if answer.status >= 400:
            raise RuntimeError(f"toxiproxy: {path}: {answer.data.decode()}")


MakeProxy = Callable[[str], Proxy]


@pytest.fixture
def toxiproxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeProxy]:
    """Makes proxies in front of servers (host and port); closes them with the test."""
    with ExitStack() as proxies:

        def make(upstream: str) -> Proxy:
            proxy = Proxy(upstream, tmp_path_factory.mktemp("toxiproxy"))
            proxies.callback(proxy.cut)
            return proxy

        yield make


@pytest.fixture
def minio_proxy(minio: MinioServer, toxiproxy: MakeProxy) -> Proxy:
    """A proxy of the test's own in front of MinIO."""
    return toxiproxy(minio.endpoint)
