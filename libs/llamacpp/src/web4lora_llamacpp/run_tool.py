"""Runs a tool of llama.cpp to its end: its output kept in a log, each line passed on as it comes."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
from web4lora_chassis import process

_CHUNK_BYTES = 1 << 16
_LINE_END = re.compile(rb"[\r\n]+")


def run_tool(
    command: Sequence[str | Path],
    log: Path,
    on_line: Callable[[str], None],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> int:
    """Run a program and return its exit code; it and all that it started end when we are interrupted.

    Args:
        command: The program and its arguments.
        log: Its output, standard output and error together, is appended here.
        on_line: Called with each line; a progress bar that redraws itself gives a line each time.
        env: Its whole environment; when absent ours without secrets and settings.
        cwd: Its working folder.

    Raises:
        FailedPrecondition: The program is not there or can't be run.
    """
    child = process.start(command, env=env, cwd=cwd)
    try:
        with log.open("ab") as log_file:
            _pump(child, log_file.write, on_line)
        return child.wait()
    except BaseException:
        _end(child)
        raise


def tail(log: Path, lines: int = 8) -> str:
    """Return a log's last lines, indented, for an error message."""
    text = log.read_bytes()[-_CHUNK_BYTES:].decode("utf-8", errors="replace")
    return "".join(f"\n  {line}" for line in text.strip().splitlines()[-lines:])


def _pump(
    child: subprocess.Popen[bytes], write: Callable[[bytes], int], on_line: Callable[[str], None]
) -> None:
    """Pass the output on as it comes, in lines."""
    assert child.stdout is not None
    rest = b""
    while chunk := child.stdout.read1(_CHUNK_BYTES):  # type: ignore[attr-defined]
        write(chunk)
        *whole, rest = _LINE_END.split(rest + chunk)
        for line in whole:
            on_line(line.decode("utf-8", errors="replace").rstrip())
    if rest:
        on_line(rest.decode("utf-8", errors="replace").rstrip())


def _end(child: subprocess.Popen[bytes]) -> None:
    """Stop a program and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        program = psutil.Process(child.pid)
        for running in [*program.children(recursive=True), program]:
            running.terminate()
    child.wait()
