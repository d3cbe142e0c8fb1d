"""Compiles llama.cpp's tools with CMake and Ninja, both from PyPI, once, into the cache."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from web4lora_chassis.errors import FailedPrecondition, Internal, ResourceExhausted
from web4lora_chassis.jobs import Progress

from web4lora_llamacpp.follow import follow
from web4lora_llamacpp.source import SDIST, Report, ensure_source
from web4lora_llamacpp.tools import TARGETS, LlamaCpp, build_folder, cache_root, find, options, version_of

_COUNTER = re.compile(r"\[(\d+)/(\d+)\]")
_COMPILER_ERROR = re.compile(r"(fatal )?error:|undefined reference|Killed|cannot find -l|^CMake Error")
_NEEDED_BYTES = 1 << 30
_MEMORY_PER_JOB_BYTES = 1 << 30


def _silent(_: Progress) -> None:
    """Take progress that nobody watches."""


def ensure_built(cache: Path, report: Report | None = None, *, portable: bool = False) -> LlamaCpp:
    """Return llama.cpp's tools, compiled first when they are not in the cache.

    Safe to call from several processes: one builds, the others wait. An interrupted build goes on.

    Args:
        cache: The cache folder of the settings.
        report: Takes progress: phases "source" and "compile llama.cpp", the latter with steps and time left.
        portable: Build for other machines too; see `web4lora_llamacpp.tools.options`.

    Raises:
        FailedPrecondition: There is no C++ compiler.
        ResourceExhausted: The disk is too full.
        DataLoss: The source is not the pinned one.
        Unavailable: The source could not be downloaded.
        Internal: The build failed; the message has the compiler's first errors and names the log.
    """
    if found := find(cache):
        return found
    report = report or _silent
    root = cache_root(cache)
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / "build.lock", report):
        if found := find(cache):  # another process built it while we waited
            return found
        _require_space(root)
        _require_compiler()
        source = ensure_source(root, report)
        target = build_folder(cache, portable=portable)
        started = time.monotonic()
        work = target.with_name(target.name + ".build")
        _compile(source, work, target.with_name(target.name + ".log"), portable=portable, report=report)
        version = _install(work, target, portable=portable, seconds=time.monotonic() - started)
        shutil.rmtree(work)
    return LlamaCpp(target / "bin", source, version, found=False)


@contextlib.contextmanager
def _locked(path: Path, report: Report) -> Iterator[None]:
    """Hold a lock that the kernel frees when we die."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(Progress(phase="source", message="another process is building llama.cpp; waiting for it"))
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


def _compile(source: Path, work: Path, log: Path, *, portable: bool, report: Report) -> None:
    """Configure and compile in a folder that is kept until all is done."""
    import cmake  # here, because images that only run llama.cpp don't have it
    import ninja

    program = Path(cmake.CMAKE_BIN_DIR) / "cmake"
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}"]
    flags = [f"-D{name}={value}" for name, value in options(portable=portable).items()]
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

    code = follow(command, log, on_line)
    if code != 0:
        raise Internal(
            "\n  ".join([f"Compiling llama.cpp failed with exit code {code}.", *errors]),
            fix=f"The whole output: {log}. A build that ran out of memory goes on when it is started again.",
            reason="BUILD_FAILED",
            metadata={"log": log},
        )


def _install(work: Path, target: Path, *, portable: bool, seconds: float) -> str:
    """Put the tools, and nothing else of the build, in their place at once; return their version."""
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "bin").mkdir(parents=True)
    for path in sorted((work / "bin").iterdir()):
        if path.name in TARGETS or ".so" in path.name or path.suffix in (".dylib", ".metal", ".metallib"):
            shutil.copy2(path, part / "bin" / path.name, follow_symlinks=False)
    version = version_of(part / "bin")
    marker = {
        "version": version,
        "sdist": f"{SDIST.name} {SDIST.version}",
        "sha256": SDIST.sha256,
        "options": dict(options(portable=portable)),
        "seconds": round(seconds, 1),
    }
    (part / "build.json").write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    part.replace(target)
    return version
