"""A rehearsal against the training that it stands for, on the tiny base."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from web4lora_chassis.dataset import Dataset
from web4lora_trainer import rehearsal
from web4lora_trainer.prepare import prepare
from web4lora_trainer.rehearsal import Rehearsal, Rehearser

from tests.unit.trainer.test_train import SETTINGS, rows


def test_prepare_tells_what_a_rehearsal_measured(tiny_base: Path) -> None:
    seen: list[Rehearsal] = []

    class Watched(Rehearser):
        def __call__(self, *args: Any) -> Rehearsal | None:
            found = super().__call__(*args)
            assert found is not None
            seen.append(found)
            return found

    data = Dataset(rows(18), rows(5, 100), ())
    with Watched() as watched:
        watched.start()
        found = prepare(SETTINGS, data, tiny_base, rehearser=watched)
    [own] = seen
    assert found.estimate.rehearsed
    assert found.estimate.peak_memory_bytes == own.peak_memory_bytes + 113 * found.train.tokens
    assert 200 << 20 < own.peak_memory_bytes < 4 << 30  # torch and transformers alone take that much
    assert own.tokens > own.trained_tokens > 0
    assert own.seconds > 0
    assert found.warnings == list(found.notes)


def killed(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rehearsal_that_is_killed_is_said_and_stops_nothing(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "_child", killed)
    with Rehearser() as rehearser:
        found = prepare(SETTINGS, Dataset(rows(18), (), ()), tiny_base, rehearser=rehearser)
    assert not found.estimate.rehearsed
    assert any("the rehearsal of the largest step ended before" in note for note in found.notes)


def test_the_largest_batch_comes_first_and_others_follow() -> None:
    from web4lora_trainer.plan import TrainPlan

    plan: Any = object.__new__(TrainPlan)
    for name, value in {"batch_tokens": 100, "seed": 1, "pad_to_multiple_of": 1}.items():
        object.__setattr__(plan, name, value)
    lengths = [10] * 40 + [33] * 6 + [50] * 4
    batches = rehearsal._batches(plan, lengths)
    assert [lengths[place] for place in batches[0]] == [50, 50]
    assert {lengths[place] for batch in batches for place in batch} >= {10, 50}
    assert len(batches) <= 5


def test_a_rehearser_that_got_nothing_to_do_ends_at_once_and_leaves_no_process() -> None:
    with Rehearser() as rehearser:
        assert rehearser.processes == []
        rehearser.start()
        [waiting] = rehearser.processes
        assert waiting.is_running()
    assert not waiting.is_running()
    assert rehearser.processes == []


def test_nothing_is_rehearsed_beside_another_job(tiny_base: Path) -> None:
    with Rehearser() as rehearser:
        found = prepare(
            SETTINGS, Dataset(rows(18), (), ()), tiny_base,
            other_jobs=lambda: [psutil.Process()], rehearser=rehearser,
        )  # fmt: skip
        assert rehearser.processes == []
    assert not found.estimate.rehearsed
    assert any("computed, not measured: another job" in note for note in found.notes)
