"""Train: the core's second verb. Settings and folders go in, figures come back by a callback."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from web4lora_chassis.dataset import Dataset
from web4lora_chassis.errors import FailedPrecondition, OutOfMemory, ResourceExhausted
from web4lora_chassis.pipeline.train import TrainSettings

from web4lora_trainer.assemble import assemble
from web4lora_trainer.base_check import context_tokens
from web4lora_trainer.base_model import load_tokenizer
from web4lora_trainer.checkpoints import is_whole, last_whole_checkpoint, step_of
from web4lora_trainer.decoder import Decoder, read_decoder
from web4lora_trainer.device import Device, choose_device, require_one_process
from web4lora_trainer.encoding import EncodedRows
from web4lora_trainer.export import export_adapter, export_conversations, export_last, export_state
from web4lora_trainer.ladder import Ladder, Rung, rungs
from web4lora_trainer.loss_report import LossLog, judge, plot_losses
from web4lora_trainer.plan import PlanFile, TrainPlan, make_plan, plan_key, rows_order
from web4lora_trainer.preflight import estimate, probed_tokens, require_memory
from web4lora_trainer.probes import CSV_FILE, PaceFile, ProbeLog, ProbeRow, Probes, choose_probes
from web4lora_trainer.progress import Report, StepReporter, TrainProgress
from web4lora_trainer.rows import encode_dataset, sampled

if TYPE_CHECKING:
    from web4lora_trainer.probing import Prober
    from web4lora_trainer.sft import AnswerTrainer, NonFiniteLoss

_MEMORY_ERRORS = ("out of memory", "invalid buffer size", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Base:
    """The base model to train on.

    Attributes:
        folder: Its folder.
        source: What it is, without any path of this machine: goes into adapter_config.json.
        revision: Its hub commit or file hash; may be empty.
        digest: Of the artifact that it is; may be empty.
    """

    folder: Path
    source: str
    revision: str = ""
    digest: str = ""


@dataclass(frozen=True)
class TrainOutcome:
    """What training made; see the contract's TrainResult.

    Attributes:
        files: Path in the adapter artifact to the file on disk.
        final_loss: Mean training loss of the answer tokens of the last tenth of the steps.
        held_out_loss: The last one, or None.
        settled: The loss lies in its band and no longer moves.
        verdict: In words.
        steps: Optimizer steps made.
        tokens_per_second: Non-padding tokens through the model in a second of training.
        seconds: Time in the training loop, attempts before a restart included.
        peak_memory_bytes: The most memory that this process had; see `Device.peak_memory_bytes`.
        device: Device and number format.
        trained_parameters: Weights of the adapter.
        rows_too_long: Rows left out.
        events: What happened to the training, in words: less memory, another number format.
        ended_early: It made fewer steps than planned, on request.
        exported_step: The step whose adapter is in `files`: the best one, which need not be the last.
        probe_score: What its probe scored, of 100; None when nothing was probed.
    """

    files: Mapping[str, Path] = field(repr=False)
    final_loss: float
    held_out_loss: float | None
    settled: bool
    verdict: str
    steps: int
    tokens_per_second: float
    seconds: float
    peak_memory_bytes: int
    device: str
    trained_parameters: int
    rows_too_long: int
    events: tuple[str, ...] = ()
    ended_early: bool = False
    exported_step: int = 0
    probe_score: float | None = None


def train(
    settings: TrainSettings,
    dataset: Dataset,
    base: Base,
    work_dir: Path,
    report: Report,
    memory_failures: int = 0,
    end_early: Callable[[], bool] = lambda: False,
    rates: Path | None = None,
    start: Path | None = None,
) -> TrainOutcome:
    """Train an adapter; goes on from the last checkpoint in `work_dir` when there is one.

    Args:
        settings: How to train.
        dataset: Checked rows.
        base: The base model.
        work_dir: The plan, checkpoints, and `output/` with the result; kept from attempt to attempt.
        report: Called after every step and at the start of each phase.
        memory_failures: How often memory ran out before, for all that the caller can tell.
        end_early: Asked after every step: whether to end there, and export what there is.
        start: Folder of the adapter to go on from; its digest is in the settings.
        rates: Where measured speeds are kept; see `choose_device`.

    Returns:
        What was made; its files lie in `work_dir/output`.

    Raises:
        InvalidInput: The base lacks a target module.
        FailedPrecondition: The base's tokenizer or architecture is unusable, every row is too long, or the
            number format asked for overflows, or a launcher started several processes.
        OutOfMemory: Memory ran out; a new process may go on, a rung further down.
        ResourceExhausted: Memory ran out on the last rung.
        NonFiniteLoss: The loss stayed infinite or not a number in every number format.
    """
    from web4lora_trainer.sft import PROBE_STEPS, NonFiniteLoss

    require_one_process(os.environ)
    file = PlanFile(work_dir)
    report = _with_last_event(report, file)
    report(TrainProgress("load"))
    decoder = read_decoder(base.folder)
    settings = settings.for_model(context_tokens(base.folder))
    decoder.adapted(settings.lora)
    tokenizer = load_tokenizer(base.folder)
    rows, held_out = encode_dataset(settings, dataset, tokenizer, _rendered_at(work_dir))
    probes = choose_probes(held_out, settings.probes, settings.seed, tokenizer)
    key = plan_key(settings, rows, held_out, (base.source, base.revision, base.digest, probes.digest))
    plan = file.read(key)
    if plan is not None and plan.order != rows_order(rows, settings, plan.device):
        plan = None
    if plan is None:
        _clear(work_dir, file)
    device = plan.device if plan else choose_device(decoder.layer_shapes, settings.dtype, "auto", rates)
    measured = sampled(rows, held_out, settings, device)
    while True:
        if plan is None:
            plan = make_plan(key, settings, decoder, rows, measured, device)
            file.write(plan)
        ladder = Ladder(work_dir, rungs(plan, may_checkpoint=settings.gradient_checkpointing == "auto"))
        ladder.begin(memory_failures)
        rung = ladder.rung
        if not ladder.at_its_top:
            file.note(f"memory ran out: the planned steps go on with {rung}")
        try:
            return _Run(
                settings, decoder, rows, measured, probes, base, plan, rung, file, work_dir, report,
                end_early, start,
            ).make()  # fmt: skip
        except NonFiniteLoss as error:
            if error.step > PROBE_STEPS or (safer := device.fallback()) is None:
                raise
            if settings.dtype != "auto":
                raise _not_in(device, safer, error) from error
            file.note(
                f"the loss or its gradient was NaN or infinite in {device.dtype} at step {error.step}: "
                f"the training started again in {safer.dtype}"
            )
            device, plan = safer, None
            shutil.rmtree(work_dir / "checkpoints", ignore_errors=True)
            PaceFile(work_dir).forget()
        except (RuntimeError, MemoryError) as error:
            if not _is_memory_error(error):
                raise
            if ladder.at_its_foot:
                raise _no_less(plan, rung) from error
            ladder.ran_out()
            raise OutOfMemory(
                f"Memory ran out while training on {plan.device}.",
                fix="Lower tokens_per_batch, or set gradient_checkpointing to auto.",
            ) from error
        gc.collect()
        device.release_memory()
        needed = estimate(decoder, rows, measured, settings, device)
        require_memory(needed, settings, device, file.events[-1])


def _with_last_event(report: Report, file: PlanFile) -> Report:
    """Return a callback that tells the last event with every figure: a job shows the newest alone."""

    def report_with_event(progress: TrainProgress) -> None:
        last = file.events[-1] if file.events else ""
        report(replace(progress, note=progress.note or last))

    return report_with_event


def _rendered_at(work_dir: Path) -> datetime:
    """Return when the first attempt rendered its rows: one that goes on reads the same, date and all."""
    path = work_dir / "rendered_at"
    try:
        return datetime.fromisoformat(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        now = datetime.now().replace(microsecond=0)
        work_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(now.isoformat(), encoding="utf-8")
        return now


def _clear(work_dir: Path, file: PlanFile) -> None:
    """Remove what a training by another plan left."""
    if any((work_dir / "checkpoints").glob("checkpoint-*")):
        file.note("the checkpoints found belong to another plan: the training starts anew")
    shutil.rmtree(work_dir / "checkpoints", ignore_errors=True)
    PaceFile(work_dir).forget()


def _not_in(device: Device, safer: Device, error: NonFiniteLoss) -> FailedPrecondition:
    """Return the refusal of a number format that was asked for and does not work: it is never changed."""
    return FailedPrecondition(
        f"The loss or its gradient is NaN or infinite at step {error.step}: {device.dtype}, which train.dtype"
        " asks for, overflowed, or the learning rate is too high.",
        fix=f"Set dtype to {safer.dtype} or auto, or lower learning_rate.",
        reason=error.reason,
        metadata={"field": "train.dtype", "step": error.step},
    )


def _no_less(plan: TrainPlan, rung: Rung) -> ResourceExhausted:
    """Return the refusal at the foot of the memory ladder."""
    hints = ["a smaller base model", "max_length_tokens lower", "lora.last_layers"]
    if not rung.checkpointing:
        hints.append("gradient_checkpointing to auto")
    return ResourceExhausted(
        f"Memory ran out while training on {plan.device}, with {rung}: no step can be computed with less. "
        f"The longest row has {plan.longest_row_tokens} tokens.",
        fix=f"Close other programs, or choose {hints[0]}, or set {', or '.join(hints[1:])}.",
        reason="MEMORY_TOO_SMALL",
    )


def _is_memory_error(error: BaseException) -> bool:
    """Tell want of memory from other errors: torch's CPU and MPS raise a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in str(error).lower() for words in _MEMORY_ERRORS)


class _Run:
    """One attempt on one device."""

    def __init__(
        self,
        settings: TrainSettings,
        decoder: Decoder,
        rows: EncodedRows,
        held_out: EncodedRows,
        probes: Probes,
        base: Base,
        plan: TrainPlan,
        rung: Rung,
        file: PlanFile,
        work_dir: Path,
        report: Report,
        end_early: Callable[[], bool],
        start: Path | None,
    ) -> None:
        self._settings = settings
        self._decoder = decoder
        self._rows = rows
        self._held_out = held_out
        self._probes = probes
        self._base = base
        self._plan = plan
        self._rung = rung
        self._file = file
        self._checkpoints = work_dir / "checkpoints"
        self._output = work_dir / "output"
        self._losses = work_dir / "loss.csv"
        self._probe_rows = work_dir / CSV_FILE
        self._pace = PaceFile(work_dir)
        self._report = report
        self._end_early = end_early
        self._start = start

    def make(self) -> TrainOutcome:
        """Load, train from the last whole checkpoint, export."""
        steps = self._plan.steps
        resume = last_whole_checkpoint(self._checkpoints, self._file.note)
        resumed_step = step_of(resume) if resume else 0
        log = LossLog(self._losses, resumed_step)
        try:
            reporter = StepReporter(
                log, steps, resumed_step, self._settings, self._report, self._end_early,
                ProbeLog(self._probe_rows, resumed_step), self._pace, self._file.note,
            )  # fmt: skip
            trainer = assemble(
                self._plan, self._rung, self._settings, self._decoder,
                self._rows.rows, self._held_out.rows, self._checkpoints, [reporter],
                self._start,
            )  # fmt: skip
            reporter.watch(trainer, self._prober(trainer))
            if resume is not None and reporter.stalled:  # killed between its end and its export
                trainer.take_over(resume)
            else:
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        finally:
            log.close()
        step, events = log.rows[-1].step, list(self._file.events)
        if reporter.stalled and step < steps:
            events.append(
                f"ended at step {step} of {steps}: neither score nor held-out loss got better in "
                f"{self._settings.patience} probes"
            )
        elif step < steps:  # no word for the plan's file: the training may go on from here
            events.append(f"ended early at step {step} of {steps} on request")
        self._report(TrainProgress("export", step, steps, note=events[-1] if step < steps else ""))
        return self._export(trainer, log, reporter, events)

    def _prober(self, trainer: AnswerTrainer) -> Prober | None:
        """Return who asks the probes; None when there are none."""
        from web4lora_trainer.probing import Prober

        if not self._probes.prompts:
            return None
        tokens = probed_tokens(
            self._decoder, self._settings, self._rung.tokens, checkpointing=self._rung.checkpointing
        )
        return Prober(trainer, load_tokenizer(self._base.folder), self._probes, tokens)

    def _take_best(self, trainer: AnswerTrainer, best: int, last: int, events: list[str]) -> int:
        """Put the best step's adapter into the model, keep the last one's beside it; return the step."""
        if best == last:
            return last
        checkpoint = self._checkpoints / f"checkpoint-{best}"
        if not is_whole(checkpoint):
            events.append(f"the checkpoint of step {best}, the best, is not whole: the last step is exported")
            return last
        export_last(trainer.peft_model, self._base.source, self._base.revision, self._output, last)
        trainer.load_adapter(checkpoint)
        return best

    def _export(
        self, trainer: AnswerTrainer, log: LossLog, reporter: StepReporter, events: list[str]
    ) -> TrainOutcome:
        settings, output = self._settings, self._output
        shutil.rmtree(output, ignore_errors=True)
        (output / "logs").mkdir(parents=True)
        last = log.rows[-1]
        exported = self._take_best(trainer, reporter.best_step, last.step, events)
        export_adapter(
            trainer.peft_model,
            self._base.source,
            self._base.revision,
            self._base.folder,
            output,
            write_bin=settings.write_bin,
        )
        export_conversations(self._rows.rows, output, self._rows.rendered_at)
        export_state(asdict(trainer.state), output)
        shutil.copyfile(self._losses, output / "logs" / "loss.csv")
        held_out = [row.held_out_loss for row in log.rows if row.held_out_loss is not None]
        verdict = judge(log.rows, held_out, settings.loss_band)
        probed = reporter.probe_rows
        if probed:
            shutil.copyfile(self._probe_rows, output / "logs" / CSV_FILE)
        words = f"{verdict.words}; {self._exported_words(exported, last.step, probed)}"
        title = f"LoRA on {self._base.source}: {verdict.words.split(';')[0]}"
        plot_losses(log.rows, settings.loss_band, title, output / "logs" / "loss.png", probed, exported)
        files = {
            path.relative_to(output).as_posix(): path for path in sorted(output.rglob("*")) if path.is_file()
        }
        return TrainOutcome(
            files=files,
            final_loss=verdict.final_loss,
            held_out_loss=held_out[-1] if held_out else None,
            settled=verdict.settled,
            verdict=words,
            steps=last.step,
            tokens_per_second=last.tokens / max(last.seconds, 1e-9),
            seconds=last.seconds,
            peak_memory_bytes=self._plan.device.peak_memory_bytes(),
            device=str(self._plan.device),
            trained_parameters=sum(
                parameter.numel() for parameter in trainer.peft_model.parameters() if parameter.requires_grad
            ),
            rows_too_long=self._rows.rows_too_long,
            events=tuple(events),
            ended_early=last.step < self._plan.steps and not reporter.stalled,
            exported_step=exported,
            probe_score=next((row.score for row in probed if row.step == exported), None),
        )

    def _exported_words(self, exported: int, last: int, probed: Sequence[ProbeRow]) -> str:
        """Say which step was exported, and why."""
        step = f"exported is step {exported} of {last}"
        if probed:
            scores = " → ".join(f"{row.score:.0f}" for row in probed)
            return f"{step}, by {len(probed)} probes of {probed[-1].prompts} prompts: {scores} of 100"
        pace = self._pace.read()
        why = self._probes.left_out
        if pace is not None and not pace.times:
            why = "probes would take too long"
        elif self._probes.prompts:
            why = "it ended before the first probe"
        by = "by held-out loss" if exported != last else "the last"
        return f"{step}, {by}: not probed, {why or 'no held-out row fits'}"
