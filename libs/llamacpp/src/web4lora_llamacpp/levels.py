"""Levels of processor instructions, the fastest first: what to build, or to choose, when one crashes here.

A level is a way to compile llama.cpp for this machine, or, in a build that has a library for each generation
of processors (an image's), a choice of those libraries.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from web4lora_chassis import process
from web4lora_chassis.errors import Web4Error

_CPUINFO = Path("/proc/cpuinfo")
_VARIANT = re.compile(r"libggml-cpu-(\w[\w.]*)\.so")
_AMX_VARIANTS = frozenset({"sapphirerapids"})
_AVX2_VARIANTS = frozenset({"x64", "sse42", "sandybridge", "ivybridge", "piledriver", "haswell"})
_BASIC_VARIANTS = frozenset({"x64", "armv8.0_1", "apple_m1", "power0"})
# Earlier ones believe that only 8 of the 64 bytes of a tile configuration are read, and drop the rest.
_FIRST_GCC_WITH_AMX = (13, 3)
_FIRST_LINUX_WITH_AMX = (5, 16)  # before, the kernel does not keep the tiles; a sandbox says an old version
_WITHOUT_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
_X86_FEATURES = ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C")


@dataclass(frozen=True)
class Level:
    """A set of processor instructions.

    Attributes:
        name: Short, for file names.
        words: What it uses, to go on after "built for" or "using".
        options: CMake's, for a level that is compiled.
        without: Variants of the CPU library that are left out, for a level that is chosen.
    """

    name: str
    words: str
    options: Mapping[str, str] = field(default_factory=dict)
    without: frozenset[str] = frozenset()


NATIVE = Level("native", "all of this processor's instructions", {"GGML_NATIVE": "ON"})
_NO_AMX = Level(
    "no-amx",
    "this processor's instructions without AMX",
    {"GGML_NATIVE": "ON", "CMAKE_C_FLAGS": _WITHOUT_AMX, "CMAKE_CXX_FLAGS": _WITHOUT_AMX},
)
_AVX2 = Level(
    "avx2",
    "AVX2 and nothing newer",
    {"GGML_NATIVE": "OFF", **{f"GGML_{name}": "ON" for name in _X86_FEATURES}},
)
_BASIC = Level(
    "basic",
    "the instructions that every processor of this kind has",
    {"GGML_NATIVE": "OFF", **{f"GGML_{name}": "OFF" for name in _X86_FEATURES}},
)


def cpu_flags() -> tuple[str, ...]:
    """Return the features that Linux tells of the processor, sorted; none elsewhere."""
    try:
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return tuple(sorted(line.partition(":")[2].split()))
    except OSError:
        pass  # not Linux
    return ()


def native_levels() -> list[Level]:
    """Return the levels that can be compiled on this machine, the fastest first, the safest last."""
    flags = set(cpu_flags())
    if "amx_tile" in flags:
        with_amx = [NATIVE] if amx_is_trusted() else []
        levels = [*with_amx, _NO_AMX]
    else:
        levels = [NATIVE]
    if {"avx2", "fma", "f16c", "bmi2"} <= flags:
        levels.append(_AVX2)
    return [*levels, _BASIC]


def left_out() -> str:
    """Say in words what of this processor is left out of a build here, and why; nothing for most machines."""
    if "amx_tile" not in cpu_flags() or amx_is_trusted():
        return ""
    if not _compiler_knows_amx():
        return "AMX is left out: this compiler gets it wrong (GCC does before 13.3)"
    return f"AMX is left out: the kernel {platform.release()} is older than 5.16 and may not carry it"


def variants(folder: Path) -> frozenset[str]:
    """Return the processor generations that a folder of binaries has a CPU library for."""
    found = (_VARIANT.fullmatch(path.name) for path in folder.glob("libggml-cpu-*.so"))
    return frozenset(match[1] for match in found if match)


def variant_levels(folder: Path) -> list[Level]:
    """Return the choices that a folder of ready binaries gives, the fastest first; one without variants."""
    there = variants(folder)
    levels = [Level("all", "what fits this processor best" if there else "what it was compiled for")]
    for name, words, kept in (
        ("no-amx", _NO_AMX.words, there - _AMX_VARIANTS),
        ("avx2", _AVX2.words, there & _AVX2_VARIANTS),
        ("basic", _BASIC.words, there & _BASIC_VARIANTS),
    ):
        without = there - kept
        if kept and without != levels[-1].without and (name != "no-amx" or "amx_tile" in cpu_flags()):
            levels.append(Level(name, words, without=without))
    return levels


def unsafe_variants() -> frozenset[str]:
    """Return the variants that the compiler at hand gets wrong: an image must not have them."""
    return frozenset() if _compiler_knows_amx() else _AMX_VARIANTS


def amx_is_trusted() -> bool:
    """Say whether compiler and kernel of this machine get AMX right."""
    return _compiler_knows_amx() and _kernel_keeps_amx(platform.release())


def _kernel_keeps_amx(release: str) -> bool:
    numbers = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    return numbers >= _FIRST_LINUX_WITH_AMX


def _compiler_knows_amx() -> bool:
    """Say whether the C++ compiler that CMake will take is none of the GCCs that break AMX."""
    return _knows_amx(os.environ.get("CXX") or "c++", os.environ.get("PATH", ""))


@functools.cache
def _knows_amx(compiler: str, path: str) -> bool:
    del path  # where the compiler is looked for, part of the cache's key
    try:
        output = process.run(
            [*shlex.split(compiler), "-dM", "-E", "-x", "c++", "/dev/null"], timeout_seconds=60
        )
    except (Web4Error, ValueError):
        return False  # no compiler, or one of which nothing is known
    macros = dict(re.findall(r"#define (__GNUC__|__GNUC_MINOR__|__clang__) (\d+)", output))
    if "__clang__" in macros:
        return True
    return (int(macros.get("__GNUC__", 0)), int(macros.get("__GNUC_MINOR__", 0))) >= _FIRST_GCC_WITH_AMX
