"""Jobs of the real deployer whose runtime is the wrong one, goes away, or never stops talking."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from web4.lora.v1 import deployer_pb2, deployments_pb2, jobs_pb2
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.rpc import ref_message, ref_of

from tests.integration.deployer.deployer_stack import Stack, deployed, server_of
from tests.servers.fixtures import MakeProxy

pytestmark = pytest.mark.timeout(600)
CONTEXT_TOKENS = 1024


class _Ollama(BaseHTTPRequestHandler):
    """An Ollama of some version that has every blob and no longer makes models."""

    version = ""

    def do_GET(self) -> None:
        self._answer(200, {"version": self.version})

    def do_HEAD(self) -> None:
        self._answer(200, None)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(404, {"error": "404 page not found"})

    def do_DELETE(self) -> None:
        self.do_POST()

    def _answer(self, status: int, data: object) -> None:
        body = b"" if data is None else json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def other_ollama() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Ollama)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def restarted(stack: Stack, **update: str) -> None:
    stack.stop()
    stack.settings = stack.settings.model_copy(update=update)
    stack.start()


@pytest.mark.parametrize(
    ("version", "reason", "text"),
    [
        ("0.29.1", "RUNTIME_NOT_USABLE", "is 0.29.1; 0.31.2 or newer is needed to take a quantized GGUF."),
        ("99.0.0", "RUNTIME_TOO_NEW", "This Ollama no longer takes a GGUF by /api/create (HTTP 404)."),
    ],
)
def test_an_ollama_too_old_or_too_new_is_told_and_the_right_one_finishes(
    stack: Stack,
    other_ollama: str,
    ollama: str,
    tiny_gguf: Path,
    version: str,
    reason: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_Ollama, "version", version)
    restarted(stack, ollama=other_ollama)
    ref = stack.put(tiny_gguf)
    job = stack.deploy(ref, target="ollama", context_tokens=CONTEXT_TOKENS)
    assert job.state == jobs_pb2.JOB_STATE_FAILED
    assert job.error.reason == reason
    assert text in job.error.message
    assert "llama-server" in job.error.message + job.error.fix
    assert not stack.deployments.ListDeployments(deployments_pb2.ListDeploymentsRequest()).deployments

    restarted(stack, ollama=ollama)
    deployment = deployed(stack.deploy(ref, target="ollama", context_tokens=CONTEXT_TOKENS))
    stack.delete(deployment.id)


@pytest.fixture
def suite(stack: Stack, tmp_path: Path, request: pytest.FixtureRequest) -> ArtifactRef:
    """A suite of some prompts, each cut off after a few tokens, or as many as the test asks for."""
    max_tokens = getattr(request, "param", 6)
    folder = tmp_path / "suite"
    folder.mkdir()
    rows = [
        {
            "id": f"g{number}",
            "core": "guardrail",
            "messages": [
                {"role": "user", "content": f"Say hello {number}."},
                {"role": "assistant", "content": "Hello."},
            ],
            "check": {"refuse": False},
        }
        for number in range(12)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "suite.yaml").write_text(
        "name: small\n"
        f"cores: {{guardrail: {{check: guardrail, prompts: prompts.jsonl, max_tokens: {max_tokens}}}}}\n"
    )
    files = {path.name: path for path in folder.iterdir()}
    return stack.store.put("suite", "small", files, link=False)


def begin_verify(stack: Stack, deployment: deployments_pb2.Deployment, suite: ArtifactRef, key: str) -> str:
    spec = deployer_pb2.VerifySpec(
        name="demo", deployment=deployment.id, verify=deployer_pb2.VerifySettings(suite=ref_message(suite))
    )
    request = jobs_pb2.CreateJobRequest(request_id=key, spec=jobs_pb2.JobSpec(verify=spec))
    return str(stack.jobs.CreateJob(request).job.id)


def asking(stack: Stack, job_id: str, answers: int) -> None:
    """Return once the tests are at work and have so many answers."""
    request = jobs_pb2.WatchJobRequest(id=job_id)
    for snapshot in stack.jobs.WatchJob(request):
        progress = snapshot.job.progress
        if progress.unit == "prompts" and progress.done >= answers:
            return
    raise AssertionError("the tests were over before anything could be done to them")


def test_a_runtime_that_goes_away_while_it_is_tested(
    stack: Stack, suite: ArtifactRef, ollama: str, toxiproxy: MakeProxy, tiny_gguf: Path
) -> None:
    proxy = toxiproxy(ollama.removeprefix("http://"))
    restarted(stack, ollama=f"http://{proxy.address}")
    ref = stack.put(tiny_gguf)
    deployment = deployed(stack.deploy(ref, target="ollama", context_tokens=CONTEXT_TOKENS))
    proxy.slow(1, "downstream")  # so that the tests take long enough to be met
    job_id = begin_verify(stack, deployment, suite, "cut")
    asking(stack, job_id, answers=2)
    proxy.cut()
    job = stack.finish(job_id)
    assert job.state == jobs_pb2.JOB_STATE_FAILED
    assert job.error.reason == "MODEL_UNAVAILABLE"
    assert "failed 4 times in a row" in job.error.message
    assert "then test again" in job.error.fix

    proxy.heal()
    job = stack.finish(begin_verify(stack, deployment, suite, "again"))
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.error
    stack.delete(deployment.id)


def test_a_model_that_never_stops_talking_is_cut_off_and_counted(
    stack: Stack, suite: ArtifactRef, tiny_gguf: Path, tmp_path: Path
) -> None:
    """The tiny model has never learnt to end an answer."""
    deployment = deployed(stack.deploy(stack.put(tiny_gguf), context_tokens=CONTEXT_TOKENS))
    job = stack.finish(begin_verify(stack, deployment, suite, "talks"))
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.error
    scores = {score.name: score for score in job.result.verify.scores}
    assert scores["answers.ends"].prompts == 12
    assert scores["answers.ends"].deployed_percent < 50
    stack.store.get(ref_of(job.result.verify.report), tmp_path / "report")
    assert "never ended: cut off at max_tokens" in (tmp_path / "report" / "eval.json").read_text()


def test_a_llama_server_that_hangs_before_it_is_tested_is_started_again_and_tested(
    stack: Stack, suite: ArtifactRef, tiny_gguf: Path
) -> None:
    """It is asked whether it answers, and killed by its supervisor while that is open."""
    deployment = deployed(stack.deploy(stack.put(tiny_gguf), context_tokens=CONTEXT_TOKENS))
    server = server_of(deployment)
    server.suspend()
    job = stack.finish(begin_verify(stack, deployment, suite, "hung"))
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.error
    assert not server.is_running()
    assert {score.prompts for score in job.result.verify.scores} == {12}


@pytest.mark.parametrize("suite", [400], indirect=True)  # so that the tests are met at work
def test_a_llama_server_that_is_killed_while_it_is_tested_comes_back_and_the_tests_go_on(
    stack: Stack, suite: ArtifactRef, tiny_gguf: Path
) -> None:
    deployment = deployed(stack.deploy(stack.put(tiny_gguf), context_tokens=CONTEXT_TOKENS))
    server = server_of(deployment)
    job_id = begin_verify(stack, deployment, suite, "killed")
    asking(stack, job_id, answers=0)
    server.suspend()  # so that it is killed with an answer open
    state = stack.jobs.GetJob(jobs_pb2.GetJobRequest(id=job_id)).job.state
    assert state == jobs_pb2.JOB_STATE_RUNNING, "the tests were over before anything could be done to them"
    server.kill()
    job = stack.finish(job_id)
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.error
    assert {score.prompts for score in job.result.verify.scores} == {12}
