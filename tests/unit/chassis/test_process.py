"""External programs: output, failure, a missing one named, a slow one ended."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
from web4lora_chassis.errors import FailedPrecondition, Internal, OutOfMemory, Web4Error
from web4lora_chassis.process import CRASHED, run, start


def test_output_and_arguments_without_a_shell(tmp_path: Path) -> None:
    program = "import os, sys; print(sys.argv[1:], os.getcwd()); print('é', file=sys.stderr)"
    output = run([sys.executable, "-c", program, "a b", "$HOME;*"], cwd=tmp_path)
    assert "['a b', '$HOME;*']" in output
    assert str(tmp_path) in output
    assert "é" in output


def test_failure_ends_with_what_was_printed() -> None:
    with pytest.raises(Internal, match=r"exit code 3:\nlast words"):
        run([sys.executable, "-c", "print('last words'); raise SystemExit(3)"])


@pytest.mark.parametrize(
    ("end", "kind", "reason", "words"),
    [
        (
            "os.kill(os.getpid(), 11)",
            FailedPrecondition,
            CRASHED,
            "was killed by SIGSEGV, most likely it was",
        ),
        ("os.kill(os.getpid(), 4)", FailedPrecondition, CRASHED, "was killed by SIGILL, most likely it was"),
        ("os.kill(os.getpid(), 6)", FailedPrecondition, CRASHED, "was killed by SIGABRT, it gave up at"),
        (
            "os.kill(os.getpid(), 9)",
            OutOfMemory,
            "OUT_OF_MEMORY",
            "was killed by SIGKILL, most likely because mem",
        ),
        ("os._exit(139)", FailedPrecondition, CRASHED, r"failed with exit code 139 \(SIGSEGV\), most likely"),
        (
            "os._exit(137)",
            OutOfMemory,
            "OUT_OF_MEMORY",
            r"failed with exit code 137 \(SIGKILL\), most likely",
        ),
        ("os.kill(os.getpid(), 15)", Internal, "PROGRAM_FAILED", "was killed by SIGTERM:"),
        ("os._exit(128)", Internal, "PROGRAM_FAILED", "failed with exit code 128:"),
        ("os._exit(255)", Internal, "PROGRAM_FAILED", "failed with exit code 255:"),
    ],
)
def test_a_signal_is_named_with_its_likely_cause(
    end: str, kind: type[Web4Error], reason: str, words: str
) -> None:
    with pytest.raises(kind, match=words) as caught:
        run([sys.executable, "-c", f"import os; print('last words', flush=True); {end}"])
    assert caught.value.reason == reason
    assert caught.value.message.endswith(":\nlast words")
    assert "try again" not in f"{caught.value}".lower()


def test_missing_program_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="no-such-program") as caught:
        start(["no-such-program"])
    assert caught.value.reason == "PROGRAM_MISSING"
    assert "Install no-such-program" in caught.value.fix
    with pytest.raises(FailedPrecondition, match="nowhere"):
        start([sys.executable], cwd=tmp_path / "nowhere")


def test_slow_program_is_ended_with_what_it_started() -> None:
    sleep = "import time; time.sleep(600)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{sleep}'])"
    with pytest.raises(Internal, match="did not end within"):
        run([sys.executable, "-c", program], timeout_seconds=1)
    assert not [child for child in psutil.Process().children(recursive=True) if sleep in child.cmdline()]
