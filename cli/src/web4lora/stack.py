"""The native stack: gateway, trainer, packager and deployer as processes of this machine."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from web4lora_chassis import process
from web4lora_chassis.artifacts import open_store
from web4lora_chassis.environment import HUB_TOKEN, STORE_KEY, environment
from web4lora_chassis.errors import FailedPrecondition, Unauthenticated, Unavailable
from web4lora_chassis.rpc import channel
from web4lora_chassis.settings import ENV_FILE, PREFIX, Settings, make_native_tokens, make_private

from web4lora.client import Client

SERVICES = ("trainer", "packager", "deployer", "gateway")
"""In the order in which they start; they stop in the reverse order, so nothing is asked of what is gone."""

_ALL_SECRETS = (f"{PREFIX}TOKEN*", *STORE_KEY, ENV_FILE)
_SECRETS = {
    "trainer": (f"{PREFIX}TRAINER_TOKEN*", *HUB_TOKEN),
    "packager": (f"{PREFIX}PACKAGER_TOKEN*",),
    "deployer": (f"{PREFIX}DEPLOYER_TOKEN*",),
    "gateway": (f"{PREFIX}*_TOKEN*", f"{PREFIX}DATABASE*"),
}
"""Variables with secrets that a service needs; the others stay with the command."""

_START_SECONDS = 90.0
_STOP_SECONDS = 15.0
_CALL_SECONDS = 2.0
_POLL_SECONDS = 0.1
_SAME_START_SECONDS = 2.0
_LOG_LIMIT_BYTES = 16 << 20
_LOG_TAIL_BYTES = 4096
_OTHER_ADDRESSES = (
    "Stop that one with `web4lora down` in its folder, or give this one other addresses: "
    f"{PREFIX}GATEWAY_ADDRESS=127.0.0.1:PORT and so on."
)

Report = Callable[[str, str], None]
"""Called with a service's name and what became of it: "started", "already up", "stopped", "not running"."""


@dataclass(frozen=True)
class Service:
    """One service of the stack on this machine.

    Attributes:
        name: trainer, packager, deployer or gateway.
        address: Where it listens.
        log_file: Where its output goes.
        pid_file: Where its process is noted.
    """

    name: str
    address: str
    log_file: Path
    pid_file: Path

    @property
    def full_name(self) -> str:
        """Its name in the contract."""
        return f"web4.lora.v1.{self.name.capitalize()}Service"


def service(name: str, settings: Settings) -> Service:
    """Return a service of the settings' stack."""
    return Service(
        name=name,
        address=str(getattr(settings, f"{name}_address")),
        log_file=settings.home / "logs" / f"{name}.log",
        pid_file=settings.home / "run" / f"{name}.json",
    )


class Stack:
    """Starts and stops the services; safe to use from two commands at once.

    Args:
        settings: Addresses and the home folder.
        outputs: Where a gateway started here puts the runs' folders.
    """

    def __init__(self, settings: Settings, outputs: Path) -> None:
        self._settings = settings
        self._outputs = outputs
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self.services = tuple(service(name, settings) for name in SERVICES)

    def up(self, report: Report, names: Iterable[str] = SERVICES) -> list[str]:
        """Start what is not up yet, and wait until it answers.

        Args:
            report: Told of each service.
            names: Just these services.

        Returns:
            The names of the services that this call started.

        Raises:
            InvalidInput: The store's address is none.
            FailedPrecondition: A port is taken by another program, a service's package is not installed, or a
                service ended as soon as it was started. What this call started is stopped again.
        """
        started: list[str] = []
        open_store(self._settings)  # an address that is none is told before anything is there
        make_private(self._settings.home)
        make_native_tokens(self._settings)
        with self._lock():
            try:
                waiting = []
                for each in [each for each in self.services if each.name in set(names)]:
                    if self.serving(each):
                        self._require_ours(each)
                        report(each.name, "already up")
                        continue
                    if self.process(each) is None:
                        self._start(each)
                        started.append(each.name)
                    waiting.append(each)
                for each in waiting:
                    self._wait(each)
                    report(each.name, "started")
            except BaseException:
                self._stop(started, _say_nothing)
                raise
        return started

    def down(self, report: Report, names: Iterable[str] = SERVICES) -> list[str]:
        """Stop services of this stack; jobs at work go on at the next start.

        Returns:
            The names of those that were stopped.
        """
        with self._lock():
            return self._stop(list(names), report)

    def serving(self, each: Service, timeout_seconds: float = _CALL_SECONDS) -> bool:
        """True when the service answers at its address and says it serves."""
        if not _listens(each.address):
            return False
        with channel(each.address, self._settings) as line:
            request = health_pb2.HealthCheckRequest(service=each.full_name)
            try:
                answer = health_pb2_grpc.HealthStub(line).Check(  # type: ignore[attr-defined]
                    request, timeout=timeout_seconds
                )
            except grpc.RpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def process(self, each: Service) -> psutil.Process | None:
        """Return the process that this stack started for a service, while it lives."""
        if (child := self._children.get(each.name)) is not None:
            child.poll()  # takes note of its end
        try:
            noted = json.loads(each.pid_file.read_text(encoding="utf-8"))
            found = psutil.Process(int(noted["pid"]))
            same = abs(found.create_time() - float(noted["started"])) < _SAME_START_SECONDS
            return found if same and found.status() != psutil.STATUS_ZOMBIE else None
        except (OSError, ValueError, KeyError, TypeError, psutil.Error):
            return None

    def _start(self, each: Service) -> None:
        if find_spec(f"web4lora_{each.name}") is None:
            raise FailedPrecondition(
                f"The package web4lora-{each.name} is not installed.",
                fix="`make setup` in the checkout installs every service.",
                reason="NOT_INSTALLED",
            )
        if owner := _listener(each.address):
            raise FailedPrecondition(
                f"{each.address} is taken by {owner}, so the {each.name} can't listen there.",
                fix=f"Stop it, or choose another: {PREFIX}{each.name.upper()}_ADDRESS=127.0.0.1:PORT.",
                reason="ADDRESS_IN_USE",
            )
        each.log_file.parent.mkdir(parents=True, exist_ok=True)
        each.pid_file.parent.mkdir(parents=True, exist_ok=True)
        if each.log_file.exists() and each.log_file.stat().st_size > _LOG_LIMIT_BYTES:
            each.log_file.replace(each.log_file.with_suffix(".log.1"))
        with each.log_file.open("ab") as log:
            child = process.start(
                [sys.executable, "-m", f"web4lora_{each.name}"],
                env=self._environment(each.name),
                stdout=log,
                new_session=True,
            )
        self._children[each.name] = child
        noted = {"pid": child.pid, "started": psutil.Process(child.pid).create_time()}
        each.pid_file.write_text(json.dumps(noted), encoding="utf-8")

    def _require_ours(self, each: Service) -> None:
        """Refuse a gateway that was started for another home: its runs and artifacts are others.

        Raises:
            FailedPrecondition: It keeps its artifacts in another folder than this stack.
        """
        ours = self._settings.store
        if each.name != "gateway" or self.process(each) is not None or not ours.startswith("file:"):
            return
        try:
            with Client(self._settings) as client:
                theirs = client.info().store
        except Unauthenticated as error:
            raise FailedPrecondition(
                f"The gateway at {each.address} belongs to another stack: it does not take this one's token.",
                fix=_OTHER_ADDRESSES,
                reason="ANOTHER_STACK",
            ) from error
        if theirs != ours and theirs.startswith("file:"):
            raise FailedPrecondition(
                f"The gateway at {each.address} belongs to another stack: its artifacts lie in {theirs}, "
                f"this one's in {ours}.",
                fix=_OTHER_ADDRESSES,
                reason="ANOTHER_STACK",
            )

    def _environment(self, name: str) -> dict[str, str]:
        """Return a service's variables: its own secrets, this stack's folders, threads for our cores."""
        env = environment(*_SECRETS[name], *_ALL_SECRETS, ours=True)
        env[f"{PREFIX}HOME"] = str(self._settings.home)
        env.setdefault(f"{PREFIX}OUTPUTS", str(self._outputs))
        env.setdefault("OMP_NUM_THREADS", str(usable_cores()))
        env["PYTHONUNBUFFERED"] = "1"
        return env

    def _wait(self, each: Service) -> None:
        """Wait until a service answers.

        Raises:
            FailedPrecondition: It ended; the message holds its last words.
            Unavailable: It does not answer in time.
        """
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self.serving(each, timeout_seconds=0.5):
                return
            if self.process(each) is None:
                child = self._children.get(each.name)
                code = child.poll() if child is not None else None
                outcome = process.ending(code) if code and code < 0 else "ended"
                raise FailedPrecondition(
                    f"The {each.name} {outcome} as soon as it was started: {_last_words(each.log_file)}",
                    fix=f"Its log has the details: {each.log_file}",
                    reason="SERVICE_DIED",
                )
            time.sleep(_POLL_SECONDS)
        raise Unavailable(
            f"The {each.name} does not answer at {each.address} after {_START_SECONDS:.0f} s.",
            fix=f"Its log may say why: {each.log_file}",
        )

    def _stop(self, names: list[str], report: Report) -> list[str]:
        """Stop the gateway first, so that it takes nothing for a failure, then the others at once."""
        stopped = []
        chosen = [each for each in reversed(self.services) if each.name in names]
        for group in ([each for each in chosen if each.name == "gateway"],
                      [each for each in chosen if each.name != "gateway"]):  # fmt: skip
            running = {each.name: self.process(each) for each in group}
            for found in running.values():
                if found is not None:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        found.terminate()
            for each in group:
                if (found := running[each.name]) is not None:
                    _await_end(found)
                    stopped.append(each.name)
                each.pid_file.unlink(missing_ok=True)
                report(each.name, "stopped" if found else "not running")
        return stopped

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Let one command at a time start and stop things."""
        folder = self._settings.home / "run"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _say_nothing(name: str, what: str) -> None:
    """Take a report that nobody reads."""
    del name, what


def usable_cores() -> int:
    """Return the cores that computing may use: those this process may run on, hyper-threads not counted."""
    logical = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(logical, psutil.cpu_count(logical=False) or logical))


def _await_end(ending: psutil.Process) -> None:
    """Wait for a process that was asked to end; kill it and what is left of its session when it does not."""
    if not _ended(ending):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(ending.pid, signal.SIGKILL)
        if not _ended(ending):
            raise Unavailable(
                f"Process {ending.pid} does not end, although it was killed.", fix="Try again in a minute."
            )


def _ended(ending: psutil.Process) -> bool:
    """Wait for a process to end; one that its parent has not taken note of has ended too."""
    deadline = time.monotonic() + _STOP_SECONDS
    with contextlib.suppress(psutil.NoSuchProcess):
        while ending.is_running() and ending.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
    return True


def _listens(address: str) -> bool:
    """True when something accepts connections at an address."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]") or "127.0.0.1", int(port)), timeout=_CALL_SECONDS):
            return True
    except OSError:
        return False


def _listener(address: str) -> str:
    """Return who listens at an address, for people; empty when nobody does."""
    if not _listens(address):
        return ""
    port = int(address.rpartition(":")[2])
    with contextlib.suppress(psutil.Error):  # macOS tells only the superuser
        for connection in psutil.net_connections(kind="tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,)
            if listens and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    return "another program"


def _last_words(log_file: Path) -> str:
    """Return a log's last line, with the line above that an indented one belongs to."""
    with contextlib.suppress(OSError):
        with log_file.open("rb") as file:
            file.seek(max(0, log_file.stat().st_size - _LOG_TAIL_BYTES))
            rows = [row for row in file.read().decode("utf-8", errors="replace").splitlines() if row.strip()]
        words: list[str] = []
        for row in reversed(rows):
            words.insert(0, row.strip())
            if not row[0].isspace():
                break
        if words:
            return " ".join(words)
    return "it said nothing."
