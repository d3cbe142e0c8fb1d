"""Training in fp16, as a GPU without bf16 does it, computed by the CPU: slow, so small."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from web4lora_chassis.dataset import Dataset
from web4lora_trainer.base_model import load_tokenizer
from web4lora_trainer.batching import Collator
from web4lora_trainer.device import Device
from web4lora_trainer.encoding import encode_rows
from web4lora_trainer.loss_report import read_losses
from web4lora_trainer.sft import AnswerTrainer
from web4lora_trainer.train import Base, train

from tests.unit.trainer.test_plan import at_step
from tests.unit.trainer.test_train import SETTINGS, Killed, rows, silent, trainer_for

AUTO = replace(SETTINGS, dtype="auto")


@pytest.fixture
def dataset() -> Dataset:
    return Dataset(rows(18), rows(5, 100), ())


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return Base(tiny_base, "org/tiny", "0123abc")


@pytest.fixture(autouse=True)
def _fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(_: object, dtype: str, *__: object) -> Device:
        return Device("cpu", "cpu", "fp16" if dtype == "auto" else dtype, 1)

    monkeypatch.setattr("web4lora_trainer.train.choose_device", choose)


def gradients(dataset: Dataset, base: Base, folder: Path, dtype: str, tokens: int) -> dict[str, torch.Tensor]:
    """Return a batch's gradients as part of a step of so many tokens, multiplied by them."""
    trainer = trainer_for(base, dataset, folder, dtype)
    torch.manual_seed(5)
    for name, parameter in trainer.peft_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    encoded = encode_rows(dataset.train[:5], load_tokenizer(base.folder), 256).rows
    batch = Collator(2)([{"input_ids": row.input_ids, "labels": row.labels} for row in encoded])
    trainer.compute_loss(trainer.peft_model, batch, num_items_in_batch=tokens).backward()
    return {n: p.grad * tokens for n, p in trainer.peft_model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tokens", [20, 1_000_000], ids=["few tokens a step", "many"])
def test_small_gradients_do_not_vanish_however_many_tokens_a_step_has(
    dataset: Dataset, base: Base, tmp_path: Path, tokens: int
) -> None:
    exact = gradients(dataset, base, tmp_path, "fp32", tokens)
    ours = gradients(dataset, base, tmp_path, "fp16", tokens)
    assert ours.keys() == exact.keys()
    for name, gradient in exact.items():
        error = (ours[name] - gradient).norm() / gradient.norm()
        assert error < 0.03, f"{name}: {error:.3f}"


def test_a_training_in_fp16_learns_as_one_in_fp32_does(dataset: Dataset, base: Base, tmp_path: Path) -> None:
    half = train(AUTO, dataset, base, tmp_path / "half", silent)
    full = train(replace(SETTINGS, dtype="fp32"), dataset, base, tmp_path / "full", silent)
    assert (half.device, full.device) == ("cpu, fp16", "cpu, fp32")
    pairs = zip(*(read_losses(o.files["logs/loss.csv"]) for o in (half, full)), strict=True)
    for ours, theirs in pairs:
        assert ours.loss == pytest.approx(theirs.loss, rel=0.01)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=0.05)


def test_an_overflow_costs_scale_and_not_the_step_and_a_resumed_training_keeps_the_scale(
    dataset: Dataset, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = AnswerTrainer._forward_and_backward
    scales: dict[int, float] = {}

    def overflowing(self: AnswerTrainer, model: Any, *arguments: Any) -> Any:
        loss = honest(self, model, *arguments)
        if self.token_scale > 256:
            next(p for p in model.parameters() if p.grad is not None).grad[0] = math.inf
        scales[self.state.global_step] = self.token_scale
        return loss

    whole = train(AUTO, dataset, base, tmp_path / "plain", silent)
    monkeypatch.setattr(AnswerTrainer, "_forward_and_backward", overflowing)
    scaled = train(AUTO, dataset, base, tmp_path / "whole", silent)
    assert set(scales.values()) == {256}
    assert "fp16" in scaled.device
    first, second = (read_losses(o.files["logs/loss.csv"]) for o in (whole, scaled))
    assert [row.tokens for row in first] == [row.tokens for row in second]
    assert [row.loss for row in first] == pytest.approx([row.loss for row in second], rel=0.01)
    assert all(row.grad_norm is not None for row in second)

    with pytest.raises(Killed):
        train(AUTO, dataset, base, tmp_path / "cut", at_step(5))
    began: list[float] = []
    load = AnswerTrainer._load_optimizer_and_scheduler

    def watch(self: AnswerTrainer, checkpoint: str | None) -> None:
        load(self, checkpoint)
        began.append(self.token_scale)

    monkeypatch.setattr(AnswerTrainer, "_load_optimizer_and_scheduler", watch)
    cut = train(AUTO, dataset, base, tmp_path / "cut", silent)
    assert began == [256]
    ours, theirs = (load_file(o.files["adapter_model.safetensors"]) for o in (cut, scaled))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_fp16_that_overflows_in_every_scale_gives_way_to_bf16(
    dataset: Dataset, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = AnswerTrainer._summed_loss

    def overflowing(self: AnswerTrainer, inputs: Any) -> Any:
        loss, count = honest(self, inputs)
        return (loss * math.inf if self._plan.device.dtype == "fp16" else loss), count

    monkeypatch.setattr(AnswerTrainer, "_summed_loss", overflowing)
    outcome = train(AUTO, dataset, base, tmp_path, silent)
    assert "bf16" in outcome.device
    assert outcome.events == (
        "the loss or its gradient was NaN or infinite in fp16 at step 1: the training started again in bf16",
    )
