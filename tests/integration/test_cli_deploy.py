"""`web4lora deploy` and `web4lora deployments push` through the real gateway and the real deployer."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
from web4lora_chassis.rpc import channel
from web4lora_chassis.settings import Settings
from web4lora_llamacpp import LlamaCpp

from tests import lora_files
from tests.servers.fixtures import free_port
from tests.servers.registries import PASSWORD, USER, RegistryServer, private_registry
from tests.servers.smollm2 import smollm2_gguf

__all__ = ["private_registry"]
pytestmark = pytest.mark.timeout(400)


class Desk:
    """A gateway and a deployer under a home of their own, and the command in front of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        gateway, deployer = (f"127.0.0.1:{free_port()}" for _ in range(2))
        self.settings = Settings(home=root / "home", gateway_address=gateway)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("WEB4LORA_")}
        for name in ("CACHE", "LLAMA_CPP", "LLAMA_CPP_SOURCE"):
            if value := os.environ.get(f"WEB4LORA_{name}"):
                self.env[f"WEB4LORA_{name}"] = value
        self.env |= {
            "WEB4LORA_HOME": str(root / "home"),
            "WEB4LORA_OUTPUTS": str(root / "outputs"),
            "WEB4LORA_GATEWAY_ADDRESS": gateway,
            "WEB4LORA_DEPLOYER_ADDRESS": deployer,
            "WEB4LORA_LLAMA_SERVER_FIRST_PORT": str(free_port()),
            "WEB4LORA_OLLAMA": "http://127.0.0.1:1",
            "WEB4LORA_DOCKER_MODEL_RUNNER": "http://127.0.0.1:1",
            "DOCKER_CONFIG": str(root / "docker"),
        }
        self._processes = []
        for name, address in (("deployer", deployer), ("gateway", gateway)):
            with (root / f"{name}.log").open("ab") as log:
                command = [sys.executable, "-m", f"web4lora_{name}"]
                self._processes.append(
                    subprocess.Popen(command, env=self.env, cwd=root, stdout=log, stderr=log)
                )
            with channel(address, self.settings) as opened:
                grpc.channel_ready_future(opened).result(timeout=120)

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(30)

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "web4lora", *words], cwd=self.root, env=self.env,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, *words: str, code: int = 0) -> str:
        process = self.start(*words)
        text, _ = process.communicate(timeout=300)
        assert process.returncode == code, text
        assert "Traceback" not in text
        return text

    def json(self, *words: str) -> Any:
        return json.loads(self.run(*words, "--json"))


@pytest.fixture
def desk(tmp_path: Path, llama_cpp: LlamaCpp) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.close()
    sys.stderr.write((tmp_path / "deployer.log").read_text())


@pytest.fixture(scope="module")
def gguf() -> Path:
    return smollm2_gguf()


def test_a_gguf_from_elsewhere_is_deployed_answers_and_is_pushed(
    desk: Desk, gguf: Path, private_registry: RegistryServer
) -> None:
    text = desk.run("deploy", str(gguf), "--name", "other", "--context", "512", "--stop", "Newton")
    assert "ollama" in text
    assert "not running at http://127.0.0.1:1" in text  # what was tried
    assert "on llama-server" in text
    assert "! llama-server takes system message and stop texts from each request" in text
    assert "Its name           other" in text
    (curl,) = [row.split("Or", 1)[1].strip() for row in text.splitlines() if "curl " in row]
    answer = subprocess.run(shlex.split(curl), capture_output=True, check=True, timeout=120)
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"]

    again = desk.json("deploy", str(gguf), "--name", "other", "--context", "512", "--stop", "Newton")
    assert again["unchanged"]
    assert again["deployment"]["promoted"]
    assert httpx2.post(again["request"]["url"], json=again["request"]["body"], timeout=60).is_success
    assert "it serves already" in desk.run(
        "deploy", str(gguf), "--name", "other", "--context", "512", "--stop", "Newton"
    )

    place = f"{private_registry.host}/web4/other"
    assert f"docker login {private_registry.host}" in desk.run("deployments", "push", "other", place, code=1)
    (desk.root / "docker").mkdir()
    login = {"auths": {private_registry.host: {"username": USER, "password": PASSWORD}}}
    (desk.root / "docker" / "config.json").write_text(json.dumps(login))
    pushed = desk.json("deployments", "push", "other", place)
    assert pushed["reference"] == f"{place}:{again['deployment']['id'].partition(':')[2]}"
    assert private_registry.digest("web4/other", pushed["reference"].rpartition(":")[2]) == pushed["digest"]
    assert "it was there already" in desk.run("deployments", "push", "other", place)


def test_a_candidate_leaves_the_name_where_it_is(desk: Desk, gguf: Path) -> None:
    text = desk.run("deploy", str(gguf), "--name", "other", "--context", "512", "--no-promote")
    assert "deployments promote other:v" in text
    (deployment,) = desk.json("deployments", "list")
    assert not deployment["promoted"]


def test_adapters_are_deployed_shown_and_switched(desk: Desk, gguf: Path, llama_cpp: LlamaCpp) -> None:
    for seed, name in enumerate(("tool", "style"), 1):
        (desk.root / name).mkdir()
        lora_files.adapter_gguf(llama_cpp, desk.root / name, seed)
    words = ["deploy", str(gguf), "--name", "both", "--context", "512"]
    for name in ("tool", "style"):
        words += ["--adapter", f"{name}={name}/adapter.gguf"]
    text = desk.run(*words)
    assert "! adapters: tool 1, style 0" in text
    assert "deployments adapters both --use style" in text
    before = desk.json("deployments", "adapters", "both")
    assert [(each["name"], each["scale"]) for each in before["adapters"]] == [("tool", 1), ("style", 0)]
    assert before["adapters"][0]["gguf"]["name"] == "tool"
    rows = desk.run("deployments", "adapters", "both", "--use", "style").splitlines()
    assert [row.split()[:2] for row in rows] == [["adapter", "scale"], ["tool", "0"], ["style", "1"]]
    rows = desk.run("deployments", "adapters", "both", "--set", "tool=0.5").splitlines()
    assert [row.split()[:2] for row in rows[1:]] == [["tool", "0.5"], ["style", "1"]]
    assert f"{before['id']}: adapters tool 0.5, style 1" in desk.run("deployments", "list")
    status = desk.root / "home" / "deployer" / "status" / f"{before['id'].replace(':', '@')}.json"
    assert json.loads(status.read_text())["scales"] == {"tool": 0.5, "style": 1}
    assert desk.json(*words)["unchanged"]
    for given, says, code in (
        (["both", "--use", "tol"], f"{before['id']} has no adapter 'tol'.", 2),
        (["both", "--set", "tool"], "--set tool: it needs ADAPTER=SCALE.", 2),
        (["both", "--use", "tool", "--set", "tool=1"], "--use and --set can't go together.", 2),
        (["gone", "--use", "tool"], "No model called 'gone' is deployed.", 1),
        (["gone", "--set", "tool=1"], "There is no deployment 'gone'.", 1),
    ):
        assert says in desk.run("deployments", "adapters", *given, code=code)
    assert "can't hold" in desk.run("deployments", "push", "both", "127.0.0.1:1/x/y", code=1)
    for given, says in (
        (["--adapter", "tool"], "--adapter tool: it needs NAME=GGUF."),
        (["--adapter", "a=tool/adapter.gguf", "--target", "ollama"], "ollama takes no adapters"),
    ):
        assert says in desk.run("deploy", str(gguf), "--name", "both", *given, code=2)


def test_ctrl_c_cancels_the_job_and_leaves_nothing_half_done(desk: Desk, gguf: Path) -> None:
    process = desk.start("deploy", str(gguf), "--name", "other", "--context", "512", "--json")
    jobs = desk.root / "home" / "deployer" / "jobs"
    deadline = time.monotonic() + 120
    while not list(jobs.glob("*/lock")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 130, text
    assert "Cancelled. What served before still serves." in text
    assert desk.json("deployments", "list") == []


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        (["nothing.gguf", "--name", "a"], "nothing.gguf is not there.", 1),
        (["text.gguf", "--name", "a"], "text.gguf is no GGUF file", 2),
        (["cut.gguf", "--name", "a"], "The GGUF is cut off", 1),
        (["cut.gguf"], "cut.gguf comes without a name.", 2),
        (["cut.gguf", "--name", "My Model"], "'My Model'", 2),
        (["cut.gguf", "--name", "a", "--target", "toaster"], "'toaster' must be one of auto, ollama", 2),
        (["cut.gguf", "--name", "a", "--target", "ollama"], "not running at http://127.0.0.1:1", 1),
        (["run_2026-01-01_1"], "run_2026-01-01_1", 1),
        (["folder"], "folder is no run's folder", 1),
    ],
)
def test_what_can_t_be_deployed_is_said_in_a_line(
    desk_of_errors: Desk, words: list[str], says: str, code: int
) -> None:
    error = desk_of_errors.run("deploy", *words, code=code)
    (line,) = [row for row in error.splitlines() if row.startswith("✗")]
    assert says in line


@pytest.fixture(scope="module")
def desk_of_errors(
    tmp_path_factory: pytest.TempPathFactory, llama_cpp: LlamaCpp, gguf: Path
) -> Iterator[Desk]:
    root = tmp_path_factory.mktemp("errors")
    (root / "text.gguf").write_text("no model")
    (root / "cut.gguf").write_bytes(gguf.read_bytes()[: 8 << 20])
    (root / "folder").mkdir()
    desk = Desk(root)
    yield desk
    desk.close()
