"""The real gateway over stand-in workers, each a process of its own, on free ports."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import grpc
import pytest
from web4.lora.v1 import artifacts_pb2_grpc, deployments_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from web4lora_chassis.artifacts import ArtifactStore, open_store
from web4lora_chassis.rpc import channel, ref_message
from web4lora_chassis.settings import Settings

HERE = Path(__file__).parent
WORKERS = ("trainer", "packager", "deployer")
WAIT_SECONDS = 180  # on a machine with others at work; what is awaited takes a second on an idle one
TERMINAL = (gateway_pb2.RUN_STATE_SUCCEEDED, gateway_pb2.RUN_STATE_FAILED, gateway_pb2.RUN_STATE_CANCELLED)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Stack:
    """Starts and kills processes, and speaks to the gateway."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.control = root / "control"
        self.control.mkdir()
        self.outputs = root / "outputs"
        self.addresses = {name: f"127.0.0.1:{free_port()}" for name in ("gateway", *WORKERS)}
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("WEB4LORA_")},
            "WEB4LORA_HOME": str(root / "home"),
            "WEB4LORA_OUTPUTS": str(self.outputs),
            **{f"WEB4LORA_{name.upper()}_ADDRESS": address for name, address in self.addresses.items()},
        }
        self.settings = Settings(home=root / "home")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.envs: dict[str, dict[str, str]] = {}
        self.channel = channel(self.addresses["gateway"], self.settings)
        self.api = gateway_pb2_grpc.GatewayServiceStub(self.channel)
        self.deployments = deployments_pb2_grpc.DeploymentServiceStub(self.channel)
        self.artifacts = artifacts_pb2_grpc.ArtifactServiceStub(self.channel)

    @property
    def store(self) -> ArtifactStore:
        return open_store(self.settings)

    @property
    def log(self) -> str:
        return (self.root / "gateway.log").read_text()

    def start(self, *names: str) -> None:
        for name in names or (*WORKERS, "gateway"):
            command = (
                [sys.executable, "-m", "web4lora_gateway"]
                if name.startswith("gateway")
                else [
                    sys.executable,
                    str(HERE / "stand_in" / "stand_in_service.py"),
                    name if name in WORKERS else "trainer",
                    str(self.control),
                ]
            )
            with (self.root / f"{name}.log").open("ab") as log:
                self.processes[name] = subprocess.Popen(
                    command,
                    env={**self.env, **self.envs.get(name, {})},
                    stdout=log,
                    stderr=log,
                    cwd=self.root,
                )
        for name in names or (*WORKERS, "gateway"):
            self.wait(lambda name=name: self._listens(name), f"{name} to listen")

    def add_gateway(self, name: str) -> gateway_pb2_grpc.GatewayServiceStub:
        """Let `start` know another gateway with a state folder of its own; return what calls it."""
        self.addresses[name] = f"127.0.0.1:{free_port()}"
        self.envs[name] = {
            "WEB4LORA_HOME": str(self.root / name),
            "WEB4LORA_STORE": self.store.url,
            "WEB4LORA_GATEWAY_ADDRESS": self.addresses[name],
        }
        return gateway_pb2_grpc.GatewayServiceStub(channel(self.addresses[name], self.settings))

    def add_trainer(self, name: str) -> None:
        """Let `start` know another trainer with a state folder of its own, which shares the store."""
        self.addresses[name] = f"127.0.0.1:{free_port()}"
        (self.root / name).mkdir()
        self.envs[name] = {
            "WEB4LORA_HOME": str(self.root / name),
            "WEB4LORA_STORE": self.store.url,
            "WEB4LORA_TRAINER_ADDRESS": self.addresses[name],
        }
        known = self.env.get("WEB4LORA_TRAINERS", "")
        self.env["WEB4LORA_TRAINERS"] = ",".join(filter(None, [known, f"{name}={self.addresses[name]}"]))

    def kill(self, name: str, how: int = signal.SIGKILL) -> int:
        process = self.processes.pop(name)
        process.send_signal(how)
        return process.wait(timeout=30)

    def stop(self) -> None:
        self.channel.close()
        for name in list(self.processes):
            self.processes[name].send_signal(signal.SIGCONT)
            self.kill(name, signal.SIGKILL)

    def hold(self, kind: str) -> None:
        (self.control / f"hold-{kind}").touch()

    def release(self, kind: str) -> None:
        (self.control / f"hold-{kind}").unlink()

    def pipeline(self, **train: object) -> gateway_pb2.Pipeline:
        """Store a dataset and a suite and return a pipeline over them."""
        folder = self.root / "data"
        folder.mkdir(exist_ok=True)
        (folder / "tools.jsonl").write_text('{"messages": []}\n')
        (folder / "suite.yaml").write_text("prompts: []\n")
        dataset = self.store.put("dataset", "data", {"train/tools.jsonl": folder / "tools.jsonl"}, link=False)
        suite = self.store.put("suite", "suite", {"suite.yaml": folder / "suite.yaml"}, link=False)
        pipeline = gateway_pb2.Pipeline(name="demo", base={"model": "smollm2-135m-instruct"}, train=train)
        pipeline.dataset.artifact.CopyFrom(ref_message(dataset))
        pipeline.verify.suite.CopyFrom(ref_message(suite))
        return pipeline

    def create(self, pipeline: gateway_pb2.Pipeline | None = None, **fields: object) -> gateway_pb2.Run:
        fields.setdefault("request_id", uuid.uuid4().hex)
        request = gateway_pb2.CreateRunRequest(pipeline=pipeline or self.pipeline(), **fields)
        return self.api.CreateRun(request).run

    def get(self, run_id: str) -> gateway_pb2.Run:
        return self.api.GetRun(gateway_pb2.GetRunRequest(id=run_id)).run

    def watch(self, run_id: str) -> list[gateway_pb2.Run]:
        request = gateway_pb2.WatchRunRequest(id=run_id)
        return [answer.run for answer in self.api.WatchRun(request, timeout=60)]

    def finish(self, run_id: str) -> gateway_pb2.Run:
        """Wait for a run's end, over restarts of the gateway."""
        return self.until(run_id, lambda run: run.state in TERMINAL, "its end")

    def until(self, run_id: str, condition, what: str) -> gateway_pb2.Run:
        found: list[gateway_pb2.Run] = []

        def look() -> bool:
            with contextlib.suppress(grpc.RpcError):
                found.append(self.get(run_id))
            return bool(found) and condition(found[-1])

        self.wait(look, f"{run_id}: {what}", lambda: str(found[-1:]))
        return found[-1]

    def jobs(self, worker: str) -> list[dict]:
        """Return the jobs on the disk of a worker, of all trainers together, oldest first."""
        paths = self.root.glob(f"*/{worker}/jobs/*/job.json")
        return sorted((json.loads(path.read_text()) for path in paths), key=lambda job: job["created_at"])

    def wait(self, condition, what: str, tell=lambda: "") -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"waited too long for {what} {tell()}\n{self._logs()}"
            time.sleep(0.05)

    def _listens(self, name: str) -> bool:
        assert self.processes[name].poll() is None, self._logs()
        host, port = self.addresses[name].split(":")
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) == 0

    def _logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-4000:]}" for path in self.root.glob("*.log"))


@pytest.fixture
def stack(tmp_path: Path):
    made = Stack(tmp_path)
    try:
        yield made
    finally:
        made.stop()


def stage_of(run: gateway_pb2.Run, name: str) -> gateway_pb2.Stage:
    number = gateway_pb2.StageName.Value(f"STAGE_NAME_{name.upper()}")
    return next(stage for stage in run.stages if stage.name == number)


@pytest.fixture
def stage():
    return stage_of


@pytest.fixture
def states():
    """Return the states of a run's stages, in words."""
    return lambda run: [gateway_pb2.StageState.Name(stage.state)[12:] for stage in run.stages]
