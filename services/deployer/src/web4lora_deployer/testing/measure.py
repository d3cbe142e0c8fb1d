"""Measures models with a suite, one after the other: a deployment, a file served for that time, an endpoint.

What is measured is kept in the job's folder: an interrupted job goes on behind it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import web4lora_llamacpp
from pydantic import TypeAdapter
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore
from web4lora_chassis.errors import FailedPrecondition, ResourceExhausted, Web4Error
from web4lora_chassis.jobs import Progress
from web4lora_chassis.jobs.byte_progress import byte_progress
from web4lora_chassis.model_files.gguf import read_gguf

from web4lora_deployer.prompts.training_record import model_file
from web4lora_deployer.records.deployments import Deployment
from web4lora_deployer.report import Measured, ServedModel, SpeedLimit
from web4lora_deployer.runtimes.base import Deployed, Report, Runtime, State
from web4lora_deployer.runtimes.llama_server import require_memory
from web4lora_deployer.serving import promotion
from web4lora_deployer.settings import DeployerSettings
from web4lora_deployer.suite import Endpoint, Suite, SuiteResult, run_suite
from web4lora_deployer.testing.llama_bench import measure_limit

log = logging.getLogger(__name__)

EVAL = "eval.json"
_HEALTHY_SECONDS = 120.0
_POLL_SECONDS = 0.5
_LOAD_SECONDS = 900.0
_BENCH = "llama-bench"
_BENCH_TOKENS = 4096  # of its context, at most: a prompt and an answer as the suite's
_RESULT = TypeAdapter(SuiteResult)
_LIMIT = TypeAdapter(SpeedLimit)
T = TypeVar("T")


class _NoRoom(Exception):
    """llama-bench has no room; not that what was set aside for it does not come back."""


@dataclass(frozen=True)
class Bench:
    """Measures one model after the other with the same suite.

    Attributes:
        suite: The suite.
        settings: Where llama.cpp is.
        store: Holds the artifacts.
        work_dir: Kept from attempt to attempt.
        report: Takes progress.
    """

    suite: Suite
    settings: DeployerSettings
    store: ArtifactStore
    work_dir: Path
    report: Report

    def file(
        self, role: str, label: str, ref: ArtifactRef, *, context_tokens: int, parallel: int
    ) -> Measured:
        """Serve a GGUF for the time of the suite and measure its answers; its speed is of no interest.

        Args:
            role: Names what is kept of it.
            label: Its name for people.
            ref: The GGUF.
            context_tokens: Context of each request; at most the model's own counts.
            parallel: Requests at once.
        """
        folder = self.work_dir / role
        entry = model_file(self.store.manifest(ref))
        self.store.get(
            ref,
            folder,
            only=[entry.path],
            advance=byte_progress(self.report, f"fetch {label}", ref.size_bytes),
        )
        file = folder / entry.path
        context_tokens = min(context_tokens, read_gguf(file).context_tokens or 1 << 31)
        served = ServedModel(
            label=label, digest=entry.sha256, size_bytes=entry.size_bytes, target="llama-server",
            context_tokens=context_tokens, parallel=parallel,
        )  # fmt: skip

        def run() -> SuiteResult:
            llama = web4lora_llamacpp.ensure_built(self.settings.cache, self.report)
            require_memory(f"The {label} model", file, context_tokens, parallel)
            self.report(Progress(phase=f"load {label}"))
            with web4lora_llamacpp.LlamaServer(
                llama, file, context_tokens=context_tokens, parallel=parallel,
                log_file=self.work_dir / f"{role}.log", alias=role,
            ) as server:  # fmt: skip
                server.wait_ready(_LOAD_SECONDS)
                endpoint = Endpoint(server.endpoint, role, context_tokens)
                return run_suite(
                    self.suite, endpoint, report=self.report, max_parallel=parallel, label=label, extras=False
                )

        return Measured(served, self._once(role, _RESULT, run))

    def deployment(
        self,
        role: str,
        label: str,
        record: Deployment,
        runtime: Runtime,
        deployed: Deployed,
        *,
        extras: bool = True,
    ) -> Measured:
        """Measure a deployed model's answers and memory; with `extras` odd prompts and speed too."""
        served = ServedModel(
            label=label,
            id=record.id,
            digest=record.sha256,
            size_bytes=record.size_bytes,
            target=record.target,
            endpoint=deployed.endpoint,
            runtime_version=deployed.version,
            context_tokens=record.context_tokens,
            parallel=record.parallel,
        )

        def memory() -> int:
            try:
                return runtime.memory_bytes(record)
            except Web4Error:  # then it is not known at this moment
                return 0

        def run() -> SuiteResult:
            return run_suite(
                self.suite,
                Endpoint(deployed.endpoint, deployed.model, record.context_tokens),
                report=self.report,
                max_parallel=record.parallel,
                label=label,
                extras=extras,
                memory=memory,
            )

        return Measured(served, self._once(role, _RESULT, run))

    def endpoint(
        self, role: str, label: str, endpoint: Endpoint, parallel: int, *, extras: bool = True
    ) -> Measured:
        """Measure the model behind an endpoint of which nothing else is known."""
        served = ServedModel(
            label=label,
            id=endpoint.model,
            endpoint=endpoint.url,
            context_tokens=endpoint.context_tokens,
            parallel=parallel,
        )

        def run() -> SuiteResult:
            return run_suite(
                self.suite, endpoint, report=self.report, max_parallel=parallel, label=label, extras=extras
            )

        return Measured(served, self._once(role, _RESULT, run))

    def measured(self, role: str) -> bool:
        """Say whether an attempt before this one measured a model already."""
        return (self.work_dir / f"{role}.json").is_file()

    def limit(self, file: Path | None, measured: Measured, loaded: str = "") -> SpeedLimit | None:
        """Run llama-bench on a model's file.

        Args:
            file: The file.
            measured: What the suite found.
            loaded: Id of the deployment that has it in memory; a candidate is set aside meanwhile.

        Returns:
            None when the suite doesn't want it, no file is here, or memory has no room for it beside what
            serves.
        """
        if not self.suite.llama_bench or file is None:
            return None

        def run() -> SpeedLimit:
            llama = web4lora_llamacpp.ensure_built(self.settings.cache, self.report)
            with promotion.set_aside(loaded, self.settings) if loaded else contextlib.nullcontext():
                try:
                    require_memory("llama-bench", file, _BENCH_TOKENS, 1)
                except ResourceExhausted as error:
                    raise _NoRoom(error.message) from error
                return measure_limit(llama, file, measured.result, self.report)

        try:
            return self._once(_BENCH, _LIMIT, run)
        except _NoRoom as error:
            self.report(Progress(phase=_BENCH, message=f"left out: {error}"))
            log.warning("%s is left out: %s", _BENCH, error)
            return None

    def _once(self, role: str, adapter: TypeAdapter[T], run: Callable[[], T]) -> T:
        """Measure something, unless an attempt before this one did."""
        path = self.work_dir / f"{role}.json"
        try:
            return adapter.validate_python(json.loads(path.read_text("utf-8")))
        except FileNotFoundError:
            found = run()
        part = self.work_dir / f".part-{role}.json"
        part.write_text(json.dumps(adapter.dump_python(found)), encoding="utf-8")
        part.replace(path)
        return found


def serving(runtime: Runtime, record: Deployment) -> Deployed:
    """Return where a deployment answers; one that is being started again is waited for.

    Raises:
        FailedPrecondition: It does not serve.
    """
    deadline = time.monotonic() + _HEALTHY_SECONDS
    while True:
        health = runtime.health(record)
        if health.state is State.SERVING and health.deployed is not None:
            return health.deployed
        if health.state is State.STOPPED or time.monotonic() > deadline:
            raise FailedPrecondition(
                f"{record.id} on {record.target} does not serve: {health.detail or health.state.lower()}",
                fix="Deploy it again, then test it.",
                reason="NOT_SERVING",
            )
        time.sleep(_POLL_SECONDS)


def last_report(
    store: ArtifactStore, name: str, work_dir: Path, prefer: tuple[str, ...] = ()
) -> Mapping[str, Any] | None:
    """Return the eval.json of an earlier test of this name, or None.

    Args:
        store: Holds the reports.
        name: Of the report.
        work_dir: Where the file is brought to.
        prefer: Deployments, the most wanted first: the newest report of the first one that has any is
            taken. Without one, the newest of all is.
    """
    reports = [
        manifest
        for manifest in store.find("report", name)
        if any(entry.path == EVAL for entry in manifest.files)
    ]
    tested = [json.loads(manifest.parameters.get("deployment", "null")) for manifest in reports]
    chosen = next((reports[tested.index(wanted)] for wanted in prefer if wanted in tested), None)
    chosen = chosen or next(iter(reports), None)
    if chosen is None:
        return None
    store.get(chosen.ref, work_dir / "previous", only=[EVAL])
    data = json.loads((work_dir / "previous" / EVAL).read_text(encoding="utf-8"))
    return data if isinstance(data, dict) else None


def quietly(do: Callable[[], None]) -> None:
    """Do what would be nice but isn't needed."""
    try:
        do()
    except Web4Error as error:
        log.warning("%s", error)
