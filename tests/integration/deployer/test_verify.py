"""A verify job of the real deployer: real models, real answers, real reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from web4.lora.v1 import deployer_pb2, deployments_pb2, jobs_pb2
from web4lora_chassis.artifacts import ArtifactRef, open_store
from web4lora_chassis.errors import ResourceExhausted
from web4lora_chassis.jobs import Progress
from web4lora_chassis.rpc import ref_message, ref_of
from web4lora_deployer.records.deployments import Deployments
from web4lora_deployer.testing import measure
from web4lora_deployer.testing.verify import VerifyRequest, verify

from tests.integration.deployer.deployer_stack import Stack, ask, deployed, server_of

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def suite(tmp_path: Path, stack: Stack) -> ArtifactRef:
    prompts = [
        {
            "id": f"g{number}",
            "core": "guardrail",
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "It is a thing that helps."},
            ],
            "check": {"refuse": False},
        }
        for number, question in enumerate(["What is a wallet?", "What is a token?", "What is a block?"])
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    (tmp_path / "suite.yaml").write_text(
        "name: small\n"
        "cores: {guardrail: {check: guardrail, prompts: prompts.jsonl, max_tokens: 12}}\n"
        "latency: {requests_at_once: [1], requests: 1, max_tokens: 8}\n"
    )
    files = {name: tmp_path / name for name in ("suite.yaml", "prompts.jsonl")}
    return stack.store.put("suite", "small", files, link=False)


def test_verify_measures_all_models_and_stores_the_report(
    stack: Stack, gguf: Path, suite: ArtifactRef, tmp_path: Path
) -> None:
    ref = stack.put(gguf)
    deployment = deployed(stack.deploy(ref))
    spec = deployer_pb2.VerifySpec(
        name="demo",
        deployment=deployment.id,
        reference=ref_message(ref),
        base_gguf=ref_message(ref),
        verify=deployer_pb2.VerifySettings(
            suite=ref_message(suite),
            budgets=deployer_pb2.Budgets(max_memory_bytes=1, min_score_percent={"guardrail.helps": 50}),
        ),
    )
    request = jobs_pb2.CreateJobRequest(request_id="verify", spec=jobs_pb2.JobSpec(verify=spec))
    job = stack.finish(stack.jobs.CreateJob(request).job.id)
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.error
    result = job.result.verify
    scores = {score.name: score for score in result.scores}
    assert scores["guardrail.helps"].prompts == 3
    assert scores["guardrail.helps"].deployed_percent == 100
    assert scores["guardrail.helps"].reference_percent == 100
    assert scores["guardrail.helps"].base_percent == 100
    assert scores["guardrail.helps"].drop_points == 0
    assert result.memory_bytes > 50_000_000
    assert result.tokens_per_second > 0
    gates = {gate.name: gate for gate in result.gates}
    # Three prompts prove nothing of a score, neither way.
    failed, undecided = deployer_pb2.TEST_STATE_FAILED, deployer_pb2.TEST_STATE_UNDECIDED
    assert {name: gate.state for name, gate in gates.items()} == {
        name: failed if name == "memory" else undecided for name in gates
    }
    assert gates["score: guardrail.helps"].prompts_needed == 4
    assert (result.state, result.passed) == (failed, False)
    assert result.advice
    stack.store.get(ref_of(result.report), tmp_path / "report")
    assert (tmp_path / "report" / "eval_log.md").read_text().startswith("#")
    assert json.loads((tmp_path / "report" / "eval.json").read_text())
    assert b"PNG" in (tmp_path / "report" / "drawio_diagram.png").read_bytes()[:8]
    assert "gravity" in ask(stack.get("demo"))
    assert "What changed" not in (tmp_path / "report" / "eval_log.md").read_text()


@pytest.mark.parametrize("promoted", [False, True])
def test_a_candidate_makes_room_for_the_16_bit_model_and_what_serves_does_not(
    stack: Stack, gguf: Path, suite: ArtifactRef, tmp_path: Path, promoted: bool
) -> None:
    ref = stack.put(gguf)
    deployment = deployed(stack.deploy(ref))
    if promoted:
        stack.promote(deployment)
    server = server_of(deployment)
    beside: list[bool] = []

    def report(progress: Progress) -> None:
        if progress.phase in ("load 16 bit", "test 16 bit", "load base"):
            beside.append(server.is_running())

    store = open_store(stack.settings)
    request = VerifyRequest("demo", deployment.id, suite, reference=ref, base=ref)
    verify(request, stack.settings, store, tmp_path / "work", report)
    assert set(beside) == {promoted}
    assert server.is_running() is promoted
    assert "gravity" in ask(stack.get(deployment.id))
    again: list[str] = []
    verify(request, stack.settings, store, tmp_path / "work", lambda told: again.append(told.phase))
    assert "load 16 bit" not in again  # what is measured already takes nobody's place


@pytest.mark.parametrize(("promoted", "room"), [(False, True), (True, True), (True, False)])
def test_llama_bench_takes_a_candidate_s_place_and_goes_beside_what_serves_only_where_there_is_room(
    stack: Stack, gguf: Path, suite: ArtifactRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    promoted: bool, room: bool,
) -> None:  # fmt: skip
    stack.store.get(suite, tmp_path / "benched")
    text = (tmp_path / "benched" / "suite.yaml").read_text() + "llama_bench: true\n"
    (tmp_path / "with_bench.yaml").write_text(text)
    files = {"suite.yaml": tmp_path / "with_bench.yaml", "prompts.jsonl": tmp_path / "prompts.jsonl"}
    benched = stack.store.put("suite", "benched", files, link=False)
    deployment = deployed(stack.deploy(stack.put(gguf)))
    if promoted:
        stack.promote(deployment)
    server, told, running = server_of(deployment), list[str](), list[bool]()

    def report(progress: Progress) -> None:
        if progress.phase == "llama-bench":
            told.append(progress.message)
            running.append(server.is_running())

    def no_room(what: str, *_: object) -> None:
        raise ResourceExhausted(f"{what} needs about 999 GB.")

    if not room:
        monkeypatch.setattr(measure, "require_memory", no_room)
    request = VerifyRequest("demo", deployment.id, benched)
    found = verify(request, stack.settings, open_store(stack.settings), tmp_path / "work", report)
    assert running == [promoted]
    assert told[0].startswith("left out: llama-bench needs") is not room
    stack.store.get(found.report, tmp_path / "report")
    limit = json.loads((tmp_path / "report" / "eval.json").read_text())["llama_bench"]
    assert (limit is not None) is room
    assert "gravity" in ask(stack.get(deployment.id))


def test_a_candidate_that_a_killed_test_left_stopped_is_loaded_again(
    stack: Stack, gguf: Path, suite: ArtifactRef, tmp_path: Path
) -> None:
    deployment = deployed(stack.deploy(stack.put(gguf)))
    deployments = Deployments(stack.settings.deployer_home)
    deployments.save(replace(deployments.get(deployment.id), loaded=False))
    store = open_store(stack.settings)
    request = VerifyRequest("demo", deployment.id, suite)
    assert verify(request, stack.settings, store, tmp_path / "work", lambda _: None).prompts == 3
    assert "gravity" in ask(stack.get(deployment.id))


def test_a_16_bit_model_that_does_not_fit_leaves_the_candidate_as_it_was(
    stack: Stack, gguf: Path, suite: ArtifactRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = stack.put(gguf)
    deployment = deployed(stack.deploy(ref))

    def too_large(*_: object) -> None:
        raise ResourceExhausted("The 16 bit model needs about 999 GB.")

    monkeypatch.setattr(measure, "require_memory", too_large)
    request = VerifyRequest("demo", deployment.id, suite, reference=ref)
    with pytest.raises(ResourceExhausted):
        verify(request, stack.settings, open_store(stack.settings), tmp_path / "work", lambda _: None)
    assert "gravity" in ask(stack.get(deployment.id))


def test_the_next_version_is_compared_with_the_one_that_served_before(
    stack: Stack, gguf: Path, suite: ArtifactRef, tmp_path: Path
) -> None:
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(gguf.read_bytes() + b"\0")
    logs = []
    for number, file in enumerate((gguf, changed)):
        deployment = deployed(stack.deploy(stack.put(file)))
        spec = deployer_pb2.VerifySpec(
            name="demo", deployment=deployment.id,
            verify=deployer_pb2.VerifySettings(suite=ref_message(suite)),
        )  # fmt: skip
        request = jobs_pb2.CreateJobRequest(request_id=f"verify-{number}", spec=jobs_pb2.JobSpec(verify=spec))
        job = stack.finish(stack.jobs.CreateJob(request).job.id)
        assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.error
        assert job.result.verify.prompts == 3
        stack.store.get(ref_of(job.result.verify.report), tmp_path / f"report-{number}")
        logs.append((tmp_path / f"report-{number}" / "eval_log.md").read_text())
        stack.deployments.PromoteDeployment(deployments_pb2.PromoteDeploymentRequest(id=deployment.id))
        if number == 0:
            first = deployment.id
    assert "What changed" not in logs[0]
    assert f"Against {first}, measured" in logs[1]
