"""No call over HTTP asks a proxy of the environment, unless it says so: what we ask runs on this machine."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCES = sorted(
    file for folder in ("libs", "services", "cli") for file in (ROOT / folder).rglob("src/**/*.py")
)
MAKE = {
    "Client",
    "AsyncClient",
    "get",
    "post",
    "put",
    "delete",
    "head",
    "patch",
    "request",
    "stream",
    "options",
}


def calls(file: Path) -> list[ast.Call]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in ("httpx2", "httpx2")
        and node.func.attr in MAKE
    ]


def test_there_is_something_to_look_at() -> None:
    assert sum(len(calls(file)) for file in SOURCES) >= 8


@pytest.mark.parametrize("file", [file for file in SOURCES if calls(file)], ids=lambda file: file.stem)
def test_every_call_says_whether_it_trusts_the_environment(file: Path) -> None:
    silent = [
        call.lineno for call in calls(file) if not any(word.arg == "trust_env" for word in call.keywords)
    ]
    assert not silent, f"{file.relative_to(ROOT)}: lines {silent}: a proxy variable reaches a call"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.stem)
def test_nothing_else_speaks_http_by_the_environment(file: Path) -> None:
    """`requests` and `urllib.request.urlopen` take proxies from the environment without a word."""
    text = file.read_text(encoding="utf-8")
    assert "urlopen(" not in text
    assert "import requests" not in text
