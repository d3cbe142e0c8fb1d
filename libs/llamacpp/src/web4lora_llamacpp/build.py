"""Compiles llama.cpp's tools with CMake and Ninja, both from PyPI, once, into the cache."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
from web4lora_chassis import process
from web4lora_chassis.errors import FailedPrecondition, ResourceExhausted, disk_error
from web4lora_chassis.jobs import Progress

from web4lora_llamacpp import verdicts
from web4lora_llamacpp.levels import NATIVE, native_levels, unsafe_variants
from web4lora_llamacpp.run_tool import run_tool
from web4lora_llamacpp.selftest import self_test
from web4lora_llamacpp.source import SDIST, Report, ensure_source
from web4lora_llamacpp.tools import (
    TARGETS,
    Build,
    LlamaCpp,
    build_folder,
    builds,
    cache_root,
    find,
    is_whole,
    none_works,
    options,
    version_of,
)

log = logging.getLogger(__name__)

_COUNTER = re.compile(r"\[(\d+)/(\d+)\]")
_COMPILER_ERROR = re.compile(r"(fatal )?error:|undefined reference|Killed|cannot find -l|^CMake Error")
_NEEDED_BYTES = 1 << 30
_MEMORY_PER_JOB_BYTES = 1 << 30


def _silent(_: Progress) -> None:
    """Take progress that nobody watches."""


def ensure_built(cache: Path, report: Report | None = None, *, portable: bool = False) -> LlamaCpp:
    """Return llama.cpp's tools, compiled first when they are not in the cache, and proved to work here.

    A build that crashes or computes wrong in its self-test is passed over for one with fewer of the
    processor's instructions. Safe to call from several processes: one builds, the others wait. An interrupted
    build goes on.

    Args:
        cache: The cache folder of the settings.
        report: Takes progress: phases "source" and "compile llama.cpp", the latter with steps and time left,
            and "self-test".
        portable: Build for other machines too; see `web4lora_llamacpp.tools.options`.

    Raises:
        FailedPrecondition: There is no C++ compiler, or nothing that it builds works on this machine.
        ResourceExhausted: The disk is too full.
        DataLoss: The source is not the pinned one.
        Unavailable: The source could not be downloaded.
        Internal: The build failed; the message has the compiler's first errors and names the log.
    """
    report = report or _silent
    if found := find_working(cache, report):
        return found
    root = _root(cache)
    with _locked(root / "build.lock", report, "another process is building llama.cpp; waiting for it"):
        compiled = False
        while not (found := find_working(cache, report)):  # another process may have built it while we waited
            _build_next(cache, root, portable=portable, report=report)
            compiled = True
    return replace(found, found=not compiled)


def find_working(cache: Path, report: Report | None = None) -> LlamaCpp | None:
    """Return the tools that are ready and work on this machine, tested first if they were not yet.

    Never compiles; a few seconds at the first call on a machine, none later.

    Args:
        cache: The cache folder of the settings.
        report: Takes progress: phase "self-test".

    Returns:
        The tools; None when they have to be compiled first.

    Raises:
        FailedPrecondition: WEB4LORA_LLAMA_CPP names a folder without the tools, or nothing works here.
        OutOfMemory: Memory ran out in the self-test.
        Unavailable: Nothing answered in time in the self-test.
    """
    report = report or _silent
    found = find(cache)
    if (found is not None and found.tested) or (found is None and not _left_to_copy(cache)):
        return found
    root = _root(cache)
    with _locked(root / "self-test.lock", report, "another process tests llama.cpp; waiting for it"):
        while (found := find(cache)) is not None or _copy_next(cache):
            if found is None:
                continue
            if found.tested:
                return found
            report(Progress(phase="self-test", message=f"a tiny model is asked, with {found.level}"))
            verdict = self_test(found, root)
            verdicts.write(root, found.bin, verdict)
            if not verdict.works:
                said = f"llama.cpp with {found.level} {verdict.problem}; the next safer one is taken"
                log.warning("%s", said)
                report(Progress(phase="self-test", message=said))
    return None


def _left_to_copy(cache: Path) -> list[Build]:
    """Return the choices of ready binaries that were not needed yet."""
    return [each for each in builds(cache) if each.template is not None and not each.there]


def _copy_next(cache: Path) -> bool:
    """Put the next safer choice of ready binaries in its place; say whether there was one."""
    left = _left_to_copy(cache)
    if not left:
        return False
    build = left[0]
    assert build.template is not None
    part = build.bin.with_name(build.bin.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    ignore = _leave_out(build.level.without)
    shutil.copytree(build.template, part, symlinks=True, ignore=ignore)
    shutil.rmtree(build.bin, ignore_errors=True)
    part.replace(build.bin)
    return True


def _leave_out(without: Iterable[str]) -> Callable[[str, list[str]], set[str]]:
    """Return what `shutil.copytree` asks: which files of a folder stay behind."""
    starts = tuple(f"libggml-cpu-{name}.so" for name in without)
    return lambda _, names: {name for name in names if name.startswith(starts)}


def _build_next(cache: Path, root: Path, *, portable: bool, report: Report) -> None:
    """Compile the fastest level that is not there yet."""
    levels = [NATIVE] if portable else native_levels()
    folders = {level.name: build_folder(cache, portable=portable, level=level) for level in levels}
    missing = [level for level in levels if not is_whole(folders[level.name] / "bin")]
    if not missing:  # a portable build, of which nothing works here
        raise none_works(cache)
    level = missing[0]
    target = folders[level.name]
    _require_space(root)
    _require_compiler()
    source = ensure_source(root, report)
    started = time.monotonic()
    work = target.with_name(target.name + ".build")
    given = options(portable=portable, level=level)
    if level is not levels[0]:
        report(Progress(phase="compile llama.cpp", message=f"again, with {level.words}"))
    _compile(source, work, target.with_name(target.name + ".log"), given, report)
    _install(work, target, given, unsafe_variants() if portable else frozenset(), time.monotonic() - started)
    shutil.rmtree(work)


def _root(cache: Path) -> Path:
    """Return llama.cpp's folder in the cache, made if it is not there."""
    root = cache_root(cache)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, root) from error
    return root


@contextlib.contextmanager
def _locked(path: Path, report: Report, waiting: str) -> Iterator[None]:
    """Hold a lock that the kernel frees when we die."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(Progress(phase="source", message=waiting))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _require_space(root: Path) -> None:
    free = shutil.disk_usage(root).free
    if free < _NEEDED_BYTES:
        raise ResourceExhausted(
            f"Compiling llama.cpp needs about 1 GB in {root}, {free / 1e9:.1f} GB are free.",
            fix="Free disk space, or set WEB4LORA_CACHE to a folder on another disk.",
            reason="DISK_FULL",
        )


def _require_compiler() -> None:
    """Name what to install before CMake fails with a page of text."""
    for variable, names in (("CC", ("cc", "gcc", "clang")), ("CXX", ("c++", "g++", "clang++"))):
        given = os.environ.get(variable)
        if not any(shutil.which(name) for name in ([given.split()[0]] if given else names)):
            what = f"{variable} names {given}, which is not there" if given else "none was found"
            language = "C++" if variable == "CXX" else "C"
            raise FailedPrecondition(
                f"Compiling llama.cpp needs a {language} compiler; {what}.",
                fix=_how_to_install(),
                reason="COMPILER_MISSING",
            )


def _how_to_install() -> str:
    if platform.system() == "Darwin":
        return "Install Apple's: xcode-select --install"
    for tool, command in (
        ("apt-get", "sudo apt-get install g++"),
        ("dnf", "sudo dnf install gcc-c++"),
        ("pacman", "sudo pacman -S gcc"),
        ("zypper", "sudo zypper install gcc-c++"),
        ("apk", "sudo apk add g++ linux-headers"),
    ):
        if shutil.which(tool):
            return f"Install one: {command}"
    return "Install g++ or clang++ with your system's package manager."


def _compile(source: Path, work: Path, log: Path, given: Mapping[str, str], report: Report) -> None:
    """Configure and compile in a folder that is kept until all is done."""
    import cmake  # here, because images that only run llama.cpp don't have it
    import ninja

    program = Path(cmake.CMAKE_BIN_DIR) / "cmake"
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}"]
    flags = [f"-D{name}={value}" for name, value in given.items()]
    report(Progress(phase="compile llama.cpp", message="configuring"))
    log.write_bytes(b"")
    _step([program, "-S", source, "-B", work, *generator, *flags], log, report)
    jobs = max(1, min(_cpus(), psutil.virtual_memory().total // _MEMORY_PER_JOB_BYTES))
    _step([program, "--build", work, "-j", str(jobs), "--target", *TARGETS], log, report)


def _cpus() -> int:
    """Return how many processors we may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _step(command: Sequence[str | Path], log: Path, report: Report) -> None:
    """Run a step of the build and pass its counter on."""
    started, first = time.monotonic(), 0
    errors: list[str] = []

    def on_line(line: str) -> None:
        nonlocal first
        if step := _COUNTER.match(line):
            done, total = int(step[1]), int(step[2])
            first = first or done
            spent = time.monotonic() - started
            left = spent / (done - first) * (total - done) if done > first else 0.0
            report(Progress("compile llama.cpp", done, total, "steps", left))
        elif _COMPILER_ERROR.search(line) and len(errors) < 5:
            errors.append(line)

    code = run_tool(command, log, on_line)
    if code != 0:
        fix = f"The whole output: {log}. A build that ran out of memory goes on when it is started again."
        error = process.failure("Compiling llama.cpp", code, fix=fix, reason="BUILD_FAILED")
        error.message = "\n  ".join([error.message, *errors])
        error.metadata["log"] = str(log)
        raise error


def _install(
    work: Path, target: Path, given: Mapping[str, str], without: frozenset[str], seconds: float
) -> None:
    """Put the tools, and nothing else of the build, in their place at once."""
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "bin").mkdir(parents=True)
    names = [path.name for path in sorted((work / "bin").iterdir())]
    for name in sorted(set(names) - _leave_out(without)("", names)):
        if name in TARGETS or ".so" in name or name.endswith((".dylib", ".metal", ".metallib")):
            shutil.copy2(work / "bin" / name, part / "bin" / name, follow_symlinks=False)
    marker = {
        "version": version_of(part / "bin"),
        "sdist": f"{SDIST.name} {SDIST.version}",
        "sha256": SDIST.sha256,
        "options": dict(given),
        "without": sorted(without),
        "seconds": round(seconds, 1),
    }
    (part / "build.json").write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)  # one of before, that lacks a tool
    part.replace(target)
