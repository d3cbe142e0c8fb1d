"""What jobs of one trainer must know of each other: a prepare may run beside a training. No torch here."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil

from web4lora_trainer.device import free_host_memory_bytes

LANES = {"prepare": "prepare", "train": "train"}
"""One of each at a time: a long training must not hold up the next run's prepare."""

_PREPARE_BYTES = 2_500_000_000
"""Memory of a prepare: Python with torch and transformers, 0.6 GB measured; one decoder layer of a model with
7 billion weights in fp32, 0.9 GB, on which the speed is measured; the rows as tokens, which get the rest."""


def lacks(kind: str) -> str:
    """Return what a job must wait for while others of this trainer are at work; empty when it may start.

    Args:
        kind: "prepare" or "train". A training waits for nothing: it was measured, and where memory runs out
            nevertheless the prepare beside it is what the system ends, see `yield_memory`.
    """
    if kind != "prepare":
        return ""
    free = free_host_memory_bytes()
    if free >= _PREPARE_BYTES:
        return ""
    return (
        f"waiting for memory beside the training: {free / 1e9:.1f} GB are free, "
        f"{_PREPARE_BYTES / 1e9:.1f} GB are needed"
    )


def yield_memory() -> None:
    """Have the system end this process and its children first when memory runs out: a prepare is short.

    Linux alone has such a killer. Elsewhere nothing is to be done.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def other_jobs() -> list[psutil.Process]:
    """Return the processes of this trainer's other jobs. Only for the process of a job: its parent serves."""
    me, service = os.getpid(), psutil.Process().parent()
    found: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        for child in service.children() if service else ():
            if child.pid != me:
                found += [child, *child.children(recursive=True)]
    return found
