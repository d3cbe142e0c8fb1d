"""What is trained on and what is held out: every setting of `dataset` but the files."""

from __future__ import annotations

from dataclasses import dataclass

from web4lora_chassis.pipeline.rules import Flag, Number, StageSettings, setting


@dataclass(frozen=True)
class DatasetSettings(StageSettings):
    """How the files become rows to train on and held-out ones; see the contract's DatasetSpec."""

    eval_share: float = setting(Number(0.0, low=0, high=0.5))
    allow_duplicates: bool = setting(Flag(False))
