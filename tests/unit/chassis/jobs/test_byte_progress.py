from __future__ import annotations

from web4lora_chassis.jobs import Progress
from web4lora_chassis.jobs.byte_progress import byte_progress


def test_bytes_add_up() -> None:
    reported: list[Progress] = []
    advance = byte_progress(reported.append, "fetch", 10, "a model")
    advance(4)
    advance(6)
    assert [(each.done, each.total) for each in reported] == [(4, 10), (10, 10)]
    assert {(each.phase, each.unit, each.message) for each in reported} == {("fetch", "bytes", "a model")}
