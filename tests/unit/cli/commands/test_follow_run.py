"""What is asked on Ctrl-C, and what is said at the end."""

from __future__ import annotations

import os
import pty
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from web4.lora.v1 import gateway_pb2
from web4lora.commands import follow_run
from web4lora.commands.follow_run import _ask, conclude, locate
from web4lora.pipeline_file import read_pipeline
from web4lora.views import console
from web4lora_chassis import process

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def keyboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The other side of the terminal that is asked."""
    leader, follower = pty.openpty()
    with os.fdopen(follower) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        yield leader
    os.close(leader)


@pytest.mark.parametrize(("typed", "answer"), [("c\n", "c"), ("D\n", "d"), ("\n", ""), ("\x04", "d")])
def test_the_answer_is_its_first_letter_and_the_end_of_input_detaches(
    keyboard: int, typed: str, answer: str
) -> None:
    os.write(keyboard, typed.encode())
    assert _ask() == answer


def test_a_ctrl_c_that_interrupts_no_read_is_still_seen(keyboard: int) -> None:
    """One that comes a moment before the read begins; here another thread takes it."""

    def press() -> None:
        time.sleep(0.5)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    assert _ask() == "d"
    thread.join()


def test_a_ctrl_c_while_the_question_is_being_written_detaches(
    keyboard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is on the screen before its print has returned."""

    def press(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(console.out, "print", press)
    monkeypatch.setattr(follow_run, "line", lambda: None)
    assert _ask() == "d"


@pytest.mark.parametrize(("reason", "offered"), [("STORE_UNAVAILABLE", True), (process.CRASHED, False)])
def test_a_retry_is_not_offered_for_what_would_crash_again(
    capfd: pytest.CaptureFixture[str], reason: str, offered: bool
) -> None:
    run = gateway_pb2.Run(id="run_1", state=gateway_pb2.RUN_STATE_FAILED)
    run.stages.add(
        name=gateway_pb2.STAGE_NAME_PACKAGE, state=gateway_pb2.STAGE_STATE_FAILED
    ).error.reason = reason
    conclude(run)
    said = "".join(capfd.readouterr())
    assert ("runs retry run_1" in said) is offered


def test_an_error_that_speaks_of_a_key_names_its_line_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    (tmp_path / "rows.jsonl").write_text("{}\n")
    path.write_text(
        "name: demo\ndataset:\n  train_files: [rows.jsonl]\nbase:\n  model: org/name\n"
        "package:\n  context_tokens: 8192\n"
    )
    run = gateway_pb2.Run()
    stage = run.stages.add()
    stage.error.message = "package.context_tokens: 8192 is more than the 2048"
    stage.error.metadata["field"] = "package.context_tokens"
    run.stages.add().error.message = "Memory ran out."
    locate(run, read_pipeline(path))
    assert stage.error.message.endswith("pipeline.yaml:7: package.context_tokens: 8192 is more than the 2048")
    assert run.stages[1].error.message == "Memory ran out."
    assert not run.HasField("error")
