"""A guarded program ends with its owner, however the owner ends, and keeps its own process id."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest
from web4lora_llamacpp import guard

OWNER = f"""
import subprocess, sys, time
command = [sys.executable, "-I", "-S", {guard.__file__!r}, "/bin/sleep", "600"]
child = subprocess.Popen(command, stdin=subprocess.PIPE)
print(child.pid, flush=True)
time.sleep(600)
"""


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def _gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _is_sleep(process: psutil.Process) -> bool:
    return process.name() == "sleep"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_owner_takes_the_program_with_it(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        program = psutil.Process(int(owner.stdout.readline()))
        assert _within(10, lambda: _is_sleep(program))
        (watcher,) = program.children()
        owner.send_signal(number)
    assert _within(10, lambda: _gone(program) and _gone(watcher))


def test_a_program_that_ends_leaves_no_watcher() -> None:
    command = [sys.executable, "-I", "-S", guard.__file__, "/bin/sleep", "600"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert child.stdin is not None
    program = psutil.Process(child.pid)
    assert _within(10, lambda: _is_sleep(program))
    (watcher,) = program.children()
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(10) == -signal.SIGTERM
    child.stdin.close()
    assert _within(10, lambda: _gone(watcher))
