"""Becomes a program that ends with its owner, however the owner ends.

Started as a script with the program and its arguments; standard input must be a pipe that the owner holds.
This process turns into the program, keeping its process id; a fork of it reads the pipe and kills the program
when the pipe closes. Works without the standard library's heavier modules and on any POSIX system; Linux's
parent-death signal would follow the owner's thread, not its process.
"""

from __future__ import annotations

import os
import signal
import sys


def main(command: list[str]) -> None:
    """Fork the watcher, then become the program."""
    program = os.getpid()
    if os.fork() == 0:
        _watch(program)
        os._exit(0)
    os.execv(command[0], command)  # noqa: S606 - a list of words, no shell


def _watch(program: int) -> None:
    """Wait for the owner's end; our parent is the program as long as that lives."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    while os.read(0, 4096):
        pass
    if os.getppid() == program:
        os.kill(program, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
