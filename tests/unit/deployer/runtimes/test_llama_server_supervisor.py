"""The supervisor with real processes: a small program stands in for llama-server's, not for ours."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx2
import psutil
import pytest
from web4lora_chassis.settings import load
from web4lora_deployer.records.deployments import Adapter, Deployment, Deployments
from web4lora_deployer.runtimes import llama_server_supervisor as supervisor_module
from web4lora_deployer.runtimes.base import State
from web4lora_deployer.runtimes.llama_server import LlamaServerRuntime, ServerStatus, StatusFiles
from web4lora_deployer.runtimes.llama_server_supervisor import Supervisor
from web4lora_deployer.settings import DeployerSettings
from web4lora_llamacpp.tools import TARGETS

from tests.unit.deployer.sample_records import record

PROGRAM = """#!{python}
import os, shutil, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
if "--version" in sys.argv:
    sys.exit(print("version: 1 (0123abc)"))
if "quantize" in sys.argv[0]:
    sys.exit(shutil.copy(*sys.argv[-3:-1]) and 0)
model = sys.argv[sys.argv.index("--model") + 1]
how = open(model, "rb").read()
if how == b"broken":
    sys.exit("error loading model: it is broken")
if how == b"crashing":
    os.kill(os.getpid(), 11)
if how == b"slow":
    time.sleep(0.5)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        with open(model + ".asked", "a") as file:
            file.write("x")
        if how == b"slow":
            os.kill(os.getpid(), 4)
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        with open(model + ".posted", "a") as file:
            file.write(f"{{self.path}} {{body}}\\n")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{{"tokens": [340, 341, 342, 343, 344, 345, 346, 347]}}')
    def log_message(self, *_):
        pass
server = HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler)
print(f"listening on http://127.0.0.1:{{server.server_port}}", flush=True)
server.serve_forever()
"""


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DeployerSettings:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in TARGETS:
        (tools / name).write_text(PROGRAM.format(python=sys.executable))
        (tools / name).chmod(0o755)
    monkeypatch.setenv("WEB4LORA_LLAMA_CPP", str(tools))
    return load(
        DeployerSettings,
        home=tmp_path / "home",
        cache=tmp_path / "cache",
        llama_server_first_port=free_port(),
    )


@pytest.fixture
def deployments(settings: DeployerSettings) -> Deployments:
    return Deployments(settings.deployer_home)


@pytest.fixture
def status(settings: DeployerSettings) -> StatusFiles:
    return StatusFiles(settings.deployer_home)


@pytest.fixture
def supervisor(settings: DeployerSettings) -> Iterator[Supervisor]:
    supervisor = Supervisor(settings)
    supervisor.start()
    yield supervisor
    supervisor.stop()


def wish(deployments: Deployments, digit: str = "a", content: str = "fine") -> Deployment:
    wanted = record(digit)
    deployments.path(wanted).parent.mkdir()
    deployments.path(wanted).write_text(content)
    deployments.save(wanted)
    return wanted


def until(
    status: StatusFiles, wanted: Deployment, condition: Callable[[ServerStatus], bool], seconds: float = 30
) -> ServerStatus:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = status.read(wanted.id)
        if found is not None and found.generation == wanted.generation and condition(found):
            return found
        time.sleep(0.02)
    raise AssertionError(f"it did not happen: {status.read(wanted.id)}")


def is_serving(found: ServerStatus) -> bool:
    return found.state is State.SERVING


@pytest.mark.usefixtures("supervisor")
def test_what_is_wished_for_is_served(deployments: Deployments, status: StatusFiles) -> None:
    found = until(status, wish(deployments), is_serving)
    assert httpx2.get(found.endpoint.removesuffix("/v1") + "/health", trust_env=False).status_code == 200
    assert found.version == "1 (0123abc)"


@pytest.mark.usefixtures("supervisor")
def test_requests_that_name_no_temperature_get_the_models(
    deployments: Deployments, status: StatusFiles
) -> None:
    found = until(status, wish(deployments), is_serving)
    words = psutil.Process(found.pid).cmdline()
    assert words[words.index("--temp") + 1] == "0"


@pytest.mark.usefixtures("supervisor")
def test_a_server_that_dies_comes_back_on_its_port(deployments: Deployments, status: StatusFiles) -> None:
    wanted = wish(deployments)
    before = until(status, wanted, is_serving)
    os.kill(before.pid, signal.SIGKILL)
    after = until(status, wanted, lambda found: is_serving(found) and found.pid != before.pid)
    assert after.port == before.port


@pytest.mark.usefixtures("supervisor")
def test_adapters_begin_with_the_scales_last_set_and_get_others_as_they_are(
    deployments: Deployments, status: StatusFiles
) -> None:
    names = ("tool", "st,yle")
    adapters = tuple(Adapter(name, record("e").gguf, f"{name}.gguf", "e" * 64, 1) for name in names)
    wanted = record("a", adapters=adapters)
    for file in wanted.files:
        (deployments.models / file).parent.mkdir(exist_ok=True)
        (deployments.models / file).write_text("fine")
    deployments.save(wanted)
    before = until(status, wanted, is_serving)
    assert before.scales == {"tool": 1, "st,yle": 0}
    assert scaled(before, deployments) == '"{}/tool.gguf:1.0","{}/st,yle.gguf:0.0"'
    deployments.save_scales(wanted, {"tool": 0.25, "st,yle": 1})
    same = until(status, wanted, lambda found: found.scales == {"tool": 0.25, "st,yle": 1})
    assert same.pid == before.pid
    body = '[{"id": 0, "scale": 0.25}, {"id": 1, "scale": 1.0}]'
    posted = deployments.path(wanted).with_name(f"{deployments.path(wanted).name}.posted")
    assert posted.read_text() == f"/lora-adapters {body}\n"
    os.kill(before.pid, signal.SIGKILL)
    after = until(status, wanted, lambda found: is_serving(found) and found.pid != before.pid)
    assert after.scales == same.scales
    assert scaled(after, deployments) == '"{}/tool.gguf:0.25","{}/st,yle.gguf:1.0"'
    assert len(posted.read_text().splitlines()) == 1


def scaled(found: ServerStatus, deployments: Deployments) -> str:
    words = psutil.Process(found.pid).cmdline()
    assert "--no-cache-prompt" in words
    return words[words.index("--lora-scaled") + 1].replace(str(deployments.models), "{}")


@pytest.mark.usefixtures("supervisor")
def test_a_server_that_can_not_start_says_why_and_is_tried_again_later_and_later(
    deployments: Deployments, status: StatusFiles
) -> None:
    wanted = wish(deployments, content="broken")
    first = until(status, wanted, lambda found: found.failures == 1)
    assert first.state is State.FAILED
    assert "it is broken" in first.detail
    assert first.detail.endswith("in 0.5 s")
    second = until(status, wanted, lambda found: found.failures == 2)
    assert second.detail.endswith("in 1 s")
    deployments.path(wanted).write_text("fine")
    assert until(status, wanted, is_serving).failures == 0


@pytest.mark.usefixtures("supervisor")
def test_a_server_that_crashes_is_told_by_its_signal(deployments: Deployments, status: StatusFiles) -> None:
    found = until(status, wish(deployments, content="crashing"), lambda found: found.failures == 1)
    assert "was killed by SIGSEGV, most likely it was compiled for instructions" in found.detail


def test_a_long_load_does_not_count_as_having_served(
    deployments: Deployments,
    status: StatusFiles,
    settings: DeployerSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor_module, "_STEADY_SECONDS", 0.3)  # the model takes half a second to load
    wanted = wish(deployments, content="slow")
    supervisor = Supervisor(settings)
    supervisor.start()
    try:
        for crashes, pause in ((1, "0.5"), (2, "1"), (3, "2")):
            found = until(status, wanted, lambda found, n=crashes: found.crashes == n)  # type: ignore[misc]
            assert found.detail.endswith(
                f"SIGILL, most likely it was compiled for instructions that this "
                f"machine's processor or kernel doesn't take; it is started again in {pause} s"
            )
    finally:
        supervisor.stop()


def test_a_proxy_of_the_environment_is_not_asked_for_a_server_of_ours(
    deployments: Deployments,
    status: StatusFiles,
    settings: DeployerSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(supervisor_module, "_HEALTH_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(supervisor_module, "_HEALTH_FAILURES", 2)
    wanted = wish(deployments)
    asked = deployments.path(wanted).with_name(f"{deployments.path(wanted).name}.asked")
    supervisor = Supervisor(settings)
    supervisor.start()
    try:
        found = until(
            status,
            wanted,
            lambda found: found.crashes > 0 or (asked.is_file() and asked.stat().st_size > 5),
        )
        assert (found.state, found.crashes) == (State.SERVING, 0)
    finally:
        supervisor.stop()


@pytest.mark.usefixtures("supervisor")
def test_two_deployments_have_two_ports_and_one_taken_by_others_is_left_alone(
    deployments: Deployments, status: StatusFiles, settings: DeployerSettings
) -> None:
    with contextlib.closing(socket.socket()) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", settings.llama_server_first_port))
        other.listen()
        ports = {until(status, wish(deployments, digit), is_serving).port for digit in "ab"}
    assert len(ports) == 2
    assert settings.llama_server_first_port not in ports


@pytest.mark.usefixtures("supervisor")
def test_other_settings_mean_another_server(deployments: Deployments, status: StatusFiles) -> None:
    wanted = wish(deployments)
    before = until(status, wanted, is_serving)
    changed = replace(wanted, generation="g2", context_tokens=512)
    deployments.save(changed)
    after = until(status, changed, is_serving)
    command = psutil.Process(after.pid).cmdline()
    assert command[command.index("--ctx-size") + 1] == str(512 * wanted.parallel)
    assert not psutil.pid_exists(before.pid)


@pytest.mark.usefixtures("supervisor")
def test_what_is_kept_for_a_rollback_is_stopped_and_comes_back(
    deployments: Deployments, status: StatusFiles
) -> None:
    wanted = wish(deployments)
    before = until(status, wanted, is_serving)
    deployments.save(replace(wanted, loaded=False))
    until(status, wanted, lambda found: found.state is State.STOPPED)
    assert not psutil.pid_exists(before.pid)
    deployments.save(wanted)
    assert until(status, wanted, is_serving).port == before.port


@pytest.mark.usefixtures("supervisor")
def test_deleting_stops_the_server_and_forgets_it(
    deployments: Deployments, status: StatusFiles, settings: DeployerSettings
) -> None:
    wanted = wish(deployments)
    before = until(status, wanted, is_serving)
    LlamaServerRuntime(settings).delete(wanted)
    assert not psutil.pid_exists(before.pid)
    deployments.remove(wanted)
    deadline = time.monotonic() + 30
    while status.ids() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert status.ids() == []
    LlamaServerRuntime(settings).delete(wanted)  # again is no error


def test_a_stopped_supervisor_leaves_no_process_and_a_new_one_goes_on(
    deployments: Deployments, status: StatusFiles, settings: DeployerSettings
) -> None:
    wanted = wish(deployments)
    first = Supervisor(settings)
    first.start()
    before = until(status, wanted, is_serving)
    first.stop()
    assert not psutil.pid_exists(before.pid)
    second = Supervisor(settings)
    second.start()
    try:
        assert until(status, wanted, is_serving).port == before.port
    finally:
        second.stop()


def test_what_a_killed_service_wrote_last_is_not_believed(
    deployments: Deployments, status: StatusFiles, settings: DeployerSettings
) -> None:
    wanted = wish(deployments, content="broken")
    status.write(wanted.id, ServerStatus(wanted.generation, State.SERVING, port=8480, pid=os.getpid()))
    supervisor = Supervisor(settings)
    supervisor.start()
    try:
        assert LlamaServerRuntime(settings).health(wanted).state is not State.SERVING
    finally:
        supervisor.stop()


def test_what_is_kept_without_its_memory_can_be_deleted_after_a_restart(
    deployments: Deployments, status: StatusFiles, settings: DeployerSettings
) -> None:
    kept = wish(deployments)
    deployments.save(replace(kept, loaded=False))
    status.write(kept.id, ServerStatus(kept.generation, State.STOPPED, port=8480))
    supervisor = Supervisor(settings)
    supervisor.start()
    try:
        LlamaServerRuntime(settings).delete(kept)
        assert until(status, kept, lambda found: found.state is State.STOPPED).pid == 0
    finally:
        supervisor.stop()


@pytest.mark.usefixtures("supervisor")
def test_a_record_that_cannot_be_read_does_not_end_the_care_for_others(
    deployments: Deployments, status: StatusFiles, settings: DeployerSettings
) -> None:
    broken = settings.deployer_home / "deployments" / "x@v00000000.json"
    broken.write_text("{")
    until(status, wish(deployments), is_serving)
