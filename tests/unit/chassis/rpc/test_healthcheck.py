from __future__ import annotations

import subprocess
import sys
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def _probe(address: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "web4lora_chassis.rpc.healthcheck", address]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)


@pytest.mark.parametrize(
    ("state", "code", "word"), [(SERVING, 0, "SERVING"), (NOT_SERVING, 1, "NOT_SERVING")]
)
def test_the_exit_code_is_the_services_health(state: int, code: int, word: str) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    servicer = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    servicer.set("", state)
    server.start()
    try:
        done = _probe(f"127.0.0.1:{port}")
    finally:
        server.stop(0)
    assert done.returncode == code
    assert done.stdout == f"127.0.0.1:{port}: {word}\n"


def test_nobody_there_is_unhealthy() -> None:
    done = _probe("127.0.0.1:1")
    assert done.returncode == 1
    assert "UNAVAILABLE" in done.stdout
