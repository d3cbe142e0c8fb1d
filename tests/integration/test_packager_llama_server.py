"""llama-server as the packager's load check and the deployer use it: a real one, on a tiny model."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import psutil
import pytest
from web4lora_chassis.errors import FailedPrecondition, NotFound
from web4lora_llamacpp import LlamaCpp, LlamaServer
from web4lora_packager.check import check_loads
from web4lora_packager.convert import convert

from tests import tiny_llama

pytestmark = pytest.mark.timeout(180)
READY_SECONDS = 90.0


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory, llama_cpp: LlamaCpp) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    base = tiny_llama.write_base(folder / "base", tied=False)
    convert(
        llama_cpp, base, folder / "tiny.gguf",
        gguf_type="BF16", name="tiny", log=folder / "log", report=lambda _: None,
    )  # fmt: skip
    return folder / "tiny.gguf"


def test_serves_with_the_models_own_template_and_a_whole_context_for_each(
    llama_cpp: LlamaCpp, gguf: Path, tmp_path: Path
) -> None:
    server = LlamaServer(
        llama_cpp, gguf, context_tokens=512, parallel=3, log_file=tmp_path / "log", alias="tiny-one"
    )
    with server:
        server.wait_ready(READY_SECONDS)
        root = server.endpoint.removesuffix("/v1")
        props = httpx2.get(f"{root}/props").json()
        assert props["total_slots"] == 3
        assert props["default_generation_settings"]["n_ctx"] == 512
        assert props["chat_template"] == tiny_llama.CHAT_TEMPLATE
        body = {"messages": [{"role": "user", "content": "hi"}]}
        prompt = httpx2.post(f"{root}/apply-template", json=body).json()["prompt"]
        assert prompt.startswith(f"<|im_start|>system\n{tiny_llama.SYSTEM}<|im_end|>\n<|im_start|>user\nhi")
        assert httpx2.get(f"{server.endpoint}/models").json()["data"][0]["id"] == "tiny-one"
        origin = httpx2.get(f"{root}/health", headers={"Origin": "https://example.org"})
        assert origin.headers.get("access-control-allow-origin") not in ("*", "https://example.org")
        assert psutil.Process(server.pid).name() == "llama-server"
    assert not server.alive
    assert not psutil.pid_exists(server.pid)


def test_the_load_check_tells_what_was_answered(llama_cpp: LlamaCpp, gguf: Path, tmp_path: Path) -> None:
    loaded = check_loads(llama_cpp, gguf, log=tmp_path / "log", timeout_seconds=READY_SECONDS)
    assert loaded.load_seconds > 0
    assert loaded.sample


@pytest.mark.parametrize("damage", ["junk", "cut off"])
def test_a_broken_file_is_named(llama_cpp: LlamaCpp, gguf: Path, tmp_path: Path, damage: str) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"junk" * 100 if damage == "junk" else gguf.read_bytes()[: gguf.stat().st_size // 2])
    with pytest.raises(FailedPrecondition, match=r"can't load bad\.gguf") as caught:
        check_loads(llama_cpp, bad, log=tmp_path / "log", timeout_seconds=READY_SECONDS)
    assert caught.value.reason == "MODEL_NOT_LOADABLE"
    assert str(tmp_path / "log") in caught.value.fix


def test_a_missing_file_is_named(llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"nowhere\.gguf"):
        check_loads(llama_cpp, tmp_path / "nowhere.gguf", log=tmp_path / "log", timeout_seconds=1)


def test_a_port_in_use_is_named(llama_cpp: LlamaCpp, gguf: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = LlamaServer(
            llama_cpp, gguf, port=port, context_tokens=64, parallel=1, log_file=tmp_path / "log"
        )
        with server, pytest.raises(FailedPrecondition, match=str(port)) as caught:
            server.wait_ready(READY_SECONDS)
    assert caught.value.reason == "ADDRESS_IN_USE"


def test_it_ends_when_its_owner_is_killed(llama_cpp: LlamaCpp, gguf: Path, tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from web4lora_llamacpp import LlamaCpp, LlamaServer\n"
        "llama = LlamaCpp(Path(sys.argv[1]), Path('.'), '')\n"
        "gguf, log = Path(sys.argv[2]), Path('log')\n"
        "server = LlamaServer(llama, gguf, context_tokens=64, parallel=1, log_file=log)\n"
        f"server.start(); server.wait_ready({READY_SECONDS})\n"
        "print(server.pid, flush=True); time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, llama_cpp.bin, gguf]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as owner:
        assert owner.stdout is not None
        server = psutil.Process(int(owner.stdout.readline()))
        owner.kill()
    end = time.monotonic() + 20
    while server.is_running() and server.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        time.sleep(0.05)
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
