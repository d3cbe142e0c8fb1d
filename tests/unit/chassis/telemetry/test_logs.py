"""Logs as JSON lines: what each says, and whose work it belongs to."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.settings import Settings, load
from web4lora_chassis.telemetry import belongs_to, origin
from web4lora_chassis.telemetry.logs import JsonLines


@pytest.fixture
def logged():
    """Log to a list of decoded lines."""
    lines: list[dict] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = self.format(record)
            assert "\n" not in line
            lines.append(json.loads(line))

    log = logging.getLogger("web4lora.test")
    handler = Kept()
    handler.setFormatter(JsonLines("trainer"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield log, lines
    log.removeHandler(handler)


def test_a_line_says_what_happened_to_whom(logged) -> None:
    log, lines = logged
    with belongs_to(run="run_1"), belongs_to(job="train-1"):
        log.warning("loss %s\nis high", 3)
    log.info("idle")
    assert lines[0].items() >= {
        "level": "WARNING", "service": "trainer", "logger": "web4lora.test", "message": "loss 3\nis high",
        "run": "run_1", "job": "train-1",
    }.items()  # fmt: skip
    assert lines[0]["time"].endswith("+00:00")
    assert not lines[1].keys() & {"run", "job", "trace_id", "error"}


def test_an_exception_stands_in_its_line(logged) -> None:
    log, lines = logged
    try:
        raise ValueError("odd")
    except ValueError:
        log.exception("it failed")
    assert lines[0]["error"].startswith("Traceback")
    assert "ValueError: odd" in lines[0]["error"]


def test_tasks_and_threads_belong_to_what_started_them(logged) -> None:
    log, lines = logged

    async def work() -> None:
        with belongs_to(run="run_1"):
            task = asyncio.create_task(asyncio.to_thread(log.info, "in a thread of a task"))
        with belongs_to(run="run_2"):
            await task

    asyncio.run(work())
    assert lines[0]["run"] == "run_1"


def test_what_goes_to_another_process_is_the_run_alone_without_traces() -> None:
    with belongs_to(run="run_1", job="train-1"):
        assert origin() == {"run": "run_1"}
    assert origin() == {}


def test_another_format_than_these_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB4LORA_LOG_FORMAT", "xml")
    with pytest.raises(InvalidInput, match=r"WEB4LORA_LOG_FORMAT: .*'text' or 'json'"):
        load(Settings)
