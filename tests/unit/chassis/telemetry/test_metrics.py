"""Metrics: read over HTTP as Prometheus reads them."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from web4lora_chassis.artifacts import open_store
from web4lora_chassis.artifacts.manifest import ArtifactRef
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, NotFound
from web4lora_chassis.settings import Settings, load
from web4lora_chassis.telemetry import metrics


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read(port: int, token: str = "") -> str:
    address = f"http://127.0.0.1:{port}/metrics"
    request = urllib.request.Request(address)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310 - our own
        return answer.read().decode()


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_each_service_has_its_port_behind_the_gateway_s() -> None:
    port = free_port()
    metrics.serve("packager", Settings(metrics_address=f"127.0.0.1:{port - 2}"))
    text = read(port)
    assert "# TYPE web4lora_rpc_seconds histogram" in text
    assert "process_resident_memory_bytes" in text


def test_beyond_the_loopback_a_token_is_needed_and_asked_for() -> None:
    port = free_port()
    with pytest.raises(FailedPrecondition) as caught:
        metrics.serve("gateway", Settings(metrics_address=f"0.0.0.0:{port}", home=Path("/nowhere")))
    assert caught.value.reason == "TOKEN_REQUIRED"
    metrics.serve("gateway", Settings(metrics_address=f"0.0.0.0:{port}", token="secret"))
    for shown in ("", "wrong"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            read(port, shown)
    assert "web4lora_rpc_seconds" in read(port, "secret")


def test_a_taken_address_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(FailedPrecondition, match=rf"127\.0\.0\.1:{port} can't be listened on"):
            metrics.serve("gateway", Settings(metrics_address=f"127.0.0.1:{port}"))


def test_an_address_without_a_port_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB4LORA_METRICS_ADDRESS", "localhost")
    with pytest.raises(InvalidInput, match="WEB4LORA_METRICS_ADDRESS"):
        load(Settings)


def test_what_is_looked_up_is_shown_while_the_block_runs(caplog) -> None:
    with metrics.shown(metrics.JOBS, lambda: {"QUEUED": 3.0}):
        assert value("web4lora_jobs", state="QUEUED") == 3.0
    assert value("web4lora_jobs", state="QUEUED") == 0.0

    def broken() -> dict[str, float]:
        raise OSError("the disk is gone")

    with metrics.shown(metrics.JOBS, broken):
        assert value("web4lora_jobs", state="QUEUED") == 0.0
        assert value("process_resident_memory_bytes") > 0, "one gauge's error hides the others"
    assert "web4lora_jobs can't be looked up" in caplog.text


def test_the_store_s_calls_and_bytes_are_counted(tmp_path: Path) -> None:
    store = open_store(Settings(home=tmp_path))
    (tmp_path / "file").write_bytes(b"x" * 1000)
    before_in = value("web4lora_store_bytes_total", direction="in")
    before_out = value("web4lora_store_bytes_total", direction="out")
    before = value("web4lora_store_calls_total", call="put_file", outcome="ok")
    ref = store.put("report", "r", {"file": tmp_path / "file"}, link=False)
    store.get(ref, tmp_path / "got")
    assert value("web4lora_store_calls_total", call="put_file", outcome="ok") == before + 1
    assert value("web4lora_store_bytes_total", direction="in") == before_in + 1000
    assert value("web4lora_store_bytes_total", direction="out") == before_out + 1000
    missing = value("web4lora_store_calls_total", call="read", outcome="NOT_FOUND")
    with pytest.raises(NotFound):
        store.manifest(ArtifactRef("report", "r", "0" * 64, 0))
    assert value("web4lora_store_calls_total", call="read", outcome="NOT_FOUND") == missing + 1


def test_what_a_job_s_process_counted_is_added() -> None:
    before = value("web4lora_store_calls_total", call="write", outcome="ok")
    metrics.add([["web4lora_store_calls_total", {"call": "write", "outcome": "ok"}, 5.0]])
    assert value("web4lora_store_calls_total", call="write", outcome="ok") == before + 5
    assert ["web4lora_store_calls_total", {"call": "write", "outcome": "ok"}, before + 5] in metrics.counted()
