"""The unit tests lie as the packages do: what tests a module lies where the module does, and has its name."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNIT = Path(__file__).parent
SOURCES = {
    path.name.removeprefix("web4lora_") if path.name != "web4lora" else "cli": path
    for path in (*ROOT.glob("libs/*/src/*"), *ROOT.glob("services/*/src/*"), *ROOT.glob("cli/src/*"))
    if (path / "__init__.py").is_file()
}


@pytest.mark.parametrize("package", sorted(SOURCES))
def test_a_module_s_tests_lie_where_it_does(package: str) -> None:
    folders: dict[str, set[Path]] = defaultdict(set)
    for module in SOURCES[package].rglob("*.py"):
        folders[module.stem].add(module.parent.relative_to(SOURCES[package]))
    tests = [path.relative_to(UNIT / package) for path in (UNIT / package).rglob("test_*.py")]
    assert tests
    for test in tests:
        assert (SOURCES[package] / test.parent).is_dir(), f"tests/unit/{package}/{test}: no such package"
        homes = folders.get(test.stem.removeprefix("test_"), {test.parent})
        assert test.parent in homes, f"tests/unit/{package}/{test} belongs into {sorted(map(str, homes))}"
