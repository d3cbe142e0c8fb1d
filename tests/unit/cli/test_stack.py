from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from web4lora.home import load_settings, short
from web4lora.stack import Stack, service, usable_cores
from web4lora_chassis.errors import FailedPrecondition, InvalidInput
from web4lora_chassis.settings import Settings, make_native_tokens, make_private


@pytest.fixture
def sleeper() -> Iterator[psutil.Process]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield psutil.Process(child.pid)
    child.kill()
    child.wait()


def stack(tmp_path: Path, port: int = 1) -> Stack:
    addresses = {
        f"{name}_address": f"127.0.0.1:{port}" for name in ("gateway", "trainer", "packager", "deployer")
    }
    return Stack(Settings(home=tmp_path, **addresses), tmp_path / "outputs")


def note(made: Stack, pid: int, started: float) -> None:
    made.services[0].pid_file.parent.mkdir(exist_ok=True)
    made.services[0].pid_file.write_text(json.dumps({"pid": pid, "started": started}), "utf-8")


def test_a_noted_process_is_ours_only_with_its_start_time(tmp_path: Path, sleeper: psutil.Process) -> None:
    made = stack(tmp_path)
    assert made.process(made.services[0]) is None
    note(made, sleeper.pid, sleeper.create_time())
    assert made.process(made.services[0]) == sleeper
    note(made, sleeper.pid, sleeper.create_time() - 100)  # the number was given to another process since
    assert made.process(made.services[0]) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 3}', '{"pid": "x", "started": 1}'])
def test_a_broken_note_is_no_process(tmp_path: Path, text: str) -> None:
    made = stack(tmp_path)
    made.services[0].pid_file.parent.mkdir(exist_ok=True)
    made.services[0].pid_file.write_text(text, "utf-8")
    assert made.process(made.services[0]) is None


def test_down_leaves_processes_that_are_not_ours(tmp_path: Path, sleeper: psutil.Process) -> None:
    made = stack(tmp_path)
    note(made, sleeper.pid, sleeper.create_time() - 100)
    said: list[tuple[str, str]] = []
    assert made.down(lambda *told: said.append(told)) == []
    assert sleeper.is_running()
    assert ("trainer", "not running") in said
    assert not made.services[0].pid_file.exists()


def test_a_store_that_is_none_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    made = Stack(Settings(home=tmp_path, store="ftp://x"), tmp_path / "outputs")
    with pytest.raises(InvalidInput, match="WEB4LORA_STORE"):
        made.up(lambda *_: pytest.fail("something was started"))
    assert not list(tmp_path.iterdir())


def test_down_ends_ours(tmp_path: Path, sleeper: psutil.Process) -> None:
    made = stack(tmp_path)
    note(made, sleeper.pid, sleeper.create_time())
    assert made.down(lambda *_: None) == ["trainer"]
    assert not sleeper.is_running() or sleeper.status() == psutil.STATUS_ZOMBIE


def test_a_port_that_another_program_has_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        made = stack(tmp_path, taken.getsockname()[1])
        assert not made.serving(made.services[0], timeout_seconds=0.3)
        with pytest.raises(FailedPrecondition) as caught:
            made.up(lambda *_: None, ["gateway"])
    assert caught.value.reason == "ADDRESS_IN_USE"
    assert made.services[0].address in caught.value.message
    assert f"(process {os.getpid()})" in caught.value.message
    assert "WEB4LORA_GATEWAY_ADDRESS" in caught.value.fix


def test_services_know_their_names_and_places(tmp_path: Path) -> None:
    trainer = service("trainer", Settings(home=tmp_path, trainer_address="127.0.0.1:5"))
    assert trainer.full_name == "web4.lora.v1.TrainerService"
    assert (trainer.address, trainer.log_file) == ("127.0.0.1:5", tmp_path / "logs" / "trainer.log")


def test_at_least_one_core_is_used() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


def test_the_nearest_home_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEB4LORA_HOME", raising=False)
    (tmp_path / ".web4lora").mkdir()
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert load_settings().home == tmp_path / ".web4lora"
    monkeypatch.setenv("WEB4LORA_HOME", str(tmp_path / "other"))
    assert load_settings().home == tmp_path / "other"
    assert short(deep / "c") == Path("c")
    assert short(tmp_path) == tmp_path


def test_the_state_and_its_token_are_for_their_owner_alone(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    umask = os.umask(0o022)
    try:
        settings = Settings(home=home)
        make_private(home)
        make_native_tokens(settings)
        (home / "later").mkdir()
        (home / "later" / "file").write_text("x", "utf-8")
    finally:
        os.umask(umask)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (home, home / "token", home / "later" / "file")]
    assert modes == [0o700, 0o600, 0o600]
    first = settings.shared_token
    assert len(first) >= 32
    make_native_tokens(settings)
    assert settings.shared_token == first  # of a stack that has one
    assert sorted(path.name for path in home.iterdir()) == [
        "deployer.token", "later", "packager.token", "token", "trainer.token",
    ]  # fmt: skip


def test_a_token_that_was_set_wins(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, token="set")  # type: ignore[arg-type]
    make_native_tokens(settings)
    assert settings.shared_token == "set"
    assert not (tmp_path / "token").exists()


def test_a_folder_that_all_share_is_no_home_and_stays_open(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    umask = os.umask(0o022)
    try:
        with pytest.raises(FailedPrecondition, match="is shared with other users"):
            make_private(tmp_path)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o1777
