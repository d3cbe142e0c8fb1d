"""A checkpoint is whole or none: whatever was lost, an older one is gone on from, or none at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from web4lora_chassis.dataset import Dataset
from web4lora_trainer.checkpoints import LIST_NAME, last_whole_checkpoint, seal
from web4lora_trainer.loss_report import read_losses
from web4lora_trainer.train import Base, TrainOutcome, train

from tests.unit.trainer.test_plan import SETTINGS, STEPS, at_step
from tests.unit.trainer.test_train import Killed, rows, silent

FILES = (
    "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt",
    "trainer_state.json", LIST_NAME,
)  # fmt: skip


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    # None are held out: a step at which those are measured has a checkpoint of its own.
    return Dataset(rows(24), (), ())


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return Base(tiny_base, "org/tiny", "0123abc")


@pytest.fixture(scope="module")
def whole(dataset: Dataset, base: Base, tmp_path_factory: pytest.TempPathFactory) -> TrainOutcome:
    return train(SETTINGS, dataset, base, tmp_path_factory.mktemp("whole"), silent)


@pytest.fixture(scope="module")
def killed(dataset: Dataset, base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a training that was killed in step 5, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(Killed):
        train(SETTINGS, dataset, base, folder, at_step(5))
    return folder


def same(ours: TrainOutcome, theirs: TrainOutcome) -> bool:
    first, second = (load_file(o.files["adapter_model.safetensors"]) for o in (ours, theirs))
    steps = [row.step for row in read_losses(ours.files["logs/loss.csv"])]
    return steps == list(range(1, STEPS + 1)) and all(
        torch.equal(first[name], second[name]) for name in second
    )


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [remove, truncate, flip])
@pytest.mark.parametrize("name", FILES)
def test_whatever_a_checkpoint_lost_the_one_before_is_gone_on_from(
    dataset: Dataset, base: Base, tmp_path: Path, killed: Path, whole: TrainOutcome, name: str,
    harm: Callable[[Path], None],
) -> None:  # fmt: skip
    shutil.copytree(killed, tmp_path / "cut")
    harm(tmp_path / "cut" / "checkpoints" / "checkpoint-4" / name)
    resumed: list[int] = []
    cut = train(SETTINGS, dataset, base, tmp_path / "cut", lambda p: resumed.append(p.resumed_step))
    assert max(resumed) == 2
    assert "checkpoint-4 is not whole" in cut.events[-1]
    assert cut.events[-1].endswith("the training goes on from checkpoint-2")
    assert same(cut, whole)


def test_with_no_checkpoint_left_the_training_starts_anew_and_says_so(
    dataset: Dataset, base: Base, tmp_path: Path, killed: Path, whole: TrainOutcome
) -> None:
    shutil.copytree(killed, tmp_path / "cut")
    for step in (2, 4):
        truncate(tmp_path / "cut" / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt")
    resumed: list[int] = []
    cut = train(SETTINGS, dataset, base, tmp_path / "cut", lambda p: resumed.append(p.resumed_step))
    assert max(resumed) == 0
    assert "starts anew" in cut.events[-1]
    assert "optimizer.pt is not as it was saved" in cut.events[-1]
    assert same(cut, whole)


@pytest.mark.parametrize(
    "instant", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state", "seal"]
)
def test_killed_at_any_instant_of_saving_the_same_adapter_comes_out(
    dataset: Dataset, base: Base, tmp_path: Path, whole: TrainOutcome, monkeypatch: pytest.MonkeyPatch,
    instant: str,
) -> None:  # fmt: skip
    from web4lora_trainer import sft

    owner: Any = sft if instant == "seal" else sft.AnswerTrainer
    honest = getattr(owner, instant)
    calls = 0

    def die(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if instant != "seal":
            honest(*arguments, **options)
        if calls == 2:  # the second checkpoint, of step 4
            raise Killed
        return honest(*arguments, **options) if instant == "seal" else None

    with monkeypatch.context() as patch:
        patch.setattr(owner, instant, die)
        with pytest.raises(Killed):
            train(SETTINGS, dataset, base, tmp_path, silent)
    resumed: list[int] = []
    cut = train(SETTINGS, dataset, base, tmp_path, lambda p: resumed.append(p.resumed_step))
    assert max(resumed) == 2
    assert same(cut, whole)


def test_the_newest_whole_one_is_found_by_its_number(tmp_path: Path) -> None:
    for step in (2, 10, 12):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in FILES[:-1]:
            (folder / name).write_text(f"{step}")
        if step != 12:
            seal(folder)
    (tmp_path / "checkpoint-x").mkdir()
    told: list[str] = []
    found = last_whole_checkpoint(tmp_path, told.append)
    assert found == tmp_path / "checkpoint-10"
    assert told == [
        "checkpoint-12 is not whole (it was not saved to its end); the training goes on from checkpoint-10"
    ]
    assert not (tmp_path / "checkpoint-12").exists()
    assert last_whole_checkpoint(tmp_path / "none", told.append) is None
    assert len(told) == 1


def test_a_checkpoint_without_what_a_resume_reads_is_never_sealed(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_text("weights")
    with pytest.raises(AssertionError, match=r"without adapter_config\.json, optimizer\.pt"):
        seal(tmp_path)
