"""External programs: output, failure, a missing one named, a slow one ended."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
from web4lora_chassis.errors import FailedPrecondition, Internal
from web4lora_chassis.process import run, start


def test_output_and_arguments_without_a_shell(tmp_path: Path) -> None:
    program = "import os, sys; print(sys.argv[1:], os.getcwd()); print('é', file=sys.stderr)"
    output = run([sys.executable, "-c", program, "a b", "$HOME;*"], cwd=tmp_path)
    assert "['a b', '$HOME;*']" in output
    assert str(tmp_path) in output
    assert "é" in output


def test_failure_ends_with_what_was_printed() -> None:
    with pytest.raises(Internal, match=r"exit code 3:\nlast words"):
        run([sys.executable, "-c", "print('last words'); raise SystemExit(3)"])


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
