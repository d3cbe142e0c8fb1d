"""`web4lora up`, `status`, `down`, `doctor` with the real services."""

from __future__ import annotations

import json
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import pytest
from web4.lora.v1 import gateway_pb2, gateway_pb2_grpc
from web4lora_chassis.errors import Unauthenticated
from web4lora_chassis.rpc import channel, error_of
from web4lora_chassis.settings import Settings
from web4lora_llamacpp.tools import TARGETS

from tests.servers.native import SERVICES, Machine

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    subprocess.run(made.command("down"), env=made.env, cwd=tmp_path, capture_output=True, check=False)
    assert made.left_over() == []


def test_a_stack_starts_is_seen_heals_and_stops(machine: Machine) -> None:
    assert "not running; `web4lora up` starts it" in machine.run("status", code=1)
    text = machine.run("up")
    assert [row.split()[1:] for row in text.splitlines()[:4]] == [[name, "started"] for name in SERVICES]
    gateway = machine.process("gateway")
    assert gateway is not None
    assert gateway.environ()["WEB4LORA_OUTPUTS"] == str(machine.root / "outputs")

    assert stat.S_IMODE(machine.home.stat().st_mode) == 0o700
    assert stat.S_IMODE((machine.home / "token").stat().st_mode) == 0o600
    with channel(machine.address("gateway"), Settings(home=machine.root / "another account")) as stranger:
        stub = gateway_pb2_grpc.GatewayServiceStub(stranger)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ListRuns(gateway_pb2.ListRunsRequest(), timeout=20)
        assert type(error_of(caught.value)) is Unauthenticated

    state = json.loads(machine.run("status", "--json"))
    assert all(each["serving"] and each["version"] for each in state["services"])
    assert state["home"] == str(machine.home)

    text = machine.run("up")
    assert text.count("already up") == 4
    assert machine.process("gateway") == gateway

    killed = machine.process("packager")
    assert killed is not None
    killed.kill()
    killed.wait(10)
    text = machine.run("status", code=1)
    assert [row.split()[:2] for row in text.splitlines() if "✗" in row] == [["✗", "packager"]]
    text = machine.run("up")
    assert "✓ packager   started" in text
    assert text.count("already up") == 3

    assert machine.run("down").count("stopped") == 4
    assert machine.left_over() == []
    assert machine.run("down").count("not running") == 4
    assert (machine.home / "logs" / "gateway.log").stat().st_size > 0


def test_another_stack_is_not_taken_for_ours(machine: Machine) -> None:
    machine.run("up", "gateway")
    ours = machine.env["WEB4LORA_HOME"]
    machine.env["WEB4LORA_HOME"] = str(machine.root / "other")
    text = machine.run("up", "gateway", code=1)
    assert "belongs to another stack" in text
    machine.run("down")
    machine.env["WEB4LORA_HOME"] = ours
    assert machine.process("gateway") is not None


def test_a_taken_port_stops_everything_that_was_started(machine: Machine) -> None:
    host, port = machine.env["WEB4LORA_GATEWAY_ADDRESS"].split(":")
    with socket.create_server((host, int(port))):
        text = machine.run("up", code=1)
    assert f"{host}:{port} is taken by" in text
    assert "WEB4LORA_GATEWAY_ADDRESS=127.0.0.1:PORT" in text
    assert machine.left_over() == []


def test_a_service_that_refuses_to_start_says_why(machine: Machine) -> None:
    port = machine.env["WEB4LORA_GATEWAY_ADDRESS"].rpartition(":")[2]
    machine.env["WEB4LORA_GATEWAY_ADDRESS"] = f"0.0.0.0:{port}"  # beyond the loopback, without a token
    text = machine.run("up", "gateway", code=1)
    assert "The gateway ended as soon as it was started" in text
    assert "token" in text
    assert str(machine.home / "logs" / "gateway.log") in text
    assert machine.left_over() == []


def test_in_the_foreground_ctrl_c_stops_what_was_started(machine: Machine) -> None:
    child = subprocess.Popen(
        machine.command("up", "--foreground", "gateway", "packager"), cwd=machine.root, env=machine.env,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    while "Ctrl-C stops them" not in child.stdout.readline():
        assert child.poll() is None
    assert machine.process("gateway") is not None
    child.send_signal(signal.SIGINT)
    rest, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    assert rest.count("stopped") == 2
    assert machine.left_over() == []


def test_names_of_services_are_checked(machine: Machine) -> None:
    assert "The services are trainer, packager, deployer, gateway." in machine.run("up", "baker", code=2)


class _OldOllama(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"version": "0.29.1"}')

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_doctor_looks_at_everything_and_says_what_to_do(machine: Machine) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _OldOllama)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    machine.env["WEB4LORA_OLLAMA"] = f"http://127.0.0.1:{server.server_port}"
    machine.env["WEB4LORA_DOCKER_MODEL_RUNNER"] = "http://127.0.0.1:1"
    text = machine.run("doctor")
    server.shutdown()
    server.server_close()
    rows = {row[4:24].strip(): row for row in text.splitlines()}
    wanted = ["Python", "device", "memory", "disk", "compiler", "CMake", "llama.cpp", "Ollama"]
    assert list(rows)[:8] == wanted
    assert "GB of memory" in rows["device"]
    assert "0.29.1" in rows["Ollama"]
    assert "0.31.2 or newer is needed" in rows["Ollama"]
    assert rows["Docker Model Runner"].startswith("  ! ")
    assert "host-side TCP 12434" in rows["Docker Model Runner"]


@pytest.mark.parametrize(("number", "words"), [("SEGV", "SIGSEGV"), ("ILL", "SIGILL")])
def test_doctor_says_that_llama_cpp_crashes_here(machine: Machine, number: str, words: str) -> None:
    tools = machine.root / "tools"
    tools.mkdir()
    for name in TARGETS:
        case = 'case "$*" in *--version*) echo "version: 1 (0123abc)"; exit;; esac'
        (tools / name).write_text(f"#!/bin/sh\n{case}\nkill -{number} $$\n")
        (tools / name).chmod(0o755)
    machine.env["WEB4LORA_LLAMA_CPP"] = str(tools)
    machine.env["WEB4LORA_CACHE"] = str(machine.root / "cache")
    checks = {check["name"]: check for check in json.loads(machine.run("doctor", "--json", code=1))}
    assert checks["llama.cpp"]["sign"] == "missing"
    assert f"llama-quantize was killed by {words}" in checks["llama.cpp"]["text"]
    assert "Unset WEB4LORA_LLAMA_CPP" in checks["llama.cpp"]["text"]


def test_doctor_fails_only_for_what_is_needed(machine: Machine) -> None:
    machine.env["PATH"] = str(machine.root)  # no compiler, no Docker
    machine.env["WEB4LORA_CACHE"] = str(machine.root / "empty")
    for name in ("WEB4LORA_LLAMA_CPP", "WEB4LORA_LLAMA_CPP_SOURCE", "CXX"):
        machine.env.pop(name, None)
    checks = {check["name"]: check for check in json.loads(machine.run("doctor", "--json", code=1))}
    assert checks["compiler"]["sign"] == "missing"
    assert checks["Docker"]["sign"] == "note"
    assert checks["llama.cpp"]["sign"] == "note"
