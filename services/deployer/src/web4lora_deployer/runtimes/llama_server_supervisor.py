"""Keeps one llama-server process for each deployment that wants one: starts, watches, restarts, stops.

It reads the wishes from the records again and again and makes them so: after a crash, of a server or of the
whole service, nothing has to be remembered but what is on disk. Each server has a thread of its own; a server
that dies is started again after a pause that doubles from half a second to half a minute.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx2
import psutil
from web4lora_chassis.errors import FailedPrecondition, Unavailable, Web4Error
from web4lora_llamacpp import LlamaCpp, LlamaServer, find_working

from web4lora_deployer.records.deployments import Deployment, Deployments
from web4lora_deployer.runtimes.base import State
from web4lora_deployer.runtimes.llama_server import TARGET, ServerStatus, StatusFiles, log_file
from web4lora_deployer.settings import DeployerSettings

log = logging.getLogger(__name__)

_TICK_SECONDS = 0.2
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
_STEADY_SECONDS = 60.0
_LOAD_SECONDS = 600.0
_HEALTH_INTERVAL_SECONDS = 5.0
_HEALTH_TIMEOUT_SECONDS = 5.0
_HEALTH_FAILURES = 6
_LOG_LIMIT_BYTES = 16 << 20


class Supervisor:
    """Makes what the llama-server records want so, until it is stopped.

    Args:
        settings: Where the records lie, which address and ports to take.
    """

    def __init__(self, settings: DeployerSettings) -> None:
        self._settings = settings
        self._deployments = Deployments(settings.deployer_home)
        self._status = StatusFiles(settings.deployer_home)
        self._ports = _Ports(settings.llama_server_host, settings.llama_server_first_port)
        self._keepers: dict[str, _Keeper] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        """Begin; what the records want is started again."""
        for deployment_id in self._status.ids():
            status = self._status.read(deployment_id)
            if status is not None:
                self._ports.remember(deployment_id, status.port)
                # What a killed service wrote last is no longer so: its servers ended with it.
                self._status.write(deployment_id, replace(status, state=State.STARTING, detail="", pid=0))
        self._thread.start()

    def stop(self) -> None:
        """Stop every server. The records stay: the next start brings them back."""
        self._stopping.set()
        self._thread.join()
        for keeper in self._keepers.values():
            keeper.ask_to_stop()
        for keeper in self._keepers.values():
            keeper.join()
        self._keepers.clear()

    def _run(self) -> None:
        while not self._stopping.wait(_TICK_SECONDS):
            try:
                self._reconcile()
            except Web4Error as error:
                log.error("%s", error)
            except Exception:  # a record that can't be read must not end the others' care
                log.exception("defect while looking after the deployments")

    def _reconcile(self) -> None:
        """Start and stop servers so that they are what the records want."""
        records = {record.id: record for record in self._deployments.list() if record.target == TARGET}
        wanted = {deployment_id: record for deployment_id, record in records.items() if record.loaded}
        for deployment_id, keeper in list(self._keepers.items()):
            record = wanted.get(deployment_id)
            if not keeper.running:
                del self._keepers[deployment_id]
            elif record is None or record.generation != keeper.generation:
                keeper.ask_to_stop()
        for deployment_id in self._status.ids():
            if deployment_id in self._keepers:
                continue
            if deployment_id not in records:
                self._status.remove(deployment_id)
                self._ports.forget(deployment_id)
            elif deployment_id not in wanted:
                self._say_stopped(deployment_id)
        for deployment_id, record in wanted.items():
            if deployment_id not in self._keepers:
                self._keepers[deployment_id] = keeper = _Keeper(
                    record, self._deployments, self._settings, self._status, self._ports
                )
                keeper.start()

    def _say_stopped(self, deployment_id: str) -> None:
        """Say of what nobody wants and nothing serves that it is stopped: after a restart no keeper does."""
        status = self._status.read(deployment_id)
        if status is not None and status.state is not State.STOPPED:
            self._status.write(deployment_id, replace(status, state=State.STOPPED))


class _Ports:
    """Gives each deployment a port and, when it can, the same one again."""

    def __init__(self, host: str, first: int) -> None:
        self._host = host
        self._first = first
        self._taken: dict[str, int] = {}
        self._lock = threading.Lock()

    def remember(self, deployment_id: str, port: int) -> None:
        with self._lock:
            self._taken[deployment_id] = port

    def forget(self, deployment_id: str) -> None:
        with self._lock:
            self._taken.pop(deployment_id, None)

    def take(self, deployment_id: str) -> int:
        """Return the deployment's port if it is free, else the first free one that no other has."""
        with self._lock:
            others = {port for other, port in self._taken.items() if other != deployment_id}
            before = self._taken.get(deployment_id, 0)
            candidates: list[int] = [*([before] if before else []), *range(self._first, 1 << 16)]
            for port in candidates:
                if port not in others and self._free(port):
                    self._taken[deployment_id] = port
                    return port
        raise FailedPrecondition(
            f"No port from {self._first} up is free on {self._host}.",
            fix="Set WEB4LORA_LLAMA_SERVER_FIRST_PORT lower.",
        )

    def _free(self, port: int) -> bool:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self._host, port))
            except OSError:
                return False
        return True


class _Keeper:
    """Looks after the server of one deployment, in a thread of its own."""

    def __init__(
        self,
        record: Deployment,
        deployments: Deployments,
        settings: DeployerSettings,
        status: StatusFiles,
        ports: _Ports,
    ) -> None:
        self.generation = record.generation
        self._record = record
        self._deployments = deployments
        self._settings = settings
        self._files = status
        self._ports = ports
        self._log = log_file(settings.deployer_home, record.id)
        self._status = ServerStatus(generation=record.generation)
        self._loading: LlamaServer | None = None
        self._ready_at = self._fine_at = 0.0  # since when it has served, and until when without a fault
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"llama-server {record.id}", daemon=True)

    def start(self) -> None:
        """Begin to look after it."""
        self._say(State.STARTING, "")
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Let the server end; `join` waits for it."""
        self._stop.set()
        loading = self._loading
        if loading is not None:  # its thread waits for the model and doesn't look
            loading.stop()

    def join(self) -> None:
        """Wait until the server has ended."""
        self._thread.join()

    @property
    def running(self) -> bool:
        """True until the server has ended for good."""
        return self._thread.is_alive()

    def _run(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while not self._stop.is_set():
            self._ready_at = self._fine_at = time.monotonic()
            try:
                state, why = State.STARTING, self._serve_once()
            except Web4Error as error:
                state, why = State.FAILED, error.message
            except Exception as error:  # said where people look, logged, and tried again
                log.exception("%s: defect", self._record.id)
                state, why = State.FAILED, f"{type(error).__name__}: {error}"
            if self._stop.is_set():
                break
            if self._fine_at - self._ready_at > _STEADY_SECONDS:
                pause = _FIRST_PAUSE_SECONDS
            failed = state is State.FAILED
            self._status = replace(
                self._status,
                pid=0,
                failures=self._status.failures + 1 if failed else 0,
                crashes=self._status.crashes + 1,
            )
            log.warning("%s: %s; it is started again in %.1f s", self._record.id, why, pause)
            self._say(state, f"{why}; it is started again in {pause:g} s")
            self._stop.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        self._status = replace(self._status, pid=0)
        self._say(State.STOPPED, "")

    def _serve_once(self) -> str:
        """Run the server until it dies or is not wanted any more; return why it ended.

        Raises:
            Web4Error: It did not get as far as serving.
        """
        llama = self._llama()
        _trim(self._log)
        port = self._ports.take(self._record.id)
        scales = self._deployments.scales(self._record)
        server = LlamaServer(
            llama,
            self._deployments.path(self._record),
            host=self._settings.llama_server_host,
            port=port,
            context_tokens=self._record.context_tokens,
            parallel=self._record.parallel,
            log_file=self._log,
            alias=self._record.model,
            adapters=[
                (self._deployments.models / adapter.file, scales[adapter.name])
                for adapter in self._record.adapters
            ],
            # Of requests that name none; llama-server's own default would be 0.8.
            options=("--temp", f"{self._record.parameters.temperature:g}"),
        )
        with server:
            self._loading = server
            try:
                server.wait_ready(_LOAD_SECONDS)
            except Web4Error:
                if self._stop.is_set():
                    return "it was not wanted any more"
                raise
            finally:
                self._loading = None
            self._status = replace(
                self._status,
                endpoint=server.endpoint,
                port=port,
                pid=server.pid,
                started_at=_started_at(server.pid),
                version=llama.version,
                failures=0,
                scales=scales,
            )
            while not self._scaled(server) and server.alive and not self._stop.wait(_TICK_SECONDS):
                pass  # other scales were asked for while it was loading, and it is busy already
            self._say(State.SERVING, "")
            return self._watch(server)

    def _watch(self, server: LlamaServer) -> str:
        """Return once the server has died, hangs or is not wanted any more; say which."""
        failures = 0
        asked_at = self._ready_at = self._fine_at = time.monotonic()
        while not self._stop.wait(_TICK_SECONDS):
            if not server.alive:
                return f"llama-server {server.ending}"
            if failures == 0:
                self._fine_at = time.monotonic()
            self._scaled(server)
            if self._status.crashes and self._fine_at - self._ready_at > _STEADY_SECONDS:
                self._status = replace(self._status, crashes=0)
                self._say(State.SERVING, "")
            if time.monotonic() - asked_at < _HEALTH_INTERVAL_SECONDS:
                continue
            asked_at = time.monotonic()
            failures = 0 if _answers(server.endpoint) else failures + 1
            if failures >= _HEALTH_FAILURES:
                return f"llama-server did not answer {failures} times in a row"
        return "it was not wanted any more"

    def _scaled(self, server: LlamaServer) -> bool:
        """Let the server apply its adapters as strongly as was last asked for; say whether it does.

        Nobody else tells it: so what was asked for last is what it applies at last.
        """
        wanted = self._deployments.scales(self._record) if self._record.adapters else {}
        if wanted != self._status.scales:
            try:
                server.set_adapters(list(wanted.values()))
            except Unavailable as error:  # tried again at the next look
                log.warning("%s: %s", self._record.id, error.message)
                return False
            self._status = replace(self._status, scales=wanted)
            self._files.write(self._record.id, self._status)
        return True

    def _llama(self) -> LlamaCpp:
        """Return the tools, which the job that asked for the deployment has built.

        They are tested once more when this is another machine now, or another kernel.
        """
        llama = find_working(self._settings.cache)
        if llama is None:
            raise FailedPrecondition(
                "llama.cpp is not built any more.",
                fix="Deploy again, which builds it, or run `python -m web4lora_llamacpp build`.",
            )
        return llama

    def _say(self, state: State, detail: str) -> None:
        """Write down where it stands."""
        self._status = replace(self._status, state=state, detail=detail)
        self._files.write(self._record.id, self._status)


def _answers(endpoint: str) -> bool:
    """Say whether a server's health check succeeds."""
    try:
        answer = httpx2.get(
            endpoint.removesuffix("/v1") + "/health",
            timeout=_HEALTH_TIMEOUT_SECONDS,
            trust_env=False,  # proxies of the environment are for the outside world
        )
    except httpx2.HTTPError:
        return False
    return answer.status_code == httpx2.codes.OK


def _started_at(pid: int) -> float:
    """Return when a process was started; 0 when it is gone already."""
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return 0.0


def _trim(path: Path) -> None:
    """Put a log that has grown large aside, in place of the one put aside before."""
    if path.is_file() and path.stat().st_size > _LOG_LIMIT_BYTES:
        path.replace(path.with_suffix(".1.log"))
