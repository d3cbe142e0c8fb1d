"""The hub's files, from a server on this machine that speaks as much of the hub as is needed."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from web4lora_chassis.errors import InvalidInput
from web4lora_trainer.base_model import resolve

COMMIT = "c" * 40
CODE = (
    "LICENSE_tok.py",
    "modeling_dream.py",
    "LICENSE.py",
    "tokenization.py",
    "NOTICE_x.sh",
    "pytorch_model.bin",
)


class Hub:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                if path.startswith("/api/models/"):
                    names = [{"rfilename": file.name} for file in sorted(hub.folder.iterdir())]
                    self.answer(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": names}).encode())
                    return
                name = path.rpartition("/")[2]
                if "/resolve/" in path:
                    hub.asked.append(name)
                file = hub.folder / name
                if file.is_file():
                    self.answer(file.read_bytes())
                else:
                    self.send_error(404)

            def answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{hash(body):x}"')
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def hub(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = Path(shutil.copytree(tiny_base, tmp_path / "remote"))
    for name in (*CODE, "LICENSE", "consolidated.safetensors", "README.md"):
        (folder / name).write_bytes(b"x")
    made = Hub(folder)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", made.url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        made.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_files_come_by_exact_names_alone(hub: Hub, tmp_path: Path) -> None:
    base = resolve("org/name", "", tmp_path / "cache", lambda _: None)
    assert base.revision == COMMIT
    assert set(hub.asked) == {
        "LICENSE", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert not {path.name for path in tmp_path.rglob("cache/**/*")} & set(CODE)


def test_code_is_refused_before_the_weights_are_fetched(hub: Hub, tmp_path: Path) -> None:
    path = hub.folder / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": ["LICENSE_tok.Tokenizer", None]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto_map}))
    with pytest.raises(InvalidInput, match=r"tokenizer_config\.json asks for code of its own"):
        resolve("org/name", "", tmp_path / "cache", lambda _: None)
    assert "model.safetensors" not in hub.asked
    assert not set(hub.asked) & set(CODE)


def test_a_repository_without_safetensors_is_refused(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "model.safetensors").unlink()
    with pytest.raises(InvalidInput, match="has no weights as safetensors"):
        resolve("org/name", "", tmp_path / "cache", lambda _: None)
