"""The self-test and the levels: with real builds that really crash, and planted processors and compilers."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from web4lora_chassis import process
from web4lora_chassis.errors import FailedPrecondition, Web4Error
from web4lora_chassis.jobs import Progress
from web4lora_llamacpp import LlamaCpp, ensure_built, find, find_working, levels, verdicts
from web4lora_llamacpp.selftest import self_test
from web4lora_llamacpp.source import SDIST
from web4lora_llamacpp.tiny_model import TYPES
from web4lora_llamacpp.tools import (
    FOLDER_VARIABLE,
    SOURCE_VARIABLE,
    TARGETS,
    build_folder,
    cache_root,
    options,
)

from tests.unit.llamacpp.stand_in import MAIN, put_source

OLD, AVX2 = "flags : fpu sse2", "flags : fpu sse2 avx2 fma f16c bmi2"
AMX = f"{AVX2} avx512_vnni amx_tile amx_int8 amx_bf16"
GCC_12, GCC_13_3 = (
    "#define __GNUC__ 12\n#define __GNUC_MINOR__ 2",
    "#define __GNUC__ 13\n#define __GNUC_MINOR__ 3",
)
CLANG = "#define __clang__ 1\n#define __GNUC__ 4\n#define __GNUC_MINOR__ 2"

Plant = Callable[[str], None]


@pytest.fixture(autouse=True)
def _no_build_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.delenv(SOURCE_VARIABLE, raising=False)


@pytest.fixture
def processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Plants what Linux tells of the processor."""

    def plant(text: str) -> None:
        (tmp_path / "cpuinfo").write_text(f"model name : x\n{text}\n")
        monkeypatch.setattr(levels, "_CPUINFO", tmp_path / "cpuinfo")

    return plant


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Puts a compiler that says so of itself before all others."""

    def plant(macros: str) -> None:
        program = tmp_path / f"compiler-{hashlib.sha256(macros.encode()).hexdigest()[:8]}"
        program.write_text(f"#!/bin/sh\ncat <<END\n{macros}\nEND\n")
        program.chmod(0o755)
        monkeypatch.setenv("CXX", str(program))

    return plant


def never(progress: Progress) -> None:
    pytest.fail(f"nothing was to be done: {progress}")


def names() -> list[str]:
    return [level.name for level in levels.native_levels()]


@pytest.mark.parametrize(
    ("cpu", "macros", "kernel", "wanted"),
    [
        (AMX, GCC_12, "6.1.0-18-amd64", ["no-amx", "avx2", "basic"]),
        (AMX, GCC_13_3, "6.1.0", ["native", "no-amx", "avx2", "basic"]),
        (AMX, GCC_13_3, "4.4.0", ["no-amx", "avx2", "basic"]),
        (AMX, GCC_13_3, "5.15.0-91-generic", ["no-amx", "avx2", "basic"]),
        (AMX, CLANG, "5.16.0", ["native", "no-amx", "avx2", "basic"]),
        (AMX, "", "6.1.0", ["no-amx", "avx2", "basic"]),
        (AVX2, GCC_12, "6.1.0", ["native", "avx2", "basic"]),
        (OLD, GCC_12, "6.1.0", ["native", "basic"]),
        ("processor : 0", GCC_12, "6.1.0", ["native", "basic"]),
    ],
)
def test_amx_is_left_out_where_compiler_or_kernel_can_not_be_trusted(
    processor: Plant,
    compiler: Plant,
    monkeypatch: pytest.MonkeyPatch,
    cpu: str,
    macros: str,
    kernel: str,
    wanted: list[str],
) -> None:
    processor(cpu)
    compiler(macros)
    monkeypatch.setattr(platform, "release", lambda: kernel)
    assert names() == wanted


def test_without_amx_the_first_level_is_the_build_of_before(processor: Plant, tmp_path: Path) -> None:
    processor(AVX2)
    first = levels.native_levels()[0]
    given = {
        "CMAKE_BUILD_TYPE": "Release", "LLAMA_OPENSSL": "OFF", "LLAMA_BUILD_TESTS": "OFF",
        "LLAMA_BUILD_EXAMPLES": "OFF", "LLAMA_BUILD_APP": "OFF", "LLAMA_USE_PREBUILT_UI": "OFF",
        "LLAMA_BUILD_NUMBER": "1", "LLAMA_BUILD_COMMIT": SDIST.commit,
        "BUILD_SHARED_LIBS": "OFF", "GGML_NATIVE": "ON",
    }  # fmt: skip
    assert dict(options(portable=False, level=first)) == given
    shape = [given, platform.system(), platform.machine(), " ".join(sorted(AVX2.split()[2:]))]
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:12]
    folder = build_folder(tmp_path, portable=False, level=first)
    assert folder.name == f"{SDIST.sha256[:12]}-{digest}"


def test_what_is_left_out_is_said(processor: Plant, compiler: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    processor(AMX)
    compiler(GCC_12)
    assert "before 13.3" in levels.left_out()
    compiler(GCC_13_3)
    monkeypatch.setattr(platform, "release", lambda: "4.4.0")
    assert "kernel 4.4.0 is older than 5.16" in levels.left_out()
    monkeypatch.setattr(platform, "release", lambda: "6.1.0")
    assert levels.left_out() == ""
    processor(AVX2)
    compiler(GCC_12)
    assert levels.left_out() == ""


@pytest.mark.parametrize("flag", ["-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16"])
def test_the_level_without_amx_hands_the_compiler_its_flags(
    processor: Plant, compiler: Plant, flag: str
) -> None:
    processor(AMX)
    compiler(GCC_12)
    first = options(portable=False, level=levels.native_levels()[0])
    assert flag in first["CMAKE_C_FLAGS"].split()
    assert flag in first["CMAKE_CXX_FLAGS"].split()


def test_a_build_that_crashes_gives_way_to_the_next_safer_one(
    processor: Plant, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    processor(AVX2)
    put_source(tmp_path, "#include <csignal>\n#ifdef NATIVE_ON\n#define CRASHES SIGSEGV\n#endif\n" + MAIN)
    seen: list[Progress] = []
    built = ensure_built(tmp_path, seen.append)
    assert (built.level, built.tested, built.found) == ("AVX2 and nothing newer", True, False)
    (avoided,) = built.avoided
    assert "with all of this processor's instructions crashed: llama-server" in avoided
    assert "was killed by SIGSEGV, most likely it was compiled for instructions" in avoided
    said = [progress.message for progress in seen if progress.phase == "self-test"]
    assert any("SIGSEGV" in message and "the next safer one is taken" in message for message in said)
    assert "SIGSEGV" in caplog.text
    again = ensure_built(tmp_path, never)
    assert (again.bin, again.avoided) == (built.bin, built.avoided)
    assert find(tmp_path) == again


def test_a_build_that_can_not_even_say_its_version_gives_way_too(processor: Plant, tmp_path: Path) -> None:
    processor(AVX2)
    put_source(tmp_path, "#include <csignal>\n#ifdef NATIVE_ON\n#define STARTS_WITH SIGILL\n#endif\n" + MAIN)
    built = ensure_built(tmp_path)
    assert built.level == "AVX2 and nothing newer"
    assert built.version == "9.8.7 (abc1234)"
    assert "SIGILL" in built.avoided[0]


def test_ready_binaries_that_can_not_even_say_their_version_are_told(
    processor: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(OLD)
    put_source(tmp_path, MAIN)
    own = tmp_path / "own"
    shutil.copytree(ensure_built(tmp_path).bin, own)
    for name in TARGETS:
        (own / name).write_text("#!/bin/sh\nkill -ILL $$\n")
    monkeypatch.setenv(FOLDER_VARIABLE, str(own))
    with pytest.raises(FailedPrecondition, match=r"No llama\.cpp works on this machine") as caught:
        ensure_built(tmp_path / "cache")
    assert "SIGILL" in caught.value.message


def test_a_wrong_answer_is_as_bad_as_a_crash(processor: Plant, tmp_path: Path) -> None:
    processor(AVX2)
    put_source(
        tmp_path,
        '#ifdef AVX2_ON\n#define ANSWER "1,2"\n#endif\n#ifdef NATIVE_ON\n#define ANSWER ""\n#endif\n' + MAIN,
    )
    built = ensure_built(tmp_path)
    assert built.level == "the instructions that every processor of this kind has"
    assert [text.count("computed wrong") for text in built.avoided] == [1, 1]


def test_when_no_level_works_it_is_said_once_and_for_all(processor: Plant, tmp_path: Path) -> None:
    processor(OLD)
    put_source(tmp_path, "#include <csignal>\n#define CRASHES SIGILL\n" + MAIN)
    with pytest.raises(FailedPrecondition, match=r"No llama\.cpp works on this machine") as caught:
        ensure_built(tmp_path)
    assert caught.value.reason == process.CRASHED
    assert caught.value.message.count("SIGILL") == 2
    assert "CXX" in caught.value.fix
    for ask in (ensure_built, find_working, find):
        with pytest.raises(FailedPrecondition, match=r"No llama\.cpp works"):
            ask(tmp_path)


def test_memory_that_runs_out_says_nothing_about_a_build(processor: Plant, tmp_path: Path) -> None:
    processor(OLD)
    put_source(tmp_path, "#include <csignal>\n#define CRASHES SIGKILL\n" + MAIN)
    with pytest.raises(Web4Error) as caught:
        ensure_built(tmp_path)
    assert caught.value.reason == "OUT_OF_MEMORY"
    found = find(tmp_path)
    assert found is not None
    assert not found.tested
    assert not found.avoided


def test_another_processor_kernel_or_binary_is_tested_anew(
    compiled: Path, processor: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(OLD)
    own = tmp_path / "own"
    shutil.copytree(compiled, own)
    monkeypatch.setenv(FOLDER_VARIABLE, str(own))
    cache = tmp_path / "cache"

    def phases() -> list[str]:
        seen: list[Progress] = []
        ensure_built(cache, seen.append)
        return [progress.phase for progress in seen]

    assert phases() == ["self-test"]
    assert phases() == []
    processor(AVX2)
    assert phases() == ["self-test"]
    monkeypatch.setattr(platform, "release", lambda: "99.1.0")
    assert phases() == ["self-test"]
    (own / "llama-server").touch()
    assert phases() == ["self-test"]
    for file in (cache_root(cache) / "self-tests").iterdir():
        file.write_text('{"works": tr')  # cut off
    assert phases() == ["self-test"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small tools that work."""
    cache = tmp_path_factory.mktemp("compiled")
    put_source(cache)
    return ensure_built(cache).bin


def with_variants(compiled: Path, folder: Path, crashing: set[str]) -> Path:
    """A folder as an image has it: its server takes the first of the libraries beside it, and may crash."""
    shutil.copytree(compiled, folder)
    (folder / "llama-server").rename(folder / "server")
    order = ("sapphirerapids", "skylakex", "haswell", "x64")
    for name in order:
        (folder / f"libggml-cpu-{name}.so.0.1").write_text(name)
        (folder / f"libggml-cpu-{name}.so").symlink_to(f"libggml-cpu-{name}.so.0.1")
    cases = "\n".join(
        f'if [ -e "$here/libggml-cpu-{name}.so" ]; then {"kill -ILL $$" if name in crashing else run}; fi'
        for name in order
        for run in ['exec "$here/server" "$@"']
    )
    version = 'if [ "$1" = --version ]; then exec "$here/server" --version; fi'
    (folder / "llama-server").write_text(f'#!/bin/sh\nhere=$(dirname "$0")\n{version}\n{cases}\n')
    (folder / "llama-server").chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("crashing", "left", "words"),
    [
        (set(), {"sapphirerapids", "skylakex", "haswell", "x64"}, "what fits this processor best"),
        ({"sapphirerapids"}, {"skylakex", "haswell", "x64"}, "this processor's instructions without AMX"),
        ({"sapphirerapids", "skylakex"}, {"haswell", "x64"}, "AVX2 and nothing newer"),
        ({"sapphirerapids", "skylakex", "haswell"}, {"x64"}, "the instructions that every processor of this"),
    ],
)
def test_an_image_chooses_a_safer_library_at_its_first_start(
    compiled: Path,
    processor: Plant,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    crashing: set[str],
    left: set[str],
    words: str,
) -> None:
    processor(AMX)
    image = with_variants(compiled, tmp_path / "image", crashing)
    before = sorted(path.name for path in image.iterdir())
    monkeypatch.setenv(FOLDER_VARIABLE, str(image))
    found = find_working(tmp_path / "cache")
    assert found is not None
    assert found.level.startswith(words)
    assert levels.variants(found.bin) == left
    assert {path.name for path in found.bin.iterdir()} >= set(TARGETS)
    assert len(found.avoided) == 4 - len(left)
    assert sorted(path.name for path in image.iterdir()) == before
    assert find(tmp_path / "cache") == found


def test_an_image_in_which_nothing_works_says_so(
    compiled: Path, processor: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(AMX)
    image = with_variants(compiled, tmp_path / "image", {"sapphirerapids", "skylakex", "haswell", "x64"})
    monkeypatch.setenv(FOLDER_VARIABLE, str(image))
    with pytest.raises(FailedPrecondition, match=r"No llama\.cpp works") as caught:
        find_working(tmp_path / "cache")
    assert caught.value.message.count("SIGILL") == 4
    assert FOLDER_VARIABLE in caught.value.fix


def test_a_portable_build_lacks_the_variant_that_its_compiler_breaks(
    compiler: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(GCC_12)
    assert levels.unsafe_variants() == {"sapphirerapids"}
    compiler(GCC_13_3)
    assert levels.unsafe_variants() == frozenset()


def test_a_folder_that_can_not_be_tested_is_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for name in TARGETS:
        (own / name).write_text("#!/bin/sh\necho version: 1\n")
        (own / name).chmod(0o755)
    monkeypatch.setenv(FOLDER_VARIABLE, str(own))
    with pytest.raises(FailedPrecondition, match=r"no tools of llama\.cpp that can be used"):
        find_working(tmp_path / "cache")
    assert verdicts.read(cache_root(tmp_path / "cache"), own) is None


def test_the_real_llama_cpp_passes(llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    verdict = self_test(llama_cpp, tmp_path)
    assert verdict.works, verdict.problem
    log = (tmp_path / "self-test.log").read_text(errors="replace").lower()
    missing = [kind for kind in {*TYPES.values(), "q4_k"} if f"converting to {kind} .." not in log]
    assert not missing, log
