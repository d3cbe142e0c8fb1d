"""Real trainings of a tiny model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from web4lora_chassis.dataset import Dataset, Message, Row
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, OutOfMemory
from web4lora_trainer.base_model import load_tokenizer
from web4lora_trainer.batching import Collator, encode_rows
from web4lora_trainer.device import Device
from web4lora_trainer.loss_report import read_losses
from web4lora_trainer.run_training import Base, TrainProgress, last_whole_checkpoint, prepare, train
from web4lora_trainer.sft import AnswerTrainer
from web4lora_trainer.train_settings import LoraSettings, LossBand, TrainSettings

COLOURS = ["red", "green", "blue"]
SETTINGS = TrainSettings(
    lora=LoraSettings(rank=4), max_steps=6, learning_rate=1e-2, tokens_per_batch=160, checkpoint_steps=2,
    held_out_evaluations=2, loss_band=LossBand(0.0, 9.0), dtype="fp32",
)  # fmt: skip


def rows(count: int, start: int = 0) -> tuple[Row, ...]:
    return tuple(
        Row(
            "a.jsonl", index, f"r{index}", "tool",
            (
                Message("user", "question " * (1 + index % 4) + str(index)),
                Message("assistant", COLOURS[index % 3]),
            ),
        )
        for index in range(start, start + count)
    )  # fmt: skip


@pytest.fixture
def dataset() -> Dataset:
    return Dataset(rows(18), rows(5, 100), ())


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return Base(tiny_base, "org/tiny", "0123abc")


def silent(_: TrainProgress) -> None:
    pass


class Killed(BaseException):
    """Ends a training as a kill would: nothing of ours catches it."""


def test_a_training_makes_the_run_folder(dataset: Dataset, base: Base, tmp_path: Path) -> None:
    seen: list[TrainProgress] = []
    outcome = train(SETTINGS, dataset, base, tmp_path, seen.append)
    assert set(outcome.files) == {
        "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "trainer_state.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "logs/loss.csv", "logs/loss.png",
    }  # fmt: skip
    config = json.loads(outcome.files["adapter_config.json"].read_text())
    assert config["base_model_name_or_path"] == "org/tiny"
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    texts = [path.read_text() for name, path in outcome.files.items() if name.endswith(".json")]
    assert not any(str(tmp_path) in text or str(base.folder) in text for text in texts)

    tensors = load_file(outcome.files["adapter_model.safetensors"])
    plain = torch.load(outcome.files["adapter_model.bin"], weights_only=True)
    assert len(tensors) == 2 * 4 * 2
    assert tensors.keys() == plain.keys()
    assert all(torch.equal(tensors[name], plain[name]) for name in tensors)
    assert sum(t.numel() for t in tensors.values()) == outcome.trained_parameters
    assert any(t.abs().max() > 0 for name, t in tensors.items() if "lora_B" in name)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert outcome.files[name].read_bytes() == (base.folder / name).read_bytes()

    losses = read_losses(outcome.files["logs/loss.csv"])
    assert [row.step for row in losses] == [1, 2, 3, 4, 5, 6]
    assert losses[-1].loss < losses[0].loss
    assert [row.step for row in losses if row.held_out_loss is not None] == [3, 6]
    assert outcome.held_out_loss == pytest.approx(losses[-1].held_out_loss)
    state = json.loads(outcome.files["trainer_state.json"].read_text())
    assert state["global_step"] == 6
    assert [p.step for p in seen if p.phase == "train"][-1] == 6
    assert seen[0].phase == "load"
    assert seen[-1].phase == "export"
    assert outcome.steps == prepare(SETTINGS, dataset, base.folder).estimate.steps


def test_a_killed_training_goes_on_to_the_same_adapter(dataset: Dataset, base: Base, tmp_path: Path) -> None:
    settings = replace(SETTINGS, max_steps=0, epochs=2, gradient_accumulation=2, checkpoint_steps=3)
    whole = train(settings, dataset, base, tmp_path / "whole", silent)

    def kill_at(step: int) -> Any:
        def report(progress: TrainProgress) -> None:
            if progress.phase == "train" and progress.step == step:
                raise Killed

        return report

    resumed: list[int] = []
    with pytest.raises(Killed):
        train(settings, dataset, base, tmp_path / "cut", kill_at(5))
    half = tmp_path / "cut" / "checkpoints" / "checkpoint-5"  # what a kill in the middle of saving leaves
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    cut = train(settings, dataset, base, tmp_path / "cut", lambda p: resumed.append(p.resumed_step))
    assert max(resumed) == 3
    ours, theirs = (load_file(o.files["adapter_model.safetensors"]) for o in (cut, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    pairs = [
        [(r.step, r.loss, r.tokens) for r in read_losses(o.files["logs/loss.csv"])] for o in (cut, whole)
    ]
    assert pairs[0] == pairs[1]


@pytest.mark.parametrize("step", [4, 3], ids=["plain", "with a held-out loss"])
def test_a_kill_right_after_a_checkpoint_loses_no_row(
    dataset: Dataset, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    settings = replace(SETTINGS, checkpoint_steps=step)
    save = AnswerTrainer._save_checkpoint

    def save_and_die(self: AnswerTrainer, *arguments: Any) -> None:
        save(self, *arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(AnswerTrainer, "_save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            train(settings, dataset, base, tmp_path, silent)
    resumed: list[int] = []
    outcome = train(settings, dataset, base, tmp_path, lambda p: resumed.append(p.resumed_step))
    assert max(resumed) == step
    losses = read_losses(outcome.files["logs/loss.csv"])
    assert [row.step for row in losses] == [1, 2, 3, 4, 5, 6]
    assert [row.step for row in losses if row.held_out_loss is not None] == [3, 6]


def test_rows_that_a_power_cut_took_do_not_end_a_training(
    dataset: Dataset, base: Base, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, max_steps=4)
    train(settings, dataset, base, tmp_path, silent)
    lines = (tmp_path / "loss.csv").read_text().splitlines(keepends=True)
    (tmp_path / "loss.csv").write_text("".join(lines[:2]))
    longer = replace(settings, max_steps=6)
    outcome = train(longer, dataset, base, tmp_path, silent)
    assert [row.step for row in read_losses(outcome.files["logs/loss.csv"])] == [1, 5, 6]


def test_only_the_last_layers_are_adapted(dataset: Dataset, base: Base, tmp_path: Path) -> None:
    settings = replace(
        SETTINGS, lora=LoraSettings(rank=2, last_layers=1, target_modules=("up_proj",)), max_steps=1
    )
    outcome = train(settings, dataset, base, tmp_path, silent)
    tensors = load_file(outcome.files["adapter_model.safetensors"])
    assert sorted(tensors) == [
        f"base_model.model.model.layers.1.mlp.up_proj.lora_{half}.weight" for half in "AB"
    ]


def test_a_module_that_is_not_there_is_refused(dataset: Dataset, base: Base, tmp_path: Path) -> None:
    settings = replace(SETTINGS, lora=LoraSettings(target_modules=("c_attn",)))
    with pytest.raises(InvalidInput, match="c_attn"):
        train(settings, dataset, base, tmp_path, silent)


def test_rows_that_are_all_too_long_are_refused(dataset: Dataset, base: Base) -> None:
    with pytest.raises(FailedPrecondition, match="All 18 training rows"):
        prepare(replace(SETTINGS, max_length_tokens=8), dataset, base.folder)


def trainer_for(base: Base, dataset: Dataset, work_dir: Path, dtype: str = "fp32") -> AnswerTrainer:
    from web4lora_trainer.run_training import _Run

    tokenizer = load_tokenizer(base.folder)
    from web4lora_trainer.checkpoint import read_checkpoint

    run = _Run(
        SETTINGS, read_checkpoint(base.folder), encode_rows(dataset.train, tokenizer, 256),
        encode_rows(dataset.held_out, tokenizer, 256), base, Device("cpu", "cpu", dtype, 1), work_dir, silent,
    )  # fmt: skip
    return run._trainer(3, [])


def test_loss_and_gradients_are_those_of_the_whole_model(
    dataset: Dataset, base: Base, tmp_path: Path
) -> None:
    trainer = trainer_for(base, dataset, tmp_path)
    model = trainer.peft_model
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    encoded = encode_rows(dataset.train[:5], load_tokenizer(base.folder), 256).rows
    batch = Collator(2)([{"input_ids": row.input_ids, "labels": row.labels} for row in encoded])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    trainer.compute_loss(model, batch).backward()
    ours = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    loss = trainer.compute_loss(model, batch).item()
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert ours.keys() == trained.keys()
    for name, parameter in trained.items():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-6)
    assert trainer.tokens_seen == 2 * sum(len(row) for row in encoded)
    assert trainer.answer_tokens_seen == 2 * sum(row.trained_tokens for row in encoded)


def test_the_base_stays_frozen_and_adapters_are_fp32(dataset: Dataset, base: Base, tmp_path: Path) -> None:
    model = trainer_for(base, dataset, tmp_path, dtype="bf16").peft_model
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)


def test_the_held_out_loss_weighs_every_token_the_same(dataset: Dataset, base: Base, tmp_path: Path) -> None:
    trainer = trainer_for(base, dataset, tmp_path)
    encoded = encode_rows(dataset.held_out, load_tokenizer(base.folder), 256).rows
    batch = Collator(2)([{"input_ids": row.input_ids, "labels": row.labels} for row in encoded])
    model = trainer.peft_model.eval()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_a_model_that_changes_its_scores_is_refused(dataset: Dataset, base: Base, tmp_path: Path) -> None:
    trainer = trainer_for(base, dataset, tmp_path)
    inner = trainer.peft_model.get_base_model()
    forward = inner.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = 0.1 * torch.tanh(output.logits / 0.1)
        return output

    inner.forward = capped
    with pytest.raises(FailedPrecondition, match="changes its scores"):
        trainer.check_head()


def test_a_loss_that_is_not_finite_falls_back_to_fp32_from_the_start(
    dataset: Dataset, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = AnswerTrainer._summed_loss

    def overflowing(self: AnswerTrainer, inputs: Any) -> Any:
        loss, count = honest(self, inputs)
        broken = self._plan.dtype == "bf16" and self.state.global_step == 2
        return (loss * math.inf if broken else loss), count

    monkeypatch.setattr(AnswerTrainer, "_summed_loss", overflowing)
    outcome = train(replace(SETTINGS, dtype="bf16", checkpoint_steps=1), dataset, base, tmp_path, silent)
    assert "fp32" in outcome.device
    assert [row.step for row in read_losses(outcome.files["logs/loss.csv"])] == [1, 2, 3, 4, 5, 6]


def test_want_of_memory_has_its_own_error_and_less_fits(
    dataset: Dataset, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = AnswerTrainer._summed_loss

    def hungry(self: AnswerTrainer, inputs: Any) -> Any:
        if inputs["input_ids"].numel() > 100:
            raise RuntimeError("Invalid buffer size: 40.00 GB")
        return honest(self, inputs)

    monkeypatch.setattr(AnswerTrainer, "_summed_loss", hungry)
    with pytest.raises(OutOfMemory):
        train(SETTINGS, dataset, base, tmp_path, silent)
    outcome = train(SETTINGS, dataset, base, tmp_path, silent, memory_failures=1)
    assert outcome.steps == 6


def test_half_a_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"glob'), (14, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    found = last_whole_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "checkpoint-10"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    assert last_whole_checkpoint(tmp_path / "none") is None
