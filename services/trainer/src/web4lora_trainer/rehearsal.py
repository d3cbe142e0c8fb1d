"""A rehearsal: a few of a training's own steps in a process of its own, before it starts, measured.

A formula knows neither an allocator nor a processor. The largest batch comes first; batches of other lengths
follow, because an allocator keeps what it got for each; then the largest held-out batch is measured.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil
from web4lora_chassis.pipeline.train import TrainSettings

from web4lora_trainer.batching import LikeLengthBatches
from web4lora_trainer.decoder import Decoder
from web4lora_trainer.encoding import Encoded
from web4lora_trainer.ladder import Rung, rungs
from web4lora_trainer.plan import TrainPlan

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

_BATCHES = 5
_ENOUGH_SECONDS = 2.5
_FEWEST_STEPS = 5
"""Memory rises for so many steps of other lengths: a rehearsal of two told 15 % too little."""


@dataclass(frozen=True)
class Rehearsal:
    """What was measured.

    Attributes:
        peak_memory_bytes: Of the process: resident on a CPU, on the device's allocator elsewhere.
        seconds: Spent in the steps that count; the first, which sets kernels up, does not.
        tokens: Non-padding tokens in them.
        trained_tokens: Those among them that are trained on.
        held_out_seconds: Spent on the largest held-out batch.
        held_out_tokens: Non-padding tokens in it; 0 when nothing is held out.
    """

    peak_memory_bytes: int
    seconds: float
    tokens: int
    trained_tokens: int
    held_out_seconds: float = 0.0
    held_out_tokens: int = 0


class Rehearser:
    """Computes a few planned steps in a child process, whose libraries can load while others are at work.

    A context manager: the child ends with it.
    """

    def __init__(self) -> None:
        self._child: SpawnProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pipe is not None:
            self._pipe.close()
        if self._child is not None:
            self._child.terminate()
            self._child.join()
        self._child = self._pipe = None

    def start(self) -> None:
        """Start the child, which loads its libraries and waits."""
        # A fork would inherit torch's threads, but not their state.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._child = context.Process(target=_child, args=(theirs,), daemon=True)
        self._child.start()
        theirs.close()

    @property
    def processes(self) -> list[psutil.Process]:
        """The child, whose memory comes back before the training starts."""
        if self._child is None or self._child.pid is None:
            return []
        try:
            return [psutil.Process(self._child.pid)]
        except psutil.NoSuchProcess:
            return []

    def __call__(
        self,
        plan: TrainPlan,
        settings: TrainSettings,
        decoder: Decoder,
        rows: Sequence[Encoded],
        held_out: Sequence[Encoded] = (),
    ) -> Rehearsal | None:
        """Return what the steps took; None when the child ended before it could tell.

        Args:
            plan: What the training will do.
            settings: How.
            decoder: The base model.
            rows: All rows to train on.
            held_out: All that the held-out loss is measured on.
        """
        batches = _batches(plan, [len(row) for row in rows])
        chosen = [[replace(rows[place], row=None) for place in batch] for batch in batches]
        measured = [
            replace(held_out[place], row=None)
            for batch in _batches(plan, [len(row) for row in held_out])[:1]
            for place in batch
        ]
        rung = rungs(plan, may_checkpoint=False)[0]
        if self._pipe is None:
            self.start()
        assert self._pipe is not None
        try:
            self._pipe.send((plan, rung, settings, decoder, chosen, measured))
            found: Rehearsal = self._pipe.recv()
        except (EOFError, OSError):
            return None
        return found


def _batches(plan: TrainPlan, lengths: Sequence[int]) -> list[list[int]]:
    """Return a few of the plan's batches: the largest first, the others spread over all lengths."""
    found = list(
        LikeLengthBatches(
            lengths, plan.batch_tokens, plan.seed, pad_to_multiple_of=plan.pad_to_multiple_of, shuffle=False
        )
    )

    def padded(batch: Sequence[int]) -> tuple[int, int]:
        longest = max(lengths[place] for place in batch)
        return longest * len(batch), longest

    if not found:
        return []
    largest = max(found, key=padded)
    spread = found[:: max(1, -(-len(found) // (_BATCHES - 1)))]
    return [largest, *(batch for batch in spread if batch is not largest)]


class _Given:
    """Batches in a given order, again and again."""

    def __init__(self, batches: Sequence[Sequence[Encoded]]) -> None:
        self._sizes = [len(batch) for batch in batches]

    def set_epoch(self, epoch: int) -> None:
        """Change nothing: every epoch is the same."""

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        for size in self._sizes:
            yield list(range(start, start + size))
            start += size


def _child(pipe: Connection) -> None:
    """Load what training needs, wait for the steps to make, and tell what they took."""
    from transformers import TrainerCallback

    from web4lora_trainer.assemble import assemble
    from web4lora_trainer.sft import given_batches

    try:
        work: tuple[
            TrainPlan, Rung, TrainSettings, Decoder, Sequence[Sequence[Encoded]], Sequence[Encoded]
        ] = pipe.recv()
    except EOFError:  # nothing to rehearse
        return
    plan, rung, settings, decoder, batches, held_out = work
    settings = replace(settings, report_to=())

    class Clock(TrainerCallback):
        """Times every step, and ends the rehearsal when enough is known."""

        def __init__(self) -> None:
            self.spent: list[float] = []
            self._began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **__: Any) -> Any:  # noqa: ARG002
            self.spent.append(time.perf_counter() - self._began)
            if len(self.spent) >= _FEWEST_STEPS and sum(self.spent) > _ENOUGH_SECONDS:
                control.should_training_stop = True
            return control

    steps = 2 * len(batches) + 1
    short = replace(plan, steps=steps, accumulation=1, warmup_steps=0, checkpoint_steps=steps + 1)
    clock = Clock()
    rows = [row for batch in batches for row in batch]
    with tempfile.TemporaryDirectory() as folder:
        trainer = assemble(short, rung, settings, decoder, rows, held_out, Path(folder), [clock])
        given_batches(trainer, _Given(batches))
        trainer.train()
        began = time.perf_counter()
        if held_out:
            trainer.evaluate()
        held_out_seconds = time.perf_counter() - began
    made = [batches[step % len(batches)] for step in range(len(clock.spent))][1:]
    pipe.send(
        Rehearsal(
            peak_memory_bytes=plan.device.peak_memory_bytes(),
            seconds=sum(clock.spent[1:]),
            tokens=sum(len(row) for batch in made for row in batch),
            trained_tokens=sum(row.trained_tokens for batch in made for row in batch),
            held_out_seconds=held_out_seconds,
            held_out_tokens=sum(map(len, held_out)),
        )
    )
    pipe.close()
