"""The loss of a training run: a CSV for programs, a plot and a verdict in words for people."""

from __future__ import annotations

import csv
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from web4lora_chassis.pipeline.train import LossBand

from web4lora_trainer.probes import ProbeRow

COLUMNS = (
    "step", "epoch", "loss", "answer_tokens", "held_out_loss", "learning_rate", "grad_norm", "tokens",
    "tokens_per_second", "seconds",
)  # fmt: skip

_END_SHARE = 0.1
_END_STEPS = 10
_STILL_FALLING = 0.05
_SMOOTHING = 0.9
_TITLE_CHARACTERS = 100


@dataclass(frozen=True)
class LossRow:
    """One optimizer step.

    Attributes:
        step: Counted from 1.
        epoch: Passes over the data so far.
        loss: Mean over the step's answer tokens.
        answer_tokens: Tokens that the step's loss is over; those of prompts have none.
        held_out_loss: Measured after this step, or None.
        learning_rate: Used in this step.
        grad_norm: Before clipping; None when there was no finite gradient.
        tokens: Non-padding tokens so far.
        tokens_per_second: Non-padding tokens through the model in a second of training, this step.
        seconds: Time in the training loop so far, attempts before a restart included.
    """

    step: int
    epoch: float
    loss: float
    answer_tokens: int
    held_out_loss: float | None
    learning_rate: float
    grad_norm: float | None
    tokens: int
    tokens_per_second: float
    seconds: float

    def cells(self) -> list[str]:
        """Return the row as CSV cells; what is unknown is empty."""
        return [
            str(self.step),
            f"{self.epoch:.4f}",
            f"{self.loss:.6f}",
            str(self.answer_tokens),
            "" if self.held_out_loss is None else f"{self.held_out_loss:.6f}",
            f"{self.learning_rate:.8g}",
            "" if self.grad_norm is None else f"{self.grad_norm:.6g}",
            str(self.tokens),
            f"{self.tokens_per_second:.1f}",
            f"{self.seconds:.2f}",
        ]


class LossLog:
    """Appends rows to loss.csv; a resumed run drops those of steps that will be made again.

    Args:
        path: The file; kept up to `resumed_step`.
        resumed_step: The checkpoint's step; 0 starts anew.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = read_losses(path) if resumed_step and path.is_file() else []
        self.rows = [row for row in before if row.step <= resumed_step]
        part = path.with_suffix(".part")
        with part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(row.cells() for row in self.rows)
        os.replace(part, path)
        self._file = path.open("a", encoding="utf-8", newline="")

    def append(self, row: LossRow) -> None:
        """Add a row; it is on disk when this returns."""
        self.rows.append(row)
        csv.writer(self._file, lineterminator="\n").writerow(row.cells())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_losses(path: Path) -> list[LossRow]:
    """Read loss.csv; a last line that was cut off by a crash is left out."""
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        for cells in csv.DictReader(file):
            try:
                rows.append(
                    LossRow(
                        step=int(cells["step"]),
                        epoch=float(cells["epoch"]),
                        loss=float(cells["loss"]),
                        answer_tokens=int(cells["answer_tokens"]),
                        held_out_loss=float(cells["held_out_loss"]) if cells["held_out_loss"] else None,
                        learning_rate=float(cells["learning_rate"]),
                        grad_norm=float(cells["grad_norm"]) if cells["grad_norm"] else None,
                        tokens=int(cells["tokens"]),
                        tokens_per_second=float(cells["tokens_per_second"]),
                        seconds=float(cells["seconds"]),
                    )
                )
            except (TypeError, ValueError):
                break
    return rows


@dataclass(frozen=True)
class Verdict:
    """Where the loss ended.

    Attributes:
        final_loss: Mean over the answer tokens of the last tenth of the steps, at least ten steps.
        settled: It lies in the band and no longer moves.
        words: For people.
    """

    final_loss: float
    settled: bool
    words: str


def judge(rows: Sequence[LossRow], held_out: Sequence[float], band: LossBand) -> Verdict:
    """Say whether the training loss settled in its band.

    Every answer token weighs the same, as in the held-out loss: batches hold rows of like length, so a batch
    of very short answers has few tokens and often a high loss. What is not finite is counted, and left out.

    Args:
        rows: Every step.
        held_out: Held-out losses in the order in which they were measured.
        band: Where it should settle.
    """
    finite = [row for row in rows if math.isfinite(row.loss)]
    if not finite:
        return Verdict(math.nan, settled=False, words=f"none of {len(rows)} losses was finite")
    lost = len(rows) - len(finite)
    notes = f"; {lost} of {len(rows)} losses {'was' if lost == 1 else 'were'} not finite" if lost else ""
    if held_out and not math.isfinite(held_out[-1]):
        notes += "; the last held-out loss is not finite"
    held_out = [loss for loss in held_out if math.isfinite(loss)]
    rows = finite
    count = min(len(rows), max(_END_STEPS, round(len(rows) * _END_SHARE)))
    final, noise = _mean(rows[-count:])
    before, noise_before = _mean(rows[-2 * count : -count])
    fall = before - final
    falling = fall > max(_STILL_FALLING * final, 2 * math.hypot(noise, noise_before))
    where = f"the band {band.low:g} to {band.high:g}"
    inside = band.low <= final <= band.high
    if final > band.high:
        words = f"ended at {final:.2f}, above {where}" + (
            ", and is still falling: train longer"
            if falling
            else ": more epochs, a higher rate, or more rank"
        )
    elif final < band.low:
        words = f"ended at {final:.2f}, below {where}: likely overfitting"
    elif falling:
        words = f"still falling at {final:.2f}, inside {where}"
    else:
        words = f"settled at {final:.2f}, inside {where}"
    if len(held_out) > 1 and held_out[-1] > min(held_out) * 1.05:
        words += f"; held-out loss rose from {min(held_out):.2f} to {held_out[-1]:.2f}: likely overfitting"
    return Verdict(final, inside and not falling, words + notes)


def _mean(rows: Sequence[LossRow]) -> tuple[float, float]:
    """Return the mean loss of the steps' answer tokens and its standard error; NaN for no steps."""
    tokens = sum(row.answer_tokens for row in rows)
    if not tokens:
        return math.nan, math.nan
    mean = sum(row.loss * row.answer_tokens for row in rows) / tokens
    spread = sum((row.answer_tokens * (row.loss - mean)) ** 2 for row in rows)
    return mean, math.sqrt(spread) / tokens


def plot_losses(
    rows: Sequence[LossRow],
    band: LossBand,
    title: str,
    path: Path,
    probes: Sequence[ProbeRow] = (),
    exported_step: int = 0,
) -> None:
    """Draw training, smoothed and held-out loss over the steps, with the band shaded, and what probes scored.

    Args:
        rows: The steps.
        band: Where the loss should settle.
        title: Above the plot, broken into lines that fit.
        path: The PNG to write.
        probes: Their scores have an axis of their own; may be empty.
        exported_step: Marked; 0 marks none.
    """
    from matplotlib.figure import Figure

    steps = [row.step for row in rows]
    losses = [row.loss if math.isfinite(row.loss) else math.nan for row in rows]  # a NaN is a gap
    broken = [row.step for row in rows if not math.isfinite(row.loss)]
    held_out = [
        (row.step, row.held_out_loss)
        for row in rows
        if row.held_out_loss is not None and math.isfinite(row.held_out_loss)
    ]
    smoothed = _smoothed(rows)
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.axhspan(
        band.low,
        band.high,
        color="#2e7d32",
        alpha=0.12,
        lw=0,
        label=f"target band {band.low:g} to {band.high:g}",
    )
    axes.plot(steps, losses, color="#90a4ae", lw=0.9, label="training loss, each step")
    axes.plot(steps, smoothed, color="#1565c0", lw=2.0, label="training loss, smoothed")
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True), color="#e65100", marker="o", ms=6, lw=1.4, label="held-out loss"
        )
    if broken:
        axes.plot(broken, [0.0] * len(broken), "x", color="#c62828", clip_on=False, label="loss not finite")
    finite = [loss for loss in losses if math.isfinite(loss)]
    smooth = [loss for loss in smoothed if math.isfinite(loss)]
    highest = max([band.high * 1.3, *smooth, *(loss for _, loss in held_out)])
    axes.set_ylim(0, min(max(finite, default=highest), highest * 1.25) * 1.05)
    margin = 0.01 * (len(steps) + 1)
    axes.set_xlim(min(steps) - margin, max(steps) + margin)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross entropy per answer token (nats)")
    axes.set_title(textwrap.fill(title, _TITLE_CHARACTERS), fontsize=11)
    axes.grid(alpha=0.25)
    if exported_step:
        axes.axvline(exported_step, color="#6a1b9a", lw=1.0, ls=":", label=f"exported: step {exported_step}")
    handles, labels = axes.get_legend_handles_labels()
    if probes:
        scores = axes.twinx()
        scores.plot(
            [row.step for row in probes], [row.score for row in probes], "s-", color="#6a1b9a", label="probes"
        )
        scores.set_ylim(0, 105)
        scores.set_ylabel("probes: checks passed (of 100)")
        more = scores.get_legend_handles_labels()
        handles, labels = [*handles, *more[0]], [*labels, *more[1]]
    axes.legend(handles, labels, frameon=False)
    part = path.with_name(f".part-{path.name}")
    figure.savefig(part, format="png", metadata={"Software": None})
    os.replace(part, path)


def _smoothed(rows: Sequence[LossRow]) -> list[float]:
    """Return the moving average of the answer tokens' loss: exponential by steps, corrected for its start.

    A loss that is not finite leaves it as it was; it is NaN before the first finite one.
    """
    total, weight, result = 0.0, 0.0, []
    for row in rows:
        if math.isfinite(row.loss):
            total = _SMOOTHING * total + row.answer_tokens * row.loss
            weight = _SMOOTHING * weight + row.answer_tokens
        result.append(total / weight if weight else math.nan)
    return result
