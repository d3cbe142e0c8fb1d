"""Moving the pin: what an sdist says of its llama.cpp is read from its files, and three values change."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "libs" / "llamacpp" / "update_pin.py"


@pytest.fixture(scope="module")
def update() -> Any:
    spec = importlib.util.spec_from_file_location("update_pin", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["update_pin"] = module
    spec.loader.exec_module(module)
    return module


def _sdist(path: Path, version: str, files: Mapping[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"llama_cpp_python-{version}/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def _release(update: Any, folder: Path, version: str, commit: str, models: str, tokenizer: str) -> Any:
    changelog = (
        f"# Changelog\n\n## [{version}]\n\n- feat: update llama.cpp to ggml-org/llama.cpp@{commit}\n\n"
        "## [0.1.0]\n\n- feat: update llama.cpp to ggml-org/llama.cpp@0123456789\n"
    )
    files = {
        "CHANGELOG.md": changelog,
        "vendor/llama.cpp/CHANGELOG.md": "no such thing",
        "vendor/llama.cpp/conversion/llama.py": f"@ModelBase.register(\n    {models},\n)\n",
        "vendor/llama.cpp/conversion/base.py": f'            res = "{tokenizer}"\n',
        "vendor/llama.cpp/src/llama.cpp": '@ModelBase.register("Elsewhere")',
    }
    archive = _sdist(folder / f"{version}.tar.gz", version, files)
    release = update.read_release(archive, version)
    assert release.sha256 == hashlib.sha256(archive.read_bytes()).hexdigest()
    return release


def test_it_tells_what_the_converter_knows_more_or_less(update: Any, tmp_path: Path) -> None:
    old = _release(update, tmp_path, "0.3.1", "aaaaaaa", '"One", "Two"', "gpt-2")
    new = _release(update, tmp_path, "0.3.2", "bbbbbbbcccc", '"Two", "Three"', "gpt-3")
    assert update.differences(old, new) == [
        "0.3.1 (aaaaaaa) → 0.3.2 (bbbbbbb)",
        "architectures: 2 → 2", "  + Three", "  - One",
        "pre-tokenizers: 1 → 1", "  + gpt-3", "  - gpt-2",
    ]  # fmt: skip


def test_only_the_pin_changes(update: Any, tmp_path: Path) -> None:
    release = _release(update, tmp_path, "0.3.2", "bbbbbbb", '"One"', "gpt-2")
    old = update.SOURCE.read_text()
    new = update.pinned(old, release)
    changed = [(a, b) for a, b in zip(old.splitlines(), new.splitlines(), strict=True) if a != b]
    assert [b.strip() for _, b in changed] == [
        'version="0.3.2",', f'sha256="{release.sha256}",', 'commit="bbbbbbb",',
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="no version"):
        update.pinned("nothing", release)


def test_a_version_whose_commit_is_not_told_is_refused(update: Any, tmp_path: Path) -> None:
    archive = _sdist(tmp_path / "a.tar.gz", "0.3.2", {"CHANGELOG.md": "# Changelog\n"})
    with pytest.raises(SystemExit, match=r"no commit of llama\.cpp for 0\.3\.2"):
        update.read_release(archive, "0.3.2")
