"""Every service's README has a map of its files, in the words of their own docstrings."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SERVICES = Path(__file__).parents[2] / "services"
HEAD = "## Where things are\n\n| file | what |\n| --- | --- |\n"


def written(service: str) -> str:
    """Return the map as it must be: a line a file, the package's own files first."""
    package = SERVICES / service / "src" / f"web4lora_{service}"
    files = [path.relative_to(package) for path in package.rglob("*.py") if path.name != "__init__.py"]
    files.sort(key=lambda path: (len(path.parts), path.as_posix()))
    return HEAD + "".join(f"| `{file.as_posix()}` | {summary(package / file)} |\n" for file in files)


def summary(path: Path) -> str:
    said = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert said, path
    return said.split("\n\n")[0].replace("\n", " ").replace("|", "\\|")


@pytest.mark.parametrize("service", ["trainer", "packager", "deployer", "gateway"])
def test_the_map_of_a_service_is_true(service: str) -> None:
    text = (SERVICES / service / "README.md").read_text("utf-8")
    assert HEAD in text
    found = text[text.index(HEAD) :].split("\n\n## ")[0].rstrip() + "\n"
    assert found == written(service), f"services/{service}/README.md should have:\n\n{written(service)}"
