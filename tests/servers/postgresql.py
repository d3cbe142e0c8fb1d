"""PostgreSQL as this machine has it, started on a free loopback port with a data folder of its own."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa

from tests.servers.fixtures import NOT_BUILT, free_port, missing

_PLACES = (*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), Path("/opt/homebrew/bin"))


def find_program(name: str) -> Path | None:
    """Return a program of PostgreSQL, or None."""
    found = shutil.which(name, path=os.pathsep.join([*map(str, _PLACES), os.environ.get("PATH", "")]))
    return Path(found) if found else None


@dataclass(frozen=True)
class Server:
    """A server that can be killed and stopped.

    Attributes:
        address: Of its database.
        data: Its folder.
        start: Starts it.
    """

    address: str
    data: Path
    start: Callable[[], None]

    def signal(self, number: int) -> None:
        """Send a signal to the server and to the processes of its connections."""
        first = psutil.Process(int((self.data / "postmaster.pid").read_text().split()[0]))
        processes = [first, *first.children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        if number == signal.SIGKILL:
            psutil.wait_procs(processes, timeout=30)


@contextmanager
def running() -> Iterator[str]:
    """Run a server until the block ends; yields the address of its database."""
    with server() as made:
        yield made.address


@contextmanager
def server() -> Iterator[Server]:
    """Run a server that can be killed, until the block ends."""
    initdb, pg_ctl = find_program("initdb"), find_program("pg_ctl")
    if not initdb or not pg_ctl:
        missing(f"postgresql{NOT_BUILT}: install it with the system's package manager")
    account = None
    if os.geteuid() == 0:  # it refuses to run as root
        try:
            account = pwd.getpwnam("postgres")
        except KeyError:
            missing(f"postgresql{NOT_BUILT}: as root it needs an account `postgres`")
    data, port = Path(tempfile.mkdtemp(prefix="postgresql-")), free_port()
    as_user: list[str] = []
    if account is not None:
        # By a program, not by subprocess: that would fork, which gRPC's threads here don't survive.
        as_user = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
        os.chown(data, account.pw_uid, account.pw_gid)

    def run(*command: str | Path) -> None:
        line = [*as_user, *command]
        done = subprocess.run(line, cwd=data, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command[0]}: {done.stdout}{done.stderr}"

    def stop() -> None:
        if (data / "postmaster.pid").exists():
            run(pg_ctl, "-D", data, "-m", "immediate", "-w", "stop")

    def start() -> None:
        options = f"-c listen_addresses=127.0.0.1 -p {port} -k {data} -c max_connections=200"
        run(pg_ctl, "-D", data, "-o", options, "-l", data / "log", "-w", "start")

    try:
        run(initdb, "-D", data, "-A", "trust", "-U", "web4lora", "-E", "UTF8", "--locale=C", "--no-sync")
        start()
        yield Server(f"postgresql://web4lora@127.0.0.1:{port}/postgres", data, start)
    finally:
        stop()
        shutil.rmtree(data)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    with running() as address:
        yield address


@pytest.fixture
def postgresql(postgresql_server: str) -> Iterator[str]:
    """The address of an empty database of the test's own."""
    name = f"test_{secrets.token_hex(6)}"
    server = sa.create_engine(
        sa.make_url(postgresql_server).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT"
    )
    with server.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    yield postgresql_server.removesuffix("postgres") + name
    with server.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()
