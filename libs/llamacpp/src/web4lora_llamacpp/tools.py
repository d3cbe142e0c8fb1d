"""Compiled tools of llama.cpp: where they lie, and which build of them fits this machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from web4lora_chassis import process
from web4lora_chassis.errors import FailedPrecondition

from web4lora_llamacpp.source import SDIST, source_folder

FOLDER_VARIABLE = "WEB4LORA_LLAMA_CPP"
"""Names a folder of ready binaries, which is then used in place of a build."""
SOURCE_VARIABLE = "WEB4LORA_LLAMA_CPP_SOURCE"
"""Names the source that those binaries were built from; the cache's own when unset."""

TARGETS = ("llama-quantize", "llama-server", "llama-imatrix", "llama-bench")
_VERSION = re.compile(r"version: (\S+) \((?:build \d+, commit )?(\w+)\)")


@dataclass(frozen=True)
class LlamaCpp:
    """A build of llama.cpp's tools.

    Attributes:
        bin: Folder of the binaries.
        source: Root of the source, which holds convert_hf_to_gguf.py.
        version: What the binaries say, for example "0.5.0-dev (0c1e570)".
        found: False when this call compiled it, True when it was there already.
    """

    bin: Path
    source: Path
    version: str
    found: bool = True

    @property
    def quantize(self) -> Path:
        """The program llama-quantize."""
        return self.bin / "llama-quantize"

    @property
    def server(self) -> Path:
        """The program llama-server."""
        return self.bin / "llama-server"

    @property
    def imatrix(self) -> Path:
        """The program llama-imatrix."""
        return self.bin / "llama-imatrix"

    @property
    def bench(self) -> Path:
        """The program llama-bench."""
        return self.bin / "llama-bench"

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


def options(*, portable: bool) -> Mapping[str, str]:
    """Return CMake's options.

    Args:
        portable: For images that run elsewhere: one CPU library for each generation of processors, of which
            the best fitting is loaded at the start. Otherwise compiled for this machine's processor alone.
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
        return {**common, "BUILD_SHARED_LIBS": "OFF", "GGML_NATIVE": "ON"}
    return {
        **common,
        "BUILD_SHARED_LIBS": "ON",
        "GGML_BACKEND_DL": "ON",
        "GGML_CPU_ALL_VARIANTS": "ON",
        "GGML_NATIVE": "OFF",
        "CMAKE_BUILD_RPATH_USE_ORIGIN": "ON",
    }


def build_folder(cache: Path, *, portable: bool) -> Path:
    """Return where a build for this machine lies in the cache: named by its source and all that shapes it."""
    shape: list[object] = [dict(options(portable=portable)), platform.system(), platform.machine()]
    if not portable:
        shape.append(_cpu())
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()
    return cache_root(cache) / f"{SDIST.sha256[:12]}-{digest[:12]}"


def find(cache: Path) -> LlamaCpp | None:
    """Return the tools that are ready to use, or None. Never builds.

    Args:
        cache: The cache folder of the settings.

    Raises:
        FailedPrecondition: WEB4LORA_LLAMA_CPP names a folder without the tools.
    """
    source = Path(os.environ.get(SOURCE_VARIABLE) or source_folder(cache_root(cache)))
    if given := os.environ.get(FOLDER_VARIABLE):
        missing = [name for name in TARGETS if not (Path(given) / name).is_file()]
        if missing:
            raise FailedPrecondition(
                f"{FOLDER_VARIABLE}: {given} has no {missing[0]}.",
                fix=f"Name a folder with {', '.join(TARGETS)}, or unset {FOLDER_VARIABLE}.",
            )
        return LlamaCpp(Path(given), source, version_of(Path(given)))
    for portable in (False, True):
        folder = build_folder(cache, portable=portable)
        marker = folder / "build.json"
        if marker.is_file() and (source / "convert_hf_to_gguf.py").is_file():
            return LlamaCpp(folder / "bin", source, json.loads(marker.read_text(encoding="utf-8"))["version"])
    return None


def version_of(folder: Path) -> str:
    """Ask the binaries in a folder for their version.

    Raises:
        FailedPrecondition: They can't be run.
        Internal: They fail.
    """
    output = process.run([folder / "llama-server", "--version"], timeout_seconds=60)
    match = _VERSION.search(output)
    return f"{match[1]} ({match[2]})" if match else (output.strip().splitlines() or ["unknown"])[0]


def _cpu() -> str:
    """Return what -march=native depends on: the processor's features."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return " ".join(sorted(line.partition(":")[2].split()))
    except OSError:
        pass  # not Linux
    if platform.system() == "Darwin":
        return process.run(["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]).strip()
    return platform.processor()
