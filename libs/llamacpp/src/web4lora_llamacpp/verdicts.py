"""What the self-test found of a build on this machine, kept in the cache.

Another processor, another kernel or other binaries have no verdict yet: so an image that is started
elsewhere, or a cache that is carried there, is tested anew.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from web4lora_chassis.jobs.record import write_json

from web4lora_llamacpp.levels import cpu_flags


@dataclass(frozen=True)
class Verdict:
    """What the self-test found.

    Attributes:
        works: The tiny model was quantized, loaded and gave the right answer.
        problem: What happened instead, in words that go on after "it ".
    """

    works: bool
    problem: str = ""


def read(root: Path, folder: Path) -> Verdict | None:
    """Return the verdict on the binaries of a folder; None when they were not tested here yet.

    Args:
        root: llama.cpp's folder in the cache.
        folder: The binaries.
    """
    try:
        data = json.loads(_file(root, folder).read_text(encoding="utf-8"))
        return Verdict(bool(data["works"]), str(data["problem"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # never written, or cut off: it is tested again


def write(root: Path, folder: Path, verdict: Verdict) -> None:
    """Keep a verdict."""
    file = _file(root, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {**asdict(verdict), "bin": str(folder), "kernel": platform.release()})


def _file(root: Path, folder: Path) -> Path:
    files = sorted(path for path in folder.glob("*") if path.name.startswith(("llama-", "lib")))
    shape = [
        str(folder.resolve()),
        [(path.name, stat.st_size, stat.st_mtime_ns) for path in files if (stat := path.stat())],
        [platform.system(), platform.machine(), platform.release(), platform.processor()],
        cpu_flags(),
    ]
    digest = hashlib.sha256(json.dumps(shape).encode()).hexdigest()
    return root / "self-tests" / f"{digest[:24]}.json"
