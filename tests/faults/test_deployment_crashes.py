"""Deploying, promoting and rolling back, killed before each of their steps, on real runtimes.

At every moment the name has the old or the new model behind it, and doing it again finishes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count, cycle
from pathlib import Path
from typing import Any

import httpx2
import pytest
from web4lora_chassis.artifacts import ArtifactRef, open_store
from web4lora_chassis.settings import load
from web4lora_deployer.records.deployments import Deployment, Deployments
from web4lora_deployer.runtimes import open_runtime
from web4lora_deployer.runtimes.base import State
from web4lora_deployer.runtimes.llama_server_supervisor import Supervisor
from web4lora_deployer.runtimes.ollama_api import OllamaApi
from web4lora_deployer.serving import promotion
from web4lora_deployer.serving.deploy import DeployRequest, deploy
from web4lora_deployer.serving.first_answer import first_answer
from web4lora_deployer.settings import DeployerSettings
from web4lora_llamacpp import LlamaCpp

from tests.servers.fixtures import free_port

pytestmark = pytest.mark.timeout(1500)

CHILD = Path(__file__).with_name("dying_deployer.py")
KILLED = -9
NAME = "demo"


class Bench:
    """A deployer's home with a few models in its store, and a watch over the name."""

    def __init__(self, settings: DeployerSettings, target: str, files: list[Path]) -> None:
        self.settings = settings
        self.target = target
        self.deployments = Deployments(settings.deployer_home)
        self.store = open_store(settings)
        self.ggufs = cycle([self.store.put("gguf", NAME, {"model.gguf": file}) for file in files])
        self.gaps: list[str] = []
        self._stop = threading.Event()
        self._watch = threading.Thread(target=self._watch_name, daemon=True)

    def deploy(self, ref: ArtifactRef) -> Deployment:
        """Deploy without a fault."""
        with tempfile.TemporaryDirectory() as work_dir:
            request = DeployRequest(NAME, ref, target=self.target, context_tokens=1024, parallel=1)
            return deploy(request, self.settings, self.store, Path(work_dir), lambda _: None).deployment

    def promote_next(self) -> Deployment:
        """Deploy the next model and promote it, without a fault."""
        return promotion.promote(self.deploy(next(self.ggufs)).id, self.settings)

    def die(self, step: int, verb: str, *, gate: str = "passed", **given: Any) -> bool:
        """Do a verb in a process that is killed before a step; tell whether it had so many steps."""
        names = ("home", "store", "ollama", "docker_model_runner", "llama_server_first_port")
        given["settings"] = {name: str(getattr(self.settings, name)) for name in names}
        command = [sys.executable, str(CHILD), str(step), verb, json.dumps(given), gate]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode in (0, KILLED), done.stderr
        return done.returncode == KILLED

    def current(self) -> str:
        name = self.deployments.name(NAME)
        assert name is not None
        return name.current

    def state(self) -> dict[str, State]:
        """Return how each deployment does."""
        return {record.id: open_runtime(record.target, self.settings).health(record).state
                for record in self.deployments.list()}  # fmt: skip

    def shown(self, model: str) -> object:
        """Return what Ollama shows of a model; nothing where there is none."""
        if self.target != "ollama":
            return None
        shown = OllamaApi(self.settings.ollama).show(model)
        parameters = sorted(str(shown.get("parameters")).splitlines())  # Ollama tells them in any order
        return [parameters, *(shown.get(key) for key in ("system", "template", "license"))]

    def candidates(self) -> list[str]:
        """Return what Ollama has of ours besides the name."""
        if self.target != "ollama":
            return []
        models = httpx2.get(f"{self.settings.ollama}/api/tags", trust_env=False).json()["models"]
        return [model["name"] for model in models if model["name"].startswith(f"{NAME}:v")]

    def check(self, *allowed: str) -> None:
        """See that the name has one of these behind it, and that it answers."""
        current = self.current()
        assert current in allowed
        record = self.deployments.get(current)
        health = open_runtime(record.target, self.settings).health(record)
        assert health.state is State.SERVING, health
        assert health.deployed is not None
        first_answer(health.deployed)
        if self.target == "ollama":
            api = OllamaApi(self.settings.ollama)
            assert api.digest(NAME) in [api.digest(each) for each in allowed if api.digest(each)]
        assert not self.gaps

    def __enter__(self) -> Bench:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watch.join()

    def _watch_name(self) -> None:
        """Note each moment at which what the name stands for is not there."""
        while not self._stop.wait(0.1):
            name = self.deployments.name(NAME)
            if name is None or self._there(name.current):
                continue
            again = self.deployments.name(NAME)
            if again is not None and again.current == name.current:  # it did not just move on
                self.gaps.append(name.current)

    def _there(self, deployment_id: str) -> bool:
        record = self.deployments.get(deployment_id)
        health = open_runtime(record.target, self.settings).health(record)
        if health.state is not State.SERVING or health.deployed is None:
            return False
        if self.target != "llama-server":
            return True
        try:
            answer = httpx2.get(health.deployed.endpoint.removesuffix("/v1") + "/health", trust_env=False)
        except httpx2.HTTPError:
            return False
        return answer.status_code == httpx2.codes.OK


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_gguf: Path) -> list[Path]:
    """Three models that are the same but for the word that is their name."""
    folder = tmp_path_factory.mktemp("models")
    words = (b"tin1", b"tin2", b"tin3")
    files = [folder / f"{word.decode()}.gguf" for word in words]
    for file, word in zip(files, words, strict=True):
        file.write_bytes(tiny_gguf.read_bytes().replace(b"tiny", word))
    return files


@pytest.fixture
def bench(
    request: pytest.FixtureRequest, tmp_path: Path, files: list[Path], llama_cpp: LlamaCpp
) -> Iterator[Bench]:
    """A bench on the runtime that the test names, with the first model promoted."""
    target = request.param
    settings = load(
        DeployerSettings,
        home=tmp_path / "home",
        store=(tmp_path / "store").as_uri(),
        llama_server_first_port=free_port(),
        ollama=request.getfixturevalue("ollama") if target == "ollama" else "http://127.0.0.1:1",
        docker_model_runner="http://127.0.0.1:1",
    )
    supervisor = Supervisor(settings)
    supervisor.start()
    try:
        bench = Bench(settings, target, files)
        bench.promote_next()
        with bench:
            yield bench
        for record in bench.deployments.list():
            promotion.delete(record.id, settings)
    finally:
        supervisor.stop()


both = pytest.mark.parametrize("bench", ["llama-server", "ollama"], indirect=True)


@both
def test_deploying_killed_before_each_step_leaves_the_old_one_and_finishes_when_done_again(
    bench: Bench,
) -> None:
    old = bench.current()
    ref = next(bench.ggufs)
    how = {"name": NAME, "gguf": ref.to_json(), "target": bench.target, "context_tokens": 1024, "parallel": 1}
    for step in count(1):
        died = bench.die(step, "deploy", **how)
        bench.check(old)
        new = bench.deploy(ref)
        assert set(bench.state().items()) == {(old, State.SERVING), (new.id, State.SERVING)}
        bench.check(old)
        promotion.delete(new.id, bench.settings)
        if not died:
            break
    assert step > 3


@both
@pytest.mark.parametrize("gate", ["passed", "refused"])
def test_the_promoted_file_with_other_parameters_poisons_nothing(bench: Bench, gate: str) -> None:
    """Killed before each step, or refused by the template gate: the next start promotes nothing of it."""
    old = bench.deployments.get(bench.current())
    shown = bench.shown(old.id)
    how = {
        "name": NAME, "gguf": old.gguf.to_json(), "target": bench.target, "context_tokens": 512, "parallel": 1
    }  # fmt: skip
    for step in count(1):
        died = bench.die(step, "deploy", gate=gate, **how)
        bench.check(old.id)
        promotion.settle(bench.settings)  # what the service does when it is started again
        bench.check(old.id)
        assert bench.deployments.get(old.id) == old
        assert bench.shown(old.id) == bench.shown(NAME) == shown
        if not died:
            break
    assert step > 3
    if gate == "refused":
        assert set(bench.state()) == {old.id}
        assert bench.candidates() == ([old.id] if bench.target == "ollama" else [])
    else:
        (new,) = set(bench.state()) - {old.id}
        assert bench.deployments.find(NAME) == old
        promotion.promote(new, bench.settings)
        bench.check(new)


@both
@pytest.mark.parametrize("gate", ["passed", "refused"])
def test_the_promoted_one_deployed_again_is_never_changed(bench: Bench, gate: str) -> None:
    old = bench.deployments.get(bench.current())
    shown = bench.shown(old.id)
    how = {
        "name": NAME, "gguf": old.gguf.to_json(), "target": bench.target, "context_tokens": 1024,
        "parallel": 1,
    }  # fmt: skip
    for step in count(1):
        died = bench.die(step, "deploy", gate=gate, **how)
        bench.check(old.id)
        promotion.settle(bench.settings)
        bench.check(old.id)
        assert bench.deployments.get(old.id) == old
        assert bench.shown(old.id) == bench.shown(NAME) == shown
        if not died:
            break


@both
def test_promoting_killed_before_each_step_leaves_the_old_or_the_new_and_finishes_when_done_again(
    bench: Bench,
) -> None:
    bench.promote_next()
    for step in count(1):
        old = bench.current()
        (older,) = set(bench.state()) - {old}
        new = bench.deploy(next(bench.ggufs)).id
        died = bench.die(step, "promote", id=new)
        bench.check(old, new)
        if step % 2:  # what the service does when it is started again
            before = bench.current()
            promotion.settle(bench.settings)
            assert bench.current() == before
            bench.check(before)
        promotion.promote(new, bench.settings)
        bench.check(new)
        assert set(bench.state()) == {old, new}, f"{older} should be gone"
        record = bench.deployments.get(old)
        assert not record.loaded
        if not died:
            break
    assert step > 5


@both
def test_rolling_back_killed_before_each_step_leaves_the_old_or_the_new_and_finishes_when_done_again(
    bench: Bench,
) -> None:
    old = bench.current()
    new = bench.promote_next().id
    for step in count(1):
        died = bench.die(step, "roll_back", name=NAME, from_id=new)
        bench.check(old, new)
        promotion.roll_back(NAME, bench.settings, from_id=new)
        bench.check(old)
        assert not bench.deployments.get(new).loaded
        name = bench.deployments.name(NAME)
        assert name is not None
        assert (name.previous, name.rolled_back) == ((), (new,)), asdict(name)
        promotion.promote(new, bench.settings)
        if not died:
            break
    assert step > 4
