"""Compiled tools of llama.cpp: where they lie, and which build of them fits this machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from web4lora_chassis import process
from web4lora_chassis.errors import FailedPrecondition, Web4Error

from web4lora_llamacpp import verdicts
from web4lora_llamacpp.levels import NATIVE, Level, cpu_flags, native_levels, variant_levels
from web4lora_llamacpp.source import SDIST, SOURCE_VARIABLE, source_folder

FOLDER_VARIABLE = "WEB4LORA_LLAMA_CPP"
"""Names a folder of ready binaries, which is then used in place of a build."""
TARGETS = ("llama-quantize", "llama-server", "llama-imatrix", "llama-bench", "llama-tokenize")
_NEEDED = ("llama-quantize", "llama-server")  # in a folder of ready binaries: what the self-test asks
_VERSION = re.compile(r"version: (\S+) \((?:build \d+, commit )?(\w+)\)")


@dataclass(frozen=True)
class LlamaCpp:
    """A build of llama.cpp's tools.

    Attributes:
        bin: Folder of the binaries.
        source: Root of the source, which holds convert_hf_to_gguf.py.
        version: What the binaries say, for example "0.5.0-dev (0c1e570)".
        found: False when this call compiled it, True when it was there already.
        level: Which of the processor's instructions it uses, in words.
        tested: It passed the self-test on this machine.
        avoided: What did not pass it and was passed over for this one, a sentence each.
    """

    bin: Path
    source: Path
    version: str
    found: bool = True
    level: str = NATIVE.words
    tested: bool = False
    avoided: Sequence[str] = ()

    @property
    def quantize(self) -> Path:
        """The program llama-quantize."""
        return self._program("llama-quantize")

    @property
    def server(self) -> Path:
        """The program llama-server."""
        return self._program("llama-server")

    @property
    def imatrix(self) -> Path:
        """The program llama-imatrix."""
        return self._program("llama-imatrix")

    @property
    def bench(self) -> Path:
        """The program llama-bench."""
        return self._program("llama-bench")

    @property
    def tokenize(self) -> Path:
        """The program llama-tokenize."""
        return self._program("llama-tokenize")

    def _program(self, name: str) -> Path:
        path = self.bin / name
        if not path.is_file():
            raise FailedPrecondition(
                f"{self.bin} has no {name}.",
                fix=f"Name a folder with {', '.join(TARGETS)} in {FOLDER_VARIABLE}, or unset it.",
            )
        return path

    @property
    def converter(self) -> Path:
        """The script convert_hf_to_gguf.py."""
        return self.source / "convert_hf_to_gguf.py"

    @property
    def adapter_converter(self) -> Path:
        """The script convert_lora_to_gguf.py."""
        return self.source / "convert_lora_to_gguf.py"


def cache_root(cache: Path) -> Path:
    """Return llama.cpp's folder in the cache."""
    return cache / "llama.cpp"


def options(*, portable: bool, level: Level = NATIVE) -> Mapping[str, str]:
    """Return CMake's options.

    Args:
        portable: For images that run elsewhere: one CPU library for each generation of processors, of which
            the best fitting is loaded at the start. Otherwise compiled for this machine's processor alone.
        level: Which of its instructions to use, unless portable.
    """
    common = {
        "CMAKE_BUILD_TYPE": "Release",
        "LLAMA_OPENSSL": "OFF",
        "LLAMA_BUILD_TESTS": "OFF",
        "LLAMA_BUILD_EXAMPLES": "OFF",
        "LLAMA_BUILD_APP": "OFF",
        "LLAMA_USE_PREBUILT_UI": "OFF",
        # The sdist has no Git history to take these from; a checkout around the cache must not lend its own.
        "LLAMA_BUILD_NUMBER": "1",
        "LLAMA_BUILD_COMMIT": SDIST.commit,
    }
    if not portable:
        return {**common, "BUILD_SHARED_LIBS": "OFF", **level.options}
    return {
        **common,
        "BUILD_SHARED_LIBS": "ON",
        "GGML_BACKEND_DL": "ON",
        "GGML_CPU_ALL_VARIANTS": "ON",
        "GGML_NATIVE": "OFF",
        "CMAKE_BUILD_RPATH_USE_ORIGIN": "ON",
    }


def build_folder(cache: Path, *, portable: bool, level: Level = NATIVE) -> Path:
    """Return where a build for this machine lies in the cache: named by its source and all that shapes it."""
    given = dict(options(portable=portable, level=level))
    shape: list[object] = [given, platform.system(), platform.machine()]
    if not portable:
        shape.append(_cpu())
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()
    return cache_root(cache) / f"{SDIST.sha256[:12]}-{digest[:12]}"


@dataclass(frozen=True)
class Build:
    """A build that may serve on this machine.

    Attributes:
        level: Which instructions it uses.
        bin: Where its tools lie, or would lie.
        template: The folder to copy it from, all but some variants; None for one that is compiled or there.
    """

    level: Level
    bin: Path
    template: Path | None = None

    @property
    def there(self) -> bool:
        """True when its tools are there: all that were there where it is copied from."""
        given = os.environ.get(FOLDER_VARIABLE)
        return is_whole(self.bin, _NEEDED if given else TARGETS)


def is_whole(folder: Path, tools: Sequence[str] = TARGETS) -> bool:
    """Say whether a folder holds the tools."""
    return all((folder / name).is_file() for name in tools)


def builds(cache: Path) -> list[Build]:
    """Return what may serve here, in the order in which it is to be tried; compiled or not.

    Raises:
        FailedPrecondition: WEB4LORA_LLAMA_CPP names a folder without the tools.
    """
    if given := os.environ.get(FOLDER_VARIABLE):
        missing = [name for name in _NEEDED if not (Path(given) / name).is_file()]
        if missing:
            raise FailedPrecondition(
                f"{FOLDER_VARIABLE}: {given} has no {missing[0]}.",
                fix=f"Name a folder with {', '.join(TARGETS)}, or unset {FOLDER_VARIABLE}.",
            )
        return _choices(cache, Path(given))
    native = [
        Build(level, build_folder(cache, portable=False, level=level) / "bin") for level in native_levels()
    ]
    portable = build_folder(cache, portable=True) / "bin"
    return [*native, *(_choices(cache, portable) if portable.is_dir() else [])]


def _choices(cache: Path, folder: Path) -> list[Build]:
    """Return the choices that a folder of ready binaries gives: all of it, or a copy without some variants.

    A copy, because llama.cpp looks for its variants beside the very file of the program.
    """
    found = []
    for level in variant_levels(folder):
        if not level.without:
            found.append(Build(level, folder))
            continue
        mark = hashlib.sha256(f"{folder.resolve()} {(folder / 'llama-server').stat().st_mtime_ns}".encode())
        place = cache_root(cache) / f"{level.name}-{mark.hexdigest()[:12]}"
        found.append(Build(level, place, folder))
    return found


def find(cache: Path) -> LlamaCpp | None:
    """Return the tools that are ready to use, or None. Never builds, never tests.

    What has failed the self-test on this machine is passed over.

    Args:
        cache: The cache folder of the settings.

    Raises:
        FailedPrecondition: WEB4LORA_LLAMA_CPP names a folder without the tools, or no level works here.
    """
    source = Path(os.environ.get(SOURCE_VARIABLE) or source_folder(cache_root(cache)))
    whole = bool(os.environ.get(FOLDER_VARIABLE)) or (source / "convert_hf_to_gguf.py").is_file()
    tried = builds(cache)
    avoided = []
    for build in tried:
        if not (build.there and whole):
            continue
        verdict = verdicts.read(cache_root(cache), build.bin)
        if verdict is not None and not verdict.works:
            avoided.append(f"llama.cpp with {build.level.words} {verdict.problem}.")
            continue
        return LlamaCpp(
            build.bin,
            source,
            _version(build.bin),
            level=build.level.words,
            tested=verdict is not None,
            avoided=tuple(avoided),
        )
    if len(avoided) == len(tried):
        raise _none_works(cache, avoided)
    return None


def none_works(cache: Path) -> FailedPrecondition:
    """Return the error for a machine on which nothing that is there passes the self-test."""
    return _none_works(
        cache,
        [
            f"llama.cpp with {build.level.words} {verdict.problem}."
            for build in builds(cache)
            if build.there and (verdict := verdicts.read(cache_root(cache), build.bin))
        ],
    )


def _none_works(cache: Path, avoided: Sequence[str]) -> FailedPrecondition:
    given = os.environ.get(FOLDER_VARIABLE)
    other = (
        f"Unset {FOLDER_VARIABLE}, so that llama.cpp is compiled here, or name another folder than {given}."
        if given
        else f"Name another compiler in CC and CXX and remove {cache_root(cache)}, or name binaries that run "
        f"here in {FOLDER_VARIABLE}."
    )
    return FailedPrecondition(
        "\n  ".join(["No llama.cpp works on this machine.", *avoided]), fix=other, reason=process.CRASHED
    )


def _version(folder: Path) -> str:
    """Return the version of binaries, as a build wrote it down or as they say."""
    try:
        marker = json.loads((folder.parent / "build.json").read_text(encoding="utf-8"))
        return str(marker["version"])
    except (OSError, ValueError, KeyError):
        return version_of(folder)


def version_of(folder: Path) -> str:
    """Ask the binaries in a folder for their version; "unknown" when they crash, which their self-test tells.

    Raises:
        FailedPrecondition: They can't be run.
        Internal: They fail.
    """
    try:
        output = process.run([folder / "llama-server", "--version"], timeout_seconds=60)
    except Web4Error as error:
        if error.reason != process.CRASHED:
            raise
        return "unknown"
    match = _VERSION.search(output)
    return f"{match[1]} ({match[2]})" if match else (output.strip().splitlines() or ["unknown"])[0]


def _cpu() -> str:
    """Return what -march=native depends on: the processor's features."""
    if flags := cpu_flags():
        return " ".join(flags)
    if platform.system() == "Darwin":
        return process.run(["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]).strip()
    return platform.processor()
