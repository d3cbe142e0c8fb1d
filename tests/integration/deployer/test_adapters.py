"""Adapters on one base in a real llama-server: switched without a restart, and still what was trained."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx2
import psutil
import pytest
from web4.lora.v1 import deployments_pb2, jobs_pb2
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.errors import InvalidInput, NotFound
from web4lora_chassis.rpc import error_of
from web4lora_llamacpp import LlamaCpp, LlamaServer

from tests import lora_files, tiny_llama
from tests.integration.deployer.deployer_stack import (
    Stack,
    deployed,
    eventually,
    scales_of,
    server_of,
    serving,
)

pytestmark = pytest.mark.timeout(400)

QUESTION = [{"role": "user", "content": "Tell me what gravity is, in a few words."}]
TOKENS = 16
# Of the logarithm of a likelihood. The merge rounds each weight that it changes to bfloat16, of 8 bits, an
# adapter beside its base rounds nothing: that makes 0.03 here, where the adapter itself makes 2.4.
TOLERANCE = 0.1


@dataclass(frozen=True)
class Adapters:
    """GGUFs of two adapters on SmolLM2."""

    tool: Path
    style: Path


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, llama_cpp: LlamaCpp) -> Adapters:
    folders = [tmp_path_factory.mktemp(name) for name in ("tool", "style")]
    tool, style = (lora_files.adapter_gguf(llama_cpp, folder, seed) for seed, folder in enumerate(folders, 1))
    return Adapters(tool, style)


def ask(endpoint: str, **how: Any) -> dict[str, Any]:
    """Ask the same as anybody would, its cache left to the server, and return the whole answer."""
    body = {"messages": QUESTION, "max_tokens": TOKENS, "temperature": 0, **how}
    answer = httpx2.post(f"{endpoint}/chat/completions", json=body, timeout=240)
    answer.raise_for_status()
    return dict(answer.json()["choices"][0])


def text_of(endpoint: str) -> str:
    return str(ask(endpoint)["message"]["content"])


def put_adapters(stack: Stack, adapters: Adapters) -> dict[str, ArtifactRef]:
    return {"tool": stack.put(adapters.tool, "tool"), "style": stack.put(adapters.style, "style")}


def with_adapters(stack: Stack, gguf: Path, adapters: Adapters, **how: Any) -> deployments_pb2.Deployment:
    return deployed(stack.deploy(stack.put(gguf), adapters=put_adapters(stack, adapters), **how))


def alone(llama: LlamaCpp, gguf: Path, folder: Path, *adapters: tuple[Path, float]) -> Iterator[str]:
    server = LlamaServer(
        llama, gguf, context_tokens=512, parallel=1, log_file=folder / "alone.log", adapters=adapters
    )
    with server:
        server.wait_ready(120)
        yield server.endpoint


def test_adapters_are_switched_without_a_restart(
    stack: Stack, gguf: Path, adapters: Adapters, llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    deployment = with_adapters(stack, gguf, adapters)
    assert scales_of(deployment) == {"tool": 1, "style": 0}
    server = server_of(deployment)
    tool = text_of(deployment.endpoint)
    assert stack.set_adapters("demo", tool=0, style=1) == {"tool": 0, "style": 1}
    style = text_of(deployment.endpoint)
    assert stack.set_adapters("demo", style=0) == {"tool": 0, "style": 0}
    base = text_of(deployment.endpoint)
    assert len({tool, style, base}) == 3
    assert stack.set_adapters(deployment.id, tool=0.5, style=0.5) == {"tool": 0.5, "style": 0.5}
    assert text_of(deployment.endpoint) not in (tool, base)
    for _ in range(2):  # again is no error
        assert stack.set_adapters("demo", tool=1, style=0) == {"tool": 1, "style": 0}
    assert text_of(deployment.endpoint) == tool  # nothing of what the others read is gone on from
    assert server_of(deployment) == server
    for wanted, files in ((style, [(adapters.style, 1.0)]), (base, [])):
        for endpoint in alone(llama_cpp, gguf, tmp_path, *files):
            assert text_of(endpoint) == wanted
    again = stack.deploy(stack.put(gguf), adapters=put_adapters(stack, adapters))
    assert again.result.deploy.unchanged
    assert server_of(deployment) == server


def test_an_answer_at_work_ends_as_it_began(stack: Stack, gguf: Path, adapters: Adapters) -> None:
    deployment = with_adapters(stack, gguf, adapters, parallel=2)
    undisturbed = ask(deployment.endpoint, max_tokens=120, ignore_eos=True)["message"]["content"]
    pieces: list[str] = []
    begun = threading.Event()

    def stream() -> None:
        body = {"messages": QUESTION, "max_tokens": 120, "temperature": 0, "ignore_eos": True, "stream": True}
        url = f"{deployment.endpoint}/chat/completions"
        with httpx2.stream("POST", url, json=body, timeout=240) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
                    pieces.append(delta.get("content") or "")
                    if len(pieces) > 3:
                        begun.set()

    reader = threading.Thread(target=stream)
    reader.start()
    assert begun.wait(60)
    stack.set_adapters("demo", tool=0, style=1)
    read = len(pieces)
    other = text_of(deployment.endpoint)
    reader.join(timeout=240)
    assert "".join(pieces) == undisturbed
    assert read < len(pieces)  # it was at work
    assert not undisturbed.startswith(other)


@pytest.mark.parametrize("kill", ["llama-server", "the service"])
def test_scales_outlive_every_process(stack: Stack, gguf: Path, adapters: Adapters, kill: str) -> None:
    deployment = with_adapters(stack, gguf, adapters)
    stack.set_adapters("demo", tool=0, style=0.75)
    before = text_of(deployment.endpoint)
    server = server_of(deployment)
    if kill == "llama-server":
        server.kill()
        psutil.wait_procs([server], timeout=20)
        # Between two servers it takes new wishes too.
        eventually(
            lambda: True if stack.get("demo").state != deployments_pb2.DEPLOYMENT_STATE_SERVING else None
        )
        stack.set_adapters("demo", tool=0.0)
    else:
        stack.stop(signal.SIGKILL)
        psutil.wait_procs([server], timeout=20)
        stack.start()
    again = eventually(serving(stack, "demo"))
    assert server_of(again) != server
    assert scales_of(again) == {"tool": 0, "style": 0.75}
    assert text_of(again.endpoint) == before


def test_other_adapters_are_another_candidate(stack: Stack, gguf: Path, adapters: Adapters) -> None:
    refs = put_adapters(stack, adapters)
    bare = deployed(stack.deploy(stack.put(gguf)))
    one = stack.promote(deployed(stack.deploy(stack.put(gguf), adapters={"tool": refs["tool"]})))
    both = deployed(stack.deploy(stack.put(gguf), adapters=refs))
    assert len({bare.id, one.id, both.id}) == 3
    stack.set_adapters("demo", tool=0.5)  # of the promoted one
    assert scales_of(stack.get(both.id)) == {"tool": 1, "style": 0}
    assert stack.promote(both).id == stack.get("demo").id == both.id
    stack.set_adapters(one.id, tool=0.25)  # kept, though it is not loaded
    back = stack.roll_back(from_id=both.id)
    assert back.id == one.id
    assert scales_of(back) == {"tool": 0.25}
    assert text_of(back.endpoint)
    models = stack.settings.deployer_home / "models"
    assert len(list(models.rglob("*.gguf"))) == 3  # the base once, and two adapters
    for deployment in (both, bare):
        stack.delete(deployment.id)
    assert len(list(models.rglob("*.gguf"))) == 2
    stack.delete(one.id)
    assert not list(models.rglob("*.gguf"))
    fresh = deployed(stack.deploy(stack.put(gguf), adapters={"tool": refs["tool"]}))
    assert scales_of(fresh) == {"tool": 1}


def test_what_is_no_adapter_of_it_is_refused_in_words(
    stack: Stack, gguf: Path, adapters: Adapters, llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    tiny = lora_files.adapter_gguf(llama_cpp, tmp_path, 1, tiny_llama.write_base(tmp_path / "tiny"))
    for file, reason, why in (
        (tiny, "BASE_MISMATCH", "The adapter x does not fit this base: it was made for a blk.0.attn_"),
        (gguf, "NOT_AN_ADAPTER", "The adapter x is no LoRA adapter: its GGUF holds a model."),
    ):
        job = stack.deploy(stack.put(gguf), adapters={"x": stack.put(file, "x")})
        assert job.state == jobs_pb2.JOB_STATE_FAILED
        assert job.error.reason == reason
        assert job.error.message.startswith(why)
    job = stack.deploy(stack.put(adapters.tool))
    assert job.error.reason == "NOT_A_WHOLE_MODEL"
    assert not list((stack.settings.deployer_home / "models").rglob("*.gguf"))
    with pytest.raises(grpc.RpcError) as caught:
        stack.deploy(stack.put(gguf), target="ollama", adapters=put_adapters(stack, adapters))
    error = error_of(caught.value)
    assert isinstance(error, InvalidInput)
    assert error.message == "ollama takes no adapters: llama-server alone can switch between them."

    deployment = with_adapters(stack, gguf, adapters, target="auto")
    assert deployment.target == "llama-server"
    for scales, why in (
        ({"tol": 1.0}, f"{deployment.id} has no adapter 'tol'."),
        ({"tool": 2.5}, "The scale of tool is 2.5; it needs 0 to 2."),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            stack.set_adapters("demo", **scales)
        error = error_of(caught.value)
        assert isinstance(error, InvalidInput)
        assert error.message == why
    assert scales_of(stack.get("demo")) == {"tool": 1, "style": 0}
    with pytest.raises(grpc.RpcError) as caught:
        stack.set_adapters("nothing", tool=1)
    assert isinstance(error_of(caught.value), NotFound)


def test_an_adapter_of_another_base_of_the_same_shape_is_refused_by_its_lineage(
    stack: Stack, gguf: Path, adapters: Adapters
) -> None:
    one, other = (ArtifactRef("base_model", "b", digit * 64) for digit in "12")
    base = stack.store.put("gguf", "base", {"base.gguf": gguf}, inputs=[one], link=False)
    adapter = stack.store.put("gguf", "tool", {"adapter.gguf": adapters.tool}, inputs=[other], link=False)
    job = stack.deploy(base, adapters={"tool": adapter})
    assert job.error.reason == "BASE_MISMATCH"
    assert job.error.message == f"The adapter tool was trained on {other}, this base is made from {one}."


def test_at_scale_1_it_is_the_merged_model(
    stack: Stack, llama_cpp: LlamaCpp, adapters: Adapters, tmp_path: Path
) -> None:
    merged = lora_files.merged_gguf(llama_cpp, adapters.tool.parent)
    base = lora_files.base_gguf(llama_cpp, tmp_path)
    deployment = with_adapters(stack, base, adapters)
    together, answer = likelihoods(deployment.endpoint), text_of(deployment.endpoint)
    stack.set_adapters("demo", tool=0)
    bare = likelihoods(deployment.endpoint)
    for endpoint in alone(llama_cpp, merged, tmp_path):
        wanted = likelihoods(endpoint)
        assert text_of(endpoint) == answer
    far, effect = distance(together, wanted), distance(bare, wanted)
    sys.stderr.write(f"to the merged model: base and adapter {far:.4f}, base alone {effect:.4f}\n")
    assert far < TOLERANCE < effect / 10


def likelihoods(endpoint: str) -> list[dict[str, float]]:
    """Return the likeliest first tokens of answers to some questions, with the logarithms of how likely."""
    found = []
    for content in ("Hello!", "What is gravity?", "Count to ten.", "Write a poem on rain.", "1 + 1 ="):
        messages = [{"role": "user", "content": content}]
        answer = ask(endpoint, messages=messages, max_tokens=1, logprobs=True, top_logprobs=40)
        (first,) = answer["logprobs"]["content"]
        found.append({token["token"]: token["logprob"] for token in first["top_logprobs"]})
    return found


def distance(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> float:
    """Return the largest difference over the five likeliest tokens of each answer."""
    return max(
        abs(tokens.get(token, -99.0) - logprob)
        for tokens, likeliest in zip(found, wanted, strict=True)
        for token, logprob in sorted(likeliest.items(), key=lambda item: -item[1])[:5]
    )
