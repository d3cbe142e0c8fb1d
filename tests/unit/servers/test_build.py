"""Building the test servers: once, by one process, all or nothing."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from web4lora_chassis.errors import Internal, InvalidInput

from tests.servers import build as build_module
from tests.servers.build import CATALOGUE, GoProgram, build, find, main


@dataclass
class Recipe:
    """A server whose building takes a moment, and may fail."""

    name: str = "demo"
    version: str = "1.0"
    digest: str = "a"
    fails: bool = False
    builds: list[str] = field(default_factory=list)

    def build(self, target: Path, work: Path, report: Callable[[str], None]) -> None:
        self.builds.append(self.digest)
        (target / self.name).write_text("half")
        threading.Event().wait(0.05)
        if self.fails:
            raise Internal("no compiler")
        (target / self.name).write_text(f"whole {self.digest}")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    made = Recipe()
    monkeypatch.setenv("WEB4LORA_CACHE", str(tmp_path))
    monkeypatch.setattr(build_module, "CATALOGUE", {"demo": made})
    return made


def test_many_at_once_build_once(recipe: Recipe, tmp_path: Path) -> None:
    threads = [threading.Thread(target=build, args=("demo", lambda _: None)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert recipe.builds == ["a"]
    assert find("demo") == tmp_path / "servers" / "demo-1.0" / "demo"


def test_another_recipe_is_built_anew(recipe: Recipe) -> None:
    build("demo", lambda _: None)
    recipe.digest = "b"
    assert find("demo") is None
    assert build("demo", lambda _: None).read_text() == "whole b"


def test_a_failed_build_leaves_nothing_and_is_told(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.fails = True
    monkeypatch.setenv("CI", "false")
    assert main([]) == 0  # on a contributor's machine its tests are skipped
    assert main(["demo"]) == 1
    monkeypatch.setenv("CI", "true")
    assert main([]) == 1
    assert "demo: no compiler" in capsys.readouterr().err
    assert find("demo") is None
    recipe.fails = False
    assert main(["demo"]) == 0
    assert find("demo") is not None


def test_a_program_of_ones_own(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB4LORA_TEST_DEMO", str(tmp_path / "own"))
    assert build("demo", lambda _: None) == tmp_path / "own"
    assert recipe.builds == []


def test_unknown_servers_are_named() -> None:
    with pytest.raises(InvalidInput, match="nobody") as caught:
        build("nobody", lambda _: None)
    assert "minio" in caught.value.fix


@pytest.mark.parametrize("name", [name for name, made in CATALOGUE.items() if isinstance(made, GoProgram)])
def test_each_go_program_is_pinned(name: str) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(-[\w.-]+)?", CATALOGUE[name].version)
    assert (build_module.HERE / name / "go.sum").stat().st_size > 0
