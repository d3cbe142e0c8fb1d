# ruff: noqa: ARG002 - transformers names the arguments of a callback
"""Follows a training: a row of loss.csv and a report for every step, held-out measurements at their steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from web4lora_chassis.pipeline.train import TrainSettings

from web4lora_trainer.loss_report import LossLog, LossRow
from web4lora_trainer.probes import (
    PaceFile,
    ProbeLog,
    ProbeRow,
    best_probe,
    decide_pace,
    first_step,
    spread,
    stalled,
)

if TYPE_CHECKING:
    from web4lora_trainer.probing import Prober
    from web4lora_trainer.sft import AnswerTrainer

_RECENT_STEPS = 20


@dataclass(frozen=True)
class TrainProgress:
    """How far a training is.

    Attributes:
        phase: "load", "train" or "export".
        step: Finished optimizer steps.
        total_steps: All of them.
        loss: Of the last step; None before the first.
        held_out_loss: The last one measured, or None.
        probe_score: Of the last probe, of 100; None before the first.
        tokens_per_second: Non-padding tokens through the model in a second of training.
        seconds_left: Estimated from the steps so far.
        resumed_step: The checkpoint's step that this attempt went on from.
        note: What last happened to the training beside its steps, in words; empty when nothing did.
    """

    phase: str
    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    held_out_loss: float | None = None
    probe_score: float | None = None
    tokens_per_second: float = 0.0
    seconds_left: float = 0.0
    resumed_step: int = 0
    note: str = ""


Report = Callable[[TrainProgress], None]


class StepReporter(TrainerCallback):
    """Turns the trainer's events into rows and reports.

    Args:
        log: Where rows go.
        total_steps: All optimizer steps.
        resumed_step: The step this attempt goes on from.
        settings: How often the held-out loss is measured.
        report: The caller's callback.
        end_early: Asked after every step: whether the training is to end here, exported as it is then.
        probe_log: Where probes go.
        pace: Where it is kept how often the training is probed.
        note: Told what deserves a look.
    """

    def __init__(
        self,
        log: LossLog,
        total_steps: int,
        resumed_step: int,
        settings: TrainSettings,
        report: Report,
        end_early: Callable[[], bool],
        probe_log: ProbeLog,
        pace: PaceFile,
        note: Callable[[str], None],
    ) -> None:
        self._log = log
        self._probe_log = probe_log
        self._pace_file = pace
        self._pace = pace.read()
        self._note = note
        self._patience = settings.patience
        self._total = total_steps
        self._resumed_step = resumed_step
        self._report = report
        self._end_early = end_early
        self._measure_at = spread(total_steps, settings.held_out_evaluations)
        before = log.rows[-1] if log.rows else None
        self._tokens = before.tokens if before else 0
        self._seconds = self._seconds_before = before.seconds if before else 0.0
        self._held_out = next(
            (row.held_out_loss for row in reversed(log.rows) if row.held_out_loss is not None), None
        )
        self._trainer: AnswerTrainer | None = None
        self._prober: Prober | None = None
        self._probe_due = False
        self._pending: LossRow | None = None
        self._step_began = 0.0
        self._seen = (0, 0)

    def watch(self, trainer: AnswerTrainer, prober: Prober | None) -> None:
        """Say whose tokens to count, and who asks the probes."""
        self._trainer, self._prober = trainer, prober

    @property
    def probe_rows(self) -> list[ProbeRow]:
        """The probes made where they were planned, and behind the last step."""
        steps = self._pace.steps(self._total) if self._pace else frozenset()
        last = self._log.rows[-1].step if self._log.rows else 0
        return [row for row in self._probe_log.rows if row.step in steps or row.step == last]

    @property
    def best_step(self) -> int:
        """The step to export: by probes, else by held-out loss, else the last."""
        if (best := best_probe(self.probe_rows)) is not None:
            return best.step
        last = self._log.rows[-1].step
        measured = [
            (row.held_out_loss, -row.step)
            for row in self._log.rows
            if row.held_out_loss is not None and (row.step in self._measure_at or row.step == last)
        ]
        finite = [each for each in measured if math.isfinite(each[0])]
        return -min(finite)[1] if finite else last

    @property
    def stalled(self) -> bool:
        """Neither score nor held-out loss got better for as long as patience has it."""
        return stalled(self.probe_rows, self._patience)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the step's clock."""
        self._step_began = time.perf_counter()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Take a finished step in; where the held-out loss is due, its row waits for it.

        Either way the row is on disk before the step's checkpoint: a kill between them must not lose it.
        """
        if not logs or "loss" not in logs or self._trainer is None:
            return
        spent = time.perf_counter() - self._step_began
        seen = (self._trainer.tokens_seen, self._trainer.answer_tokens_seen)
        tokens, answer_tokens = seen[0] - self._seen[0], seen[1] - self._seen[1]
        self._seen = seen
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + spent
        norm = logs.get("grad_norm")
        row = LossRow(
            step=state.global_step,
            epoch=float(state.epoch or 0.0),
            loss=logs["loss"],
            answer_tokens=answer_tokens,
            held_out_loss=None,
            learning_rate=logs.get("learning_rate", 0.0),
            grad_norm=norm if norm is not None and math.isfinite(norm) else None,
            tokens=self._tokens,
            tokens_per_second=tokens / max(spent, 1e-9),
            seconds=self._seconds,
        )
        self._report_row(row)
        if control.should_evaluate:
            self._pending = row
        else:
            self._log.append(row)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for the held-out loss where it is due; end the training where that is wanted."""
        ends = state.global_step < self._total and self._end_early()
        if ends:
            control.should_training_stop = control.should_save = True
        if self._trainer is not None and self._trainer.eval_dataset is not None:
            self._probe_due = self._probes_at(state.global_step, ends=ends)
            control.should_evaluate = ends or self._probe_due or state.global_step in self._measure_at
            if control.should_evaluate:  # what is measured may be what is exported
                control.should_save = True
        return control

    def _probes_at(self, step: int, *, ends: bool) -> bool:
        """Tell whether a probe is due behind a step; behind the first tenth settle how often."""
        if self._prober is None or step < first_step(self._total):
            return False
        if self._pace is None:
            assert self._trainer is not None
            began = time.perf_counter()
            a_step = (self._seconds + began - self._step_began) / step
            self._pace = decide_pace(
                self._total,
                len(self._prober.prompts),
                self._prober.seconds(),
                a_step * self._total,
                self._trainer.held_out_seconds(),
                self._measure_at,
            )
            self._pace_file.write(self._pace)
            if self._pace.words:
                self._note(self._pace.words)
            self._step_began += time.perf_counter() - began
        return bool(self._pace.times) and (ends or step in self._pace.steps(self._total))

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> Any:
        """Add the held-out loss to the step's row, and what the probes found, before the step is saved."""
        self._held_out = (metrics or {}).get("eval_loss")
        row, self._pending = self._pending, None
        if row is None:
            return control
        self._report_row(row)
        self._log.append(replace(row, held_out_loss=self._held_out))
        if self._probe_due and self._prober is not None:
            began = time.perf_counter()
            assert self._pace is not None
            results = self._prober.ask(self._pace.prompts)
            loss = math.nan if self._held_out is None else self._held_out
            self._probe_log.append(ProbeRow.of(row.step, results, loss, time.perf_counter() - began))
            self._report_row(row)
        state.best_global_step = self.best_step  # whose checkpoint transformers then keeps
        if row.step < self._total and self.stalled:
            control.should_training_stop = True
        return control

    def _report_row(self, row: LossRow) -> None:
        recent = [*self._log.rows[-_RECENT_STEPS:], row]
        recent = [each for each in recent if each.step > self._resumed_step]
        speeds = [(each.tokens_per_second, each) for each in recent if each.tokens_per_second > 0]
        rate = len(speeds) / sum(1 / speed for speed, _ in speeds) if speeds else 0.0
        made = row.step - self._resumed_step
        per_step = (row.seconds - self._seconds_before) / max(made, 1)
        self._report(
            TrainProgress(
                phase="train",
                step=row.step,
                total_steps=self._total,
                loss=row.loss,
                held_out_loss=self._held_out,
                probe_score=self._probe_log.rows[-1].score if self._probe_log.rows else None,
                tokens_per_second=rate,
                seconds_left=per_step * (self._total - row.step) + self._probes_left(row.step),
                resumed_step=self._resumed_step,
            )
        )

    def _probes_left(self, step: int) -> float:
        """Return the seconds that probes still take, at most."""
        if self._pace is None:
            return 0.0
        return self._pace.probe_seconds * sum(each > step for each in self._pace.steps(self._total))
