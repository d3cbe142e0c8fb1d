"""The real trainer over a real socket, with real trainings of a tiny model."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from safetensors.torch import load_file, save_file
from web4.lora.v1 import jobs_pb2, jobs_pb2_grpc, trainer_pb2, trainer_pb2_grpc
from web4lora_chassis.artifacts import ArtifactStore, open_store
from web4lora_chassis.errors import AlreadyExists, InvalidInput
from web4lora_chassis.rpc import channel, error_of, ref_message, ref_of
from web4lora_chassis.settings import Settings, load
from web4lora_llamacpp import LlamaCpp

from tests.tiny_base import make_base

pytestmark = pytest.mark.timeout(400)

COLOURS = ["red", "green", "blue"]
TRAIN = trainer_pb2.TrainSettings(
    lora=trainer_pb2.LoraSettings(rank=4),
    max_steps=12,
    learning_rate=1e-2,
    tokens_per_batch=160,
    checkpoint_steps=2,
    held_out_evaluations=2,
    loss_band=trainer_pb2.LossBand(low=0, high=9),
)
LONG = trainer_pb2.TrainSettings(
    max_steps=5000, tokens_per_batch=160, checkpoint_steps=10, held_out_evaluations=0
)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny-llama"
    folder.mkdir()
    make_base(folder, convertible=True)
    return folder


@pytest.fixture
def settings(tmp_path: Path, llama_cpp: LlamaCpp, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("WEB4LORA_LLAMA_CPP", str(llama_cpp.bin))
    monkeypatch.setenv("WEB4LORA_LLAMA_CPP_SOURCE", str(llama_cpp.source))
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return load(
        Settings, home=tmp_path / "home", cache=tmp_path / "cache", store=(tmp_path / "store").as_uri(),
        trainer_address=f"127.0.0.1:{port}",
    )  # fmt: skip


class Service:
    """A trainer process that can be killed and started again."""

    def __init__(self, settings: Settings, log: Path) -> None:
        self.store: ArtifactStore = open_store(settings)
        self._settings = settings
        self._log = log
        self.process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None

    @property
    def api(self) -> trainer_pb2_grpc.TrainerServiceStub:
        assert self._channel is not None
        return trainer_pb2_grpc.TrainerServiceStub(self._channel)

    @property
    def jobs(self) -> jobs_pb2_grpc.JobServiceStub:
        assert self._channel is not None
        return jobs_pb2_grpc.JobServiceStub(self._channel)

    def start(self) -> None:
        settings = self._settings
        env = {
            **os.environ,
            "WEB4LORA_HOME": str(settings.home),
            "WEB4LORA_CACHE": str(settings.cache),
            "WEB4LORA_STORE": settings.store,
            "WEB4LORA_TRAINER_ADDRESS": settings.trainer_address,
            "OMP_NUM_THREADS": "1",
        }
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "web4lora_trainer"], env=env, stdout=log, stderr=log
            )
        self._channel = channel(settings.trainer_address, settings)
        grpc.channel_ready_future(self._channel).result(timeout=60)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self._channel is not None:
            self._channel.close()
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(timeout=30)

    def workers(self) -> list[psutil.Process]:
        """Return the child processes of the jobs at work."""
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def service(settings: Settings, tmp_path: Path) -> Iterator[Service]:
    service = Service(settings, tmp_path / "trainer.log")
    service.start()
    yield service
    service.stop()


def rows(count: int, start: int = 0) -> str:
    lines = []
    for index in range(start, start + count):
        messages = [
            {"role": "user", "content": "question " * (1 + index % 4) + str(index)},
            {"role": "assistant", "content": COLOURS[index % 3]},
        ]
        lines.append(json.dumps({"id": f"r{index}", "core": "tool", "messages": messages}))
    return "\n".join(lines) + "\n"


def put_dataset(service: Service, folder: Path, train: str) -> Any:
    folder.mkdir()
    (folder / "train.jsonl").write_text(train)
    (folder / "eval.jsonl").write_text(rows(5, 100))
    files = {"train/rows.jsonl": folder / "train.jsonl", "eval/rows.jsonl": folder / "eval.jsonl"}
    return ref_message(service.store.put("dataset", "colours", files, link=False))


@pytest.fixture
def dataset(service: Service, tmp_path: Path) -> Any:
    return put_dataset(service, tmp_path / "data", rows(18))


def create(service: Service, request_id: str, **spec: Any) -> str:
    request = jobs_pb2.CreateJobRequest(request_id=request_id, spec=jobs_pb2.JobSpec(**spec))
    return str(service.jobs.CreateJob(request).job.id)


def get(service: Service, job_id: str) -> jobs_pb2.Job:
    return service.jobs.GetJob(jobs_pb2.GetJobRequest(id=job_id)).job


def follow(service: Service, job_id: str) -> list[jobs_pb2.Job]:
    """Watch a job to its end and return what was seen."""
    request = jobs_pb2.WatchJobRequest(id=job_id)
    return [answer.job for answer in service.jobs.WatchJob(request, timeout=300)]


def wait_for(service: Service, job_id: str, reached: Callable[[jobs_pb2.Job], bool]) -> jobs_pb2.Job:
    deadline = time.monotonic() + 200
    while not reached(job := get(service, job_id)):
        assert time.monotonic() < deadline, f"the job stayed at {job}"
        assert job.state not in (jobs_pb2.JOB_STATE_FAILED, jobs_pb2.JOB_STATE_SUCCEEDED), job
        time.sleep(0.05)
    return job


def training(step: int) -> Callable[[jobs_pb2.Job], bool]:
    return lambda job: job.progress.phase == "train" and job.progress.done >= step


def prepared_base(service: Service, dataset: Any, tiny_base: Path) -> trainer_pb2.PrepareResult:
    base = trainer_pb2.BaseModelSpec(model=str(tiny_base))
    spec = trainer_pb2.PrepareSpec(dataset=dataset, base=base, train=TRAIN)
    last = follow(service, create(service, "prepare", prepare=spec))[-1]
    assert last.state == jobs_pb2.JOB_STATE_SUCCEEDED, last.error
    return last.result.prepare


def test_prepare_and_train_give_an_adapter_in_the_store(
    service: Service, dataset: Any, tiny_base: Path, tmp_path: Path
) -> None:
    info = service.api.GetTrainerInfo(trainer_pb2.GetTrainerInfoRequest())
    assert info.device
    assert info.tools["torch"] != "not installed"
    assert 0 < info.free_memory_bytes <= info.memory_bytes

    prepared = prepared_base(service, dataset, tiny_base)
    assert prepared.base.name == "tiny-llama"
    assert (prepared.dataset.train_rows, prepared.dataset.eval_rows) == (18, 5)
    assert dict(prepared.dataset.rows_by_core) == {"tool": 18}
    assert 0 < prepared.dataset.trained_tokens < prepared.dataset.tokens
    assert prepared.estimate.steps == 12
    assert prepared.estimate.seconds > 0
    assert (tiny_base / "model.safetensors").stat().st_mode & 0o200, "the user's own file was made read-only"

    spec = trainer_pb2.TrainSpec(name="colours", dataset=dataset, base=prepared.base, train=TRAIN)
    job_id = create(service, "train", train=spec)
    assert create(service, "train", train=spec) == job_id
    seen = follow(service, job_id)
    last = seen[-1]
    assert last.state == jobs_pb2.JOB_STATE_SUCCEEDED, last.error
    steps = [job.progress for job in seen if job.progress.phase == "train"]
    assert steps[-1].total == 12
    assert steps[-1].figures["tokens_per_second"] > 0
    assert "loss " in steps[-1].message

    result = last.result.train
    assert result.steps == 12
    assert result.held_out_loss > 0
    assert result.verdict
    manifest = service.store.get(ref_of(result.adapter), tmp_path / "adapter")
    assert {entry.path for entry in manifest.files} >= {
        "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "trainer_state.json",
        "trained_conversations.json",
        "tokenizer.json", "logs/loss.csv", "logs/loss.png",
    }  # fmt: skip
    assert [ref.kind for ref in manifest.inputs] == ["dataset", "base_model"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-llama"

    with pytest.raises(grpc.RpcError) as caught:
        create(
            service, "train", train=trainer_pb2.TrainSpec(name="other", dataset=dataset, base=prepared.base)
        )
    assert isinstance(error_of(caught.value), AlreadyExists)
    bad = trainer_pb2.TrainSpec(
        name="a", dataset=dataset, base=prepared.base, train=trainer_pb2.TrainSettings(learning_rate=-1)
    )
    with pytest.raises(grpc.RpcError) as caught:
        create(service, "bad", train=bad)
    refused = error_of(caught.value)
    assert isinstance(refused, InvalidInput)
    assert refused.metadata["field"] == "train.learning_rate"


def test_a_training_goes_on_from_an_adapter_of_the_same_base_and_shape(
    service: Service, dataset: Any, tiny_base: Path, tmp_path: Path
) -> None:
    base = prepared_base(service, dataset, tiny_base).base
    spec = trainer_pb2.TrainSpec(name="colours", dataset=dataset, base=base, train=TRAIN)
    first = follow(service, create(service, "first", train=spec))[-1].result.train.adapter

    setattr(spec.train, "from", first.digest)
    last = follow(service, create(service, "second", train=spec))[-1]
    assert last.state == jobs_pb2.JOB_STATE_SUCCEEDED, last.error
    manifest = service.store.manifest(ref_of(last.result.train.adapter))
    assert [ref.digest for ref in manifest.inputs] == [dataset.digest, base.digest, first.digest]
    assert json.loads(manifest.parameters["start_from"]) == first.digest

    other = shutil.copytree(tiny_base, tmp_path / "other-llama")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})

    def prepare(name: str, folder: Path) -> Any:
        wanted = trainer_pb2.BaseModelSpec(model=str(folder))
        asked = trainer_pb2.PrepareSpec(dataset=dataset, base=wanted, train=spec.train)
        return follow(service, create(service, name, prepare=asked))[-1]

    refused = prepare("another base", other)
    assert refused.state == jobs_pb2.JOB_STATE_FAILED
    assert "train.from: adapter/colours@" in refused.error.message
    assert "was trained on base_model/tiny-llama@" in refused.error.message
    spec.train.lora.rank = 8
    refused = prepare("another rank", tiny_base)
    assert refused.error.message.startswith("train.lora.rank: 8 is not 4, with which adapter/colours@")
    setattr(spec.train, "from", "run_2026-01-01_1")
    with pytest.raises(grpc.RpcError) as caught:
        create(service, "run", train=spec)
    assert error_of(caught.value).metadata["field"] == "train.from"


def test_bad_data_fails_before_anything_is_loaded(service: Service, tiny_base: Path, tmp_path: Path) -> None:
    dataset = put_dataset(service, tmp_path / "data", rows(2) + '{"messages": []}\n{"mess\n')
    base = trainer_pb2.BaseModelSpec(model="/nowhere/at/all")  # never looked at
    spec = trainer_pb2.PrepareSpec(dataset=dataset, base=base)
    last = follow(service, create(service, "prepare", prepare=spec))[-1]
    assert last.state == jobs_pb2.JOB_STATE_FAILED
    assert last.error.reason == "DATASET_INVALID"
    assert "rows.jsonl:3: " in last.error.message
    assert "2 problems" in last.error.message


def test_a_killed_service_goes_on_from_the_last_checkpoint(
    service: Service, dataset: Any, tiny_base: Path, tmp_path: Path
) -> None:
    base = prepared_base(service, dataset, tiny_base).base
    settings = trainer_pb2.TrainSettings()
    settings.CopyFrom(TRAIN)
    settings.max_steps = 400
    settings.checkpoint_steps = 20
    spec = trainer_pb2.TrainSpec(name="colours", dataset=dataset, base=base, train=settings)
    job_id = create(service, "train", train=spec)
    wait_for(service, job_id, training(50))
    workers = service.workers()
    service.kill()
    psutil.wait_procs(workers, timeout=20)
    assert not [worker for worker in workers if worker.is_running()], "the worker outlived its service"

    service.start()
    seen = follow(service, job_id)
    last = seen[-1]
    assert last.state == jobs_pb2.JOB_STATE_SUCCEEDED, last.error
    assert last.attempt == 2
    assert any("resumed at step" in job.progress.message for job in seen)
    service.store.get(ref_of(last.result.train.adapter), tmp_path / "adapter")
    with (tmp_path / "adapter" / "logs" / "loss.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, 401))


def test_a_killed_worker_goes_on_with_the_same_steps(service: Service, dataset: Any, tiny_base: Path) -> None:
    base = prepared_base(service, dataset, tiny_base).base
    settings = trainer_pb2.TrainSettings()
    settings.CopyFrom(TRAIN)
    settings.max_steps = 200
    spec = trainer_pb2.TrainSpec(name="colours", dataset=dataset, base=base, train=settings)
    job_id = create(service, "train", train=spec)
    wait_for(service, job_id, training(10))
    for worker in service.workers():
        worker.kill()
    last = follow(service, job_id)[-1]
    assert last.state == jobs_pb2.JOB_STATE_SUCCEEDED, last.error
    assert last.attempt == 2
    assert last.result.train.steps == 200
    # The kill may come while a checkpoint is being saved; that one is then left out, and said. Nothing else.
    assert [event for event in last.result.train.events if "is not whole" not in event] == []


def test_the_next_job_of_a_cancelled_training_goes_on_with_it(
    service: Service, settings: Settings, dataset: Any, tiny_base: Path
) -> None:
    base = prepared_base(service, dataset, tiny_base).base
    wanted = trainer_pb2.TrainSettings()
    wanted.CopyFrom(TRAIN)
    wanted.max_steps = 200
    spec = trainer_pb2.TrainSpec(name="colours", dataset=dataset, base=base, train=wanted)
    first = create(service, "first", train=spec)
    wait_for(service, first, training(10))
    service.jobs.CancelJob(jobs_pb2.CancelJobRequest(id=first))
    assert follow(service, first)[-1].state == jobs_pb2.JOB_STATE_CANCELLED

    seen = follow(service, create(service, "again", train=spec))
    assert seen[-1].state == jobs_pb2.JOB_STATE_SUCCEEDED, seen[-1].error
    assert seen[-1].result.train.steps == 200
    assert any("resumed at step" in job.progress.message for job in seen)
    assert [path.name for path in (settings.home / "trainer" / "trainings").iterdir()] == ["lock"]


def test_cancel_ends_the_worker_within_seconds(service: Service, dataset: Any, tiny_base: Path) -> None:
    base = prepared_base(service, dataset, tiny_base).base
    spec = trainer_pb2.TrainSpec(name="colours", dataset=dataset, base=base, train=LONG)
    job_id = create(service, "train", train=spec)
    wait_for(service, job_id, training(1))
    workers = service.workers()
    service.jobs.CancelJob(jobs_pb2.CancelJobRequest(id=job_id))
    last = follow(service, job_id)[-1]
    assert last.state == jobs_pb2.JOB_STATE_CANCELLED
    psutil.wait_procs(workers, timeout=20)
    assert not [worker for worker in workers if worker.is_running()]
