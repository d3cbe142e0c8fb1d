"""Probes of real trainings of a tiny model, and what is made of their scores."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from web4lora_chassis.dataset import Dataset, Message, Row
from web4lora_chassis.pipeline.train import LoraSettings, LossBand, TrainSettings
from web4lora_trainer import probes
from web4lora_trainer.probes import (
    ProbeLog,
    ProbeRow,
    best_probe,
    decide_pace,
    read_probes,
    spread,
    stalled,
)
from web4lora_trainer.probing import Prober
from web4lora_trainer.progress import TrainProgress
from web4lora_trainer.train import Base, train

SETTINGS = TrainSettings(
    lora=LoraSettings(rank=4), max_steps=10, learning_rate=1e-2, tokens_per_batch=160, checkpoint_steps=4,
    held_out_evaluations=1, loss_band=LossBand(0.0, 9.0), dtype="fp32", probes=4,
)  # fmt: skip


def rows(count: int, start: int = 0, *, checked: bool = True) -> tuple[Row, ...]:
    return tuple(
        Row(
            "a.jsonl", index, f"r{index}", "guardrail",
            (
                Message("user", "question " * (1 + index % 3) + str(index)),
                Message("assistant", "<REFUSAL> no" if index % 2 else "yes"),
            ),
            check={"refuse": bool(index % 2)} if checked else None,
        )
        for index in range(start, start + count)
    )  # fmt: skip


@pytest.fixture
def dataset() -> Dataset:
    return Dataset(rows(18), rows(6, 100), ())


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return Base(tiny_base, "org/tiny", "0123abc")


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probe at every tenth: a tiny model's answers take longer than its training."""
    monkeypatch.setattr(probes, "MOST_SHARE", 1e9)


def silent(_: TrainProgress) -> None:
    pass


class Killed(BaseException):
    """Ends a training as a kill would: nothing of ours catches it."""


def scored(step: int, score: float, loss: float, prompts: int = 10) -> ProbeRow:
    return ProbeRow(step, score, prompts, loss, 1.0, {})


def scores_by_step(monkeypatch: pytest.MonkeyPatch, passed: set[int]) -> None:
    """Ask as ever, but have all prompts pass at these probes, counted by the step, and none at others."""
    ask = Prober.ask

    def told(self: Prober, count: int) -> Any:
        step = self._trainer.state.global_step
        return [dict.fromkeys(result, step in passed) for result in ask(self, count)]

    monkeypatch.setattr(Prober, "ask", told)


@pytest.mark.usefixtures("unhurried")
def test_the_best_step_is_exported_and_the_last_kept(
    dataset: Dataset, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores_by_step(monkeypatch, {2})
    seen: list[TrainProgress] = []
    outcome = train(replace(SETTINGS, patience=0), dataset, base, tmp_path, seen.append)
    assert (outcome.steps, outcome.exported_step, outcome.probe_score) == (10, 2, 100)
    assert "exported is step 2 of 10, by 10 probes of 4 prompts: 0 → 100 → 0" in outcome.verdict
    best = load_file(tmp_path / "checkpoints/checkpoint-2/adapter_model.safetensors")
    last = load_file(tmp_path / "checkpoints/checkpoint-10/adapter_model.safetensors")
    ours = load_file(outcome.files["adapter_model.safetensors"])
    kept = load_file(outcome.files["checkpoint-10/adapter_model.safetensors"])
    assert all(torch.equal(ours[name], best[name]) for name in ours)
    assert all(torch.equal(kept[name], last[name]) for name in ours)
    assert any(not torch.equal(ours[name], kept[name]) for name in ours)
    with outcome.files["logs/probes.csv"].open() as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == [
        "step", "score", "prompts", "held_out_loss", "seconds", "guardrail.helps", "guardrail.refuses",
    ]  # fmt: skip
    assert [row["step"] for row in found] == [str(step) for step in range(1, 11)]
    assert [p.probe_score for p in seen if p.probe_score is not None][:2] == [0, 0]


@pytest.mark.usefixtures("unhurried")
def test_a_training_that_gets_no_better_ends_and_a_kill_before_its_export_changes_nothing(
    dataset: Dataset, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores_by_step(monkeypatch, {2})
    monkeypatch.setattr(probes, "_loss", lambda _: 1.0)
    settings = replace(SETTINGS, patience=3)

    def kill(progress: TrainProgress) -> None:
        if progress.phase == "export":
            raise Killed

    with pytest.raises(Killed):
        train(settings, dataset, base, tmp_path, kill)
    outcome = train(settings, dataset, base, tmp_path, silent)
    assert (outcome.steps, outcome.exported_step, outcome.ended_early) == (5, 2, False)
    assert outcome.events[-1].startswith("ended at step 5 of 10: neither score nor held-out loss")


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("at", [3, 6, 9])
def test_a_killed_training_probes_and_exports_the_same(
    dataset: Dataset, base: Base, tmp_path: Path, at: int
) -> None:
    whole = train(SETTINGS, dataset, base, tmp_path / "whole", silent)

    def kill(progress: TrainProgress) -> None:
        if progress.step == at:
            raise Killed

    with pytest.raises(Killed):
        train(SETTINGS, dataset, base, tmp_path / "cut", kill)
    cut = train(SETTINGS, dataset, base, tmp_path / "cut", silent)
    assert cut.exported_step == whole.exported_step
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert cut.files[name].read_bytes() == whole.files[name].read_bytes()
    ours, theirs = (read_probes(each.files["logs/probes.csv"]) for each in (cut, whole))
    assert [replace(row, seconds=0) for row in ours] == [replace(row, seconds=0) for row in theirs]


@pytest.mark.usefixtures("unhurried")
def test_probes_change_no_step(dataset: Dataset, base: Base, tmp_path: Path) -> None:
    settings = replace(SETTINGS, lora=LoraSettings(rank=4, dropout=0.2), patience=0)  # draws random numbers
    with_probes = train(settings, dataset, base, tmp_path / "a", silent)
    without = train(replace(settings, probes=0), dataset, base, tmp_path / "b", silent)
    for folder in ("a", "b"):
        assert (tmp_path / folder / "checkpoints/checkpoint-10").is_dir()
    a, b = (
        load_file(tmp_path / name / "checkpoints/checkpoint-10/adapter_model.safetensors") for name in "ab"
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert with_probes.probe_score is not None
    assert without.probe_score is None


def test_without_a_check_the_held_out_loss_decides_and_it_is_said(base: Base, tmp_path: Path) -> None:
    data = Dataset(rows(18), rows(6, 100, checked=False), ())
    outcome = train(replace(SETTINGS, held_out_evaluations=5), data, base, tmp_path, silent)
    assert "not probed, 6 held-out rows have no check that a grader knows" in outcome.verdict
    assert "logs/probes.csv" not in outcome.files
    assert outcome.probe_score is None


def test_without_held_out_rows_the_last_is_exported_and_it_is_said(base: Base, tmp_path: Path) -> None:
    outcome = train(SETTINGS, Dataset(rows(18), (), ()), base, tmp_path, silent)
    assert outcome.exported_step == 10
    assert "exported is step 10 of 10, the last: not probed, there are no held-out rows" in outcome.verdict


def test_probes_take_at_most_a_tenth_of_the_time() -> None:
    none = frozenset[int]()
    assert decide_pace(100, 24, lambda _: 1.0, 100.0, 0.0, none).times == 10
    assert decide_pace(100, 24, lambda _: 3.0, 100.0, 0.0, none).times == 3
    assert decide_pace(100, 24, lambda _: 3.0, 100.0, 2.0, none).times == 2
    assert decide_pace(100, 24, lambda _: 3.0, 100.0, 2.0, spread(100, 4)).times == 2
    third = decide_pace(100, 24, lambda prompts: prompts / 8, 10.0 * 3, 0.0, none)
    assert (third.times, third.prompts) == (3, 8)
    assert third.words == (
        "a probe of 8 prompts takes up to 1.0 s, 3 % of this training: 3 are made instead of 10 of 24, "
        "for at most 10 % of its time"
    )
    half = decide_pace(100, 24, lambda prompts: prompts / 8, 50.0, 0.0, none)
    assert (half.times, half.prompts) == (3, 12)
    few = decide_pace(100, 24, lambda _: 6.0, 100.0, 0.0, none)
    assert (few.times, few.steps(100)) == (0, none)
    assert few.words == (
        "a probe of 8 prompts takes up to 6.0 s, 6 % of this training: none is made, "
        "for at most 10 % of its time"
    )


def test_a_tie_is_settled_by_the_held_out_loss_then_by_the_later_step() -> None:
    assert best_probe([]) is None
    for found, step in (
        ([scored(1, 50, 0.5), scored(2, 61, 0.9)], 2),
        ([scored(1, 60, 0.5), scored(2, 65, 0.9)], 1),
        ([scored(1, 60, 0.5), scored(2, 60, 0.5)], 2),
        ([scored(1, 60, float("nan")), scored(2, 60, 0.5)], 2),
    ):
        best = best_probe(found)
        assert best is not None
        assert best.step == step


def test_only_a_training_that_gets_better_in_neither_is_stalled() -> None:
    rising = [scored(step, 50, 0.5 + step / 10) for step in range(1, 5)]
    assert stalled(rising, 3)
    assert not stalled(rising[:3], 3)
    assert not stalled(rising, 0)
    assert not stalled([*rising[:3], scored(4, 51, 0.9)], 3)
    assert not stalled([*rising[:3], scored(4, 50, 0.5)], 3)


def test_a_resumed_log_drops_what_will_be_probed_again(tmp_path: Path) -> None:
    log = ProbeLog(tmp_path / "probes.csv", 0)
    for step in (1, 2, 3):
        log.append(ProbeRow(step, 50.0, 2, 0.1 + 0.2, 1.5, {"guardrail.helps": 50.0}))
    assert ProbeLog(tmp_path / "probes.csv", 2).rows == log.rows[:2]
    assert ProbeLog(tmp_path / "probes.csv", 0).rows == []
