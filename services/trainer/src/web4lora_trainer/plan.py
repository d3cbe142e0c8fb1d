"""The plan of a training: frozen when it starts, read by every attempt that goes on with it.

What decides which rows an optimizer step holds, how many steps there are and how fast each learns is in it:
neither a kill nor want of memory can change that. Want of memory changes how a planned step is computed,
never the step: see `ladder`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from web4lora_chassis.jobs.record import write_json
from web4lora_chassis.pipeline.train import TrainSettings

from web4lora_trainer.batching import LikeLengthBatches
from web4lora_trainer.decoder import Decoder
from web4lora_trainer.device import Device
from web4lora_trainer.encoding import EncodedRows
from web4lora_trainer.preflight import estimate, optimizer_steps

log = logging.getLogger(__name__)

FILE_NAME = "plan.json"
_FORMAT = "web4lora.train_plan/1"
_CHECKPOINTS_A_RUN = 10


@dataclass(frozen=True)
class TrainPlan:
    """What a training will do, step by step.

    Attributes:
        key: Digest of what it is made from: settings, rows, base.
        device: Where, and in which number format.
        attention: How attention is computed.
        checkpointing: Activations are computed twice instead of kept.
        batch_tokens: Most tokens in a batch, padding included.
        pad_to_multiple_of: Rows are padded to a multiple of this many tokens.
        accumulation: Batches of an optimizer step.
        seed: Decides the order of the rows.
        order: Digest of the rows of each batch of the first two epochs.
        longest_row_tokens: Of the rows that are trained on or measured.
        steps: Optimizer steps.
        warmup_steps: Steps in which the learning rate rises.
        learning_rate: Its highest value. A step has its rows and its rate, so the rate follows the rows seen.
        schedule: How the rate falls afterwards.
        checkpoint_steps: Steps between two checkpoints.
    """

    key: str
    device: Device
    attention: str
    checkpointing: bool
    batch_tokens: int
    pad_to_multiple_of: int
    accumulation: int
    seed: int
    order: str
    longest_row_tokens: int
    steps: int
    warmup_steps: int
    learning_rate: float
    schedule: str
    checkpoint_steps: int


def make_plan(
    key: str,
    settings: TrainSettings,
    decoder: Decoder,
    rows: EncodedRows,
    held_out: EncodedRows,
    device: Device,
) -> TrainPlan:
    """Plan a training.

    Args:
        key: See `plan_key`.
        settings: How to train.
        decoder: The base model.
        rows: Rows to train on.
        held_out: Those that the held-out loss is measured on.
        device: Where, and in which number format.
    """
    longest = max(rows.longest_row_tokens, held_out.longest_row_tokens)
    steps = optimizer_steps(rows, settings, device)
    return TrainPlan(
        key=key,
        device=device,
        attention=device.attention(longest),
        checkpointing=estimate(decoder, rows, held_out, settings, device).checkpointing,
        batch_tokens=settings.batch_tokens(device.kind),
        pad_to_multiple_of=device.pad_to_multiple_of,
        accumulation=settings.gradient_accumulation,
        seed=settings.seed,
        order=rows_order(rows, settings, device),
        longest_row_tokens=longest,
        steps=steps,
        warmup_steps=round(settings.warmup_ratio * steps),
        learning_rate=settings.learning_rate,
        schedule=settings.schedule,
        checkpoint_steps=settings.checkpoint_steps or max(1, steps // _CHECKPOINTS_A_RUN),
    )


def plan_key(settings: TrainSettings, rows: EncodedRows, held_out: EncodedRows, base: Iterable[str]) -> str:
    """Return the digest of all that a training is made from.

    Args:
        settings: How to train.
        rows: Rows to train on.
        held_out: Held-out rows.
        base: What tells one base from another.
    """
    made_with = [asdict(settings.of_result), list(base)]
    digest = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode())
    for part in (rows, held_out):
        for row in part.rows:
            digest.update(json.dumps([row.input_ids, row.labels]).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def rows_order(rows: EncodedRows, settings: TrainSettings, device: Device) -> str:
    """Return the digest of the batches: a version of ours that orders rows otherwise must not go on."""
    batches = LikeLengthBatches(
        [len(row) for row in rows.rows],
        settings.batch_tokens(device.kind),
        settings.seed,
        pad_to_multiple_of=device.pad_to_multiple_of,
    )
    epochs = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        epochs.append(list(batches))
    return hashlib.sha256(json.dumps(epochs).encode()).hexdigest()


class PlanFile:
    """plan.json beside the checkpoints: the plan, and what happened to the training since.

    Args:
        folder: The training's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME
        self._plan: TrainPlan | None = None
        self.events: list[str] = []

    def read(self, key: str) -> TrainPlan | None:
        """Return the plan that lies there, when it is of the training with this key.

        What else lies there is of another training, or of a version that plans otherwise.
        """
        try:
            data = json.loads(self._path.read_text(encoding="utf-8"))
            fields: dict[str, Any] = data["plan"]
            plan = TrainPlan(**{**fields, "device": Device(**fields["device"])})
            if data["format"] != _FORMAT or plan.key != key:
                return None
            self._plan, self.events = plan, [str(event) for event in data["events"]]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return self._plan

    def write(self, plan: TrainPlan) -> None:
        """Freeze a plan; it is on disk when this returns."""
        self._plan = plan
        self._save()

    def note(self, event: str) -> None:
        """Log what happened, and keep it."""
        log.warning("%s", event)
        if event not in self.events:
            self.events.append(event)
            if self._plan is not None:
                self._save()

    def _save(self) -> None:
        assert self._plan is not None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, {"format": _FORMAT, "plan": asdict(self._plan), "events": self.events})
