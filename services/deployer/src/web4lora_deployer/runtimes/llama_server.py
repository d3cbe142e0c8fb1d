"""llama-server as a runtime. The job says what is wanted, the supervisor in the service runs the process.

A deployment's record is the wish, `status/<id>.json` what became of it, written by the supervisor alone. So
the process outlives the job that asked for it, and a crash of either leaves what the other can go on from.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import web4lora_llamacpp
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, ResourceExhausted, Unavailable
from web4lora_chassis.jobs import Progress
from web4lora_chassis.jobs.record import write_json
from web4lora_chassis.model_files.gguf import read_gguf

from web4lora_deployer.prompts.gate import Served, prompts, require_same_prompts
from web4lora_deployer.records.deployments import Deployment, Deployments
from web4lora_deployer.records.names import file_name
from web4lora_deployer.runtimes.base import Deployed, Health, Report, RuntimeStatus, State
from web4lora_deployer.runtimes.http import prompt_tokens
from web4lora_deployer.runtimes.tokens import Tokenizer
from web4lora_deployer.settings import DeployerSettings

TARGET = "llama-server"
T = TypeVar("T")
_POLL_SECONDS = 0.1
_READY_SECONDS = 900.0
_STOP_SECONDS = 20.0
_SCALES_SECONDS = 20.0
_ANSWER_SECONDS = 300.0
_OVERHEAD_BYTES = 300 << 20
_MANY_CRASHES = 5  # some 8 s of pauses between them: whatever passes by itself has passed


@dataclass(frozen=True)
class ServerStatus:
    """What the supervisor made of one deployment.

    Attributes:
        generation: Of the record that it is about.
        state: Where it stands.
        detail: More, for people.
        endpoint: Base address of the API; empty before the first start.
        port: Its port, kept from start to start.
        pid: Of the process; 0 when there is none.
        started_at: When that process was started, in seconds since 1970: a later one may get its pid.
        version: Of llama.cpp.
        failures: Starts in a row that did not get as far as serving.
        crashes: Ends in a row, none of which had served for a while before.
        scales: How strongly it applies each of the adapters, by name.
    """

    generation: str = ""
    state: State = State.STARTING
    detail: str = ""
    endpoint: str = ""
    port: int = 0
    pid: int = 0
    started_at: float = 0.0
    version: str = ""
    failures: int = 0
    crashes: int = 0
    scales: dict[str, float] = field(default_factory=dict)


class StatusFiles:
    """The supervisor's side of the records: one file a deployment.

    Args:
        root: The deployer's folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root / "status"
        self._root.mkdir(parents=True, exist_ok=True)

    def read(self, deployment_id: str) -> ServerStatus | None:
        """Return a deployment's status; None when the supervisor has none."""
        try:
            data = json.loads((self._root / file_name(deployment_id)).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return ServerStatus(**{**data, "state": State(data["state"])})

    def write(self, deployment_id: str, status: ServerStatus) -> None:
        """Write a deployment's status."""
        write_json(self._root / file_name(deployment_id), asdict(status))

    def remove(self, deployment_id: str) -> None:
        """Forget a deployment's status."""
        (self._root / file_name(deployment_id)).unlink(missing_ok=True)

    def ids(self) -> list[str]:
        """Return the deployments that have a status."""
        return [path.name.removesuffix(".json").replace("@", ":") for path in self._root.glob("*@*.json")]


class LlamaServerRuntime:
    """See `Runtime`."""

    target = TARGET

    def __init__(self, settings: DeployerSettings) -> None:
        self._cache = settings.cache
        self._deployments = Deployments(settings.deployer_home)
        self._status = StatusFiles(settings.deployer_home)

    def probe(self) -> RuntimeStatus:
        """Look for a llama-server that is built."""
        llama = web4lora_llamacpp.find(self._cache)
        if llama is None:
            return RuntimeStatus(
                self.target,
                usable=True,
                address=str(self._cache),
                detail="not built yet: the first deployment builds it, in some 10 minutes",
            )
        return RuntimeStatus(self.target, usable=True, address=str(llama.server), version=llama.version)

    def deploy(self, deployment: Deployment, file: Path, report: Report) -> Deployed:
        """Say what is wanted and wait until the supervisor has made it so."""
        web4lora_llamacpp.ensure_built(self._cache, report)
        running = self._status.read(deployment.id)
        if running is None or running.state is not State.SERVING:
            beside = sum(adapter.size_bytes for adapter in deployment.adapters)
            require_memory(
                deployment.id, file, deployment.context_tokens, deployment.parallel, beside_bytes=beside
            )
        self._deployments.save(deployment)
        started = time.monotonic()

        def serving() -> Deployed | None:
            report(Progress(phase="load", message=f"llama-server loads {deployment.id}"))
            health = self.health(deployment)
            status = self._status.read(deployment.id)
            if health.state is State.FAILED and status is not None and status.failures > 1:
                raise FailedPrecondition(
                    f"llama-server can't serve {deployment.id}: {health.detail}",
                    fix=f"Its log has more: {log_file(self._deployments.models.parent, deployment.id)}",
                    reason="MODEL_NOT_SERVED",
                )
            return health.deployed if health.state is State.SERVING else None

        deployed = _wait(serving, _READY_SECONDS)
        if deployed is None:
            raise Unavailable(
                f"llama-server did not serve {deployment.id} within {time.monotonic() - started:.0f} s.",
                fix="Is the deployer still running? A smaller context_tokens loads faster.",
            )
        tokenizer = Tokenizer(deployed.endpoint.removesuffix("/v1"))
        records = [self._deployments.models / record for record in deployment.records]
        wanted = prompts(records, read_gguf(file), tokenizer, report)
        served = _served(deployed, tokenizer, deployment.context_tokens)
        require_same_prompts(deployment.id, wanted, tokenizer, served)
        return deployed

    def promote(self, deployment: Deployment) -> None:
        """Nothing to do: llama-server serves one model, and our own records know the name."""

    def withdraw(self, deployment: Deployment) -> None:
        """Nothing to do, see `promote`."""

    def health(self, deployment: Deployment) -> Health:
        """Return what the supervisor last wrote about this very record."""
        status = self._status.read(deployment.id)
        if status is None or status.generation != deployment.generation:
            return Health(State.STARTING if deployment.loaded else State.STOPPED)
        deployed = Deployed(status.endpoint, deployment.model, status.version) if status.endpoint else None
        broken = status.crashes >= _MANY_CRASHES
        detail = status.detail
        if broken:
            detail = f"llama-server ended {status.crashes} times in a row: {detail}".rstrip(": ")
        return Health(status.state, detail, deployed, broken)

    def await_scales(self, deployment: Deployment) -> None:
        """Wait until a server that serves applies its adapters as strongly as was last asked for.

        Raises:
            Unavailable: It does not take the scales in time.
        """

        def applied() -> bool | None:
            status = self._status.read(deployment.id)
            if status is None or (status.generation, status.state) != (deployment.generation, State.SERVING):
                return True  # it begins with them
            return status.scales == self._deployments.scales(deployment) or None

        if not _wait(applied, _SCALES_SECONDS):
            raise Unavailable(
                f"llama-server of {deployment.id} is busy: it has not taken the scales of its adapters yet.",
                fix="They are kept, and it gets them as soon as it takes them. Ask again to see when.",
                reason="ADAPTERS_NOT_SET",
            )

    def memory_bytes(self, deployment: Deployment) -> int:
        """Return the resident memory of the server's process, the mapped part of the file included."""
        status = self._status.read(deployment.id)
        process = process_of(status) if status else None
        return int(process.memory_info().rss) if process else 0

    def unload(self, deployment: Deployment) -> None:
        """Nothing to do: a supervised server keeps its model."""

    def restore(self, deployment: Deployment) -> None:
        """Nothing to do: the supervisor starts what the records want."""

    def delete(self, deployment: Deployment) -> None:
        """Stop the server; the record stays."""
        self.stop(deployment)

    def stop(self, deployment: Deployment) -> None:
        """Withdraw the wish and wait until the supervisor has stopped the server.

        Raises:
            Unavailable: It has not stopped in time.
        """
        for record in self._deployments.list():
            if (record.id, record.target) == (deployment.id, self.target) and record.loaded:
                self._deployments.save(replace(record, loaded=False))

        def stopped() -> bool | None:
            status = self._status.read(deployment.id)
            return status is None or (status.state is State.STOPPED and not status.pid) or None

        if not _wait(stopped, _STOP_SECONDS):
            raise Unavailable(f"llama-server of {deployment.id} has not stopped yet.", fix="Try again.")


def only_here(target: str) -> InvalidInput:
    """Return the error for adapters that another runtime was to take."""
    return InvalidInput(
        f"{target} takes no adapters: llama-server alone can switch between them.",
        fix="Use the target llama-server, or deploy a merged model.",
        reason="ADAPTERS_NOT_TAKEN",
        metadata={"field": "deploy.target"},
    )


def _served(deployed: Deployed, tokenizer: Tokenizer, context_tokens: int) -> Served:
    """Return how a llama-server tells of its prompts."""

    def count(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> int:
        return prompt_tokens(TARGET, deployed.endpoint, deployed.model, messages, tools, _ANSWER_SECONDS)

    return Served(count, tokenizer.render, tokenizer.ends, context_tokens)


def process_of(status: ServerStatus) -> psutil.Process | None:
    """Return the live process that a status is about; None when it is gone or another one has its pid."""
    if not status.pid:
        return None
    try:
        process = psutil.Process(status.pid)
        same = abs(process.create_time() - status.started_at) < 1.0
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def log_file(root: Path, deployment_id: str) -> Path:
    """Return where the output of a deployment's server goes."""
    return root / "logs" / file_name(deployment_id).replace(".json", ".log")


def _wait(condition: Callable[[], T | None], seconds: float) -> T | None:
    """Return what a condition gives once it isn't None; None after so many seconds."""
    deadline = time.monotonic() + seconds
    while (value := condition()) is None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return value


def require_memory(
    what: str, file: Path, context_tokens: int, parallel: int, *, beside_bytes: int = 0
) -> None:
    """Refuse a model that this machine's free memory can't hold: better than a machine that swaps.

    Args:
        what: Names the model in the error.
        file: The GGUF.
        context_tokens: Context of each request.
        parallel: Requests at once.
        beside_bytes: Size of its adapters.

    Raises:
        ResourceExhausted: Memory does not suffice.
    """
    cache = read_gguf(file).cache_bytes(context_tokens * parallel)
    need = file.stat().st_size + beside_bytes + cache + _OVERHEAD_BYTES
    free = psutil.virtual_memory().available
    if need > free:
        raise ResourceExhausted(
            f"{what} needs about {need / 1e9:.1f} GB to be served, {cache / 1e9:.1f} GB of it for a context "
            f"of {parallel} x {context_tokens} tokens; {free / 1e9:.1f} GB are free.",
            fix="Lower context_tokens or parallel, choose a smaller quantization, or free memory.",
            reason="NOT_ENOUGH_MEMORY",
        )
