"""An evaluate job of the real deployer: in the three real runtimes, and on an endpoint with a key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from web4.lora.v1 import deployer_pb2, jobs_pb2
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.process import start
from web4lora_chassis.rpc import ref_message, ref_of
from web4lora_deployer.settings import DeployerSettings
from web4lora_llamacpp import LlamaCpp

from tests.integration.deployer.deployer_stack import Stack, deployed
from tests.servers.fixtures import free_port
from tests.servers.runtimes import model_runner, ollama

__all__ = ["model_runner", "ollama"]
pytestmark = pytest.mark.timeout(600)
EXAMPLES = Path(__file__).parents[3] / "examples" / "web4"
SUITE = """\
name: part of web4
cores:
  tool: {check: tool_call, prompts: tool_core.eval.jsonl, max_tokens: 40, constrained: true}
  style: {check: style, prompts: style_core.eval.jsonl, max_tokens: 24}
  guardrail: {check: guardrail, prompts: guardrails.eval.jsonl, max_tokens: 24}
"""


def put_suite(stack: Stack, folder: Path, more: str = "", rows: int = 2) -> ArtifactRef:
    """Store the first rows of each of the sample's cores as a suite."""
    folder.mkdir()
    (folder / "suite.yaml").write_text(SUITE + more)
    for path in EXAMPLES.glob("*.eval.jsonl"):
        (folder / path.name).write_text("".join(path.read_text().splitlines(keepends=True)[:rows]))
    files = {path.name: path for path in folder.iterdir()}
    return stack.store.put("suite", "part", files, link=False)


def evaluate(
    stack: Stack, spec: deployer_pb2.EvaluateSpec, secrets: dict[str, str] | None = None
) -> jobs_pb2.Job:
    request = jobs_pb2.CreateJobRequest(
        request_id=f"evaluate-{spec.name}", spec=jobs_pb2.JobSpec(evaluate=spec), secrets=secrets
    )
    return stack.finish(stack.jobs.CreateJob(request).job.id)


def report_of(stack: Stack, job: jobs_pb2.Job, folder: Path) -> tuple[str, Any]:
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.error
    stack.store.get(ref_of(job.result.evaluate.report), folder)
    return (folder / "eval_log.md").read_text(), json.loads((folder / "eval.json").read_text())


class TestThreeRuntimes:
    """The same file in llama-server, Ollama and Docker Model Runner."""

    @pytest.fixture
    def settings(self, settings: DeployerSettings, ollama: str, model_runner: str) -> DeployerSettings:
        return settings.model_copy(update={"ollama": ollama, "docker_model_runner": model_runner})

    def test_same_answers_or_the_prompts_that_differ_and_why(
        self, stack: Stack, gguf: Path, tmp_path: Path
    ) -> None:
        ref = stack.put(gguf)
        targets = {"one": "docker", "two": "ollama", "three": "llama-server"}
        for name, target in targets.items():
            deployment = deployed(stack.deploy(ref, name, target=target, context_tokens=1024, parallel=2))
            assert deployment.target == target
        one, *others = [deployer_pb2.EvaluatedModel(deployment=name) for name in targets]
        spec = deployer_pb2.EvaluateSpec(
            name="runtimes",
            model=one,
            against=others,
            suite=ref_message(put_suite(stack, tmp_path / "suite", "llama_bench: true\n")),
        )
        job = evaluate(stack, spec)
        log, data = report_of(stack, job, tmp_path / "report")
        assert job.result.evaluate.prompts == 6
        assert job.result.evaluate.passed, "no limit was given"
        assert {each["model"]["target"] for each in data["comparisons"]} == {"ollama", "llama-server"}
        for comparison in data["comparisons"]:
            assert comparison["same_file"] is True
            assert comparison["same_answers"] + len(comparison["differences"]) == 6
            for difference in comparison["differences"]:
                # Each names its first token and how likely that was, or the end; never another prompt.
                assert difference["cause"] in ("rounding", "end", "unexplained"), difference
                assert difference["id"] in log
                assert difference["reason"]
        # Every runtime holds the answer to the schema: all it says is the beginning of a JSON object.
        for role in ("deployed", "reference"):
            held = [row[role]["constrained"]["text"] for row in data["answers"] if row["core"] == "tool"]
            assert len(held) == 2
            assert all(text.lstrip().startswith("{") for text in held), held
        assert {"tool_call.valid", "tool_call_constrained.valid"} <= {s["name"] for s in data["scores"]}
        speeds = [*data["throughput"].values(), *(each["throughput"] for each in data["comparisons"])]
        assert len(speeds) == 4, "under test and its reference, and each of the two compared"
        assert all(speed["llama_bench_all_share"] > 0 for speed in speeds)
        assert data["memory_bytes"] > 50_000_000, "Model Runner's own process was found"
        assert data["llama_bench"]["answer_tokens_per_second"] > 0
        assert data["models"]["reference"]["target"] == "ollama"
        assert "## Throughput" in log
        assert "## The same answers?" in log


def test_a_changed_suite_and_a_limit(stack: Stack, gguf: Path, tmp_path: Path) -> None:
    """Twice the same model: what changed is told; a missed limit fails the verdict."""
    deployed(stack.deploy(stack.put(gguf)))
    spec = deployer_pb2.EvaluateSpec(
        name="demo-eval",
        model=deployer_pb2.EvaluatedModel(deployment="demo"),
        suite=ref_message(put_suite(stack, tmp_path / "first", "repeats: 2\n", rows=2)),
        budgets=deployer_pb2.Budgets(min_score_percent={"style.all_rules": 100}),
    )
    log, data = report_of(stack, evaluate(stack, spec), tmp_path / "one")
    assert "What changed" not in log
    assert data["suite"]["repeats"] == 2
    assert data["answers"][0]["deployed"]["repeats"]["asked"] == 2
    assert [gate["name"] for gate in data["gates"]] == ["score: style.all_rules"], "no limit by default"
    assert not data["passed"]
    again = deployer_pb2.EvaluateSpec()
    again.CopyFrom(spec)
    again.suite.CopyFrom(ref_message(put_suite(stack, tmp_path / "second", "repeats: 3\n", rows=2)))
    request = jobs_pb2.CreateJobRequest(request_id="again", spec=jobs_pb2.JobSpec(evaluate=again))
    job = stack.finish(stack.jobs.CreateJob(request).job.id)
    log, _ = report_of(stack, job, tmp_path / "two")
    assert "## What changed since last time" in log
    assert "**The suite itself has changed since" in log


def test_an_endpoint_with_a_key(
    stack: Stack, gguf: Path, llama_cpp: LlamaCpp, tmp_path: Path, settings: DeployerSettings
) -> None:
    """The key reaches the server, and no file of the deployer's."""
    key, port = "sk-very-secret-key", free_port()
    command = [llama_cpp.server, "--model", gguf, "--port", str(port), "--ctx-size", "2048", "--no-ui"]
    with (tmp_path / "server.log").open("wb") as log_file:
        server = start([*command, "--api-key", key], stdout=log_file)
    try:
        model = deployer_pb2.EvaluatedModel(
            endpoint=f"http://127.0.0.1:{port}/v1", model="any", secret="key", parallel=2
        )
        suite = ref_message(put_suite(stack, tmp_path / "suite", rows=1))
        spec = deployer_pb2.EvaluateSpec(name="elsewhere", model=model, suite=suite)
        _, data = report_of(stack, evaluate(stack, spec, {"key": key}), tmp_path / "report")
        assert data["models"]["deployed"]["endpoint"].endswith(f":{port}/v1")
        assert len(data["answers"]) == 3
        wrong = deployer_pb2.EvaluateSpec(name="refused", model=model, suite=suite)
        job = evaluate(stack, wrong, {"key": "wrong"})
        assert job.state == jobs_pb2.JOB_STATE_FAILED
        assert "401" in job.error.message
        lost = deployer_pb2.EvaluateSpec(name="lost", model=model, suite=suite)
        assert evaluate(stack, lost).error.reason == "SECRET_LOST"
    finally:
        server.kill()
        server.wait()
    for folder in (settings.home, tmp_path / "store", tmp_path / "report"):
        for path in folder.rglob("*"):
            assert not path.is_file() or key.encode() not in path.read_bytes(), path
    shutil.rmtree(tmp_path / "report")
