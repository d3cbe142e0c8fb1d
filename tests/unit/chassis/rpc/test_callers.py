from __future__ import annotations

import os
from pathlib import Path

import pytest
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.rpc.callers import is_here, require_open_base
from web4lora_chassis.settings import Settings


class Caller:
    """A call's context, as far as it is asked."""

    def __init__(self, peer: str) -> None:
        self._peer = peer

    def peer(self) -> str:
        return self._peer


HERE, ELSEWHERE = Caller("ipv4:127.0.0.1:41000"), Caller("ipv4:10.0.0.7:41000")


@pytest.mark.parametrize(
    ("peer", "here"),
    [
        ("ipv4:127.0.0.1:1", True), ("ipv6:[::1]:1", True), ("ipv6:%5B::1%5D:1", True), ("unix:/run/x", True),
        ("ipv4:10.0.0.7:1", False), ("ipv6:[fe80::1]:1", False), ("ipv6:%5B2001:db8::1%5D:1", False),
        ("", False),
    ],
)  # fmt: skip
def test_where_a_call_comes_from(peer: str, here: bool) -> None:
    assert is_here(Caller(peer)) is here  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-Coder-7B", "org/name@main", "smollm2-135m-instruct", ""])
def test_a_name_is_open_to_all(model: str) -> None:
    require_open_base(model, Settings(), ELSEWHERE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "model",
    [
        "/etc",
        "~/models/x",
        "~root/x",
        "./x",
        "../x",
        "x.gguf",
        "models/x.GGUF",
        "..\\x",
        "/etc@main",
        "~nobody-here/x",
        "/a\0b",
        "/" + "x" * 5000,
    ],
)
def test_a_path_is_for_callers_on_this_machine(model: str) -> None:
    require_open_base(model, Settings(), HERE)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput) as caught:
        require_open_base(model, Settings(), ELSEWHERE)  # type: ignore[arg-type]
    assert caught.value.reason == "PATH_NOT_OPEN"
    assert caught.value.metadata["field"] == "base.model"


def test_a_name_that_is_a_folder_here_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput):
        require_open_base("org/name", Settings(), ELSEWHERE)  # type: ignore[arg-type]


def test_below_an_open_folder_and_not_out_of_it(tmp_path: Path) -> None:
    inside, outside = tmp_path / "models", tmp_path / "private"
    (inside / "a").mkdir(parents=True)
    outside.mkdir()
    (inside / "link").symlink_to(outside)
    settings = Settings(base_folders=os.pathsep.join([str(tmp_path / "other"), str(inside)]))
    require_open_base(str(inside / "a"), settings, ELSEWHERE)  # type: ignore[arg-type]
    for refused in (inside / "link", inside / ".." / "private", outside, tmp_path / "models2"):
        with pytest.raises(InvalidInput):
            require_open_base(str(refused), settings, ELSEWHERE)  # type: ignore[arg-type]
