"""Lines before the workers: who is next, what one waits for, and when work must leave a worker."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from web4lora_gateway.places import Line, Mode, Place, WorkerState

NOW = 1000.0
SMALL = WorkerState("trainer", "trainer", device="cpu, 2 cores", memory_bytes=16 << 30)
LARGE = WorkerState("gpu-1", "trainer", device="NVIDIA H100 (cuda)", memory_bytes=80 << 30)
PACKAGER = WorkerState("packager", "packager")


def place(work: str, **fields: Any) -> Place:
    values = {"kind": "trainer", "lane": "train", "entered_at": float(ord(work[0])), **fields}
    return Place(work=work, run_id=f"run_{work}", **values)


def at_work(work: str, worker: WorkerState = SMALL, **fields: Any) -> Place:
    turn = f"{worker.id}/{fields.get('lane', 'train')}"
    return place(work, worker=worker.id, turn=turn, began_at=NOW - 60, **fields)


def line(*places: Place, workers: tuple[WorkerState, ...] = (SMALL,)) -> Line:
    return Line(places, workers, grace_seconds=120.0, now=NOW)


def turns(*places: Place, workers: tuple[WorkerState, ...] = (SMALL,)) -> list[tuple[str, str]]:
    return [(each.work, worker.id) for each, worker in line(*places, workers=workers).next_turns()]


def test_priority_comes_first_and_then_who_waits_longest() -> None:
    assert turns(place("a", priority=-1), place("c"), place("b")) == [("b", "trainer")]
    assert turns(place("a"), place("b", priority=1)) == [("b", "trainer")]
    assert turns(place("a"), at_work("z")) == []


def test_each_lane_and_each_trainer_does_one_at_a_time() -> None:
    prepare = place("p", lane="prepare")
    assert turns(place("a"), prepare, place("b")) == [("a", "trainer"), ("p", "trainer")]
    assert turns(place("a"), place("b"), place("c"), workers=(SMALL, LARGE)) == [
        ("a", "trainer"),
        ("b", "gpu-1"),
    ]


def test_work_goes_to_the_first_that_fits_and_what_fits_nowhere_holds_nobody_up() -> None:
    both = (SMALL, LARGE)
    assert turns(place("a", memory_bytes=40 << 30), place("b"), workers=both) == [
        ("a", "gpu-1"),
        ("b", "trainer"),
    ]
    assert turns(place("a", device="CUDA"), workers=both) == [("a", "gpu-1")]
    assert turns(place("a", device="mps"), place("b"), workers=both) == [("b", "trainer")]
    assert turns(place("a", lane="prepare"), workers=both) == [("a", "gpu-1")], "what it refuses fits nowhere"


def test_a_trainer_that_is_paused_draining_or_lost_takes_nothing() -> None:
    for changed in ({"mode": Mode.PAUSED}, {"mode": Mode.DRAINING}):
        assert turns(place("a"), workers=(replace(SMALL, **changed),)) == []
    gone = replace(SMALL, lost_at=NOW - 1)
    assert turns(place("a"), workers=(gone, LARGE)) == [("a", "gpu-1")]
    assert turns(place("a"), workers=(gone,)) == [("a", "trainer")], "the only one is waited for at its door"


def test_what_was_begun_stays_where_its_checkpoints_are_unless_that_one_is_lost() -> None:
    begun = place("a", worker="trainer", attempt=2)
    paused = replace(SMALL, mode=Mode.PAUSED)
    assert turns(begun, workers=(paused, LARGE)) == []
    assert turns(begun, workers=(SMALL, LARGE)) == [("a", "trainer")]
    assert turns(begun, workers=(replace(SMALL, lost_at=NOW - 121), LARGE)) == [("a", "gpu-1")]
    assert turns(place("a", worker="removed", attempt=2), workers=(LARGE,)) == [("a", "gpu-1")]


@pytest.mark.parametrize(
    ("worker", "others", "said"),
    [
        (SMALL, (), ""),
        (replace(SMALL, mode=Mode.DRAINING), (LARGE,), ""),
        (replace(SMALL, mode=Mode.PAUSED), (), "trainer is paused"),
        (replace(SMALL, lost_at=NOW - 60), (LARGE,), ""),
        (replace(SMALL, lost_at=NOW - 200), (), ""),
        (replace(SMALL, lost_at=NOW - 200), (replace(LARGE, mode=Mode.DRAINING),), ""),
        (replace(SMALL, lost_at=NOW - 200), (LARGE,), "trainer is out of reach since 200 s"),
    ],
)
def test_work_leaves_a_trainer_that_is_paused_or_lost(
    worker: WorkerState, others: tuple[WorkerState, ...], said: str
) -> None:
    found = line(at_work("a"), workers=(worker, *others)).must_leave(at_work("a"))
    assert found.startswith(said)
    assert bool(found) == bool(said)


def told(*places: Place, workers: tuple[WorkerState, ...] = (SMALL,)) -> dict[str, str]:
    return {each.work: message for each, message, _ in line(*places, workers=workers).told()}


def test_who_waits_is_told_behind_how_many_and_about_how_long() -> None:
    running = at_work("z", seconds=360.0)
    assert told(running, place("a", seconds=540.0), place("b")) == {
        "a": "waiting for the trainer, 1 run ahead, about 5 min",
        "b": "waiting for the trainer, 2 runs ahead, about 14 min",
    }
    assert told(running, place("a"), place("b"))["b"] == "waiting for the trainer, 2 runs ahead"
    second = at_work("y", LARGE, seconds=360.0)
    found = told(running, second, place("a"), workers=(SMALL, LARGE))
    assert found["a"] == "waiting for the trainer, 2 runs ahead, about 5 min"
    other_lane = at_work("z", lane="prepare")
    assert told(other_lane, place("a")) == {"a": "waiting for the trainer"}
    assert told(at_work("z", seconds=65.0), place("a")) == {
        "a": "waiting for the trainer, 1 run ahead, less than a minute"
    }
    hours = told(at_work("z", seconds=20_000.0), place("a"))
    assert hours["a"] == "waiting for the trainer, 1 run ahead, about 6 h"


def test_what_nobody_takes_is_told_why() -> None:
    waiting = place("a", memory_bytes=21_000_000_000, device="mps")
    assert told(waiting)["a"] == "waiting: no trainer has 21.0 GB of memory and the device mps"
    paused = replace(SMALL, mode=Mode.PAUSED)
    assert told(place("a"), workers=(paused,))["a"] == (
        "waiting for a trainer: trainer is paused (`web4lora trainers resume trainer`)"
    )
    gone = replace(SMALL, lost_at=NOW - 1), replace(LARGE, lost_at=NOW - 1)
    assert told(place("a"), workers=gone)["a"] == (
        "waiting for a trainer: trainer is out of reach, gpu-1 is out of reach"
    )
