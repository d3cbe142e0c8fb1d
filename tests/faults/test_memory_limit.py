"""A training under a real limit of memory: it goes down the ladder and makes the same steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_base import make_base

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to RLIMIT_DATA"),
]

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import json, resource, sys
from pathlib import Path
import torch
from web4lora_chassis.dataset import Dataset, Message, Row
from web4lora_chassis.errors import OutOfMemory
from web4lora_chassis.pipeline.train import LoraSettings, LossBand, TrainSettings
from web4lora_trainer.loss_report import read_losses
from web4lora_trainer.sft import AnswerTrainer
from web4lora_trainer.train import Base, train

base, folder, failures, megabytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
rows = tuple(
    Row("a", n, "", "", (Message("user", "question " * (1 + n % 4) + str(n)), Message("assistant", "red")))
    for n in range(800)
)
settings = TrainSettings(
    lora=LoraSettings(rank=4), epochs=2, learning_rate=1e-3, tokens_per_batch=16_000, dtype="fp32",
    checkpoint_steps=1, held_out_evaluations=0, loss_band=LossBand(0, 9),
)
honest = AnswerTrainer.train

def limited(self, *arguments, **options):
    used = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
    limit = int(used.split()[1]) * 1024 + (megabytes << 20)
    if megabytes:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return honest(self, *arguments, **options)

AnswerTrainer.train = limited
try:
    outcome = train(settings, Dataset(rows, (), ()), Base(base, "x"), folder, lambda _: None, failures)
except OutOfMemory:
    print("RESULT null")
else:
    losses = read_losses(folder / "loss.csv")
    steps = [[row.step, row.tokens, row.answer_tokens, row.learning_rate] for row in losses]
    print("RESULT " + json.dumps({"steps": steps, "events": list(outcome.events)}))
"""


def attempt(base: Path, folder: Path, failures: int, megabytes: int) -> dict[str, list[object]] | None:
    """Train in a process of its own that may have so many megabytes more; None when that was too little."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(base), str(folder), str(failures), str(megabytes)],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert found, done.stderr[-3000:]
    result: dict[str, list[object]] | None = json.loads(found[-1].removeprefix("RESULT "))
    return result


def test_under_a_real_limit_the_same_steps_are_made_with_less(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    make_base(base)
    free = attempt(base, tmp_path / "free", 0, 0)
    assert free is not None
    assert free["events"] == []

    assert attempt(base, tmp_path / "cut", 0, 100) is None
    cut, failures = None, 0
    while cut is None:
        failures += 1
        cut = attempt(base, tmp_path / "cut", failures, 100)
    assert cut["steps"] == free["steps"]
    assert cut["events"]
    assert "memory ran out" in str(cut["events"][0])
