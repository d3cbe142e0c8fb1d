"""What is kept, and for how long: every bound on what piles up, for all services, in one place.

0 means no bound. The defaults lose nobody's work: runs and artifacts stay until somebody says otherwise; what
goes by itself is what nothing goes on from.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings

DAY_SECONDS = 86_400.0
HOUR_SECONDS = 3600.0
GB = 10**9


_LABEL_RULE = re.compile(r"(?P<key>[A-Za-z0-9][A-Za-z0-9._/-]*)(=(?P<value>[^=,]*))?:(?P<days>[^:=,]+)")


@dataclass(frozen=True)
class LabelRule:
    """How long the ended runs with a label are kept, whatever else is said of runs.

    Attributes:
        key: Of the label.
        value: Of the label; None: any.
        days: How long; infinite: always.
    """

    key: str
    value: str | None
    days: float

    def __str__(self) -> str:
        """Say it for people."""
        label = self.key if self.value is None else f"{self.key}={self.value}"
        return f"{'always' if math.isinf(self.days) else f'{self.days:g} days'} by its label {label}"

    def holds_for(self, labels: Mapping[str, str]) -> bool:
        """Tell whether a run with these labels has the label."""
        return self.key in labels and self.value in (None, labels[self.key])

    def over(self, ended_at: float, now: float) -> bool:
        """Tell whether a run's time is over; both in seconds since 1970."""
        return now - ended_at > self.days * DAY_SECONDS


class Keeping(BaseSettings):
    """The settings `WEB4LORA_KEEP_…`, which every service and the command share."""

    keep_runs: int = Field(default=0, ge=0, description="Ended runs kept, the newest; 0: all")
    keep_runs_days: float = Field(
        default=0, ge=0, description="Days that ended runs are kept; 0: until they are deleted"
    )
    keep_labels: str = Field(
        default="",
        description="Days that ended runs with a label are kept, whatever the two above say: KEY:DAYS or "
        "KEY=VALUE:DAYS, separated by commas; `always` for days. The longest counts",
    )
    keep_artifacts_days: float = Field(
        default=0,
        ge=0,
        description="Days that artifacts are kept that nothing needs; 0: until `web4lora gc --delete`",
    )
    keep_artifacts_gb: float = Field(
        default=0,
        ge=0,
        description="Artifacts that nothing needs go, oldest first, while the store has more; 0: no bound",
    )
    keep_new_hours: float = Field(
        default=24,
        ge=0,
        description="Hours that artifacts nothing needs yet, and uploads that were cut off, are left alone",
    )
    keep_jobs: int = Field(default=1000, ge=0, description="Ended jobs a worker keeps on record; 0: all")
    keep_jobs_days: float = Field(
        default=90, ge=0, description="Days that ended jobs are kept on record; 0: no bound"
    )
    keep_failed_work_days: float = Field(
        default=7, ge=0, description="Days that a failed job's working files are kept; 0: no bound"
    )
    keep_failed_work_gb: float = Field(
        default=20, ge=0, description="Failed jobs' working files kept by one worker, in GB; 0: no bound"
    )
    keep_trainings: int = Field(
        default=3, ge=0, description="Trainings kept to go on with, besides the one at work; 0: no bound"
    )
    keep_trainings_days: float = Field(
        default=30, ge=0, description="Days that trainings are kept to go on with; 0: no bound"
    )
    keep_trainings_gb: float = Field(
        default=100, ge=0, description="Checkpoints kept to go on with, in GB; 0: no bound"
    )
    keep_free_gb: float = Field(
        default=5,
        ge=0,
        description="Below this much free disk, in GB, it is warned, and what nothing goes on from goes",
    )
    job_attempts: int = Field(
        default=5,
        ge=1,
        description="Times that a job may end together with its service without getting further",
    )

    @field_validator("keep_labels")
    @classmethod
    def _readable(cls, text: str) -> str:
        _label_rules(text)
        return text

    def label_rule(self, labels: Mapping[str, str]) -> LabelRule | None:
        """Return what WEB4LORA_KEEP_LABELS says of a run with these labels; None: nothing."""
        found = [rule for rule in _label_rules(self.keep_labels) if rule.holds_for(labels)]
        return max(found, key=lambda rule: rule.days, default=None)


def _label_rules(text: str) -> list[LabelRule]:
    """Read the setting.

    Raises:
        ValueError: It is of another form.
    """
    rules = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        match = _LABEL_RULE.fullmatch(entry)
        try:
            days = _days(match["days"]) if match else math.nan
        except ValueError:
            days = math.nan
        if match is None or not days >= 0:
            raise ValueError(
                f"{entry!r} does not say how long a label's runs are kept; write KEY:DAYS or KEY=VALUE:DAYS, "
                "for example purpose=release:always,nightly:14"
            )
        rules.append(LabelRule(match["key"], match["value"], days))
    return rules


def _days(word: str) -> float:
    return math.inf if word == "always" else float(word)


def free_bytes(place: Path) -> int:
    """Return the free room on the disk of a place, which need not be there yet."""
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def disk_warning(place: Path, keep: Keeping) -> str:
    """Return a line about a disk that is nearly full, with what to do about it; empty when it is not."""
    free = free_bytes(place)
    if free >= keep.keep_free_gb * GB:
        return ""
    return (
        f"the disk of {place} has {free / GB:.1f} GB left (wanted: {keep.keep_free_gb:g} GB); "
        "`web4lora gc` says what can go"
    )


def folder_bytes(folder: Path) -> int:
    """Return the room that the files of a folder take, those that go meanwhile left out."""
    total = 0
    for path in folder.rglob("*"):
        try:
            if path.is_file() and not path.is_symlink():
                total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total
