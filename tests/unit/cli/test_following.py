"""What is asked on Ctrl-C."""

from __future__ import annotations

import os
import pty
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from web4lora.commands.following import _ask

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
