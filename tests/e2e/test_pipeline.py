"""The whole way on the real thing: real training, real llama.cpp, a real model that answers.

The training is a few steps long, so the model learns next to nothing; what is proven is that everything
arrives, is what it says it is, and survives the death of the process that was at work.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import torch
import yaml
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from PIL import Image
from safetensors.torch import load_file
from web4.lora.v1 import (
    deployments_pb2,
    deployments_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    packager_pb2,
    packager_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
)
from web4lora_llamacpp import LlamaCpp

from tests.servers.fixtures import program
from tests.servers.native import SERVICES, Machine

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "trainer_state.json",
    "trained_conversations.json",
    "tokenizer.json", "logs/loss.csv", "logs/loss.png", "merged_model.gguf", "model.Q4_K_M.gguf", "Modelfile",
    "SHA256SUMS", "eval_log.md", "eval.json", "drawio_diagram.png", "run.json",
)  # fmt: skip
STEPS = 24
CHECKPOINT_STEPS = 3

pytestmark = pytest.mark.timeout(2400)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    made = Machine(tmp_path_factory.mktemp("e2e"))
    yield made
    subprocess.run(made.command("down"), env=made.env, cwd=made.root, capture_output=True, check=False)
    assert made.left_over() == []


@pytest.fixture(scope="module")
def pipeline(machine: Machine) -> Path:
    """A small pipeline on real data and the real small model."""
    source = ROOT / "examples" / "web4"
    for name, rows in (("tool_core.train.jsonl", 120), ("tool_core.eval.jsonl", 4)):
        lines = (source / name).read_text("utf-8").splitlines(keepends=True)[:rows]
        (machine.root / name).write_text("".join(lines), "utf-8")
    core = {"check": "tool_call", "prompts": "tool_core.eval.jsonl", "max_tokens": 40}
    (machine.root / "suite.yaml").write_text(yaml.safe_dump({"name": "small", "cores": {"tool": core}}))
    wanted = {
        "name": "e2e",
        "dataset": {"train_files": ["tool_core.train.jsonl"], "eval_files": ["tool_core.eval.jsonl"]},
        "base": {"model": "smollm2-135m-instruct"},
        "train": {
            "max_steps": STEPS, "learning_rate": 1e-3, "max_length_tokens": 512, "lora": {"last_layers": 6},
            "checkpoint_steps": CHECKPOINT_STEPS, "held_out_evaluations": 1,
        },
        "package": {"quantizations": ["Q4_K_M"], "context_tokens": 1024},
        "deploy": {"target": "llama-server", "context_tokens": 1024, "parallel": 2},
        "verify": {"suite_file": "suite.yaml"},
    }  # fmt: skip
    path = machine.root / "pipeline.yaml"
    path.write_text(yaml.safe_dump(wanted))
    return path


@pytest.fixture(scope="module")
def folder(machine: Machine, pipeline: Path, llama_cpp: LlamaCpp) -> Path:
    """The folder of a run whose trainer was killed, worker and all, in the middle of training."""
    machine.run("up")
    run_id = json.loads(machine.run("run", str(pipeline), "--detach", "--json"))["id"]
    trainings = machine.home / "trainer" / "trainings"
    _wait(lambda: any(trainings.glob("*/checkpoints/checkpoint-*/files.json")), "a first checkpoint")
    trainer = machine.process("trainer")
    assert trainer is not None
    for process in (trainer, *trainer.children(recursive=True)):
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs([trainer], timeout=30)
    machine.run("up")
    done = json.loads(machine.run("runs", "watch", run_id, "--json").splitlines()[-1])["run"]
    assert done["state"] == "RUN_STATE_SUCCEEDED", done
    return machine.root / "outputs" / run_id


def test_every_file_is_there_and_is_what_it_says(folder: Path) -> None:
    assert [name for name in FILES if not (folder / name).is_file()] == []
    assert (folder.parent / "latest").resolve() == folder.resolve()
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split(maxsplit=1)
        assert hashlib.sha256((folder / name.lstrip("*")).read_bytes()).hexdigest() == digest
    tensors = load_file(folder / "adapter_model.safetensors")
    plain = torch.load(folder / "adapter_model.bin", weights_only=True)
    assert tensors.keys() == plain.keys()
    assert all(torch.equal(tensors[name], plain[name]) for name in tensors)
    with Image.open(folder / "drawio_diagram.png") as picture:
        assert "mxfile" in picture.info
    assert "FROM ./model.Q4_K_M.gguf" in (folder / "Modelfile").read_text()


def test_the_killed_training_went_on_from_its_checkpoint(machine: Machine, folder: Path) -> None:
    facts: dict[str, Any] = json.loads((folder / "run.json").read_text())
    assert facts["train"]["steps"] == STEPS
    rows = (folder / "logs" / "loss.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(1, STEPS + 1))
    [record] = (machine.home / "trainer" / "jobs").glob("train-*/job.json")
    assert json.loads(record.read_text())["attempt"] == 2
    assert "checkpoint" in (record.parent / "log.txt").read_text()


def test_the_deployed_model_answers(machine: Machine, folder: Path) -> None:
    [deployment] = json.loads(machine.run("deployments", "list", "--json"))
    answer = httpx2.post(
        f"{deployment['endpoint']}/chat/completions",
        json={
            "model": deployment["model"],
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 8,
        },
        timeout=60,
    )
    assert answer.json()["choices"][0]["message"]["content"]
    assert machine.run("chat", "e2e", "Hello").strip()


def test_the_same_inputs_are_not_run_again(machine: Machine, pipeline: Path, folder: Path) -> None:
    again = json.loads(machine.run("run", str(pipeline), "--json"))
    states = {stage["name"]: stage["state"] for stage in again["stages"]}
    assert states["STAGE_NAME_TRAIN"] == states["STAGE_NAME_PACKAGE"] == "STAGE_STATE_REUSED"


def test_each_service_answers_the_generated_stubs(machine: Machine, folder: Path) -> None:
    with machine.channel("trainer") as channel:
        trainer = trainer_pb2_grpc.TrainerServiceStub(channel)
        assert trainer.GetTrainerInfo(trainer_pb2.GetTrainerInfoRequest()).device
        jobs = jobs_pb2_grpc.JobServiceStub(channel).ListJobs(jobs_pb2.ListJobsRequest()).jobs
        assert {job.spec.WhichOneof("kind") for job in jobs} == {"prepare", "train"}
    with machine.channel("packager") as channel:
        packager = packager_pb2_grpc.PackagerServiceStub(channel)
        assert packager.GetPackagerInfo(packager_pb2.GetPackagerInfoRequest()).llama_cpp_ready
    with machine.channel("deployer") as channel:
        deployments = deployments_pb2_grpc.DeploymentServiceStub(channel)
        assert deployments.ListDeployments(deployments_pb2.ListDeploymentsRequest()).deployments
    with machine.channel("gateway") as channel:
        gateway = gateway_pb2_grpc.GatewayServiceStub(channel)
        run = gateway.GetRun(gateway_pb2.GetRunRequest(id=folder.name)).run
        assert run.state == gateway_pb2.RUN_STATE_SUCCEEDED


@pytest.mark.parametrize("service", SERVICES)
def test_each_service_can_be_called_by_reflection_alone(machine: Machine, folder: Path, service: str) -> None:
    name = f"web4.lora.v1.{service.capitalize()}Service"
    with machine.channel(service) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        method = pool.FindServiceByName(name).FindMethodByName(f"Get{service.capitalize()}Info")
        call = channel.unary_unary(
            f"/{name}/{method.name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        assert call(GetMessageClass(method.input_type)()).version


def test_the_readme_s_grpcurl_line_works(machine: Machine, folder: Path) -> None:
    line = next(
        line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.startswith("grpcurl ")
    )
    line = line.replace("127.0.0.1:8461", machine.address("gateway")).replace(
        ".web4lora/", f"{machine.home}/"
    )
    done = subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "NO_PROXY": "*", "PATH": f"{program('grpcurl').parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert folder.name in done.stdout


def _wait(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 900
    while not true():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.2)
