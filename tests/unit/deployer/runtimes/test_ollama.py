import json

import httpx2
import pytest
from web4lora_chassis.errors import (
    FailedPrecondition,
    InvalidInput,
    ResourceExhausted,
    Unavailable,
    Web4Error,
)
from web4lora_deployer.prompts.go_template import GoTemplate
from web4lora_deployer.records.deployments import Parameters
from web4lora_deployer.runtimes.ollama import check_shown, model_parameters
from web4lora_deployer.runtimes.ollama_api import OllamaApi, read_create_stream
from web4lora_deployer.serving.deploy import read_parameters

from tests.unit.deployer.sample_records import record

SHOWN = {
    "parameters": 'num_ctx                        2048\nstop                           "<|im_end|>"\n'
    "temperature                    0",
    "system": "Be brief.",
    "template": "{{ .Prompt }}",
}


def lines(*events: dict[str, str]) -> list[bytes]:
    return [json.dumps(event).encode() for event in events]


def test_a_stream_that_ends_with_success_is_a_success() -> None:
    said: list[str] = []
    read_create_stream(lines({"status": "parsing GGUF"}, {"status": "success"}), said.append)
    assert said == ["parsing GGUF", "success"]


def test_an_error_inside_a_stream_is_found() -> None:
    with pytest.raises(FailedPrecondition, match="unsupported file type"):
        read_create_stream(
            lines({"status": "parsing GGUF"}, {"error": "unsupported file type [110]"}), lambda _: None
        )


def test_a_full_disk_is_named() -> None:
    with pytest.raises(ResourceExhausted) as caught:
        read_create_stream(lines({"error": "write /x: no space left on device"}), lambda _: None)
    assert caught.value.reason == "DISK_FULL"


@pytest.mark.parametrize("events", [[], [{"status": "writing manifest"}]])
def test_a_stream_without_success_is_a_failure(events: list[dict[str, str]]) -> None:
    with pytest.raises(httpx2.RemoteProtocolError):
        read_create_stream(lines(*events), lambda _: None)


@pytest.mark.parametrize("garbage", [b"<html>", b'"success"', b"\xff\xfe"])
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(FailedPrecondition):
        read_create_stream([garbage], lambda _: None)


def test_stops_are_a_list_and_the_context_is_pinned() -> None:
    assert model_parameters(record()) == {"num_ctx": 2048, "temperature": 0.0, "stop": ["<|im_end|>"]}
    assert "stop" not in model_parameters(record(parameters=Parameters()))


def test_what_is_shown_as_asked_passes() -> None:
    check_shown(SHOWN, model_parameters(record()), GoTemplate("{{ .Prompt }}", "Be brief."))
    check_shown(SHOWN, model_parameters(record()), GoTemplate("", ""))


@pytest.mark.parametrize(
    ("parameters", "template"),
    [
        ({"num_ctx": 4096}, GoTemplate("", "")),
        ({"temperature": 0.5}, GoTemplate("", "")),
        ({"stop": ["<|im_end|>", "</s>"]}, GoTemplate("", "")),
        ({}, GoTemplate("", "Be long.")),
        ({}, GoTemplate("{{ .System }}", "")),
    ],
)
def test_what_is_not_as_asked_is_named(parameters: dict[str, object], template: GoTemplate) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        check_shown(SHOWN, parameters, template)
    assert caught.value.reason == "MODEL_NOT_AS_ASKED"


def test_another_licence_is_named() -> None:
    shown = {**SHOWN, "license": "Apache-2.0\n"}
    check_shown(shown, {}, GoTemplate("", ""), "Apache-2.0")
    with pytest.raises(FailedPrecondition, match="the licence"):
        check_shown(shown, {}, GoTemplate("", ""), "MIT")


@pytest.mark.parametrize(
    ("status", "said", "kind", "reason"),
    [
        (404, "404 page not found", FailedPrecondition, "RUNTIME_TOO_NEW"),
        (405, "", FailedPrecondition, "RUNTIME_TOO_NEW"),
        (503, "server busy, please try again", Unavailable, "RUNTIME_BUSY"),
        (500, "write blob: no space left on device", ResourceExhausted, "DISK_FULL"),
        (500, "model requires more system memory (9.1 GiB) than is available", ResourceExhausted,
         "NOT_ENOUGH_MEMORY"),
        (400, "invalid model name", FailedPrecondition, "RUNTIME_FAILED"),
    ],
)  # fmt: skip
def test_each_way_to_refuse_has_an_error_of_its_own(
    status: int, said: str, kind: type[Web4Error], reason: str
) -> None:
    def handle(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(status, json={"error": said})

    api = OllamaApi("http://127.0.0.1:1")
    api._http = httpx2.Client(transport=httpx2.MockTransport(handle), base_url="http://127.0.0.1:1")
    with pytest.raises(kind) as caught:
        api.create({}, lambda _: None)
    assert caught.value.reason == reason
    assert caught.value.fix


def test_the_packagers_parameters_are_read() -> None:
    data = {
        "stop": ["</s>"],
        "system": "Hi.",
        "temperature": 0,
        "context_tokens": 512,
        "license": None,
        "x": 1,
    }
    assert read_parameters(data) == Parameters(("</s>",), "Hi.", 0.0, "", 512)


@pytest.mark.parametrize(
    "data",
    [[], {"stop": "</s>"}, {"stop": [1]}, {"stop": [""]}, {"temperature": "0"}, {"context_tokens": True}],
)
def test_parameters_of_the_wrong_type_are_refused(data: object) -> None:
    with pytest.raises(InvalidInput, match=r"modelfile\.json"):
        read_parameters(data)
