"""The build, with the real CMake, Ninja and compiler, on a source of five small programs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from web4lora_chassis.errors import FailedPrecondition, Internal
from web4lora_chassis.jobs import Progress
from web4lora_llamacpp import build, tools
from web4lora_llamacpp.build import ensure_built
from web4lora_llamacpp.source import SDIST
from web4lora_llamacpp.tools import FOLDER_VARIABLE, SOURCE_VARIABLE, TARGETS, build_folder, cache_root, find

from tests.unit.llamacpp.stand_in import MAIN, put_source

Place = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _no_build_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.delenv(SOURCE_VARIABLE, raising=False)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Puts a source into a new cache, where the real one would lie once unpacked."""

    def put(main: str) -> Path:
        put_source(tmp_path, main)
        return tmp_path

    return put


def test_builds_once_and_is_found_then(place: Place) -> None:
    cache = place(MAIN)
    assert find(cache) is None
    seen: list[Progress] = []
    built = ensure_built(cache, seen.append)
    assert not built.found
    assert built.version == "9.8.7 (abc1234)"
    assert all(path.is_file() for path in (built.server, built.quantize, built.imatrix))
    assert built.bench.is_file()
    assert built.converter.is_file()
    steps = [progress for progress in seen if progress.unit == "steps"]
    assert steps[-1].done == steps[-1].total == 2 * len(TARGETS)
    assert [progress.done for progress in steps] == sorted(progress.done for progress in steps)

    assert built.tested
    again = ensure_built(cache, pytest.fail)
    assert again.found
    assert again.bin == built.bin == build_folder(cache, portable=False) / "bin"
    assert find(cache) == again
    assert not list(cache_root(cache).glob("*.build"))


def test_compiler_errors_are_named_with_the_log(place: Place) -> None:
    cache = place("int main() { return nonsense; }\n")
    with pytest.raises(Internal) as caught:
        ensure_built(cache)
    assert caught.value.reason == "BUILD_FAILED"
    assert "nonsense" in caught.value.message
    log = Path(caught.value.metadata["log"])
    assert str(log) in caught.value.fix
    assert "FAILED" in log.read_text()
    assert find(cache) is None


def test_an_interrupted_build_goes_on(place: Place) -> None:
    cache = place(MAIN)

    def interrupt(progress: Progress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_built(cache, interrupt)
    assert find(cache) is None
    assert list(cache_root(cache).glob("*.build"))
    seen: list[Progress] = []
    ensure_built(cache, seen.append)
    totals = {progress.total for progress in seen if progress.unit == "steps"}
    assert max(totals) < 2 * len(TARGETS)  # what was compiled is not compiled again


def test_two_at_once_build_once(place: Place) -> None:
    cache = place(MAIN)
    program = (
        "import sys; from pathlib import Path; from web4lora_llamacpp import ensure_built; "
        "print(ensure_built(Path(sys.argv[1])).found)"
    )
    results: list[str] = []

    def run() -> None:
        output = subprocess.run(
            [sys.executable, "-c", program, cache], capture_output=True, check=True, text=True
        )
        results.append(output.stdout.strip())

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["False", "True"]


def test_a_missing_compiler_is_named_with_its_cure(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = place(MAIN)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(FailedPrecondition, match="needs a C compiler") as caught:
        ensure_built(cache)
    assert caught.value.reason == "COMPILER_MISSING"
    assert "Install" in caught.value.fix
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    with pytest.raises(FailedPrecondition, match="no-such-compiler"):
        ensure_built(cache)


def test_a_full_disk_is_told_before_anything_starts(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = place(MAIN)
    monkeypatch.setattr(build, "_NEEDED_BYTES", 1 << 62)
    with pytest.raises(Exception, match="GB are free"):
        ensure_built(cache)
    assert not list(cache_root(cache).glob("*.build"))


def test_what_shapes_a_build_is_in_its_folder_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native, portable = build_folder(tmp_path, portable=False), build_folder(tmp_path, portable=True)
    assert native != portable
    monkeypatch.setattr(tools, "_cpu", lambda: "another processor")
    assert build_folder(tmp_path, portable=False) != native
    assert build_folder(tmp_path, portable=True) == portable


def test_a_folder_of_ones_own_is_used(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    shutil.copytree(ensure_built(place(MAIN)).bin, own)
    monkeypatch.setenv(FOLDER_VARIABLE, str(own))
    monkeypatch.setenv(SOURCE_VARIABLE, str(tmp_path))
    seen: list[Progress] = []
    found = ensure_built(tmp_path / "empty cache", seen.append)
    assert {progress.phase for progress in seen} == {"self-test"}
    assert (found.bin, found.source, found.version) == (own, tmp_path, "9.8.7 (abc1234)")
    (own / "llama-imatrix").unlink()  # serving needs less than packaging
    less = find(tmp_path)
    assert less is not None
    with pytest.raises(FailedPrecondition, match="has no llama-imatrix"):
        _ = less.imatrix
    (own / "llama-server").unlink()
    with pytest.raises(FailedPrecondition, match="has no llama-server"):
        find(tmp_path)


def test_the_pin_is_whole() -> None:
    assert len(SDIST.sha256) == 64
    assert SDIST.file_name == f"llama_cpp_python-{SDIST.version}.tar.gz"
