"""The template gate on the real llama-server: what Transformers trained on, against what llama.cpp serves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from web4.lora.v1 import deployer_pb2, deployments_pb2, jobs_pb2
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.rpc import ref_message
from web4lora_deployer.runtimes.tokens import tokenizer_of
from web4lora_llamacpp import LlamaCpp

from tests import trained_base
from tests.integration.deployer.deployer_stack import Stack, changed, deployed
from tests.trained_base import CHATML, PIPES, WITH_DEFAULT

pytestmark = pytest.mark.timeout(400)


def put(stack: Stack, gguf: Path, record: Any, folder: Path) -> ArtifactRef:
    """Store a GGUF as the packager does: made from a merged model, the record of training beside it."""
    config = folder / "config.json"
    config.write_text("{}")
    merged = stack.store.put("merged_model", "demo", {"config.json": config}, link=False)
    files = {"model.F16.gguf": gguf}
    if record is not None:
        files["trained_conversations.json"] = folder / "trained_conversations.json"
        text = record if isinstance(record, str) else json.dumps(record)
        files["trained_conversations.json"].write_text(text)
    return stack.store.put("gguf", "demo", files, inputs=[merged], link=False)


def failed(job: jobs_pb2.Job) -> Any:
    assert job.state == jobs_pb2.JOB_STATE_FAILED
    return job.error


def nothing_left(stack: Stack) -> bool:
    deployments = stack.deployments.ListDeployments(deployments_pb2.ListDeploymentsRequest()).deployments
    return not deployments and not list((stack.settings.home / "deployer" / "models").iterdir())


@dataclass(frozen=True)
class Base:
    """A base and its GGUF."""

    folder: Path
    gguf: Path

    def served_with(self, template: str, folder: Path) -> Path:
        return trained_base.with_template(self.gguf, self.folder, template, folder / "other.gguf")


@pytest.fixture(scope="module")
def chatml(llama_cpp: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = trained_base.write_base(tmp_path_factory.mktemp("chatml") / "base")
    return Base(folder, trained_base.gguf_of(llama_cpp, folder))


@pytest.fixture(scope="module")
def pipes(llama_cpp: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = trained_base.write_sentencepiece_base(tmp_path_factory.mktemp("pipes") / "base")
    return Base(folder, trained_base.gguf_of(llama_cpp, folder))


@pytest.mark.parametrize("template", [CHATML, WITH_DEFAULT])
def test_a_model_is_served_what_it_was_trained_on(
    stack: Stack, chatml: Base, tmp_path: Path, template: str
) -> None:
    record = trained_base.record_of(chatml.folder, template=template)
    ref = put(stack, chatml.served_with(template, tmp_path), record, tmp_path)
    deployment = deployed(stack.deploy(ref))
    stack.delete(deployment.id)
    assert nothing_left(stack)


def test_a_model_whose_template_writes_the_date_is_served_on_another_day(
    stack: Stack, chatml: Base, tmp_path: Path
) -> None:
    dated = "{{ '<|im_start|>system\\n' ~ strftime_now('%d %B %Y') ~ '<|im_end|>\\n' }}" + CHATML
    then = dated.replace("strftime_now('%d %B %Y')", "'29 February 2024'")
    record = trained_base.record_of(chatml.folder, template=then)
    gguf = chatml.served_with(dated, tmp_path)
    error = failed(stack.deploy(put(stack, gguf, record, tmp_path)))
    assert error.reason == "TEMPLATE_DIFFERS"
    told = {**record, "rendered_at": "2024-02-29T08:00:00"}
    deployed(stack.deploy(put(stack, gguf, told, tmp_path)))


def test_a_sentencepiece_model_is_served_what_it_was_trained_on(
    stack: Stack, pipes: Base, tmp_path: Path
) -> None:
    deployed(stack.deploy(put(stack, pipes.gguf, trained_base.record_of(pipes.folder), tmp_path)))


def test_a_beginning_that_training_had_not_is_found(stack: Stack, pipes: Base, tmp_path: Path) -> None:
    template = PIPES.removeprefix("{{ bos_token }}")
    record = trained_base.record_of(pipes.folder, template=template)
    error = failed(stack.deploy(put(stack, pipes.served_with(template, tmp_path), record, tmp_path)))
    assert error.reason == "TEMPLATE_DIFFERS"
    assert "train/rows.jsonl:1, answer to message 1" in error.message
    assert 'token 0: trained "" then' in error.message
    assert '"<s>" (1)' in error.message
    assert nothing_left(stack)


def test_a_beginning_that_is_doubled_is_found(stack: Stack, pipes: Base, tmp_path: Path) -> None:
    gguf = pipes.served_with("{{ bos_token }}" + PIPES, tmp_path)
    error = failed(stack.deploy(put(stack, gguf, trained_base.record_of(pipes.folder), tmp_path)))
    assert error.reason == "TEMPLATE_DIFFERS"
    assert "token 1" in error.message


@pytest.mark.parametrize(
    ("served", "where"),
    [
        (CHATML.replace("'<|im_end|>\\n'", "'<|im_end|>'"), "token"),  # a line end less
        (WITH_DEFAULT, 'trained "<|im_start|>" then "user"'),  # a system message more
        (CHATML.replace("m.content", "m.content | trim | replace('  ', ' ')"), "in turn 1 (user)"),
    ],
)
def test_another_template_than_training_s_is_found(
    stack: Stack, chatml: Base, tmp_path: Path, served: str, where: str
) -> None:
    assert served != CHATML
    gguf = chatml.served_with(served, tmp_path)
    error = failed(stack.deploy(put(stack, gguf, trained_base.record_of(chatml.folder), tmp_path)))
    assert error.reason == "TEMPLATE_DIFFERS"
    assert where in error.message
    assert nothing_left(stack)


def test_special_tokens_that_eat_blanks_are_found(stack: Stack, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    base = trained_base.write_base(tmp_path / "base")
    trained_base.eat_blanks(base)
    error = failed(
        stack.deploy(
            put(stack, trained_base.gguf_of(llama_cpp, base), trained_base.record_of(base), tmp_path)
        )
    )
    assert error.reason == "TEMPLATE_DIFFERS"
    assert "tokens trained" in error.message


def test_an_answer_that_would_not_end_is_found(stack: Stack, chatml: Base, tmp_path: Path) -> None:
    """The turn ends with a token that llama.cpp does not take for an end."""
    template = CHATML.replace("<|im_end|>", "<gh_stars>")
    record = trained_base.record_of(chatml.folder, stop="<gh_stars>", template=template)
    error = failed(stack.deploy(put(stack, chatml.served_with(template, tmp_path), record, tmp_path)))
    assert error.reason == "ANSWER_NOT_ENDED"
    assert '"<gh_stars>"' in error.message
    assert nothing_left(stack)


def test_an_end_of_turn_that_is_not_eos_ends_an_answer(
    stack: Stack, llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    base = trained_base.write_base(tmp_path / "base", eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    trained_base.edit(base / "config.json", lambda data: data.update(eos_token_id=0, bos_token_id=0))
    record = trained_base.record_of(base, stop="<|im_end|>")
    deployed(stack.deploy(put(stack, trained_base.gguf_of(llama_cpp, base), record, tmp_path)))


@pytest.mark.parametrize(
    ("record", "reason", "said"),
    [
        (None, "TRAINING_RECORD_MISSING", "no record of its training"),
        ({"format": "web4lora.trained_conversations/1", "conversations": []},
         "TRAINING_RECORD_MISSING", "no trained answer"),
        ("{", "TRAINING_RECORD_BROKEN", "can't be used"),
        ({"format": "other"}, "TRAINING_RECORD_BROKEN", "its format is 'other'"),
        (" " * ((16 << 20) + 1), "TRAINING_RECORD_BROKEN", "more than 16,777,216"),
    ],
)  # fmt: skip
def test_a_model_made_here_without_a_record_is_refused(
    stack: Stack, gguf: Path, tmp_path: Path, record: Any, reason: str, said: str
) -> None:
    error = failed(stack.deploy(put(stack, gguf, record, tmp_path)))
    assert (error.reason, said in error.message) == (reason, True)
    assert nothing_left(stack)


def test_the_record_is_found_in_the_adapter_that_a_model_was_made_of(
    stack: Stack, chatml: Base, tmp_path: Path
) -> None:
    wrong = trained_base.record_of(chatml.folder, template=WITH_DEFAULT)
    record = tmp_path / "trained_conversations.json"
    record.write_text(json.dumps(wrong))
    config = {"config.json": chatml.folder / "config.json"}
    adapter = stack.store.put("adapter", "demo", {record.name: record}, link=False)
    merged = stack.store.put("merged_model", "demo", config, inputs=[adapter], link=False)
    first = stack.store.put("gguf", "demo", {"16.gguf": chatml.gguf}, inputs=[merged], link=False)
    second = stack.store.put("gguf", "demo", {"4.gguf": chatml.gguf}, inputs=[first], link=False)
    assert failed(stack.deploy(second)).reason == "TEMPLATE_DIFFERS"


def test_a_context_without_room_for_any_prompt_is_no_pass(stack: Stack, chatml: Base, tmp_path: Path) -> None:
    rows = [({"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "yes"})]
    ref = put(stack, chatml.gguf, trained_base.record_of(chatml.folder, rows), tmp_path)
    error = failed(stack.deploy(ref, context_tokens=256))
    assert error.reason == "TEMPLATE_NOT_COMPARED"
    deployed(stack.deploy(ref, context_tokens=512))


def test_a_model_from_elsewhere_is_compared_with_its_own_template(
    stack: Stack, gguf: Path, tmp_path: Path
) -> None:
    ref = stack.put(changed(gguf, tmp_path))
    request = jobs_pb2.CreateJobRequest(
        request_id="elsewhere",
        spec=jobs_pb2.JobSpec(
            deploy=deployer_pb2.DeploySpec(
                name="demo",
                gguf=ref_message(ref),
                deploy=deployer_pb2.DeploySettings(target="llama-server", context_tokens=512, parallel=1),
            )
        ),
    )
    job = stack.jobs.CreateJob(request).job.id
    said = {
        snapshot.job.progress.message for snapshot in stack.jobs.WatchJob(jobs_pb2.WatchJobRequest(id=job))
    }
    assert "not made here: compared with the GGUF's own template" in said


@pytest.mark.parametrize(
    ("template", "said"),
    [("", "no chat template"), ("{{ raise_exception('Not today') }}", "Not today"), ("{% if %}", "parsed")],
)
def test_a_model_from_elsewhere_that_nothing_can_be_compared_with_is_refused(
    stack: Stack, chatml: Base, tmp_path: Path, template: str, said: str
) -> None:
    error = failed(stack.deploy(stack.put(chatml.served_with(template, tmp_path))))
    assert error.reason == "TEMPLATE_NOT_COMPARED"
    assert said in error.message
    assert nothing_left(stack)


def test_the_tokenizer_says_what_the_server_does(chatml: Base, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    with tokenizer_of(llama_cpp, chatml.gguf, tmp_path / "log") as tokenizer:
        start, word = (tokenizer.served(text)[0].id for text in ("<|im_start|>", "hello"))
        assert (start, tokenizer.piece(start)) == (1, "<|im_start|>")
        assert tokenizer.piece(10**6) == tokenizer.piece(2**31 - 1) == ""
        assert tokenizer.ends(2)
        assert not tokenizer.ends(start)
        assert not tokenizer.ends(start, ["<|im_start|>"])
        assert not tokenizer.ends(word)
        assert tokenizer.ends(word, ["hello"])  # text that the answer shows
        assert not tokenizer.ends(10**6)  # no such token
