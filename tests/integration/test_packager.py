"""The real packager over a real socket: a tiny Llama merged, converted, quantized, loaded and stored."""

from __future__ import annotations

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

import grpc
import psutil
import pytest
from safetensors.numpy import load_file, save_file
from web4.lora.v1 import artifacts_pb2, jobs_pb2, jobs_pb2_grpc, packager_pb2, packager_pb2_grpc
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore, hash_file, open_store
from web4lora_chassis.errors import InvalidInput, NotFound
from web4lora_chassis.model_files.gguf import read_gguf
from web4lora_chassis.model_files.trained_conversations import Conversation, TrainedConversations, Turn
from web4lora_chassis.rpc import channel, error_of, ref_message, ref_of
from web4lora_chassis.settings import load
from web4lora_llamacpp import LlamaCpp
from web4lora_packager.child import ask
from web4lora_packager.settings import PackagerSettings

from tests import tiny_llama

pytestmark = pytest.mark.timeout(900)
Job = jobs_pb2.Job


class Stack:
    """A packager process that can be killed and started again, and a store with something to package."""

    def __init__(self, folder: Path, base: Path, adapter: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.settings = load(
            PackagerSettings,
            home=folder / "home",
            cache=load(PackagerSettings).cache,
            store=(folder / "store").as_uri(),
            packager_address=address,
        )
        self.store: ArtifactStore = open_store(self.settings)
        self.base = self.store.put("base_model", "tiny", _files(base), link=False)
        self.adapter = self.store.put("adapter", "tiny", _files(adapter), inputs=[self.base], link=False)
        self._log = folder / "packager.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None

    @property
    def api(self) -> packager_pb2_grpc.PackagerServiceStub:
        assert self._channel is not None
        return packager_pb2_grpc.PackagerServiceStub(self._channel)

    @property
    def jobs(self) -> jobs_pb2_grpc.JobServiceStub:
        assert self._channel is not None
        return jobs_pb2_grpc.JobServiceStub(self._channel)

    @property
    def process(self) -> psutil.Process:
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def start(self) -> None:
        env = {
            **os.environ,
            "WEB4LORA_HOME": str(self.settings.home),
            "WEB4LORA_STORE": self.settings.store,
            "WEB4LORA_PACKAGER_ADDRESS": self.settings.packager_address,
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "web4lora_packager"], env=env, stdout=log, stderr=log
            )
        self._channel = channel(self.settings.packager_address, self.settings)
        grpc.channel_ready_future(self._channel).result(60)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        assert self._process is not None
        assert self._channel is not None
        self._channel.close()
        self._process.send_signal(number)
        self._process.wait(30)

    def create(self, request_id: str, spec: packager_pb2.PackageSpec) -> Job:
        request = jobs_pb2.CreateJobRequest(request_id=request_id, spec=jobs_pb2.JobSpec(package=spec))
        return self.jobs.CreateJob(request).job

    def watch(self, job_id: str, until: Callable[[Job], bool]) -> Job:
        """Follow a job until a snapshot is what is waited for; a terminal one ends the stream."""
        for answer in self.jobs.WatchJob(jobs_pb2.WatchJobRequest(id=job_id)):
            if until(answer.job):
                return answer.job
        pytest.fail(f"the job ended otherwise: {answer.job}")

    def spec(self, *quantizations: str) -> packager_pb2.PackageSpec:
        return packager_pb2.PackageSpec(
            name="tiny-demo",
            base=ref_message(self.base),
            adapter=ref_message(self.adapter),
            package=packager_pb2.PackageSettings(quantizations=quantizations),
        )


def _files(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir()}


def _ended(job: Job) -> bool:
    return job.state in (
        jobs_pb2.JOB_STATE_SUCCEEDED,
        jobs_pb2.JOB_STATE_FAILED,
        jobs_pb2.JOB_STATE_CANCELLED,
    )


def _wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _in_phase(phase: str) -> Callable[[Job], bool]:
    return lambda job: job.progress.phase.startswith(phase)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write_base(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return tiny_llama.write_adapter(tmp_path_factory.mktemp("model") / "adapter", base)


@pytest.fixture
def stack(tmp_path: Path, base: Path, adapter: Path, llama_cpp: LlamaCpp) -> Iterator[Stack]:
    stack = Stack(tmp_path, base, adapter)
    stack.start()
    yield stack
    stack.kill(signal.SIGTERM)


def test_packages_a_model(stack: Stack, tmp_path: Path, base: Path, adapter: Path) -> None:
    info = stack.api.GetPackagerInfo(packager_pb2.GetPackagerInfoRequest())
    assert info.llama_cpp_ready
    assert info.tools["llama-cpp-python"]

    spec = stack.spec("Q4_K_M", "Q8_0")
    spec.package.formats[:] = ["gguf", "safetensors"]
    created = stack.create("one", spec)
    job = stack.watch(created.id, _ended)
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.error
    result = job.result.package
    assert result.llama_cpp_version == info.llama_cpp_version
    assert (result.merge.adapter_tensors, result.merge.merged_tensors) == (16, 8)
    (uncompared,) = [gate for gate in result.merge.gates if not gate.passed]
    assert uncompared.measured == "not compared: training kept no answers beside the adapter"
    assert not result.merge.changed_at
    assert 0 < result.merge.relative_effect < 1
    assert result.merge.max_abs_error < 0.01
    assert 0 < result.merge.rounding_error < 0.005

    reference, *quantized = [result.reference, *result.quantized]
    assert (reference.file_name, reference.type, reference.size_reduction) == ("merged_model.gguf", "F16", 0)
    assert [gguf.file_name for gguf in quantized] == ["model.Q4_K_M.gguf", "model.Q8_0.gguf"]
    assert 0.6 < quantized[0].size_reduction < 0.75
    assert 4 < quantized[0].bits_per_weight < 6
    assert 8 < quantized[1].bits_per_weight < 9
    assert all(gguf.loads and gguf.load_seconds > 0 for gguf in (reference, *quantized))

    run = tmp_path / "run"
    for ref in (result.files, *(gguf.artifact for gguf in (reference, *quantized))):
        stack.store.get(ref_of(ref), run)
    for gguf in (reference, *quantized):
        assert (run / gguf.file_name).stat().st_size == gguf.size_bytes
        assert read_gguf(run / gguf.file_name).chat_template == tiny_llama.CHAT_TEMPLATE
    checker = shutil.which("shasum")
    command = [checker, "-a", "256"] if checker else ["sha256sum"]
    told = subprocess.run([*command, "-c", "SHA256SUMS"], cwd=run, check=True, capture_output=True, text=True)
    assert told.stdout.count(": OK") == 4

    modelfile = (run / "Modelfile").read_text()
    assert modelfile.startswith('FROM ./model.Q4_K_M.gguf\nPARAMETER stop "<|im_end|>"\n')
    assert f'SYSTEM "{tiny_llama.SYSTEM}"' in modelfile
    served = json.loads((run / "modelfile.json").read_text())
    assert served["stop"] == ["<|im_end|>", "</s>"]
    assert (served["system"], served["temperature"], served["context_tokens"]) == (tiny_llama.SYSTEM, 0, 2048)
    assert served["license"].startswith('The "tiny" licence.')

    merged = stack.store.get(ref_of(result.merged), tmp_path / "merged")
    assert merged.inputs == (stack.base, stack.adapter)
    proof = ask("prove", tmp_path, base, adapter, tmp_path / "merged")
    assert proof["compared"] == 8
    assert proof["max_abs_error"] > result.merge.max_abs_error  # the base's bfloat16 is coarser than F16
    for path in base.iterdir():
        same = path.read_bytes() == (tmp_path / "merged" / path.name).read_bytes()
        assert same == (path.suffix != ".safetensors"), path.name
    lineage = stack.store.manifest(ref_of(quantized[0].artifact))
    assert lineage.inputs[0] == ref_of(reference.artifact)
    assert stack.store.manifest(ref_of(reference.artifact)).inputs == (stack.base, stack.adapter)
    assert lineage.tools["llama.cpp"] == info.llama_cpp_version

    again = stack.create("one", spec)
    assert again.id == created.id
    assert again.result.package == result


def test_what_training_kept_lies_beside_each_gguf_and_ends_its_answers(
    stack: Stack, tmp_path: Path, base: Path
) -> None:
    # llama.cpp takes <|im_start|> for no end, and looks for Phi-3's tokens by a name.
    start = 3
    adapter = tiny_llama.write_adapter(tmp_path / "kept", base)
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    row = Conversation("f", 1, messages, (5, start), (-100, start), (Turn(1, 1, start),))
    TrainedConversations((row,)).write(adapter)
    ref = stack.store.put("adapter", "kept", _files(adapter), inputs=[stack.base], link=False)
    spec = stack.spec("Q8_0")
    spec.name = "phi3-helper"
    spec.adapter.CopyFrom(ref_message(ref))
    spec.package.adapter_gguf = spec.base_gguf = True
    job = stack.watch(stack.create("kept", spec).id, _ended)
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.error
    result = job.result.package
    gates = {(gate.stage, gate.name): gate for gate in result.merge.gates}
    assert [stage for stage, _ in gates] == ["merge", *["convert"] * 3, *["quantize Q8_0"] * 3]
    assert all(gate.passed for gate in gates.values())
    asked = gates["convert", "same next tokens"]
    assert (asked.answers, len(asked.changed), asked.limit) == (1, 0, "divergence at most 0.1 at any token")
    assert gates["quantize Q8_0", "same next tokens"].answers == 1
    assert result.merge.changed_at
    for gguf in (result.reference, *result.quantized):
        folder = tmp_path / gguf.type
        stack.store.get(ref_of(gguf.artifact), folder)
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            [gguf.file_name, "trained_conversations.json"]
        )
        copied = (folder / "trained_conversations.json").read_bytes()
        assert copied == (adapter / "trained_conversations.json").read_bytes()
        header = read_gguf(folder / gguf.file_name)
        assert (header.values["general.name"], header.end_ids) == ("tiny", (4, start))
        assert sum(gguf.weights_by_type.values()) == header.parameters
        assert gguf.contents == ""
    stack.store.get(ref_of(result.files), tmp_path / "files")
    assert json.loads((tmp_path / "files" / "modelfile.json").read_text())["stop"][0] == "<|im_start|>"
    for made, ends in ((result.adapter_base.artifact, (4, start)), (result.base_gguf, (4,))):
        folder = tmp_path / made.digest
        stack.store.get(ref_of(made), folder)
        assert read_gguf(next(folder.iterdir())).end_ids == ends  # the untrained one as it came
    spec.name = "another"
    again = stack.watch(stack.create("again", spec).id, _ended).result.package
    assert (again.adapter_base.artifact, again.base_gguf) == (result.adapter_base.artifact, result.base_gguf)


def test_a_head_that_llama_cpp_has_no_place_for_is_refused(stack: Stack, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tiny_llama.write_base(tmp_path / "gemma")
    config = transformers.GemmaConfig(
        vocab_size=json.loads((folder / "config.json").read_text())["vocab_size"], hidden_size=64,
        intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    adapter = tiny_llama.write_adapter(
        tmp_path / "whole", folder,
        modules=("q_proj",), rank=4, modules_to_save=["embed_tokens"],
        extra={"base_model.model.model.embed_tokens.weight": embedding + 1},
    )  # fmt: skip
    base = stack.store.put("base_model", "gemma", _files(folder), link=False)
    ref = stack.store.put("adapter", "whole", _files(adapter), inputs=[base], link=False)
    spec = stack.spec("Q8_0")
    spec.base.CopyFrom(ref_message(base))
    spec.adapter.CopyFrom(ref_message(ref))
    job = stack.watch(stack.create("whole", spec).id, _ended)
    assert job.error.reason == "HEAD_NOT_CONVERTIBLE", job.error
    assert "gemma has one tensor for both" in job.error.message


def test_an_importance_matrix_is_made_from_base_and_training_data(
    stack: Stack, tmp_path: Path, base: Path
) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {n}"},
                {"role": "assistant", "content": "jumps over " * 9},
            ]
        }
        for n in range(60)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = stack.store.put("dataset", "tiny", {"train/a.jsonl": tmp_path / "a.jsonl"}, link=False)
    spec = stack.spec("IQ2_XS")
    spec.package.importance_matrix = True
    spec.dataset.CopyFrom(ref_message(dataset))
    job = stack.watch(stack.create("matrix", spec).id, _ended)
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.error
    (quantized,) = job.result.package.quantized
    assert quantized.bits_per_weight < 4.5
    inputs = stack.store.manifest(ref_of(quantized.artifact)).inputs
    assert dataset in inputs
    stack.store.get(ref_of(quantized.artifact), tmp_path / "quantized")
    (gguf,) = (tmp_path / "quantized").glob("model.*.gguf")
    assert b"quantize.imatrix.file" in gguf.read_bytes()
    assert str(tmp_path.parent).encode() not in gguf.read_bytes()
    (matrix,) = [
        ref
        for ref in inputs
        if [entry.path for entry in stack.store.manifest(ref).files] == ["importance_matrix.gguf"]
    ]
    assert stack.store.manifest(matrix).inputs == (stack.base, dataset)

    # It is the base's: another adapter is quantized with the same one, unless it asks for its own.
    other = tiny_llama.write_adapter(tmp_path / "other", base, seed=5)
    ref = stack.store.put("adapter", "other", _files(other), inputs=[stack.base], link=False)
    spec.adapter.CopyFrom(ref_message(ref))
    for source, same in (("base", True), ("merged", False)):
        spec.package.importance_matrix_from = source
        job = stack.watch(stack.create(f"other, {source}", spec).id, _ended)
        assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.error
        made = stack.store.manifest(ref_of(job.result.package.quantized[0].artifact))
        assert (matrix in made.inputs) == same


def test_a_weight_too_large_for_the_f16_that_was_asked_for_is_refused(
    stack: Stack, tmp_path: Path, base: Path
) -> None:
    folder = tiny_llama.write_adapter(tmp_path / "wide", base)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = tensors[name] + 1e6
    save_file(tensors, folder / "adapter_model.safetensors")
    ref = stack.store.put("adapter", "wide", _files(folder), inputs=[stack.base], link=False)
    spec = stack.spec("Q4_0")
    spec.adapter.CopyFrom(ref_message(ref))
    spec.package.gguf_type = "F16"
    job = stack.watch(stack.create("wide", spec).id, _ended)
    assert job.error.reason == "TOO_LARGE_FOR_F16"


def test_another_base_is_refused(stack: Stack, tmp_path: Path) -> None:
    other = stack.store.put(
        "base_model", "other", _files(tiny_llama.write_base(tmp_path / "other", seed=9)), link=False
    )
    spec = stack.spec()
    spec.base.CopyFrom(ref_message(other))
    job = stack.watch(stack.create("other", spec).id, _ended)
    assert job.state == jobs_pb2.JOB_STATE_FAILED
    assert job.error.reason == "BASE_MISMATCH"
    assert "Merging would give a model nobody trained." in job.error.message
    assert not stack.store.find("gguf")


def test_goes_on_behind_the_last_finished_step_after_a_kill(stack: Stack) -> None:
    job_id = stack.create("killed", stack.spec("Q4_K_M")).id
    stack.watch(job_id, _in_phase("compare with PEFT"))
    children = stack.process.children(recursive=True)
    work = stack.settings.home / "packager" / "jobs" / job_id / "work"
    merged_at = (work / "merged_model.gguf").stat().st_mtime_ns
    stack.kill()
    psutil.wait_procs(children, timeout=20)
    assert not [child for child in children if child.is_running()]  # none works on without its service
    stack.start()
    job = stack.watch(job_id, _ended)
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.error
    assert job.attempt == 2
    assert not job.result.package.HasField("merged")  # nobody asked for it
    place = stack.settings.home.parent / "store" / ref_of(job.result.package.reference.artifact).prefix
    assert (place / "merged_model.gguf").stat().st_mtime_ns == merged_at  # linked: the first attempt's own
    _wait_until(lambda: not work.exists())


def test_a_cancelled_job_leaves_no_process(stack: Stack) -> None:
    job_id = stack.create("cancelled", stack.spec()).id
    stack.watch(job_id, _in_phase("convert"))
    assert stack.process.children(recursive=True)
    stack.jobs.CancelJob(jobs_pb2.CancelJobRequest(id=job_id))
    job = stack.watch(job_id, _ended)
    assert job.state == jobs_pb2.JOB_STATE_CANCELLED
    _wait_until(lambda: not stack.process.children(recursive=True))
    assert not stack.store.find("gguf")


def test_errors_name_what_is_wrong(stack: Stack) -> None:
    with pytest.raises(grpc.RpcError) as bad_type:
        stack.create("bad", stack.spec("Q4"))
    error = error_of(bad_type.value)
    assert isinstance(error, InvalidInput)
    assert error.metadata["field"] == "package.quantizations"
    with pytest.raises(grpc.RpcError) as no_job:
        stack.jobs.GetJob(jobs_pb2.GetJobRequest(id="nothing"))
    assert isinstance(error_of(no_job.value), NotFound)
    gone = stack.spec()
    gone.adapter.CopyFrom(
        artifacts_pb2.ArtifactRef(kind=artifacts_pb2.ARTIFACT_KIND_ADAPTER, name="gone", digest="0" * 64)
    )
    job = stack.watch(stack.create("gone", gone).id, _ended)
    assert (job.state, job.error.reason) == (jobs_pb2.JOB_STATE_FAILED, "NOT_FOUND")
    assert str(ArtifactRef("adapter", "gone", "0" * 64)) in job.error.message


def test_adapter_and_base_are_made_for_llama_server_to_switch(stack: Stack, tmp_path: Path) -> None:
    spec = stack.spec("Q4_K_M", "Q8_0")
    spec.package.adapter_gguf = True
    job = stack.watch(stack.create("switchable", spec).id, _ended)
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.error
    result = job.result.package
    adapter, base = result.adapter_gguf, result.adapter_base
    assert (adapter.file_name, adapter.type, adapter.bits_per_weight) == ("adapter.gguf", "F32", 32)
    assert (base.file_name, base.type) == ("base.Q4_K_M.gguf", "Q4_K_M")
    assert base.size_bytes == pytest.approx(result.quantized[0].size_bytes, abs=64)
    assert adapter.loads
    assert base.loads
    assert adapter.sample == base.sample  # of both together
    assert stack.store.manifest(ref_of(adapter.artifact)).inputs == (stack.base, stack.adapter)
    assert stack.store.manifest(ref_of(base.artifact)).inputs[0] == stack.base
    assert not result.HasField("base_gguf")  # nobody compares with it
    for ref in (adapter.artifact, base.artifact, result.files):
        stack.store.get(ref_of(ref), tmp_path / "run")
    sums = (tmp_path / "run" / "SHA256SUMS").read_text()
    for name in ("adapter.gguf", "base.Q4_K_M.gguf"):
        assert f"{hash_file(tmp_path / 'run' / name)}  {name}\n" in sums
    again = stack.watch(stack.create("again", spec).id, _ended).result.package
    assert (again.adapter_gguf.artifact, again.adapter_base.artifact) == (adapter.artifact, base.artifact)


def test_an_adapter_that_has_no_exact_gguf_fails_before_it_is_merged(
    stack: Stack, tmp_path: Path, base: Path
) -> None:
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    other = tiny_llama.write_adapter(
        tmp_path / "other", base,
        modules_to_save=["embed_tokens"], extra={"base_model.model.model.embed_tokens.weight": embedding + 1},
    )  # fmt: skip
    spec = stack.spec("Q8_0")
    ref = stack.store.put("adapter", "other", _files(other), inputs=[stack.base], link=False)
    spec.adapter.CopyFrom(ref_message(ref))
    spec.package.adapter_gguf = True
    job = stack.watch(stack.create("other", spec).id, _ended)
    assert job.error.reason == "ADAPTER_NOT_CONVERTIBLE"
    assert "modules_to_save" in job.error.message
    assert not stack.store.find("gguf")


def test_the_untrained_base_is_converted_once(stack: Stack, tmp_path: Path) -> None:
    spec = stack.spec("Q8_0")
    assert not stack.watch(stack.create("without", spec).id, _ended).result.package.HasField("base_gguf")
    spec.base_gguf = True
    first = stack.watch(stack.create("first", spec).id, _ended)
    assert first.state == jobs_pb2.JOB_STATE_SUCCEEDED, first.error
    made = ref_of(first.result.package.base_gguf)
    assert stack.store.manifest(made).inputs[0] == stack.base
    stack.store.get(made, tmp_path / "base")
    (file,) = (tmp_path / "base").iterdir()
    # As large as the merged model, and not the merged model.
    assert file.stat().st_size == pytest.approx(first.result.package.reference.size_bytes, abs=64)
    merged = stack.store.manifest(ref_of(first.result.package.reference.artifact)).files[0]
    assert stack.store.manifest(made).files[0].sha256 != merged.sha256
    spec.name = "another-adapter"
    again = stack.watch(stack.create("again", spec).id, _ended)
    assert ref_of(again.result.package.base_gguf) == made
    assert len(list(stack.store.find("gguf", stack.base.name))) == 1
