"""The memory ladder: ways to compute a training's planned steps, each with less memory than the last."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from web4lora_chassis.jobs.record import write_json

from web4lora_trainer.plan import TrainPlan

_FILE_NAME = "ladder.json"
_VMSTAT = Path("/proc/vmstat")


@dataclass(frozen=True)
class Rung:
    """A step of the memory ladder: how a planned batch is computed.

    Attributes:
        tokens: Most tokens at once, padding included; a longer row is computed alone.
        checkpointing: Activations are computed twice instead of kept.
    """

    tokens: int
    checkpointing: bool

    def __str__(self) -> str:
        """Return it for people."""
        again = ", activations computed twice" if self.checkpointing else ""
        return f"at most {self.tokens} tokens at once{again}"


def rungs(plan: TrainPlan, *, may_checkpoint: bool) -> tuple[Rung, ...]:
    """Return the ways to compute the plan's steps, each with less memory than the one before.

    First fewer rows at once, down to the longest row alone; then activations are computed twice.

    Args:
        plan: The plan.
        may_checkpoint: The settings leave it to us whether activations are computed twice.
    """
    longest = -(-plan.longest_row_tokens // plan.pad_to_multiple_of) * plan.pad_to_multiple_of
    found = [Rung(max(plan.batch_tokens, longest), plan.checkpointing)]
    for tokens in (max(plan.batch_tokens // 4, longest), longest):
        if tokens < found[-1].tokens:
            found.append(Rung(tokens, plan.checkpointing))
    if may_checkpoint and not plan.checkpointing:
        found.append(Rung(longest, checkpointing=True))
    return tuple(found)


@dataclass(frozen=True)
class _Standing:
    """What is known from the attempts before.

    Attributes:
        rung: Number of the rung that the last one stood on.
        failures: How often the job had ended for want of memory, for all its service could tell.
        kills: How many processes the system had killed for want of memory.
        ran_out: It met want of memory itself.
    """

    rung: int
    failures: int
    kills: int | None
    ran_out: bool = False


class Ladder:
    """Where a training stands on its ladder, kept from attempt to attempt.

    A worker that was killed may have been killed for its memory or by anyone. Where the system counts whom it
    kills for memory, a kill that it does not count changes nothing: the adapter is the same to the bit.

    Args:
        folder: The training's folder.
        rungs: See `rungs`.
    """

    def __init__(self, folder: Path, rungs: Sequence[Rung]) -> None:
        self._path = folder / _FILE_NAME
        self._rungs = rungs
        self._now = _Standing(0, 0, None)

    @property
    def rung(self) -> Rung:
        """The rung to stand on."""
        return self._rungs[self._now.rung]

    @property
    def at_its_foot(self) -> bool:
        """There is no further rung down."""
        return self._now.rung == len(self._rungs) - 1

    @property
    def at_its_top(self) -> bool:
        """Memory has not run out so far."""
        return self._now.rung == 0

    def begin(self, failures: int) -> None:
        """Begin an attempt: a rung further down if the one before ended for want of memory.

        Args:
            failures: How often the job ended for want of memory, for all its service can tell.
        """
        kills = memory_kills()
        try:
            before = _Standing(**json.loads(self._path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            before = _Standing(0, failures, kills)  # it never came to computing a step
        died = failures > before.failures and (kills is None or kills != before.kills)
        rung = min(before.rung + (before.ran_out or died), len(self._rungs) - 1)
        self._save(_Standing(rung, failures, kills))

    def ran_out(self) -> None:
        """Keep that memory ran out: the next attempt stands a rung further down."""
        self._save(_Standing(**{**asdict(self._now), "ran_out": True}))

    def _save(self, standing: _Standing) -> None:
        self._now = standing
        write_json(self._path, asdict(standing))


def memory_kills() -> int | None:
    """Return how many processes this system has killed for want of memory; None where it doesn't tell."""
    try:
        lines = _VMSTAT.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
