"""The source: only the pinned archive, only llama.cpp, nothing outside its folder."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from web4lora_chassis.errors import DataLoss, FailedPrecondition
from web4lora_chassis.jobs import Progress
from web4lora_llamacpp import source
from web4lora_llamacpp.source import SDIST, SDIST_VARIABLE, ensure_source, source_folder

ROOT = f"llama_cpp_python-{SDIST.version}"


def _ignore(_: Progress) -> None:
    pass


def _archive(folder: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write an archive and pin it."""
    path = folder / SDIST.file_name
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(source, "SDIST", replace(SDIST, sha256=digest))
    monkeypatch.setenv(SDIST_VARIABLE, str(path))
    return path


def test_only_what_a_build_needs_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = f"{ROOT}/vendor/llama.cpp"
    files = {
        f"{llama}/convert_hf_to_gguf.py": "c",
        f"{llama}/gguf-py/gguf/__init__.py": "g",
        f"{llama}/docs/x.md": "",
        f"{llama}/.git": "gitdir: elsewhere",
        f"{ROOT}/llama_cpp/llama.py": "",
        f"{ROOT}/PKG-INFO": "",
    }
    _archive(tmp_path, files, monkeypatch)
    folder = ensure_source(tmp_path, _ignore)
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert found == ["convert_hf_to_gguf.py", "gguf-py/gguf/__init__.py"]
    assert folder == source_folder(tmp_path)


def test_a_source_that_is_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = _archive(tmp_path, {f"{ROOT}/vendor/llama.cpp/convert_hf_to_gguf.py": "c"}, monkeypatch)
    first = ensure_source(tmp_path, _ignore)
    archive.unlink()
    assert ensure_source(tmp_path, _ignore) == first


def test_another_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SDIST_VARIABLE, str(tmp_path))
    (tmp_path / SDIST.file_name).write_bytes(b"something else")
    with pytest.raises(DataLoss, match="is not llama-cpp-python"):
        ensure_source(tmp_path, _ignore)
    assert not source_folder(tmp_path).exists()


@pytest.mark.parametrize("name", ["../../../../outside", "a/../../../../../outside"])
def test_archives_can_not_leave_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    root = tmp_path / "deep" / "root"
    root.mkdir(parents=True)
    llama = f"{ROOT}/vendor/llama.cpp"
    _archive(root, {f"{llama}/convert_hf_to_gguf.py": "c", f"{llama}/{name}": "x"}, monkeypatch)
    folder = ensure_source(root, _ignore)
    assert [path.name for path in folder.iterdir()] == ["convert_hf_to_gguf.py"]
    assert not list(tmp_path.rglob("outside"))


def test_an_archive_without_llama_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _archive(tmp_path, {f"{ROOT}/PKG-INFO": ""}, monkeypatch)
    with pytest.raises(DataLoss, match=r"holds no llama\.cpp"):
        ensure_source(tmp_path, _ignore)


def test_a_named_archive_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SDIST_VARIABLE, str(tmp_path / "nowhere.tar.gz"))
    with pytest.raises(FailedPrecondition, match=SDIST_VARIABLE):
        ensure_source(tmp_path, _ignore)
