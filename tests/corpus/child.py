"""Reads the cases of one kind, each in a process of its own with bounds: `python -m tests.corpus.child KIND`.

The folder to work in is the second argument. What came of each case is a line of JSON on standard output.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from web4lora_chassis import errors
from web4lora_chassis.errors import Web4Error

from tests.corpus.case import Kind

CPU_SECONDS = 20
MEMORY_BYTES = 1 << 30
_HUNG_SECONDS = 100.0
"""More than any of the product's own limits: only what would never end takes so long."""


def main(name: str, place: Path) -> None:
    """Read all cases of a kind."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print
    kind: Kind = importlib.import_module(f"tests.corpus.{name}").KIND
    for module in kind.modules:
        importlib.import_module(module)
    whole = place / "whole"
    whole.mkdir()
    kind.whole(whole)
    for reader, read in kind.readers.items():
        read(*_folders(place, "whole", whole))  # a reader that refuses this one would prove nothing
        for case in kind.cases:
            if reader in (case.readers or kind.readers):
                folder, made = _folders(place, "case", whole)
                case.damage(folder)
                found = {"reader": reader, "case": case.name, "folder": str(folder)}
                found |= _bounded(lambda read=read, folder=folder, made=made: read(folder, made))
                found["left"] = sorted(
                    path.relative_to(made).as_posix() for path in made.rglob("*") if not path.is_dir()
                )
                out.write(json.dumps(found) + "\n")
                out.flush()


def _folders(place: Path, name: str, whole: Path) -> tuple[Path, Path]:
    """Return a copy of the whole one and an empty folder."""
    folder, made = place / "input" / name, place / "made"
    for each in (folder, made):
        shutil.rmtree(each, ignore_errors=True)
    shutil.copytree(whole, folder, symlinks=True)
    made.mkdir()
    return folder, made


def _bounded(read: Callable[[], object]) -> dict[str, Any]:
    """Return what came of reading in a process with bounds."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as answer:
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                _bound()
                json.dump(_read(read), answer)
                answer.flush()
            os._exit(0)
        status, deadline = None, time.monotonic() + _HUNG_SECONDS
        while status is None and time.monotonic() < deadline:
            ended, code = os.waitpid(pid, os.WNOHANG)
            status = code if ended else None
            time.sleep(0.002)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return {"raised": "nothing: it never ended"}
        answer.seek(0)
        found = answer.read()
    return json.loads(found) if found else {"raised": f"nothing: killed by signal {status & 0x7F}"}


def _bound() -> None:
    """Bound this process: its time, and what memory it takes beyond what it has."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with contextlib.suppress(OSError, ValueError):  # macOS has neither
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def _read(read: Callable[[], object]) -> dict[str, Any]:
    try:
        read()
    except Web4Error as error:
        return {
            "raised": next(
                kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__
            ),
            "message": error.message,
            "fix": error.fix,
            "reason": error.reason,
            "metadata": error.metadata,
        }
    except BaseException as error:  # noqa: BLE001 - that is what must not come
        return {"raised": f"foreign {type(error).__name__}", "trace": traceback.format_exc()[-3000:]}
    return {"raised": "nothing: it was taken for a whole one"}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
