"""The one way to run external programs: never through a shell, always logged, a missing one named."""

from __future__ import annotations

import contextlib
import logging
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from web4lora_chassis.environment import environment
from web4lora_chassis.errors import FailedPrecondition, Internal, OutOfMemory, Web4Error

log = logging.getLogger(__name__)

CRASHED = "PROGRAM_CRASHED"
"""Reason of errors of a program that crashed: trying the same again changes nothing."""

_INSTRUCTIONS = (
    "most likely it was compiled for instructions that this machine's processor or kernel doesn't take"
)
_GUESSES = {
    signal.SIGILL: _INSTRUCTIONS,
    signal.SIGSEGV: _INSTRUCTIONS,
    signal.SIGBUS: _INSTRUCTIONS,
    signal.SIGFPE: _INSTRUCTIONS,
    signal.SIGABRT: "it gave up at a check of its own",
    signal.SIGKILL: "most likely because memory ran out",
}
_SHELL_SIGNAL = 128


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
        env: Its whole environment; when absent ours without secrets and settings, see `environment`.
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
            words,
            cwd=cwd,
            env=environment() if env is None else env,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=new_session,
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
        env: Its whole environment; when absent ours without secrets and settings, see `environment`.
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
        raise failure(name, process.returncode, f":\n{tail}")
    return text


def ending(code: int) -> str:
    """Say in words how a program ended that did not succeed, to go on after its name.

    Args:
        code: What `subprocess` calls its return code: negative for a signal. A shell or an interpreter that
            passes on how its own child ended adds the signal to 128.

    Returns:
        For example "failed with exit code 3", or "was killed by SIGKILL, most likely because memory ran out".
    """
    number = _signal_of(code)
    if number is None:
        return f"failed with exit code {code}"
    words = f"was killed by {number.name}" if code < 0 else f"failed with exit code {code} ({number.name})"
    return f"{words}, {_GUESSES[number]}" if number in _GUESSES else words


def failure(
    name: str, code: int, said: str = "", *, fix: str = "", reason: str = "PROGRAM_FAILED"
) -> Web4Error:
    """Return the error of a program that ended with a code other than 0.

    Args:
        name: The program, and perhaps what it was doing.
        code: See `ending`.
        said: What it printed last, appended to the message.
        fix: What to do about it.
        reason: Unless it was killed by a signal that tells more: OUT_OF_MEMORY, `CRASHED`.
    """
    number = _signal_of(code)
    words = f"{name} {ending(code)}"
    if number is signal.SIGKILL:
        return OutOfMemory(f"{words}{said or '.'}", fix=fix)
    if number in _GUESSES:
        hint = "The same again would most likely crash again."
        return FailedPrecondition(f"{words}{said or '.'}", fix=f"{hint} {fix}".strip(), reason=CRASHED)
    return Internal(f"{words}{said or '.'}", fix=fix, reason=reason)


def _signal_of(code: int) -> signal.Signals | None:
    """Return the signal that ended a program, or the child that it tells of."""
    number = -code if code < 0 else code - _SHELL_SIGNAL
    try:
        return signal.Signals(number) if number > 0 else None
    except ValueError:
        return None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a program and what it started, such as the compilers of a build: they may hold its output open."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.communicate()
