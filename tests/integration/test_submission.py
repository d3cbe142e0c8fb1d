"""What can be known before a run starts is said when it is submitted, with file and line.

The real command, gateway and deployer; no trainer and no packager are there, since nothing may come to them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from web4.lora.v1 import (
    artifacts_pb2,
    deployments_pb2,
    deployments_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
)
from web4lora_chassis.artifacts import open_store
from web4lora_chassis.rpc import error_of, ref_message
from web4lora_chassis.settings import Settings

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples/web4"
ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
PIPELINE = """\
name: web4-demo
dataset:
  train_files: [train.jsonl]
base: {model: smollm2-135m-instruct}
"""
SUITE = """\
name: a
cores:
  tool:
    check: tool_call
    prompts: prompts.jsonl
    max_tokens: 20
  guard:
    check: guardrail
    prompts: guard.jsonl
    max_tokens: 20
"""
PROMPT = {**ROW, "id": "t1", "core": "tool", "check": {"tool": "send", "args": {}}}
GUARD = {**ROW, "id": "g1", "core": "guard", "check": {"refuse": True}}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Desk:
    """A folder with a pipeline, and the services that a submission needs."""

    folder: Path
    env: dict[str, str]
    deployer: subprocess.Popen[bytes]

    def write(self, pipeline: str, suite: str = SUITE, **rows: list[dict[str, object]]) -> None:
        (self.folder / "pipeline.yaml").write_text(pipeline, "utf-8")
        (self.folder / "the_suite.yaml").write_text(suite, "utf-8")
        files = {"train": [ROW], "prompts": [PROMPT], "guard": [GUARD], **rows}
        for name, given in files.items():
            lines = "".join(json.dumps(row) + "\n" for row in given)
            (self.folder / f"{name}.jsonl").write_text(lines, "utf-8")

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Submit the pipeline, and look no further."""
        command = [sys.executable, "-m", "web4lora", "run", "pipeline.yaml", "--detach", *words]
        return subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=120
        )

    def refused(self, *words: str) -> list[str]:
        """Submit a pipeline that is refused; return the lines that say why, without signs."""
        done = self.run(*words)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "This is a defect" not in done.stderr
        return [line.removeprefix("✗ ").strip() for line in done.stderr.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    root = tmp_path_factory.mktemp("submission")
    env = {name: value for name, value in os.environ.items() if not name.startswith("WEB4LORA_")}
    ports = {name: free_port() for name in ("gateway", "trainer", "packager", "deployer")}
    env |= {f"WEB4LORA_{name.upper()}_ADDRESS": f"127.0.0.1:{port}" for name, port in ports.items()}
    env |= {"WEB4LORA_HOME": str(root / "home"), "NO_COLOR": "1", "COLUMNS": "400"}
    env |= {"WEB4LORA_LLAMA_SERVER_FIRST_PORT": str(free_port())}
    started = []
    with (root / "log").open("wb") as log:
        for name in ("deployer", "gateway"):
            command = [sys.executable, "-m", f"web4lora_{name}"]
            started.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    try:
        for name in ("deployer", "gateway"):
            with grpc.insecure_channel(f"127.0.0.1:{ports[name]}") as channel:
                grpc.channel_ready_future(channel).result(timeout=120)
        yield Desk(root / "desk", env, started[0])
    finally:
        for process in started:
            process.terminate()
            process.wait(timeout=60)


@pytest.fixture
def desk(services: Desk) -> Desk:
    shutil.rmtree(services.folder, ignore_errors=True)
    services.folder.mkdir()
    return services


@pytest.mark.parametrize(
    ("added", "line", "said"),
    [
        ("package:\n  quantizations:\n    - Q8_0\n    - Q4_K\n", 8, "did you mean Q4_K_M?"),
        ("package: {quantizations: [Q3_K]}\n", 5, "did you mean Q3_K_M?"),
        ("package: {quantizations: [q8_0]}\n", 5, "did you mean Q8_0?"),
        ("package: {quantizations: [F16]}\n", 5, "the 16-bit GGUF is made anyway"),
        ("package:\n  quantizations: [Q8_0, IQ2_XXS]\n", 6, "IQ2_XXS needs an importance matrix"),
        (
            "package:\n  importance_matrix: true\n  quantizations: [IQ1_S]\n  adapter_gguf: true\n",
            8,
            "Put another type first",
        ),
        ("train:\n  lora:\n    target_modules: [1abc]\n", 7, "'1abc' is not the name of a layer"),
        ("train: {learning_rate: 1e-9}\n", 5, "at least 1e-08"),
        ("train: {epochs: 1e-4}\n", 5, "at least 0.001"),
        ("train: {max_steps: 20000000}\n", 5, "at most 10000000"),
        ("train:\n  lora: {dropout: 0.97}\n", 6, "at most 0.95"),
        ("deploy: {context_tokens: 2}\n", 5, "at least 128"),
        ("package: {temperature: 9}\n", 5, "at most 2"),
        ("verify:\n  budgets:\n    min_score_percent:\n      tool_call.valid: 95\n", 8, "no suite is named"),
    ],
)
def test_a_setting_that_no_worker_would_take(desk: Desk, added: str, line: int, said: str) -> None:
    desk.write(PIPELINE + added)
    first = desk.refused()[0]
    assert f"pipeline.yaml:{line}: " in first
    assert said in first


def test_a_name_has_one_rule_and_it_comes_first(desk: Desk) -> None:
    for name in ("My-Model", "my_model", "a--b", "a-", "1a"):
        desk.write(PIPELINE.replace("web4-demo", name))
        first = desk.refused()[0]
        assert f"pipeline.yaml:1: name: '{name}' is not a pipeline name" in first
        assert "Use 1 to 63 of a-z and 0-9 with single dashes within" in first


def test_all_problems_are_listed(desk: Desk) -> None:
    desk.write(PIPELINE.replace("web4-demo", "My-Model") + "package: {quantizations: [Q4_K]}\nzz: 1\n")
    lines = desk.refused("--set", "train.lora.rank=0")
    text = "\n".join(lines)
    for said in (
        "pipeline.yaml:1: name:",
        "pipeline.yaml:5: package.",
        "pipeline.yaml:6: zz",
        "--set train.lora",
    ):
        assert said in text


def suited(budgets: str = "") -> str:
    return PIPELINE + "verify:\n  suite_file: the_suite.yaml\n" + budgets


@pytest.mark.parametrize(
    ("suite", "rows", "said"),
    [
        (SUITE.replace("check: tool_call", "check: tool_cal"), {}, ["the_suite.yaml:4: ", "'tool_call'"]),
        (SUITE.replace("max_tokens: 20", "max_tokens: 0", 1), {}, ["the_suite.yaml:6: ", "max_tokens"]),
        (SUITE + "seeed: 1\n", {}, ["the_suite.yaml:11: ", 'did you mean "seed"?']),
        (SUITE + "repeats: 101\n", {}, ["the_suite.yaml:11: ", "repeats"]),
        (SUITE, {"prompts": []}, ["prompts.jsonl: ", "there is no row in it"]),
        (SUITE, {"prompts": [PROMPT, PROMPT]}, ["prompts.jsonl:2: ", 'the id "t1" was used before']),
        (SUITE, {"prompts": [{**PROMPT, "check": {"args": {}}}]}, ["prompts.jsonl:1: ", '"tool": NAME']),
        (
            SUITE,
            {"prompts": [{**PROMPT, "messages": [{"role": "user", "content": " "}, ROW["messages"][1]]}]},
            ["prompts.jsonl:1: ", "message 1 has no text"],
        ),
    ],
)
def test_a_suite_that_could_not_be_run(
    desk: Desk, suite: str, rows: dict[str, list[dict[str, object]]], said: list[str]
) -> None:
    desk.write(suited(), suite, **rows)
    first = desk.refused()[0]
    for words in said:
        assert words in first
    assert "web4lora-suite-" not in first, "a path of the deployer's says nothing here"


def test_pipeline_data_and_suite_are_refused_in_one_round(desk: Desk) -> None:
    wrong = {"train": [{}], "prompts": [PROMPT, PROMPT], "suite": SUITE + "repeats: 101\n"}
    said = ["train.jsonl:1: ", "the_suite.yaml:11: repeats", "prompts.jsonl:2: the id"]
    desk.write(suited() + "zz: 1\n", **wrong)  # type: ignore[arg-type]
    found = desk.refused()
    assert [words in line for words, line in zip(["pipeline.yaml:7: ", *said], found, strict=False)] == [
        True
    ] * 4
    desk.write(suited(), **wrong)  # type: ignore[arg-type]
    text = "\n".join(desk.refused())
    assert [words for words in said if words not in text] == []


def test_the_gateway_refuses_pipeline_and_suite_in_one_round(desk: Desk) -> None:
    desk.write(suited(), SUITE + "repeats: 101\n")
    (desk.folder / "the_suite.yaml").rename(desk.folder / "suite.yaml")
    files = {name: desk.folder / name for name in ("suite.yaml", "prompts.jsonl", "guard.jsonl")}
    store = open_store(Settings(home=Path(desk.env["WEB4LORA_HOME"])))
    pipeline = gateway_pb2.Pipeline(name="My Model", base={"model": "smollm2-135m-instruct"})
    pipeline.verify.suite.CopyFrom(ref_message(store.put("suite", "a", files, link=False)))
    request = gateway_pb2.CreateRunRequest(request_id=uuid.uuid4().hex, pipeline=pipeline)
    address = desk.env["WEB4LORA_GATEWAY_ADDRESS"]
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        gateway_pb2_grpc.GatewayServiceStub(channel).CreateRun(request, timeout=60)
    error = error_of(caught.value, "the gateway")
    assert error.reason == "BAD_SUITE"
    assert error.metadata["field"].splitlines() == ["name", "dataset.artifact"]
    assert [line.partition(": ")[0] for line in error.message.splitlines()] == [
        "name", "dataset.artifact", "suite.yaml:11",
    ]  # fmt: skip


def test_limits_on_scores_that_the_suite_does_not_give(desk: Desk) -> None:
    scores = "tool_call.vald: 95, tool_call.valid: 95, guardrail.helps: 10, answers.ends: 90"
    desk.write(suited("  budgets:\n    min_score_percent: {" + scores + "}\n"))
    lines = desk.refused()
    assert "pipeline.yaml:8: verify.budgets.min_score_percent.guardrail.helps: " in lines[0]
    assert "; it has tool_call.valid, tool_call.right_tool, tool_call.exact, guardrail.refuses" in lines[0]
    assert "pipeline.yaml:8: verify.budgets.min_score_percent.tool_call.vald: " in lines[1]
    assert "did you mean tool_call.valid?" in lines[1]
    assert len([line for line in lines if "min_score_percent." in line]) == 2


def test_what_is_right_is_taken(desk: Desk) -> None:
    desk.write(suited("  budgets:\n    min_score_percent: {tool_call.valid: 95, guardrail.refuses: 1}\n"))
    done = desk.run()
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["demo.yaml", "qwen2.5-coder-7b.yaml", "deepseek-coder-6.7b.yaml"])
def test_the_examples_are_taken(desk: Desk, name: str) -> None:
    shutil.copytree(EXAMPLES, desk.folder, dirs_exist_ok=True)
    shutil.copy(EXAMPLES / name, desk.folder / "pipeline.yaml")
    done = desk.run()
    assert done.returncode == 0, done.stderr


ODD = ["\x00", "\U0010ffff", "a" * 5000, "../../etc/passwd", "latest\n", "%s", "'; DROP TABLE runs; --"]


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_no_odd_text_in_a_call_is_a_defect(desk: Desk, text: str) -> None:
    address = desk.env["WEB4LORA_GATEWAY_ADDRESS"]
    ref = artifacts_pb2.ArtifactRef(kind="ARTIFACT_KIND_DATASET", name=text, digest=text)
    pipeline = gateway_pb2.Pipeline(name="a", base={"model": text, "revision": text})
    pipeline.dataset.artifact.CopyFrom(ref)
    requests = [
        ("CreateRun", gateway_pb2.CreateRunRequest(request_id=uuid.uuid4().hex, pipeline=pipeline)),
        ("CreateRun", gateway_pb2.CreateRunRequest(request_id=text, pipeline=pipeline)),
        ("GetRun", gateway_pb2.GetRunRequest(id=text)),
        ("ListRuns", gateway_pb2.ListRunsRequest(page_token=text)),
        ("CancelRun", gateway_pb2.CancelRunRequest(id=text)),
        ("RetryRun", gateway_pb2.RetryRunRequest(id=text, request_id=text)),
        ("DeleteDeployment", deployments_pb2.DeleteDeploymentRequest(id=text)),
        ("PromoteDeployment", deployments_pb2.PromoteDeploymentRequest(id=text)),
        ("RollbackDeployment", deployments_pb2.RollbackDeploymentRequest(name=text, from_id=text)),
        ("CreateJob", jobs_pb2.CreateJobRequest(request_id=text, secrets={text: text})),
        ("GetJob", jobs_pb2.GetJobRequest(id=text)),
        ("ListJobs", jobs_pb2.ListJobsRequest(page_token=text)),
        ("CancelJob", jobs_pb2.CancelJobRequest(id=text)),
        ("SetAdapters", deployments_pb2.SetAdaptersRequest(id=text, scales={text: 1})),
    ]
    with grpc.insecure_channel(address) as channel:
        stubs = (
            gateway_pb2_grpc.GatewayServiceStub(channel),
            deployments_pb2_grpc.DeploymentServiceStub(channel),
            jobs_pb2_grpc.JobServiceStub(channel),
        )
        for name, request in requests:
            code, details = grpc.StatusCode.OK, ""
            try:
                next(getattr(stub, name) for stub in stubs if hasattr(stub, name))(request, timeout=60)
            except grpc.RpcError as error:
                code, details = error.code(), error.details() or ""  # type: ignore[attr-defined]
            said = f"{name}: {details}"
            assert code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), said


def test_without_the_deployer_it_is_said_who_is_missing(desk: Desk) -> None:
    desk.deployer.send_signal(signal.SIGKILL)
    desk.deployer.wait(timeout=30)
    desk.write(suited())
    done = desk.run()
    assert done.returncode == 1
    assert "The deployer at" in done.stderr
    assert "is out of reach" in done.stderr
