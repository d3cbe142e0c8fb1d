from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
from web4lora_chassis.pipeline.train import LossBand
from web4lora_trainer.loss_report import COLUMNS, LossLog, LossRow, judge, plot_losses, read_losses

BAND = LossBand(0.1, 0.6)


def row(step: int, loss: float = 1.0, held_out: float | None = None, answer_tokens: int = 40) -> LossRow:
    return LossRow(step, step / 10, loss, answer_tokens, held_out, 1e-3, 0.5, step * 100, 400.0, step / 4)


def rows(losses: list[float]) -> list[LossRow]:
    return [row(step, loss) for step, loss in enumerate(losses, 1)]


def test_the_csv_has_its_columns_and_is_readable_at_once(tmp_path: Path) -> None:
    log = LossLog(tmp_path / "logs" / "loss.csv", 0)
    log.append(row(1, 2.5))
    log.append(replace(row(2, 2.0, held_out=2.2), grad_norm=None))
    with (tmp_path / "logs" / "loss.csv").open() as file:
        first, second = csv.DictReader(file)
    assert tuple(first) == COLUMNS
    assert (first["loss"], first["held_out_loss"], first["tokens"]) == ("2.500000", "", "100")
    assert (second["held_out_loss"], second["grad_norm"]) == ("2.200000", "")
    assert read_losses(tmp_path / "logs" / "loss.csv") == log.rows
    log.close()


def test_a_resumed_run_drops_the_steps_that_come_again(tmp_path: Path) -> None:
    path = tmp_path / "loss.csv"
    first = LossLog(path, 0)
    for step in range(1, 8):
        first.append(row(step))
    first.close()
    with path.open("a") as file:
        file.write("8,0.8,1.0")  # the kill came in the middle of a line
    second = LossLog(path, resumed_step=5)
    second.append(row(6, 0.5))
    second.close()
    assert [(r.step, r.loss) for r in read_losses(path)] == [(s, 1.0) for s in range(1, 6)] + [(6, 0.5)]
    third = LossLog(path, 0)
    third.close()
    assert read_losses(path) == []


@pytest.mark.parametrize(
    ("losses", "settled", "words"),
    [
        (
            [3.0 - step * 0.1 for step in range(28)] + [0.3] * 60,
            True,
            "settled at 0.30, inside the band 0.1 to 0.6",
        ),
        ([3.0] * 50 + [2.0] * 40, False, "ended at 2.00, above the band 0.1 to 0.6"),
        ([3.0 - step * 0.02 for step in range(100)], False, "still falling: train longer"),
        ([3.0 - step * 0.026 for step in range(100)], False, "still falling at 0.54"),
        ([1.0] * 50 + [0.02] * 50, False, "below the band 0.1 to 0.6: likely overfitting"),
        ([0.3], True, "settled at 0.30"),
    ],
)
def test_the_verdict(losses: list[float], settled: bool, words: str) -> None:
    verdict = judge(rows(losses), [], BAND)
    assert words in verdict.words
    assert verdict.settled is settled


def test_a_rising_held_out_loss_is_told() -> None:
    assert "rose from 0.40 to 0.60" in judge(rows([0.3] * 40), [0.5, 0.4, 0.6], BAND).words
    assert "rose" not in judge(rows([0.3] * 40), [0.5, 0.4, 0.41], BAND).words


def test_the_last_tenth_counts_but_at_least_ten_steps() -> None:
    assert judge(rows([1.0] * 180 + [0.5] * 20), [], BAND).final_loss == pytest.approx(0.5)
    assert judge(rows([1.0] * 5 + [0.5] * 10), [], BAND).final_loss == pytest.approx(0.5)


def test_every_answer_token_weighs_the_same_in_the_verdict() -> None:
    """Rows of like length share a batch: one of refusals has few tokens, and the highest loss."""
    refusals = {step: row(step, 3.0, answer_tokens=8) for step in range(0, 100, 5)}
    verdict = judge([refusals.get(step, row(step, 0.5, answer_tokens=200)) for step in range(100)], [], BAND)
    assert verdict.final_loss == pytest.approx((2 * 8 * 3.0 + 8 * 200 * 0.5) / (2 * 8 + 8 * 200))
    assert verdict.settled


def test_the_plot_is_a_png_of_a_readable_size(tmp_path: Path) -> None:
    from PIL import Image

    steps = [row(step, 3 / step, 3 / step if step % 5 == 0 else None) for step in range(1, 30)]
    plot_losses(steps, BAND, "a title", tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.format == "PNG"
        assert image.width >= 800
    plot_losses(steps[:1], BAND, "one step", tmp_path / "one.png")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".part")] == []


def test_a_long_title_stays_inside_the_plot(tmp_path: Path) -> None:
    from PIL import Image

    plot_losses(rows([3.0, 2.0, 1.0]), BAND, "above the band, train longer " * 5, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        edges = [image.convert("L").crop((x, 0, x + 3, 40)) for x in (0, image.width - 3)]
    assert all(edge.getextrema() == (255, 255) for edge in edges)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_counted_and_left_out(value: float, tmp_path: Path) -> None:
    steps = rows([0.3] * 40)
    steps[30] = replace(steps[30], loss=value)
    verdict = judge(steps, [], BAND)
    assert verdict.final_loss == pytest.approx(0.3)
    assert verdict.words == "settled at 0.30, inside the band 0.1 to 0.6; 1 of 40 losses was not finite"
    steps[31] = replace(steps[31], loss=value, held_out_loss=value)
    assert "2 of 40 losses were not finite" in judge(steps, [0.3, value], BAND).words
    assert "not finite" in judge(steps, [0.3, value], BAND).words
    plot_losses(steps, BAND, "a title", tmp_path / "loss.png")

    none = judge([replace(row, loss=value) for row in steps], [], BAND)
    assert not none.settled
    assert none.words == "none of 40 losses was finite"
    plot_losses([replace(row, loss=value) for row in steps], BAND, "a title", tmp_path / "loss.png")


def test_a_held_out_loss_that_is_not_finite_is_told() -> None:
    assert "the last held-out loss is not finite" in judge(rows([0.3] * 40), [0.3, math.nan], BAND).words
