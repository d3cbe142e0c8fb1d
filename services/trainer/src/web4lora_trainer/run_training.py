"""Prepare and train: the core's two verbs. Settings and folders go in, figures come back by a callback."""

from __future__ import annotations

import gc
import json
import random
import resource
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from web4lora_chassis.dataset import Dataset
from web4lora_chassis.errors import FailedPrecondition, OutOfMemory

from web4lora_trainer.base_model import load_tokenizer
from web4lora_trainer.batching import EncodedRows, encode_rows
from web4lora_trainer.checkpoint import Checkpoint, read_checkpoint
from web4lora_trainer.device import Device, choose_device
from web4lora_trainer.export import export_adapter, export_state
from web4lora_trainer.loss_report import LossLog, judge, plot_losses
from web4lora_trainer.preflight import Estimate, epochs, estimate, optimizer_steps, require_memory
from web4lora_trainer.train_settings import TrainSettings

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from web4lora_trainer.sft import AnswerTrainer

_HELD_OUT_SHARE = 0.04
_MIN_HELD_OUT_ROWS = 16
_MEMORY_ERRORS = ("out of memory", "invalid buffer size", "can't allocate memory", "not enough memory")
_CHECKPOINTS_A_RUN = 10


@dataclass(frozen=True)
class TrainProgress:
    """How far a training is.

    Attributes:
        phase: "load", "train" or "export".
        step: Finished optimizer steps.
        total_steps: All of them.
        loss: Of the last step; None before the first.
        held_out_loss: The last one measured, or None.
        tokens_per_second: Non-padding tokens through the model in a second of training.
        seconds_left: Estimated from the steps so far.
        resumed_step: The checkpoint's step that this attempt went on from.
    """

    phase: str
    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    held_out_loss: float | None = None
    tokens_per_second: float = 0.0
    seconds_left: float = 0.0
    resumed_step: int = 0


Report = Callable[[TrainProgress], None]


@dataclass(frozen=True)
class Base:
    """The base model to train on.

    Attributes:
        folder: Its checkpoint.
        source: What it is, without any path of this machine: goes into adapter_config.json.
        revision: Its hub commit or file hash; may be empty.
    """

    folder: Path
    source: str
    revision: str = ""


@dataclass(frozen=True)
class Preparation:
    """What preparing found out."""

    device: Device
    train: EncodedRows
    held_out: EncodedRows
    estimate: Estimate

    @property
    def warnings(self) -> list[str]:
        """What deserves a look but stops nothing."""
        found = []
        for name, rows in (("training", self.train), ("held-out", self.held_out)):
            if rows.rows_too_long:
                found.append(
                    f"{rows.rows_too_long} {name} rows are longer than max_length_tokens and left out"
                )
            if rows.stop_tokens_added:
                found.append(
                    f"the chat template ends {rows.stop_tokens_added} {name} rows without a stop token; added"
                )
        return found


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
        peak_memory_bytes: Largest resident memory of this process.
        device: Device and number format.
        trained_parameters: Weights of the adapter.
        rows_too_long: Rows left out.
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


def prepare(settings: TrainSettings, dataset: Dataset, base_folder: Path) -> Preparation:
    """Count tokens, choose the device, estimate memory, disk and time.

    Args:
        settings: The training to come.
        dataset: Checked rows.
        base_folder: The base model's checkpoint.

    Raises:
        InvalidInput: The base lacks a target module.
        FailedPrecondition: Its tokenizer is unusable, or every row is too long.
        ResourceExhausted: Memory is too small.
    """
    checkpoint = read_checkpoint(base_folder)
    checkpoint.linear_shapes(settings.lora.target_modules, settings.lora.last_layers)
    train, held_out = _encode(settings, dataset, base_folder)
    device = choose_device(checkpoint.layer_shapes, settings.dtype)
    needed = estimate(checkpoint, train, _sampled(train, held_out, settings, device), settings, device)
    require_memory(needed, settings, device)
    return Preparation(device, train, held_out, needed)


def _encode(settings: TrainSettings, dataset: Dataset, base_folder: Path) -> tuple[EncodedRows, EncodedRows]:
    tokenizer = load_tokenizer(base_folder)
    train = encode_rows(dataset.train, tokenizer, settings.max_length_tokens)
    held_out = encode_rows(dataset.held_out, tokenizer, settings.max_length_tokens)
    if not train.rows:
        raise FailedPrecondition(
            f"All {train.rows_too_long} training rows have more than {settings.max_length_tokens} tokens.",
            fix="Raise max_length_tokens, or shorten the rows.",
            reason="ROWS_TOO_LONG",
        )
    return train, held_out


def _sampled(
    train: EncodedRows, held_out: EncodedRows, settings: TrainSettings, device: Device
) -> EncodedRows:
    """Return the held-out rows to measure on: a fixed sample that costs a few percent of the training."""
    rows = list(held_out.rows)
    random.Random(settings.seed).shuffle(rows)  # noqa: S311 - a sample, not a secret
    budget = _HELD_OUT_SHARE * train.tokens * epochs(train, settings, device)
    tokens = chosen = 0
    while chosen < len(rows) and (chosen < _MIN_HELD_OUT_ROWS or tokens + len(rows[chosen]) <= budget):
        tokens += len(rows[chosen])
        chosen += 1
    return EncodedRows(tuple(rows[:chosen]))


def train(
    settings: TrainSettings,
    dataset: Dataset,
    base: Base,
    work_dir: Path,
    report: Report,
    memory_failures: int = 0,
) -> TrainOutcome:
    """Train an adapter; goes on from the last checkpoint in `work_dir` when there is one.

    Args:
        settings: How to train.
        dataset: Checked rows.
        base: The base model.
        work_dir: Checkpoints, and `output/` with the result; kept from attempt to attempt.
        report: Called after every step and at the start of each phase.
        memory_failures: How often memory ran out before; each halves the batch and doubles the accumulation.

    Returns:
        What was made; its files lie in `work_dir/output`.

    Raises:
        InvalidInput: The base lacks a target module.
        FailedPrecondition: The base's tokenizer or architecture is unusable, or every row is too long.
        OutOfMemory: Memory ran out; a new process may go on with half the batch.
        NonFiniteLoss: The loss stayed infinite or not a number in every number format.
    """
    from web4lora_trainer.sft import PROBE_STEPS, NonFiniteLoss

    report(TrainProgress("load"))
    checkpoint = read_checkpoint(base.folder)
    checkpoint.linear_shapes(settings.lora.target_modules, settings.lora.last_layers)
    train_rows, held_out = _encode(settings, dataset, base.folder)
    device = _remembered_device(work_dir, settings) or choose_device(checkpoint.layer_shapes, settings.dtype)
    settings = settings.after_memory_failures(memory_failures, device.kind)
    held_out = _sampled(train_rows, held_out, settings, device)
    while True:
        _remember_device(work_dir, device, settings)
        try:
            return _Run(settings, checkpoint, train_rows, held_out, base, device, work_dir, report).make()
        except NonFiniteLoss as error:
            safer = device.fallback()
            if error.step > PROBE_STEPS or safer is None:
                raise
            device = safer
            shutil.rmtree(work_dir / "checkpoints", ignore_errors=True)
        except (RuntimeError, MemoryError) as error:
            if _is_memory_error(error):
                raise OutOfMemory(
                    f"Memory ran out while training on {device}.",
                    fix="Lower tokens_per_batch, or set gradient_checkpointing to on.",
                ) from error
            raise
        gc.collect()


def _is_memory_error(error: BaseException) -> bool:
    """Tell want of memory from other errors: torch's CPU and MPS raise a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in str(error).lower() for words in _MEMORY_ERRORS)


def _remember_device(work_dir: Path, device: Device, settings: TrainSettings) -> None:
    """Keep the number format: a resumed training must not change it, even if a new measurement would."""
    work_dir.mkdir(parents=True, exist_ok=True)
    data = {"device": asdict(device), "dtype_asked": settings.dtype}
    (work_dir / "device.json").write_text(json.dumps(data), encoding="utf-8")


def _remembered_device(work_dir: Path, settings: TrainSettings) -> Device | None:
    try:
        data = json.loads((work_dir / "device.json").read_text(encoding="utf-8"))
        return Device(**data["device"]) if data["dtype_asked"] == settings.dtype else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _Run:
    """One attempt on one device."""

    def __init__(
        self,
        settings: TrainSettings,
        checkpoint: Checkpoint,
        rows: EncodedRows,
        held_out: EncodedRows,
        base: Base,
        device: Device,
        work_dir: Path,
        report: Report,
    ) -> None:
        self._settings = settings
        self._checkpoint = checkpoint
        self._rows = rows
        self._held_out = held_out
        self._base = base
        self._device = device
        self._checkpoints = work_dir / "checkpoints"
        self._output = work_dir / "output"
        self._losses = work_dir / "loss.csv"
        self._report = report

    def make(self) -> TrainOutcome:
        """Load, train from the last whole checkpoint, export."""
        from web4lora_trainer.progress import StepReporter

        steps = optimizer_steps(self._rows, self._settings, self._device)
        resume = last_whole_checkpoint(self._checkpoints)
        resumed_step = int(resume.name.rsplit("-", 1)[1]) if resume else 0
        log = LossLog(self._losses, resumed_step)
        try:
            reporter = StepReporter(log, steps, resumed_step, self._settings, self._report)
            trainer = self._trainer(steps, [reporter])
            reporter.watch(trainer)
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        finally:
            log.close()
        self._report(TrainProgress("export", steps, steps))
        return self._export(trainer, log)

    def _trainer(self, steps: int, callbacks: Sequence[TrainerCallback]) -> AnswerTrainer:
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
        from trl.trainer.sft_config import SFTConfig

        from web4lora_trainer.sft import AnswerTrainer

        disable_progress_bar()  # type: ignore[no-untyped-call]
        settings, device = self._settings, self._device
        longest = max(self._rows.longest_row_tokens, self._held_out.longest_row_tokens)
        model = AutoModelForCausalLM.from_pretrained(
            self._base.folder,
            dtype=device.torch_dtype,
            attn_implementation=device.attention(longest),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        model.config.use_cache = False
        needed = estimate(self._checkpoint, self._rows, self._held_out, settings, device)
        if needed.checkpointing:
            # Not by the trainer's settings: TRL would then send gradients below the adapter's first layer.
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        last = settings.lora.last_layers
        layers = self._checkpoint.layers
        lora = LoraConfig(
            r=settings.lora.rank,
            lora_alpha=settings.lora.scale_numerator,  # type: ignore[arg-type]
            lora_dropout=settings.lora.dropout,
            target_modules=list(settings.lora.target_modules),
            layers_to_transform=list(range(layers - last, layers)) if 0 < last < layers else None,
            bias="none",
            task_type="CAUSAL_LM",
        )
        args = SFTConfig(
            output_dir=str(self._checkpoints),
            max_steps=steps,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=_SCHEDULES[settings.schedule],
            warmup_steps=round(settings.warmup_ratio * steps),
            gradient_accumulation_steps=settings.gradient_accumulation,
            max_grad_norm=settings.max_grad_norm,
            weight_decay=0.0,
            optim="adamw_torch",
            per_device_train_batch_size=1,
            seed=settings.seed,
            use_cpu=device.kind == "cpu",
            bf16=False,
            fp16=False,
            gradient_checkpointing=None,  # type: ignore[arg-type]  # TRL would turn it on
            activation_checkpointing=False,
            logging_strategy="steps",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=settings.checkpoint_steps or max(1, steps // _CHECKPOINTS_A_RUN),
            save_total_limit=2,
            eval_strategy="no",
            metric_for_best_model="eval_loss" if self._held_out.rows else None,
            greater_is_better=False if self._held_out.rows else None,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            torch_empty_cache_steps=50 if device.kind == "mps" else None,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
        )
        trainer = AnswerTrainer(
            model,
            args,
            lora,
            load_tokenizer(self._base.folder),
            self._rows.rows,
            self._held_out.rows,
            device,
            settings.batch_tokens(device.kind),
            callbacks,
        )
        trainer.check_head()
        return trainer

    def _export(self, trainer: AnswerTrainer, log: LossLog) -> TrainOutcome:
        settings, output = self._settings, self._output
        shutil.rmtree(output, ignore_errors=True)
        (output / "logs").mkdir(parents=True)
        export_adapter(
            trainer.peft_model,
            self._base.source,
            self._base.revision,
            self._base.folder,
            output,
            write_bin=settings.write_bin,
        )
        export_state(asdict(trainer.state), output)
        shutil.copyfile(self._losses, output / "logs" / "loss.csv")
        held_out = [row.held_out_loss for row in log.rows if row.held_out_loss is not None]
        verdict = judge(log.rows, held_out, settings.loss_band)
        title = f"LoRA on {self._base.source}: {verdict.words.split(';')[0]}"
        plot_losses(log.rows, settings.loss_band, title, output / "logs" / "loss.png")
        last = log.rows[-1]
        files = {
            path.relative_to(output).as_posix(): path for path in sorted(output.rglob("*")) if path.is_file()
        }
        return TrainOutcome(
            files=files,
            final_loss=verdict.final_loss,
            held_out_loss=held_out[-1] if held_out else None,
            settled=verdict.settled,
            verdict=verdict.words,
            steps=last.step,
            tokens_per_second=last.tokens / max(last.seconds, 1e-9),
            seconds=last.seconds,
            peak_memory_bytes=peak_memory_bytes(),
            device=str(self._device),
            trained_parameters=sum(
                parameter.numel() for parameter in trainer.peft_model.parameters() if parameter.requires_grad
            ),
            rows_too_long=self._rows.rows_too_long,
        )


_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def last_whole_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end; the halves that a kill left are removed.

    The trainer's state is the last file of a checkpoint that transformers writes.
    """
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            found.append((int(state["global_step"]), path))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path, ignore_errors=True)
    return max(found)[1] if found else None


def peak_memory_bytes() -> int:
    """Return the largest resident memory that this process had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024
