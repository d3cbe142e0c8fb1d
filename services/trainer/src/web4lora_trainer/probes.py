"""Probes: held-out prompts that a training is asked on its way, what they scored, and the best step.

The wanted answers of the prompts are graded first, as the tokens that training teaches: a prompt whose own
answer does not pass (a house style with rules of its own, an answer that begins with its reasoning) says
nothing about a model, and is left out. No torch here.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from web4lora_chassis.graders import GRADERS, Grader, grade_end
from web4lora_chassis.graders.style import StyleRules
from web4lora_chassis.jobs.record import write_json

from web4lora_trainer.encoding import Encoded, EncodedRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TIMES = 10
"""A training is probed at every tenth of it, where that is cheap enough."""
MOST_SHARE = 0.1
"""Most time for probes, as a share of the training's."""
PACE_FILE = "probes.json"
CSV_FILE = "probes.csv"
_FEWEST_TIMES = 2
_ENOUGH_TIMES = 3
"""Fewer prompts are asked where all of them could not be asked so often."""
_SPARE_TOKENS = 8
"""So much longer than the longest wanted answer may an answer be before it is cut off."""
_COLUMNS = ("step", "score", "prompts", "held_out_loss", "seconds")


@dataclass(frozen=True)
class Probe:
    """A prompt, and what its answer is held to.

    Attributes:
        grader: One of `GRADERS`.
        check: What the grader needs.
        prompt_ids: Its tokens, as training has them before the answer.
        stop: The token that ends an answer.
        wanted_tokens: Tokens of the wanted answer, the stop token included.
    """

    grader: str
    check: Mapping[str, Any]
    prompt_ids: tuple[int, ...]
    stop: int
    wanted_tokens: int

    def grade(self, text: str, *, ended: bool) -> dict[str, bool]:
        """Return which scored checks an answer passes; one that did not end passes none."""
        return _grade(GRADERS[self.grader], self.check, text, ended=ended)


@dataclass(frozen=True)
class Probes:
    """What a training is probed with.

    Attributes:
        prompts: In the order in which kinds take turns.
        left_out: What held-out rows were not taken for, in words; empty when all could be.
    """

    prompts: tuple[Probe, ...] = ()
    left_out: str = ""

    @property
    def digest(self) -> str:
        """Tells these probes from others."""
        return hashlib.sha256(json.dumps([asdict(each) for each in self.prompts]).encode()).hexdigest()


def longest_answer(prompts: Sequence[Probe]) -> int:
    """Return where an answer is cut off, in tokens."""
    return max((each.wanted_tokens for each in prompts), default=0) + _SPARE_TOKENS


def fewer(prompts: int) -> list[int]:
    """Return how many prompts may be asked: all, half, a third."""
    return sorted({prompts, -(-prompts // 2), -(-prompts // 3)}, reverse=True)


def choose_probes(held_out: EncodedRows, count: int, seed: int, tokenizer: PreTrainedTokenizerBase) -> Probes:
    """Choose prompts of the held-out rows: each kind as often, those with the shortest answers first.

    A probe takes as long as its longest answer.

    A kind is what is checked: a guardrail that must be kept and one that must not get in the way are two.

    Args:
        held_out: All held-out rows.
        count: Most prompts; 0 for none.
        seed: Decides which.
        tokenizer: The base model's.
    """
    if not count:
        return Probes(left_out="train.probes is 0")
    kinds: dict[tuple[str, ...], list[Probe]] = {}
    unchecked = failing = 0
    for encoded in held_out.rows:
        row = encoded.row
        if row is None or not encoded.turns or encoded.turns[-1].messages != len(row.messages) - 1:
            continue
        name = next((name for name, each in GRADERS.items() if _takes(each, row.check)), "")
        if row.check is None or not name:
            unchecked += 1
            continue
        probe = _probe(encoded, name, row.check)
        found = probe.grade(answer_text(encoded.input_ids[len(probe.prompt_ids) :], tokenizer), ended=True)
        if not found or not all(found.values()):
            failing += 1
            continue
        kinds.setdefault(tuple(found), []).append(probe)
    for kind, probes in kinds.items():
        random.Random(f"{seed} {kind}").shuffle(probes)  # noqa: S311 - a sample, not a secret
        probes.sort(key=lambda each: each.wanted_tokens)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*(kinds[kind] for kind in sorted(kinds))))
    prompts = [probe for probe in turns if probe is not None][:count]
    parts = []
    if not held_out.rows:
        parts.append("there are no held-out rows")
    if unchecked:
        parts.append(f"{unchecked} held-out rows have no check that a grader knows")
    if failing:
        parts.append(f"the wanted answers of {failing} held-out rows do not pass their own checks")
    return Probes(tuple(prompts), "; ".join(parts))


def _takes(grader: Grader, check: Mapping[str, Any] | None) -> bool:
    return check is not None and grader.validate_check(check) == ""


def _probe(encoded: Encoded, grader: str, check: Mapping[str, Any]) -> Probe:
    turn = encoded.turns[-1]
    prompt = encoded.input_ids[: turn.prompt_tokens]
    return Probe(grader, check, prompt, turn.stop_token, len(encoded.input_ids) - len(prompt))


def answer_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return an answer's text as a server gives it: without the tokens that end a turn."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _grade(grader: Grader, check: Mapping[str, Any], text: str, *, ended: bool) -> dict[str, bool]:
    found = grader.grade(text, check, StyleRules())
    whole = grade_end(text, "stop" if ended else "length").passed
    return {each.name: each.passed and whole for each in found if each.name in grader.titles}


@dataclass(frozen=True)
class ProbeRow:
    """What a probe found.

    Attributes:
        step: After which it was made.
        score: Of 100: the mean over the prompts of the share of their checks that passed.
        prompts: How many.
        held_out_loss: Measured at the same step.
        seconds: It took, without the held-out loss.
        checks: Per cent of its prompts that passed a check, by the check's name.
    """

    step: int
    score: float
    prompts: int
    held_out_loss: float
    seconds: float
    checks: Mapping[str, float]

    @classmethod
    def of(
        cls, step: int, results: Sequence[Mapping[str, bool]], held_out_loss: float, seconds: float
    ) -> Self:
        """Return what the checks of each prompt add up to."""
        by_name: dict[str, list[bool]] = {}
        for result in results:
            for name, passed in result.items():
                by_name.setdefault(name, []).append(passed)
        score = 100 * sum(sum(each.values()) / len(each) for each in results) / len(results)
        checks = {name: 100 * sum(each) / len(each) for name, each in sorted(by_name.items())}
        return cls(step, round(score, 4), len(results), held_out_loss, round(seconds, 3), checks)


class ProbeLog:
    """probes.csv: a row a probe, a column a check; what a resumed training will probe again is dropped.

    Args:
        path: The file.
        resumed_step: The checkpoint's step; 0 starts anew.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._path = path
        before = read_probes(path) if resumed_step and path.is_file() else []
        self.rows = [row for row in before if row.step <= resumed_step]
        self._write()

    def append(self, row: ProbeRow) -> None:
        """Add a row; it is on disk when this returns."""
        self.rows.append(row)
        self._write()

    def _write(self) -> None:
        names = sorted({name for row in self.rows for name in row.checks})
        part = self._path.with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*_COLUMNS, *names])
            for row in self.rows:
                figures = [row.score, row.prompts, row.held_out_loss, row.seconds]
                writer.writerow([row.step, *figures, *(row.checks.get(name, "") for name in names)])
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self._path)


def read_probes(path: Path) -> list[ProbeRow]:
    """Read probes.csv."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            ProbeRow(
                step=int(cells["step"]),
                score=float(cells["score"]),
                prompts=int(cells["prompts"]),
                held_out_loss=float(cells["held_out_loss"]),
                seconds=float(cells["seconds"]),
                checks={name: float(text) for name, text in cells.items() if name not in _COLUMNS and text},
            )
            for cells in csv.DictReader(file)
        ]


@dataclass(frozen=True)
class Pace:
    """How often a training is probed: decided once, after its first tenth, and kept beside its checkpoints.

    Attributes:
        times: How often, the end included; 0 when even two would take too long.
        probe_seconds: What one takes at most.
        training_seconds: What all steps take, by those made so far.
        prompts: How many are asked.
        chosen: How many there are.
    """

    times: int
    probe_seconds: float
    training_seconds: float
    prompts: int
    chosen: int

    @property
    def words(self) -> str:
        """What people should know; empty when all is as planned."""
        if self.times >= TIMES and self.prompts == self.chosen:
            return ""
        share = 100 * self.probe_seconds / max(self.training_seconds, 1e-9)
        of = f" of {self.prompts} prompts" if self.prompts < self.chosen else ""
        takes = f"a probe{of} takes up to {self.probe_seconds:.1f} s, {share:.0f} % of this training"
        instead = f"{self.times} are made instead of {TIMES}" if self.times else "none is made"
        if self.times and of:
            instead += f" of {self.chosen}"
        return f"{takes}: {instead}, for at most {100 * MOST_SHARE:.0f} % of its time"

    def steps(self, total: int) -> frozenset[int]:
        """Return the steps of a training to probe after."""
        return spread(total, self.times)


def spread(total: int, times: int) -> frozenset[int]:
    """Return steps evenly spread over a training, its last one among them."""
    times = min(times, total)
    return frozenset(round(total * (index + 1) / times) for index in range(times))


def first_step(total: int) -> int:
    """Return the step after which the pace is decided."""
    return max(1, round(total / TIMES))


def decide_pace(
    total: int,
    prompts: int,
    probe_seconds: Callable[[int], float],
    training_seconds: float,
    loss_seconds: float,
    loss_at: frozenset[int],
) -> Pace:
    """Return how often a training can be probed, with fewer prompts where all would leave too few probes.

    Args:
        total: Its steps.
        prompts: How many there are.
        probe_seconds: What a probe of so many of them takes at most.
        training_seconds: What all its steps take.
        loss_seconds: What measuring the held-out loss takes, as is done with every probe.
        loss_at: The steps after which it is measured anyway.
    """

    def cost(times: int, asked: int) -> float:
        steps = spread(total, times)
        return len(steps) * probe_seconds(asked) + len(steps - loss_at) * loss_seconds

    most = MOST_SHARE * training_seconds
    times, asked = 0, prompts
    for asked in fewer(prompts):
        often = range(min(TIMES, total), _FEWEST_TIMES - 1, -1)
        times = next((n for n in often if cost(n, asked) <= most), 0)
        if times >= min(_ENOUGH_TIMES, total):
            break
    return Pace(times, probe_seconds(asked), training_seconds, asked, prompts)


class PaceFile:
    """The pace beside the checkpoints: an attempt that goes on probes after the same steps.

    Args:
        folder: The training's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / PACE_FILE

    def read(self) -> Pace | None:
        """Return what was decided; None before."""
        try:
            return Pace(**json.loads(self._path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, pace: Pace) -> None:
        """Keep it; it is on disk when this returns."""
        write_json(self._path, asdict(pace))

    def forget(self) -> None:
        """Remove it: the training starts anew."""
        self._path.unlink(missing_ok=True)


def best_probe(rows: Sequence[ProbeRow]) -> ProbeRow | None:
    """Return the best step: by its score, and by its held-out loss where scores are a tie; None of none.

    Less than one prompt apart is a tie: a single check of one prompt tells no checkpoint from another.
    """
    top = max((row.score for row in rows), default=0.0)
    tied = [row for row in rows if row.score > top - 100 / row.prompts]
    return min(tied, key=lambda row: (_loss(row.held_out_loss), -row.step), default=None)


def stalled(rows: Sequence[ProbeRow], patience: int) -> bool:
    """Tell whether neither score nor held-out loss got better in `patience` probes; 0 never does."""
    if not patience or len(rows) <= patience:
        return False
    before, last = rows[:-patience], rows[-patience:]
    score = max(row.score for row in before)
    loss = min(_loss(row.held_out_loss) for row in before)
    return all(row.score <= score and _loss(row.held_out_loss) >= loss for row in last)


def _loss(value: float) -> float:
    return value if math.isfinite(value) else math.inf
