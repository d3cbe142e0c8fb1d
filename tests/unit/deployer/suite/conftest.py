"""A small chat server over a real socket, told by each test how to answer."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Respond = Callable[["ChatHandler", dict[str, Any]], None]


class ChatHandler(BaseHTTPRequestHandler):
    """Passes each request to the test's function."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        assert isinstance(server, ChatServer)
        with server.lock:
            server.requests.append(body)
            server.paths.append(self.path)
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        try:
            server.respond(self, body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client had enough, as some tests want
        finally:
            with server.lock:
                server.active -= 1

    def log_message(self, format: str, *args: object) -> None:
        pass

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()

    def event(self, data: object) -> None:
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
        self.wfile.write(f"data: {text}\n\n".encode())
        self.wfile.flush()

    def say(
        self,
        *pieces: str,
        finish_reason: str = "stop",
        last: dict[str, Any] | None = None,
        pause_seconds: float = 0.0,
    ) -> None:
        """Answer as llama-server does: pieces, the finish reason, then the figures in `last`."""
        self.begin()
        self.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}}]})
        for piece in pieces:
            self.event({"choices": [{"index": 0, "delta": {"content": piece}}]})
            time.sleep(pause_seconds)
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": finish_reason}]})
        if last is not None:
            self.event({"choices": []} | last)
        self.event("[DONE]")

    def fail(self, status: int, message: str) -> None:
        body = json.dumps({"error": {"code": status, "message": message}}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class ChatServer(ThreadingHTTPServer):
    """Answers on a free port of the loopback."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ChatHandler)
        self.lock = threading.Lock()
        self.respond: Respond = lambda handler, body: handler.say("ok")
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.active = 0
        self.most_active = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@pytest.fixture
def chat_server() -> Iterator[ChatServer]:
    server = ChatServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
