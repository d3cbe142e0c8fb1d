from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from web4lora_chassis.errors import ResourceExhausted
from web4lora_trainer.batching import IGNORED, Encoded, EncodedRows
from web4lora_trainer.checkpoint import Checkpoint, read_checkpoint
from web4lora_trainer.device import Device
from web4lora_trainer.preflight import (
    adapter_parameters,
    estimate,
    optimizer_steps,
    peak_memory_bytes,
    require_memory,
    training_flops,
)
from web4lora_trainer.train_settings import LoraSettings, TrainSettings

CPU = Device("cpu", "cpu, 2 threads", "fp32", 2, 1e11)


@pytest.fixture
def checkpoint(tiny_base: Path) -> Checkpoint:
    return read_checkpoint(tiny_base)


def rows(count: int = 20, length: int = 50) -> EncodedRows:
    return EncodedRows(
        tuple(Encoded((5,) * length, (IGNORED,) * (length - 10) + (5,) * 10) for _ in range(count))
    )


def test_adapter_parameters_are_counted_exactly(checkpoint: Checkpoint) -> None:
    settings = TrainSettings(lora=LoraSettings(rank=4))
    a_layer = 4 * ((32 + 32) + (16 + 32) * 2 + (32 + 32))
    assert adapter_parameters(checkpoint, settings) == 2 * a_layer
    one = replace(settings, lora=LoraSettings(rank=4, last_layers=1))
    assert adapter_parameters(checkpoint, one) == a_layer


def test_fewer_layers_cost_less_backward_work(checkpoint: Checkpoint) -> None:
    settings = TrainSettings()
    whole = training_flops(checkpoint, rows(), settings, checkpointing=False)
    half = training_flops(
        checkpoint, rows(), replace(settings, lora=LoraSettings(last_layers=1)), checkpointing=False
    )
    head = 4 * 300 * 32 * rows().trained_tokens
    assert (half - head) / (whole - head) == pytest.approx(0.75)
    again = training_flops(checkpoint, rows(), settings, checkpointing=True)
    assert (again - head) / (whole - head) == pytest.approx(1.5)


def test_memory_grows_with_the_batch_and_shrinks_with_checkpointing(checkpoint: Checkpoint) -> None:
    def peak(tokens: int, *, checkpointing: bool = False) -> int:
        settings = TrainSettings(tokens_per_batch=tokens)
        return peak_memory_bytes(checkpoint, rows(), settings, CPU, checkpointing=checkpointing)

    assert peak(4096) > peak(2048) > peak(512)
    assert peak(4096, checkpointing=True) < peak(4096)


def test_steps_and_time_follow_the_settings(checkpoint: Checkpoint) -> None:
    settings = TrainSettings(tokens_per_batch=100, gradient_accumulation=2)  # 2 rows a batch, 10 batches
    assert optimizer_steps(rows(), settings, CPU) == 5
    assert optimizer_steps(rows(), replace(settings, epochs=2.5), CPU) == 13
    assert optimizer_steps(rows(), replace(settings, max_steps=3), CPU) == 3
    once = estimate(checkpoint, rows(), rows(0), settings, CPU)
    twice = estimate(checkpoint, rows(), rows(0), replace(settings, epochs=2), CPU)
    assert twice.seconds == pytest.approx(2 * once.seconds)
    assert estimate(checkpoint, rows(), rows(0), settings, replace(CPU, flops_per_second=0)).seconds == 0


def test_too_little_memory_is_refused_with_settings_that_need_less(checkpoint: Checkpoint) -> None:
    settings = TrainSettings(tokens_per_batch=1 << 21)
    needed = estimate(checkpoint, rows(), rows(0), settings, CPU)
    short = replace(
        needed, free_memory_bytes=1_500_000_000, peak_memory_bytes=21_000_000_000, checkpointing=False
    )
    with pytest.raises(ResourceExhausted, match=r"about 21\.0 GB, cpu, 2 threads has 1\.5 GB free") as caught:
        require_memory(short, settings, CPU)
    assert "gradient_checkpointing: on" in caught.value.fix
    assert "tokens_per_batch: 1048576" in caught.value.fix
    require_memory(replace(short, free_memory_bytes=22_000_000_000), settings, CPU)
