"""Any answer whatever is graded and reported, and none keeps anybody waiting without end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from web4lora_chassis.errors import InvalidInput, Unavailable
from web4lora_chassis.graders import GRADERS
from web4lora_chassis.graders.style import StyleRules
from web4lora_deployer.report import Measured, ReportFacts, ServedModel, write_reports
from web4lora_deployer.suite import Endpoint, Suite, SuiteResult, load_suite, run_suite
from web4lora_deployer.suite.chat import ChatClient

EXAMPLES = Path(__file__).parents[4] / "examples" / "web4"
HI = [{"role": "user", "content": "Hi"}]
CHECKS = {
    "tool_call": {"tool": "stop_agent", "args": {"name": "atlas", "force": True, "n": 1}},
    "style": {"class": "AgentRegistry", "methods": ["add", "find"]},
    "guardrail": {"refuse": False},
}
LONG = 10_000
ATLAS = '{"tool": "stop_agent", "args": {"name": "atlas", "force": true, '
ODD = {
    "lone surrogate in valid JSON": '{"tool": "\\ud800", "args": {"\\udfff": "\\ud83d"}}',
    "surrogate as an argument": '{"tool": "stop_agent", "args": {"name": "\\ud800", "force": true, "n": 1}}',
    "surrogate as a key": ATLAS + '"n": 1, "\\ud9ab": 1}}',
    "surrogates as keys": '{"\\ud800": 1, "\\udbff": 2}',
    "surrogate in code": "```ts\nexport class \ud800 {\n}\n```",
    "NUL": '{"tool": "a\\u0000b", "args": {}}',
    "raw NUL": "export class A {\0}\0",
    "controls": "\x1b[2J\x1b]0;x\x07\x7f\x85\u202e\u2066",
    "line separators": '{"tool": "a\u2028b\u2029c\u0085d", "args": {}}\u2028',
    "deep arrays": "[" * LONG,
    "deep arrays, closed": "[" * 900 + "]" * 900,
    "just deep enough to be read": '{"tool": "stop_agent", "args": ' + '{"a":' * 990 + "1" + "}" * 990 + "}",
    "deep in an argument": '{"tool": "stop_agent", "args": {"name": ' + "[" * 985 + "]" * 985 + "}}",
    "NaN": '{"tool": "stop_agent", "args": {"n": NaN}}',
    "Infinity": ATLAS + '"n": -Infinity}}',
    "1e999": ATLAS + '"n": 1e999}}',
    "a huge integer": ATLAS + '"n": ' + "9" * 5000 + "}}",
    "a large integer": ATLAS + '"n": ' + "9" * 4000 + "}}",
    "duplicate keys": '{"tool": "stop_agent", "tool": "stop_agent", "args": {}}',
    "many keys, one of them twice": "{" + ",".join(f'"k{n}":1' for n in range(LONG)) + ',"k7":2}',
    "many keys": "{" + ",".join(f'"k{n}":1' for n in range(LONG)) + "}",
    "10 MB of text": "la " * 3_500_000,
    "10 MB of JSON": '{"tool": "' + "x" * 10_000_000 + '", "args": {}}',
    "10 MB of code": "```ts\n" + "export class A {}\n" * 600_000 + "```",
    "10 MB of one line": "`" * 10_000_000,
    "10 MB of blanks": " " * 10_000_000,
    "a byte order mark": "\ufeff{}",
    "a replacement character": "\ufffd",
    "only joiners": "\u200d\u200b\ufe0f",
    "markup": "</details><script>alert(1)</script> | a | b |\n|--|\n`````\n<!--",
}
MONSTERS = {
    "braces": "{\n", "parentheses": "(", "generics": "a<", "statements": "a;\n", "no semicolons": "a\n",
    "loops": "for(;;)", "ifs": "if(a){}else ", "templates": "`${", "backticks": "`", "fences": "```ts\n",
    "cases": "switch(a){case 1:\n", "classes": "export class A {\n", "arrows": "(a=>", "unclosed": "}{)(",
    "decorators": "@a", "awaits": "async ", "comments": "/*", "strings": "'", "regexes": "/a",
}  # fmt: skip


def graded(text: str) -> Iterator[Any]:
    for name, expected in CHECKS.items():
        yield from GRADERS[name].grade(text, expected, StyleRules())


@pytest.mark.parametrize("name", ODD)
def test_any_answer_is_graded_with_reasons_that_can_be_written(name: str) -> None:
    checks = list(graded(ODD[name]))
    assert len(checks) > 15
    for check in checks:
        check.reason.encode("utf-8")
        assert "\0" not in check.reason
        assert len(check.reason) < 5000
        assert check.passed == (not check.reason)
    assert not any(check.passed for check in checks if check.name == "tool_call.exact")


@pytest.mark.parametrize("name", MONSTERS)
def test_monstrous_code_is_graded(name: str) -> None:
    assert not GRADERS["style"].grade(MONSTERS[name] * 500, CHECKS["style"], StyleRules())[0].passed


@pytest.mark.parametrize(
    "code",
    ["a;\n" * 20_000, "export class A {\n" + "  m(a: number): void { return; }\n" * 1_900 + "}", "`" * 2**16],
    ids=["statements", "methods", "backticks"],
)
def test_long_code_is_graded_in_time_in_proportion(code: str) -> None:
    # Looking through all statements for each of them takes longer than a test may.
    assert not GRADERS["style"].grade(code, CHECKS["style"], StyleRules())[0].passed


@pytest.fixture(scope="module")
def suite() -> Suite:
    return replace(load_suite(EXAMPLES), robustness=None, latency=None)


def test_a_suite_with_odd_answers_is_tested_kept_read_back_and_reported(
    suite: Suite, chat_server: Any, tmp_path: Path
) -> None:
    texts = [text for text in ODD.values() if len(text) < 100_000]

    def respond(handler: Any, body: Any) -> None:
        number = int(body["messages"][-1]["content"].split()[0])
        handler.begin()
        # As JSON escapes: half a pair of surrogates can't be sent otherwise.
        text = json.dumps({"choices": [{"delta": {"content": texts[number]}, "finish_reason": "stop"}]})
        handler.event(text)
        handler.event("[DONE]")

    prompts = []
    for number in range(len(texts)):
        like = suite.prompts[(0, 45, 70)[number % 3]]
        asked = ({"role": "user", "content": f"{number} {like.question}"},)
        prompts.append(replace(like, id=f"odd-{number}", messages=asked))
    prompts.sort(key=lambda prompt: [core.name for core in suite.cores].index(prompt.core))
    odd = replace(suite, prompts=tuple(prompts))
    chat_server.respond = respond
    result = run_suite(odd, Endpoint(chat_server.url, "m"), max_parallel=2)
    assert len(result.answers) == len(texts)
    form = TypeAdapter(SuiteResult)
    # As the measuring keeps it for the next attempt, which must be able to read it.
    assert form.validate_python(json.loads(json.dumps(form.dump_python(result)))) == result
    model = Measured(ServedModel("Q4_K_M"), result)
    summary = write_reports(tmp_path, ReportFacts("odd", odd, model, reference=model, with_diagram=False))
    data = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert len(data["answers"]) == len(texts)
    log = (tmp_path / "eval_log.md").read_text(encoding="utf-8")
    assert not {"\0", "\x1b", "\u202e"} & set(log)
    for sample in summary.samples:
        assert len(sample.answer.encode()) < 10_000
        assert "\x1b" not in sample.answer


@pytest.fixture
def client(chat_server: Any) -> Iterator[ChatClient]:
    endpoint = Endpoint(chat_server.url, "m")
    with ChatClient(endpoint, seed=7, timeout_seconds=20, connections=2, pause_seconds=0.001) as made:
        yield made


def raw(handler: Any, *lines: bytes) -> None:
    handler.begin()
    for line in lines:
        handler.wfile.write(line + b"\n\n")
    handler.wfile.flush()


END = b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}'


def test_bytes_that_are_no_utf_8_are_an_answer(chat_server: Any, client: ChatClient) -> None:
    chat_server.respond = lambda handler, body: raw(
        handler,
        b'data: {"choices": [{"delta": {"content": "a\xff\xc3b\xed\xa0\x80"}}]}',
        END,
        b"data: [DONE]",
    )
    reply = client.ask(HI, 20)
    assert reply.text.startswith("a\ufffd")
    assert (reply.refused, reply.attempts) == ("", 1)


BROKEN = {
    "no JSON": b"data: {]",
    "deeply nested": b"data: " + b"[" * 100_000,
    "no object": b"data: [1]",
    "an error": b'data: {"error": {"message": "unexpected tokens in the answer"}}',
    "choices of another form": b'data: {"choices": [[1]]}',
    "choices that are none": b'data: {"choices": 5}',
    "a delta of another form": b'data: {"choices": [{"delta": "x"}]}',
    "content of another form": b'data: {"choices": [{"delta": {"content": {"a": 1}}}]}',
    "thinking of another form": b'data: {"choices": [{"delta": {"reasoning_content": [1]}}]}',
}


@pytest.mark.parametrize("how", [*BROKEN, "HTTP 500", "broken off"])
def test_one_prompts_broken_stream_is_that_prompts_failure(
    suite: Suite, chat_server: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr("web4lora_deployer.suite.chat._FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(ChatClient.__init__, "__kwdefaults__", {"pause_seconds": 0.001})
    bad = suite.prompts[3]

    def respond(handler: Any, body: Any) -> None:
        if body["messages"][-1]["content"] != bad.question:
            handler.say("Yes")
        elif how == "HTTP 500":
            handler.fail(500, "Failed to parse input at pos 7")
        else:
            raw(handler, b'data: {"choices": [{"delta": {"content": "half"}}]}', BROKEN.get(how, b""))

    chat_server.respond = respond
    result = run_suite(suite, Endpoint(chat_server.url, "m"), max_parallel=2)
    failed = [a for a in result.answers if a.reply.refused]
    assert [answer.id for answer in failed] == [bad.id]
    assert not any(check.passed for check in failed[0].checks)
    assert failed[0].reply.attempts == 4


@pytest.mark.parametrize("how", [*BROKEN, "HTTP 500"])
def test_a_server_that_breaks_over_everything_is_unavailable(
    chat_server: Any, client: ChatClient, how: str
) -> None:
    def respond(handler: Any, body: Any) -> None:
        if how == "HTTP 500":
            handler.fail(500, "no")
        else:
            raw(handler, BROKEN[how])

    chat_server.respond = respond
    with pytest.raises(Unavailable, match="4 times in a row"):
        client.ask(HI, 20)


@pytest.mark.parametrize(
    "delta",
    [
        {"reasoning_content": "hm "}, {"reasoning": "hm "}, {}, {"content": ""}, {"content": None},
        {"role": "assistant"}, {"reasoning_content": "hm", "content": "la"}, {"tool_calls": [{"index": 0}]},
    ],
)  # fmt: skip
def test_deltas_without_end_are_cut_off(chat_server: Any, client: ChatClient, delta: Any) -> None:
    def respond(handler: Any, body: Any) -> None:
        handler.begin()
        while True:
            handler.event({"choices": [{"delta": delta}]})

    chat_server.respond = respond
    reply = client.ask(HI, 10)
    assert (reply.finish_reason, reply.attempts) == ("length", 1)
    assert "hm" not in reply.text


@pytest.mark.parametrize(
    "line",
    [b": ping\n\n", b"\n", b"x", b'data: {"choices": []}\n\n', b"data:\n\n"],
    ids=["comments", "empty lines", "one line", "events without choices", "events without data"],
)
def test_a_stream_without_an_answer_is_cut_off_by_its_bytes(
    chat_server: Any, client: ChatClient, line: bytes
) -> None:
    def respond(handler: Any, body: Any) -> None:
        handler.begin()
        while True:
            handler.wfile.write(line * 5000)

    chat_server.respond = respond
    assert client.ask(HI, 10).finish_reason == "length"


def test_a_piece_of_megabytes_is_cut_off(chat_server: Any, client: ChatClient) -> None:
    chat_server.respond = lambda handler, body: handler.say("x" * 900_000, "y" * 900_000)
    reply = client.ask(HI, 10)
    assert reply.finish_reason == "length"
    assert len(reply.text) < 10_000


def test_an_error_page_without_end_is_cut_off(chat_server: Any, client: ChatClient) -> None:
    def respond(handler: Any, body: Any) -> None:
        handler.send_response(400)
        handler.end_headers()
        while True:
            handler.wfile.write(b"no! " * 5000)

    chat_server.respond = respond
    assert client.ask(HI, 10).refused == "HTTP 400: an answer that is no error of such an API"


def dripping(line: bytes) -> Any:
    def respond(handler: Any, body: Any) -> None:
        handler.begin()
        while True:
            handler.wfile.write(line)
            handler.wfile.flush()
            time.sleep(0.02)

    return respond


@pytest.fixture
def hurried(chat_server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatClient]:
    monkeypatch.setattr("web4lora_deployer.suite.stream._SLOWEST_TOKENS_PER_SECOND", 1e6)
    endpoint = Endpoint(chat_server.url, "m")
    with ChatClient(endpoint, seed=7, timeout_seconds=0.3, connections=2, pause_seconds=0.001) as made:
        yield made


def test_an_answer_that_drips_is_cut_off_in_time(chat_server: Any, hurried: ChatClient) -> None:
    chat_server.respond = dripping(b'data: {"choices": [{"delta": {"content": "drip "}}]}\n\n')
    reply = hurried.ask(HI, 10_000)
    assert reply.finish_reason == "time"
    assert reply.text.startswith("drip drip")


def test_a_server_that_only_keeps_the_line_open_is_given_up(chat_server: Any, hurried: ChatClient) -> None:
    chat_server.respond = dripping(b": ping\n\n")
    with pytest.raises(Unavailable, match="no word of an answer"):
        hurried.ask(HI, 10_000)
    assert len(chat_server.requests) == 4


def test_thinking_counts_in_the_time_it_took(chat_server: Any, client: ChatClient) -> None:
    def respond(handler: Any, body: Any) -> None:
        handler.begin()
        for _ in range(40):
            handler.event({"choices": [{"delta": {"reasoning_content": "hm "}}]})
            time.sleep(0.004)
        for piece in ("an", "swer"):
            handler.event({"choices": [{"delta": {"content": piece}}]})
        handler.event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        handler.event({"choices": [], "usage": {"completion_tokens": 42}})
        handler.event("[DONE]")

    chat_server.respond = respond
    reply = client.ask(HI, 100)
    assert (reply.text, reply.output_tokens, reply.thought_pieces) == ("answer", 42, 40)
    assert 0 < reply.tokens_per_second < 260, "40 pauses of 4 ms lie between its tokens"
    assert reply.first_token_seconds < reply.seconds / 2


def test_tokens_that_were_not_seen_to_arrive_are_not_timed(chat_server: Any, client: ChatClient) -> None:
    def respond(handler: Any, body: Any) -> None:
        handler.begin()
        for piece in ("yes", " it", " is"):
            handler.event({"choices": [{"delta": {"content": piece}}]})
            time.sleep(0.005)
        handler.event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        handler.event({"choices": [], "usage": {"completion_tokens": 5000}})

    chat_server.respond = respond
    reply = client.ask(HI, 100)
    assert reply.output_tokens == 5000
    assert 0 < reply.tokens_per_second < 410


def test_an_answer_that_comes_all_at_once_has_no_speed(chat_server: Any, client: ChatClient) -> None:
    event = b'data: {"choices": [{"delta": {"content": "la"}}]}'
    chat_server.respond = lambda handler, body: raw(handler, b"\n\n".join([event] * 64), END)
    reply = client.ask(HI, 100)
    assert reply.output_tokens == 64
    assert reply.tokens_per_second == 0


@pytest.mark.parametrize("value", ["1e999", "NaN", "-1", '"7"', "true", "null", "[]", "{}", "9" * 400])
def test_figures_that_are_none_are_left_out(chat_server: Any, client: ChatClient, value: str) -> None:
    last = (
        f'{{"choices": [{{"delta": {{"content": "ok"}}, "finish_reason": "stop"}}],'
        f'"usage": {{"prompt_tokens": {value}, "completion_tokens": {value},'
        f'"prompt_tokens_details": {{"cached_tokens": {value}}}}},'
        f'"timings": {{"predicted_per_second": {value}}}}}'
    )
    chat_server.respond = lambda handler, body: raw(handler, f"data: {last}".encode())
    reply = client.ask(HI, 100)
    assert (reply.text, reply.output_tokens, reply.prompt_tokens) == ("ok", 1, 0)
    assert (reply.tokens_per_second, reply.cached_tokens) == (0, None)


@pytest.mark.parametrize("usage", ["5", '"much"', "[1]", '{"prompt_tokens_details": [1]}'])
def test_usage_of_another_form_is_left_out(chat_server: Any, client: ChatClient, usage: str) -> None:
    event = f'{{"choices": [{{"delta": {{"content": "ok"}}, "finish_reason": 7}}], "usage": {usage}}}'
    chat_server.respond = lambda handler, body: raw(handler, f"data: {event}".encode())
    reply = client.ask(HI, 100)
    assert (reply.text, reply.finish_reason) == ("ok", "7")


def test_an_answer_of_thinking_alone_says_so(suite: Suite, chat_server: Any) -> None:
    def respond(handler: Any, body: Any) -> None:
        handler.begin()
        handler.event({"choices": [{"delta": {"reasoning_content": "hm"}, "finish_reason": "length"}]})

    chat_server.respond = respond
    result = run_suite(suite, Endpoint(chat_server.url, "m"), max_parallel=4)
    reasons = {check.reason for answer in result.answers for check in answer.checks}
    assert reasons == {"it thought and never came to an answer", "never ended: cut off at max_tokens"}


@pytest.mark.parametrize(
    ("row", "message"),
    [('"\\ud800"', "half of a pair of surrogates"), ("NaN", "NaN is not JSON")],
)
def test_a_prompt_that_cannot_be_sent_is_refused_with_its_line(
    tmp_path: Path, row: str, message: str
) -> None:
    (tmp_path / "suite.yaml").write_text(
        "name: s\ncores:\n  tool:\n    check: tool_call\n    prompts: p.jsonl\n    max_tokens: 9\n"
    )
    messages = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
    line = f'{{"id": "%s", "core": "tool", "messages": {messages}, '
    line += '"check": {"tool": "t", "args": {"a": %s}}}\n'
    (tmp_path / "p.jsonl").write_text(line % ("1", "1") + line % ("2", row))
    with pytest.raises(InvalidInput, match=message) as caught:
        load_suite(tmp_path)
    assert "p.jsonl:2:" in caught.value.message
