"""The line to a runtime, or the runtime itself, fails while a model is brought in: said clearly, and mended.

Each fault ends in an error that says who failed and what to do, and deploying again finishes.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from web4lora_chassis.artifacts import hash_file
from web4lora_chassis.errors import DataLoss, ResourceExhausted, Unavailable, Web4Error
from web4lora_chassis.jobs import Progress
from web4lora_deployer.records.deployments import Deployment
from web4lora_deployer.runtimes import docker_model_runner, http, ollama_api, open_runtime
from web4lora_deployer.runtimes.base import Deployed, Runtime, State
from web4lora_deployer.serving.first_answer import first_answer
from web4lora_deployer.settings import DeployerSettings
from web4lora_llamacpp import LlamaCpp

from tests.servers.fixtures import MakeProxy, Proxy
from tests.servers.garbler import Garbler
from tests.servers.runtimes import running_model_runner, running_ollama
from tests.unit.deployer.sample_records import record

SIZE_BYTES = 32 << 20
pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Target:
    """A real runtime and a model that it does not have yet.

    Attributes:
        name: "ollama" or "docker".
        address: Of the runtime itself: host and port.
        settings: Without the address.
        wanted: What to deploy.
        file: The model.
    """

    name: str
    address: str
    settings: DeployerSettings
    wanted: Deployment
    file: Path

    def runtime(self, address: str = "") -> Runtime:
        """Return the runtime, reached at an address."""
        field = "ollama" if self.name == "ollama" else "docker_model_runner"
        update = {field: f"http://{address or self.address}"}
        return open_runtime(self.name, self.settings.model_copy(update=update))

    def deploy(
        self, address: str = "", report: Callable[[Progress], None] = lambda _: None
    ) -> tuple[Deployed, list[str]]:
        """Deploy over an address; return where it answers, and the phases."""
        phases: list[str] = []

        def told(progress: Progress) -> None:
            phases.append(progress.phase)
            report(progress)

        return self.runtime(address).deploy(self.wanted, self.file, told), phases

    def check_again(self) -> list[str]:
        """See that deploying again, over a whole line, ends with a model that answers."""
        deployed, phases = self.deploy()
        first_answer(deployed)
        assert self.runtime().health(self.wanted).state is State.SERVING
        return phases


def a_model(tiny_gguf: Path, folder: Path, target: str) -> tuple[Deployment, Path]:
    """Return a model whose bytes no other test has, and which is too large for the buffers on the way."""
    file = folder / "fresh.gguf"
    file.write_bytes(tiny_gguf.read_bytes() + folder.name.encode().ljust(SIZE_BYTES, b"\0"))
    sha256 = hash_file(file)
    the_id = f"demo:v{sha256[:8]}"
    wanted = record(
        "a", id=the_id, model=the_id, sha256=sha256, target=target, size_bytes=file.stat().st_size,
        file=f"x/{file.name}", context_tokens=1024, parallel=1,
    )  # fmt: skip
    return wanted, file


@pytest.fixture(params=["ollama", "docker"])
def target(
    request: pytest.FixtureRequest, settings: DeployerSettings, tiny_gguf: Path, tmp_path: Path
) -> Iterator[Target]:
    """Each of the two runtimes that are reached by HTTP."""
    fixture = "ollama" if request.param == "ollama" else "model_runner"
    address = request.getfixturevalue(fixture).removeprefix("http://")
    made = Target(request.param, address, settings, *a_model(tiny_gguf, tmp_path, request.param))
    yield made
    made.runtime().delete(made.wanted)


@pytest.fixture
def proxy(target: Target, toxiproxy: MakeProxy) -> Proxy:
    return toxiproxy(target.address)


def once(phase: str, act: Callable[[], None]) -> Callable[[Progress], None]:
    """Return a report that acts when a phase begins."""
    done = False

    def report(progress: Progress) -> None:
        nonlocal done
        if progress.phase == phase and not done:
            done = True
            act()

    return report


def test_it_goes_away_while_the_model_is_made(target: Target, proxy: Proxy) -> None:
    """The bytes are there already: Ollama makes a model of them, Model Runner is about to tag it."""
    phase = "create" if target.name == "ollama" else "tag"
    with pytest.raises(Unavailable, match=proxy.address) as caught:
        target.deploy(proxy.address, once(phase, proxy.cut))
    assert "try again" in caught.value.fix
    assert "upload" in target.check_again() or target.name == "docker"


def test_it_goes_away_while_the_prompts_are_compared(target: Target, proxy: Proxy) -> None:
    with pytest.raises(Unavailable, match=proxy.address):  # asking for that, it loads the model
        target.deploy(proxy.address, once("compare templates", proxy.cut))
    target.check_again()


def test_an_upload_that_stalls_is_ended(
    target: Target, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other side takes no more bytes."""
    monkeypatch.setattr(http, "SEND_SECONDS", 1.0)
    runtime = target.runtime(proxy.address)  # it has read the time limit
    assert runtime.probe().usable
    with pytest.raises(Unavailable, match=f"{proxy.address} did not answer in time"):
        runtime.deploy(target.wanted, target.file, once("upload", proxy.stall))
    target.check_again()


def test_an_answer_that_stalls_is_ended(
    target: Target, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ollama_api, "_CREATE_SECONDS", 2.0)
    monkeypatch.setattr(docker_model_runner, "client", lambda address, _: http.client(address, 2.0))
    phase = "create" if target.name == "ollama" else "tag"
    with pytest.raises(Unavailable, match=f"{proxy.address} did not answer in time"):
        target.deploy(proxy.address, once(phase, proxy.stall))
    target.check_again()


@pytest.mark.parametrize("at_byte", [1 << 20, 30 << 20])
def test_bytes_that_change_on_the_way_are_named_and_nothing_is_kept(target: Target, at_byte: int) -> None:
    with Garbler(target.address, at_byte) as garbler:
        with pytest.raises(DataLoss) as caught:
            target.deploy(garbler.address)
        assert garbler.garbled
    assert "Try again" in caught.value.fix
    assert target.runtime().health(target.wanted).broken  # it is not there
    assert "upload" in target.check_again()


@pytest.mark.parametrize("at_byte", [5, 30, 150, 400, 800])
def test_answers_that_change_on_the_way_end_well_or_in_a_clear_error(target: Target, at_byte: int) -> None:
    """A status, a header, a length, a word of JSON: whatever it hits."""
    with Garbler(target.address, at_byte, "downstream") as garbler:
        with contextlib.suppress(Web4Error):  # any other error would be a defect
            target.deploy(garbler.address)
        assert garbler.garbled
    target.check_again()


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Callable[[int], None]]:
    """Mount a file system of so many megabytes; gives what changes its size."""
    folder.mkdir()

    def mount(options: str) -> subprocess.CompletedProcess[str]:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = mount(f"size={megabytes}m")
    if done.returncode:
        pytest.skip(f"a small file system can't be mounted here, which needs root: {done.stderr.strip()}")
    try:
        yield lambda size: mount(f"remount,size={size}m").check_returncode()
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("name", ["ollama", "docker"])
def test_a_full_disk_is_said_and_once_there_is_room_it_goes_on(
    name: str, settings: DeployerSettings, tiny_gguf: Path, tmp_path: Path, llama_cpp: LlamaCpp
) -> None:
    """The runtime's store is on a file system that is too small for the model."""
    start = running_ollama if name == "ollama" else running_model_runner
    with (
        small_disk(tmp_path / "store", 16) as resize,
        start(tmp_path, llama_cpp, models=tmp_path / "store") as url,
    ):
        target = Target(name, url.removeprefix("http://"), settings, *a_model(tiny_gguf, tmp_path, name))
        with pytest.raises(ResourceExhausted) as caught:
            target.deploy()
        assert caught.value.reason == "DISK_FULL"
        assert "Free disk space" in caught.value.fix
        resize(512)
        target.check_again()


def test_a_runtime_that_is_killed_while_it_takes_a_model_and_started_again(
    settings: DeployerSettings, tiny_gguf: Path, tmp_path: Path, llama_cpp: LlamaCpp
) -> None:
    """Its store survives: what came half is not taken for a model."""
    models = tmp_path / "store"
    with running_ollama(tmp_path, llama_cpp, models=models) as url:
        target = Target(
            "ollama", url.removeprefix("http://"), settings, *a_model(tiny_gguf, tmp_path, "ollama")
        )
        with pytest.raises(Unavailable):
            target.deploy(report=once("upload", lambda: _kill(url)))
    with running_ollama(tmp_path, llama_cpp, models=models) as url:
        again = Target("ollama", url.removeprefix("http://"), settings, target.wanted, target.file)
        assert httpx2.get(f"{url}/api/tags").json()["models"] == []
        assert "upload" in again.check_again()


def _kill(url: str) -> None:
    from web4.lora.v1 import deployments_pb2

    from tests.integration.deployer.deployer_stack import listener

    server = listener(deployments_pb2.Deployment(endpoint=f"{url}/v1"))
    assert server is not None
    server.kill()
    server.wait(10)
