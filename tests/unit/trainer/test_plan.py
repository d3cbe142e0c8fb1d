"""The frozen plan: killed at any step, out of memory at any step, the same steps come out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from web4lora_chassis.dataset import Dataset
from web4lora_chassis.errors import OutOfMemory, ResourceExhausted
from web4lora_chassis.pipeline.train import LoraSettings, LossBand, TrainSettings
from web4lora_trainer.device import Device
from web4lora_trainer.ladder import Ladder, Rung, memory_kills, rungs
from web4lora_trainer.loss_report import read_losses
from web4lora_trainer.plan import PlanFile, TrainPlan
from web4lora_trainer.progress import TrainProgress
from web4lora_trainer.sft import AnswerTrainer
from web4lora_trainer.train import Base, TrainOutcome, train

from tests.unit.trainer.test_train import Killed, rows, silent

STEPS = 6
SETTINGS = TrainSettings(
    lora=LoraSettings(rank=4), epochs=1.5, learning_rate=1e-2, tokens_per_batch=160,
    gradient_accumulation=2, checkpoint_steps=2, held_out_evaluations=2, loss_band=LossBand(0.0, 9.0),
    dtype="fp32",
)  # fmt: skip

Steps = dict[int, list[tuple[int, ...]]]
"""Rows of each optimizer step."""


@pytest.fixture
def dataset() -> Dataset:
    return Dataset(rows(24), rows(5, 100), ())


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return Base(tiny_base, "org/tiny", "0123abc")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Return what each step's rows were, of the last time the step was made."""
    steps: Steps = {}
    honest = AnswerTrainer.get_batch_samples

    def watch(self: AnswerTrainer, *arguments: Any) -> Any:
        batches, count = honest(self, *arguments)
        found = [tuple(row.tolist()) for batch in batches for row in batch["input_ids"]]
        steps[self.state.global_step] = found
        return batches, count

    monkeypatch.setattr(AnswerTrainer, "get_batch_samples", watch)
    return steps


@pytest.fixture
def whole(dataset: Dataset, base: Base, tmp_path: Path, seen: Steps) -> tuple[TrainOutcome, Steps]:
    """Return a training that nothing happened to, and its steps."""
    outcome = train(SETTINGS, dataset, base, tmp_path / "whole", silent)
    steps = dict(seen)
    seen.clear()
    assert outcome.steps == len(steps) == STEPS
    return outcome, steps


def rates(outcome: TrainOutcome) -> list[tuple[int, float, int, int]]:
    found = read_losses(outcome.files["logs/loss.csv"])
    return [(row.step, row.learning_rate, row.tokens, row.answer_tokens) for row in found]


def tensors(outcome: TrainOutcome) -> dict[str, torch.Tensor]:
    return load_file(outcome.files["adapter_model.safetensors"])


def at_step(step: int) -> Callable[[TrainProgress], None]:
    def kill(progress: TrainProgress) -> None:
        if progress.phase == "train" and progress.step == step:
            raise Killed

    return kill


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_killed_at_any_step_the_same_adapter_comes_out(
    dataset: Dataset, base: Base, tmp_path: Path, whole: Any, seen: Steps, step: int
) -> None:
    outcome, steps = whole
    with pytest.raises(Killed):
        train(SETTINGS, dataset, base, tmp_path / "cut", at_step(step))
    # The service can't tell a kill from want of memory.
    cut = train(SETTINGS, dataset, base, tmp_path / "cut", silent, memory_failures=1)
    assert cut.events == ()
    assert dict(seen) == steps
    assert rates(cut) == rates(outcome)
    ours, theirs = tensors(cut), tensors(outcome)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    first, second = (o.files["adapter_model.safetensors"].read_bytes() for o in (cut, outcome))
    assert first == second


@pytest.mark.parametrize("step", range(STEPS))
def test_out_of_memory_at_any_step_the_same_steps_are_made(
    dataset: Dataset, base: Base, tmp_path: Path, whole: Any, seen: Steps, step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    outcome, steps = whole
    honest = AnswerTrainer._summed_loss
    largest = 0

    def hungry(self: AnswerTrainer, inputs: Any) -> Any:
        nonlocal largest
        if self.model.training and self.state.global_step >= step:
            if inputs["input_ids"].numel() > 90:
                raise RuntimeError("Invalid buffer size: 40.00 GB")
            largest = max(largest, inputs["input_ids"].numel())
        return honest(self, inputs)

    monkeypatch.setattr(AnswerTrainer, "_summed_loss", hungry)
    with pytest.raises(OutOfMemory):
        train(SETTINGS, dataset, base, tmp_path / "cut", silent)
    told: list[str] = []
    cut = train(SETTINGS, dataset, base, tmp_path / "cut", lambda p: told.append(p.note), memory_failures=1)
    assert dict(seen) == steps
    assert rates(cut) == rates(outcome)
    assert 0 < largest <= 90
    for name, tensor in tensors(outcome).items():
        torch.testing.assert_close(tensors(cut)[name], tensor, rtol=1e-2, atol=1e-4)
    (event,) = cut.events
    assert "memory ran out" in event
    assert "tokens at once" in event
    assert told[-1] == event


def test_the_last_rung_computes_activations_twice_then_memory_is_refused(
    dataset: Dataset, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starved(self: AnswerTrainer, inputs: Any) -> Any:
        raise MemoryError

    honest = AnswerTrainer._summed_loss
    checkpointed = []

    def watched(self: AnswerTrainer, inputs: Any) -> Any:
        checkpointed.append(bool(self.peft_model.get_base_model().model.layers[0].gradient_checkpointing))
        return honest(self, inputs)

    monkeypatch.setattr(AnswerTrainer, "_summed_loss", starved)
    for failures in range(2):
        with pytest.raises(OutOfMemory):
            train(SETTINGS, dataset, base, tmp_path, silent, memory_failures=failures)
    for failures in (2, 0):  # 0: of another job, which tries again
        with pytest.raises(ResourceExhausted, match="no step can be computed with less") as caught:
            train(SETTINGS, dataset, base, tmp_path, silent, memory_failures=failures)
        assert caught.value.reason == "MEMORY_TOO_SMALL"

    monkeypatch.setattr(AnswerTrainer, "_summed_loss", watched)
    outcome = train(SETTINGS, dataset, base, tmp_path, silent)
    assert len(outcome.events) == 2
    assert "activations computed twice" in outcome.events[-1]
    assert all(checkpointed)


PLAN = TrainPlan(
    key="k", device=Device("cpu", "cpu", "fp32", 1), attention="eager", checkpointing=False,
    batch_tokens=4096, pad_to_multiple_of=8, accumulation=1, seed=1, order="o",
    longest_row_tokens=300, steps=9, warmup_steps=1, learning_rate=1e-3, schedule="cosine",
    checkpoint_steps=2,
)  # fmt: skip


def test_every_rung_needs_less_than_the_one_before() -> None:
    down = [Rung(4096, False), Rung(1024, False), Rung(304, False), Rung(304, True)]
    assert list(rungs(PLAN, may_checkpoint=True)) == down
    assert list(rungs(PLAN, may_checkpoint=False)) == down[:3]  # gradient_checkpointing: off stays off
    one_row = replace(PLAN, longest_row_tokens=5000)
    assert list(rungs(one_row, may_checkpoint=True)) == [Rung(5000, False), Rung(5000, True)]
    assert list(rungs(replace(one_row, checkpointing=True), may_checkpoint=True)) == [Rung(5000, True)]


def test_only_kills_that_the_system_counts_lead_down_the_ladder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def standing(failures: int, kills: int | None) -> int:
        monkeypatch.setattr("web4lora_trainer.ladder.memory_kills", lambda: kills)
        ladder = Ladder(tmp_path, rungs(PLAN, may_checkpoint=True))
        ladder.begin(failures)
        return rungs(PLAN, may_checkpoint=True).index(ladder.rung)

    assert standing(1, 7) == 0  # killed before a step was computed
    assert standing(2, 7) == 0  # killed by somebody
    assert standing(3, 8) == 1
    assert standing(3, 9) == 1  # the service was started again
    assert standing(0, 9) == 1  # another job goes on
    assert standing(1, None) == 2  # a system that doesn't tell
    assert standing(2, None) == standing(3, None) == 3


def test_the_systems_count_of_kills_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("web4lora_trainer.ladder._VMSTAT", tmp_path / "vmstat")
    assert memory_kills() is None
    (tmp_path / "vmstat").write_text("pgfault 12\noom_kill 5\n")
    assert memory_kills() == 5


def test_a_plan_is_read_as_it_was_written_and_only_by_its_training(tmp_path: Path) -> None:
    file = PlanFile(tmp_path / "new")
    assert file.read("k") is None
    file.note("before the plan")
    file.write(PLAN)
    file.note("after it")
    again = PlanFile(tmp_path / "new")
    assert again.read("k") == PLAN
    assert again.events == ["before the plan", "after it"]
    assert PlanFile(tmp_path / "new").read("other") is None
    (tmp_path / "new" / "plan.json").write_text("{")
    assert PlanFile(tmp_path / "new").read("k") is None


def test_the_plan_stays_whatever_is_measured_later(
    dataset: Dataset, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = iter(["fp32", "bf16"])

    def choose(*_: Any) -> Device:
        return Device("cpu", "cpu", next(formats), 1, 1e9)

    monkeypatch.setattr("web4lora_trainer.train.choose_device", choose)
    settings = replace(SETTINGS, dtype="auto")
    with pytest.raises(Killed):
        train(settings, dataset, base, tmp_path, at_step(3))
    before = (tmp_path / "plan.json").read_bytes()
    monkeypatch.setattr(Device, "free_memory_bytes", lambda _: 1)  # would ask for checkpointing
    assert "fp32" in train(settings, dataset, base, tmp_path, silent).device
    assert (tmp_path / "plan.json").read_bytes() == before


def test_checkpoints_of_another_plan_are_not_gone_on_from(
    dataset: Dataset, base: Base, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        train(SETTINGS, dataset, base, tmp_path, at_step(5))
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["plan"]["order"] = "as another version would put the rows"
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    resumed: list[int] = []
    outcome = train(SETTINGS, dataset, base, tmp_path, lambda p: resumed.append(p.resumed_step))
    assert max(resumed) == 0
    assert "another plan" in outcome.events[-1]
    assert [row.step for row in read_losses(outcome.files["logs/loss.csv"])] == list(range(1, STEPS + 1))
