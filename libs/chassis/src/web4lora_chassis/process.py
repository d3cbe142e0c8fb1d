"""The one way to run external programs: never through a shell, always logged, a missing one named."""

from __future__ import annotations

import contextlib
import logging
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from web4lora_chassis.errors import FailedPrecondition, Internal

log = logging.getLogger(__name__)


def start(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: int | IO[bytes] | None = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = subprocess.PIPE,
    stderr: int | IO[bytes] | None = subprocess.STDOUT,
    new_session: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a program and return at once.

    Args:
        command: The program and its arguments.
        cwd: Its working folder.
        env: Its whole environment; ours when absent.
        stdin: As for `subprocess.Popen`.
        stdout: As for `subprocess.Popen`.
        stderr: As for `subprocess.Popen`.
        new_session: Give it a session and process group of its own: a signal can then reach all its children.

    Returns:
        The running process.

    Raises:
        FailedPrecondition: The program is not there or can't be run.
    """
    words = [str(word) for word in command]
    log.info("run %s", shlex.join(words))
    try:
        return subprocess.Popen(
            words, cwd=cwd, env=env, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=new_session
        )
    except OSError as error:
        if cwd is not None and not cwd.is_dir():
            raise FailedPrecondition(
                f"The folder {cwd} is not there; {words[0]} was to run in it."
            ) from error
        raise FailedPrecondition(
            f"The program {words[0]} can't be run: {error.strerror}.",
            fix=f"Install {Path(words[0]).name} or correct its path.",
            reason="PROGRAM_MISSING",
            metadata={"program": words[0]},
        ) from error


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_seconds: float | None = None,
) -> str:
    """Run a program to its end.

    Args:
        command: The program and its arguments.
        cwd: Its working folder.
        env: Its whole environment; ours when absent.
        timeout_seconds: It is killed after this long.

    Returns:
        What it printed, standard output and error together.

    Raises:
        FailedPrecondition: The program is not there or can't be run.
        Internal: It failed or took too long; the message ends with the last lines that it printed.
    """
    process = start(command, cwd=cwd, env=env)
    name = Path(str(command[0])).name
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired as error:
        _kill(process)
        raise Internal(
            f"{name} did not end within {timeout_seconds:.0f} s.", reason="PROGRAM_TIMEOUT"
        ) from error
    except BaseException:
        _kill(process)
        raise
    text = output.decode("utf-8", errors="replace")
    if process.returncode != 0:
        tail = "\n".join(text.strip().splitlines()[-12:])
        raise Internal(f"{name} failed with exit code {process.returncode}:\n{tail}", reason="PROGRAM_FAILED")
    return text


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a program and what it started, such as the compilers of a build: they may hold its output open."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.communicate()
