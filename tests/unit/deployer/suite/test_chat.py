from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, Unavailable
from web4lora_deployer.suite.chat import ChatClient, Endpoint

HI = [{"role": "user", "content": "Hi"}]
LAST = {
    "usage": {"prompt_tokens": 12, "completion_tokens": 3},
    "timings": {"predicted_per_second": 99.5},
}


@pytest.fixture
def client(chat_server: Any) -> Iterator[ChatClient]:
    endpoint = Endpoint(chat_server.url, "web4-demo:v1", api_key="secret-token")
    with ChatClient(endpoint, seed=7, timeout_seconds=2, connections=2, pause_seconds=0.01) as made:
        yield made


def test_a_greedy_request_and_the_servers_own_figures(chat_server: Any, client: ChatClient) -> None:
    chat_server.respond = lambda handler, body: handler.say("Hel", "lo", "!", last=LAST)
    reply = client.ask(HI, 20)
    request = chat_server.requests[0]
    assert chat_server.paths == ["/v1/chat/completions"]
    assert (request["model"], request["messages"], request["max_tokens"]) == ("web4-demo:v1", HI, 20)
    assert (request["temperature"], request["seed"], request["stream"]) == (0, 7, True)
    assert (reply.text, reply.finish_reason, reply.attempts) == ("Hello!", "stop", 1)
    assert (reply.prompt_tokens, reply.output_tokens) == (12, 3)
    assert (reply.tokens_per_second, reply.timed_by_server) == (99.5, True)
    assert 0 < reply.first_token_seconds <= reply.seconds


def test_without_the_servers_figures_they_are_measured(chat_server: Any, client: ChatClient) -> None:
    chat_server.respond = lambda handler, body: handler.say(*"abcdef", pause_seconds=0.005)
    reply = client.ask(HI, 20)
    assert (reply.output_tokens, reply.prompt_tokens) == (6, 0)
    assert reply.tokens_per_second > 0
    assert not reply.timed_by_server


def test_unicode_line_ends_and_split_surrogates_come_through(chat_server: Any, client: ChatClient) -> None:
    def respond(handler: Any, body: Any) -> None:
        handler.begin()
        handler.event('{"choices": [{"delta": {"content": "a\u2028b\u0085c \\ud83d"}}]}')
        handler.event('{"choices": [{"delta": {"content": "\\ude00 \\ud800"}, "finish_reason": "stop"}]}')
        handler.event("[DONE]")

    chat_server.respond = respond
    assert client.ask(HI, 20).text == "a\u2028b\u0085c 😀 �"


def test_a_server_that_never_stops_is_cut_off(chat_server: Any, client: ChatClient) -> None:
    def respond(handler: Any, body: Any) -> None:
        handler.begin()
        while True:
            handler.event({"choices": [{"delta": {"content": "la "}}]})

    chat_server.respond = respond
    reply = client.ask(HI, 10)
    assert reply.finish_reason == "length"
    assert len(reply.text) < 200


def broken_at_first(how: str) -> Any:
    """Fail the first two requests in some way, then answer."""

    def respond(handler: Any, body: Any) -> None:
        if len(handler.server.requests) > 2:
            handler.say("fine")
        elif how in ("503", "429"):
            handler.fail(int(how), "loading model")
        elif how == "cut before":
            handler.close_connection = True
        else:
            handler.begin()
            handler.event({"choices": [{"delta": {"content": "half an ans"}}]})
            if how == "error event":
                handler.event({"error": {"message": "out of memory"}})
            elif how == "garbled":
                handler.event("{]")
            elif how == "not an object":
                handler.event("[]")
            elif how == "another form":
                handler.event({"choices": [[1]], "usage": "much"})

    return respond


@pytest.mark.parametrize(
    "how",
    ["503", "429", "cut before", "cut within", "error event", "garbled", "not an object", "another form"],
)
def test_what_may_pass_is_tried_again(chat_server: Any, client: ChatClient, how: str) -> None:
    chat_server.respond = broken_at_first(how)
    reply = client.ask(HI, 20)
    assert (reply.text, reply.attempts) == ("fine", 3)


def test_a_stalled_server_is_given_up(chat_server: Any) -> None:
    import threading

    release = threading.Event()

    def respond(handler: Any, body: Any) -> None:
        handler.begin()
        handler.event({"choices": [{"delta": {"content": "wait"}}]})
        release.wait(10)

    chat_server.respond = respond
    endpoint = Endpoint(chat_server.url, "m")
    with (
        ChatClient(endpoint, seed=0, timeout_seconds=0.05, connections=1, pause_seconds=0.01) as client,
        pytest.raises(Unavailable, match="4 times in a row"),
    ):
        client.ask(HI, 20)
    release.set()
    assert len(chat_server.requests) == 4


def test_a_server_that_is_gone_is_unavailable() -> None:
    endpoint = Endpoint("http://127.0.0.1:1/v1", "m")
    with (
        ChatClient(endpoint, seed=0, timeout_seconds=1, connections=1, pause_seconds=0.01) as client,
        pytest.raises(Unavailable) as caught,
    ):
        client.ask(HI, 20)
    assert "http://127.0.0.1:1/v1" in caught.value.message
    assert caught.value.fix


def test_an_address_that_is_none() -> None:
    with pytest.raises(InvalidInput, match="localhost:1 is no address"):
        ChatClient(Endpoint("localhost:1", "m"), seed=0, timeout_seconds=1, connections=1)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_will_not_pass_is_not_tried_again(chat_server: Any, client: ChatClient, status: int) -> None:
    chat_server.respond = lambda handler, body: handler.fail(status, "no such model")
    with pytest.raises(FailedPrecondition, match="no such model") as caught:
        client.ask(HI, 20)
    assert len(chat_server.requests) == 1
    assert "secret-token" not in str(caught.value)


def test_a_prompt_that_is_too_long_is_a_refusal(chat_server: Any, client: ChatClient) -> None:
    chat_server.respond = lambda handler, body: handler.fail(400, "exceeds the context")
    reply = client.ask(HI, 20)
    assert reply.refused == "HTTP 400: exceeds the context"
    assert len(chat_server.requests) == 1
