from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from web4lora_chassis.pipeline.train import LoraSettings, TrainSettings
from web4lora_chassis.settings import Settings
from web4lora_trainer.trainings import Training, prune_trainings

SETTINGS = TrainSettings(lora=LoraSettings(rank=4))


def training(root: Path, settings: TrainSettings = SETTINGS, job: str = "job-1") -> Training:
    (root / job).mkdir(exist_ok=True)
    return Training(root / "trainings", ("a" * 64, "b" * 64), settings, root / job, Settings())


def test_the_next_job_of_the_same_training_finds_what_the_last_one_left(tmp_path: Path) -> None:
    def fail() -> None:
        with training(tmp_path).open() as folder:
            (folder / "plan.json").write_text("plan")
            raise RuntimeError("a driver's error")

    with pytest.raises(RuntimeError):
        fail()
    with training(tmp_path, job="job-2").open() as folder:
        assert (folder / "plan.json").read_text() == "plan"
    for other in (
        training(tmp_path, replace(SETTINGS, seed=5)),
        Training(tmp_path / "trainings", ("a" * 64, "c" * 64), SETTINGS, tmp_path / "job-1", Settings()),
    ):
        with other.open() as folder:
            assert not any(folder.iterdir())


def test_a_training_that_succeeded_goes_with_its_job(tmp_path: Path) -> None:
    first = training(tmp_path)
    with first.open() as folder:
        (folder / "plan.json").write_text("plan")
        first.finish()
    again = training(tmp_path)  # the worker was killed before the job knew
    with again.open() as folder:
        assert (folder / "plan.json").read_text() == "plan"
        again.finish()
    assert folder.is_relative_to(tmp_path / "job-1")
    with training(tmp_path, job="job-2").open() as folder:
        assert not any(folder.iterdir())


def test_no_more_than_a_few_are_kept(tmp_path: Path) -> None:
    for seed in range(6):
        with training(tmp_path, replace(SETTINGS, seed=seed)).open() as folder:
            (folder / "seed").write_text(str(seed))
        then = time.time() - 3600 + seed
        os.utime(folder, (then, then))
    with training(tmp_path, replace(SETTINGS, seed=3)).open():
        pass
    left = {(path / "seed").read_text() for path in (tmp_path / "trainings").iterdir() if path.is_dir()}
    assert left == {"2", "3", "4", "5"}


def kept(root: Path) -> set[str]:
    return {path.name for path in (root / "trainings").iterdir() if path.is_dir()}


def left(root: Path, name: str, days: float) -> None:
    folder = root / "trainings" / name / "checkpoint-1"
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(b"x" * 1000)
    then = time.time() - days * 86_400
    os.utime(folder.parent, (then, then))


def test_trainings_that_nobody_takes_up_go_by_age_size_and_count(tmp_path: Path) -> None:
    for name, days in (("new", 0.5), ("week", 7), ("month", 31)):
        left(tmp_path, name, days)
    root = tmp_path / "trainings"
    assert prune_trainings(root, Settings(), False) == 1000
    assert kept(tmp_path) == {"new", "week"}
    assert prune_trainings(root, Settings(keep_trainings_gb=1.5e-6), False) == 1000
    assert kept(tmp_path) == {"new"}
    left(tmp_path, "two", 2)
    assert prune_trainings(root, Settings(keep_trainings=1), False) == 1000
    left(tmp_path, "three", 3)
    assert prune_trainings(root, Settings(), True) == 1000, "a disk that is nearly full"
    assert kept(tmp_path) == {"new"}
    assert prune_trainings(tmp_path / "none", Settings(), False) == 0


def test_the_training_at_work_stays_whatever_the_bounds(tmp_path: Path) -> None:
    left(tmp_path, "old", 40)
    with training(tmp_path).open() as folder:
        (folder / "checkpoint").write_bytes(b"x" * 1000)
        left(tmp_path, "other", 40)
        tight = Settings(keep_trainings_gb=1e-9, keep_trainings=1)
        assert prune_trainings(tmp_path / "trainings", tight, True) == 1000
        assert (folder / "checkpoint").exists()
