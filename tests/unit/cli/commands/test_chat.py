"""The chat's reading of a stream, from a server that says exactly what the test wants."""

import io
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from typer.testing import CliRunner
from web4.lora.v1 import deployments_pb2
from web4lora.commands import chat
from web4lora.commands.chat import Conversation, joined
from web4lora.main import app
from web4lora_chassis.errors import Internal

Serve = Callable[..., deployments_pb2.Deployment]


def delta(**fields: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": fields}]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


@pytest.fixture
def asked() -> list[dict[str, Any]]:
    """The bodies of the requests."""
    return []


@pytest.fixture
def serve(asked: list[dict[str, Any]]) -> Iterator[Serve]:
    """Serves a stream of bytes as every answer; returns the deployment that it is."""
    servers: list[ThreadingHTTPServer] = []

    def start(*pieces: bytes, endless: bytes = b"") -> deployments_pb2.Deployment:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()
                try:
                    for piece in pieces:
                        self.wfile.write(piece)
                    while endless:
                        self.wfile.write(endless)
                except OSError:  # it has heard enough
                    pass

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        Thread(target=server.serve_forever, daemon=True).start()
        return deployments_pb2.Deployment(
            id="demo:v1a2b3c4d",
            model="demo:v1a2b3c4d",
            endpoint=f"http://127.0.0.1:{server.server_port}/v1",
            state=deployments_pb2.DEPLOYMENT_STATE_SERVING,
            trained_system="You are Tool-Core.",
        )

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def answer(deployment: deployments_pb2.Deployment, text: str = "Hello.", max_tokens: int = 8) -> str:
    return "".join(Conversation(deployment, [], temperature=0, max_tokens=max_tokens).ask(text))


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c"])
def test_a_line_end_of_unicode_within_an_answer_is_a_sign_like_others(serve: Serve, sign: str) -> None:
    event = {"choices": [{"delta": {"content": f"one{sign}two"}}]}
    data = json.dumps(event, ensure_ascii=False).encode()
    assert answer(serve(b"data: " + data + b"\r\n\r\n", DONE)) == f"one{sign}two"


def test_half_a_sign_is_replaced_and_a_sign_in_two_halves_is_joined(serve: Serve) -> None:
    deployment = serve(delta(content="a\ud83d"), delta(content="\ude00b"), delta(content="c\ud83d"), DONE)
    text = answer(deployment, "what \udcff is")
    assert text == "a\U0001f600bc\ufffd"
    text.encode()
    assert list(joined(["x", "", "\ud83d"])) == ["x", "\ufffd"]


@pytest.mark.parametrize(
    "endless", [delta(reasoning_content="hm"), delta(), delta(content=""), delta(content="x"), b"data: {}\n"]
)
def test_a_stream_without_end_is_ended(serve: Serve, endless: bytes) -> None:
    conversation = Conversation(serve(endless=endless), [], temperature=0, max_tokens=8)
    assert len("".join(conversation.ask("Hello."))) < 100
    assert conversation.figures["finish_reason"] == "length"


@pytest.mark.parametrize(
    "event", [b"data: {\n", b"data: 3\n", b"data: \xff\n", b"data: [[[[\n", b"data: " + b"x" * (2 << 20)]
)
def test_what_is_no_part_of_an_answer_is_said(serve: Serve, event: bytes) -> None:
    with pytest.raises(Internal, match="demo:v1a2b3c4d sent"):
        answer(serve(event))


def test_events_without_a_choice_or_a_delta_are_passed_over(serve: Serve) -> None:
    events = [{"choices": None}, {"choices": [{"delta": None}]}, {"usage": {"completion_tokens": 2}}]
    pieces = [b"data: " + json.dumps(event).encode() + b"\n" for event in events]
    assert answer(serve(b": comment\n", *pieces, delta(content="x"), DONE)) == "x"


class _Client:
    """Stands for the gateway, which knows one deployment."""

    deployed = deployments_pb2.Deployment()

    def __enter__(self) -> "_Client":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def deployment(self, _: str) -> deployments_pb2.Deployment:
        return self.deployed


@pytest.mark.parametrize(
    ("words", "system"),
    [([], "You are Tool-Core."), (["--system", ""], ""), (["--system", "Be brief."], "Be brief.")],
)
def test_the_trained_system_message_is_used_unless_another_one_is_given(
    serve: Serve, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, words: list[str], system: str
) -> None:
    monkeypatch.setattr(_Client, "deployed", serve(delta(content="Hi."), DONE))
    monkeypatch.setattr(chat, "Client", _Client)
    done = CliRunner().invoke(app, ["chat", "demo", "Create an agent", "--json", *words])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["system"] == system
    wanted = [{"role": "system", "content": system}] if system else []
    assert asked[0]["messages"] == [*wanted, {"role": "user", "content": "Create an agent"}]


def test_on_a_terminal_it_is_told_and_can_be_taken_away(
    serve: Serve,
    asked: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(_Client, "deployed", serve(delta(content="Hi."), DONE))
    monkeypatch.setattr(chat, "Client", _Client)
    monkeypatch.setattr("sys.stdin", Terminal("one\n/system\ntwo\n"))
    chat.chat("demo", max_tokens=8)
    assert [len(body["messages"]) for body in asked] == [2, 1]
    assert "System message: You are Tool-Core." in capfd.readouterr().err
