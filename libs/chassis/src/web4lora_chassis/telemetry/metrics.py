"""Metrics for Prometheus: what is counted and measured, and the port of its own that shows it.

Counting is always on, and costs next to nothing; nobody sees it unless WEB4LORA_METRICS_ADDRESS is set.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from web4lora_chassis.errors import FailedPrecondition
from web4lora_chassis.settings import Settings, is_loopback

log = logging.getLogger(__name__)

SERVICES = ("gateway", "trainer", "packager", "deployer")
"""Each shows its metrics one port after the one before it: one setting does for a whole stack."""

_CALL_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900)
_WORK_SECONDS = (1, 5, 15, 60, 300, 900, 1800, 3600, 7200, 14400, 28800, 57600, 115200)

RPC_SECONDS = Histogram(
    "web4lora_rpc_seconds",
    "Calls answered, by how long they took; of a stream, to its end. A refused call names no method.",
    ("method", "code"),
    buckets=_CALL_SECONDS,
)
RPCS_AT_WORK = Gauge("web4lora_rpcs_at_work", "Calls being answered, streams included.")
RUNS_ENDED = Counter("web4lora_runs_ended", "Runs that ended, by state.", ("state",))
STAGES_RUNNING = Gauge(
    "web4lora_stages_running",
    "Stages at work or in their worker's queue, of this gateway's runs.",
    ("stage",),
)
STAGE_SECONDS = Histogram(
    "web4lora_stage_seconds",
    "Stages that ended, by how long they took from their start.",
    ("stage", "state"),
    buckets=_WORK_SECONDS,
)
JOB_SECONDS = Histogram(
    "web4lora_job_seconds",
    "A worker's jobs that ended, by how long they were at work.",
    ("kind", "state"),
    buckets=_WORK_SECONDS,
)
JOB_TOKENS_PER_SECOND = Gauge(
    "web4lora_job_tokens_per_second", "Speed of the job at work, as it tells it; 0 without one.", ("kind",)
)
STORE_CALLS = Counter("web4lora_store_calls", "Calls to the artifact store, by outcome.", ("call", "outcome"))
STORE_BYTES = Counter(
    "web4lora_store_bytes", "Bytes of files brought to and from the artifact store.", ("direction",)
)


@dataclass(frozen=True)
class Looked:
    """A gauge that is looked up when metrics are read; `shown` says where."""

    name: str
    documentation: str
    label: str


RUNS = Looked("web4lora_runs", "Runs that have not ended, by state.", "state")
JOBS = Looked("web4lora_jobs", "A worker's jobs that have not ended, by state.", "state")
JOB_MEMORY = Looked(
    "web4lora_job_memory_bytes", "Resident memory of jobs at work, all their processes together.", "kind"
)
LOOKED = (RUNS, JOBS, JOB_MEMORY)


@contextlib.contextmanager
def shown(what: Looked, look: Callable[[], Mapping[str, float]]) -> Iterator[None]:
    """Show a gauge while the block runs.

    Args:
        what: One of `LOOKED`.
        look: Returns its values by label, in another thread. An error is logged and leaves the gauge out.
    """
    collector = _Collector(what, look)
    REGISTRY.register(collector)
    try:
        yield
    finally:
        REGISTRY.unregister(collector)


class _Collector(Collector):
    def __init__(self, what: Looked, look: Callable[[], Mapping[str, float]]) -> None:
        self._what = what
        self._look = look

    def describe(self) -> Iterable[Metric]:
        """Return what is shown, without looking."""
        return [GaugeMetricFamily(self._what.name, self._what.documentation, labels=[self._what.label])]

    def collect(self) -> Iterable[Metric]:
        """Return what is there now."""
        [family] = self.describe()
        assert isinstance(family, GaugeMetricFamily)
        try:
            for label, value in self._look().items():
                family.add_metric([label], value)
        except Exception:
            log.exception("%s can't be looked up", self._what.name)
            return []
        return [family]


def counted() -> list[list[Any]]:
    """Return what this process did with the store, as JSON data for `add` in another one."""
    return [
        [sample.name, sample.labels, sample.value]
        for counter in (STORE_CALLS, STORE_BYTES)
        for family in counter.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    ]


def add(found: Iterable[Sequence[Any]]) -> None:
    """Add what a job's process counted to what this one did."""
    counters = {"web4lora_store_calls_total": STORE_CALLS, "web4lora_store_bytes_total": STORE_BYTES}
    for name, labels, value in found:
        counters[name].labels(**labels).inc(value)


def serve(service: str, settings: Settings) -> None:
    """Show the metrics over HTTP, at any path, from a thread of its own.

    Beyond the loopback the services' token is asked for, and TLS as by the services themselves.

    Raises:
        FailedPrecondition: The address can't be listened on, or is beyond the loopback without a token.
    """
    host, _, first = settings.metrics_address.rpartition(":")
    port = int(first) and int(first) + SERVICES.index(service)
    token = "" if is_loopback(settings.metrics_address) else settings.shared_token
    if not token and not is_loopback(settings.metrics_address):
        raise FailedPrecondition(
            f"WEB4LORA_METRICS_ADDRESS: {settings.metrics_address} is beyond the loopback, without a token.",
            fix="Set WEB4LORA_TOKEN_FILE, which Prometheus shows by `authorization: credentials_file`, or "
            "listen on 127.0.0.1.",
            reason="TOKEN_REQUIRED",
        )
    try:
        server = make_server(
            host.strip("[]"), port, _guarded(make_wsgi_app(), token), ThreadingWSGIServer, _Quiet
        )
    except OSError as error:
        raise FailedPrecondition(
            f"WEB4LORA_METRICS_ADDRESS: {host}:{port} can't be listened on: {error.strerror}.",
            fix="Choose another one; four ports from there on are used, one for each service.",
            reason="ADDRESS_IN_USE",
        ) from error
    if settings.tls_certificate_file and settings.tls_key_file:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.tls_certificate_file, settings.tls_key_file)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    log.info("metrics on %s, port %d", host, server.server_port)


def _guarded(app: Callable[..., Any], token: str) -> Callable[..., Any]:
    """Return the application, which a token is to be shown to where there is one."""

    def call(environ: Mapping[str, str], start_response: Callable[..., Any]) -> Any:
        shown = environ.get("HTTP_AUTHORIZATION", "")
        if token and not hmac.compare_digest(shown.encode(), f"Bearer {token}".encode()):
            start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer")])
            return [b"These metrics need the services' token.\n"]
        return app(environ, start_response)

    return call


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: Prometheus reads every few seconds."""
