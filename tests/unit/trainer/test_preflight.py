from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from web4lora_chassis.errors import ResourceExhausted
from web4lora_chassis.model_files.trained_conversations import IGNORED
from web4lora_chassis.pipeline.train import LoraSettings, TrainSettings
from web4lora_trainer.decoder import Decoder, read_decoder
from web4lora_trainer.device import Device
from web4lora_trainer.encoding import Encoded, EncodedRows
from web4lora_trainer.preflight import (
    adapter_parameters,
    estimate,
    measured,
    optimizer_steps,
    peak_memory_bytes,
    require_memory,
    training_flops,
)
from web4lora_trainer.rehearsal import Rehearsal

TOKENS, TRAINED = 20 * 50, 20 * 10
CPU = Device("cpu", "cpu, 2 threads", "fp32", 2, 1e11)


@pytest.fixture
def decoder(tiny_base: Path) -> Decoder:
    return read_decoder(tiny_base)


def rows(count: int = 20, length: int = 50) -> EncodedRows:
    return EncodedRows(
        tuple(Encoded((5,) * length, (IGNORED,) * (length - 10) + (5,) * 10) for _ in range(count))
    )


def test_adapter_parameters_are_counted_exactly(decoder: Decoder) -> None:
    settings = TrainSettings(lora=LoraSettings(rank=4))
    a_layer = 4 * ((32 + 32) + (16 + 32) * 2 + (32 + 32))
    assert adapter_parameters(decoder, settings) == 2 * a_layer
    one = replace(settings, lora=LoraSettings(rank=4, last_layers=1))
    assert adapter_parameters(decoder, one) == a_layer


def test_fewer_layers_cost_less_backward_work(decoder: Decoder) -> None:
    settings = TrainSettings()
    whole = training_flops(decoder, TOKENS, TRAINED, settings, checkpointing=False)
    half = training_flops(
        decoder, TOKENS, TRAINED, replace(settings, lora=LoraSettings(last_layers=1)), checkpointing=False
    )
    head = 4 * 300 * 32 * TRAINED
    assert (half - head) / (whole - head) == pytest.approx(0.75)
    again = training_flops(decoder, TOKENS, TRAINED, settings, checkpointing=True)
    assert (again - head) / (whole - head) == pytest.approx(1.5)


def test_memory_grows_with_the_batch_and_shrinks_with_checkpointing(decoder: Decoder) -> None:
    def peak(tokens: int, *, checkpointing: bool = False) -> int:
        settings = TrainSettings(tokens_per_batch=tokens)
        return peak_memory_bytes(decoder, rows(), settings, CPU, checkpointing=checkpointing)

    assert peak(4096) > peak(2048) > peak(512)
    assert peak(4096, checkpointing=True) < peak(4096)


def test_steps_and_time_follow_the_settings(decoder: Decoder) -> None:
    settings = TrainSettings(tokens_per_batch=100, gradient_accumulation=2)  # 2 rows a batch, 10 batches
    assert optimizer_steps(rows(), settings, CPU) == 5
    assert optimizer_steps(rows(), replace(settings, epochs=2.5), CPU) == 13
    assert optimizer_steps(rows(), replace(settings, max_steps=3), CPU) == 3
    once = estimate(decoder, rows(), rows(0), settings, CPU)
    twice = estimate(decoder, rows(), rows(0), replace(settings, epochs=2), CPU)
    assert twice.seconds == pytest.approx(2 * once.seconds)
    assert estimate(decoder, rows(), rows(0), settings, replace(CPU, flops_per_second=0)).seconds == 0


def test_too_little_memory_is_refused_with_settings_that_need_less(decoder: Decoder) -> None:
    settings = TrainSettings(tokens_per_batch=1 << 21)
    needed = estimate(decoder, rows(), rows(0), settings, CPU)
    short = replace(
        needed, free_memory_bytes=1_500_000_000, peak_memory_bytes=21_000_000_000, checkpointing=False
    )
    with pytest.raises(ResourceExhausted, match=r"about 21\.0 GB, cpu, 2 threads has 1\.5 GB free") as caught:
        require_memory(short, settings, CPU)
    assert "gradient_checkpointing: on" in caught.value.fix
    assert "tokens_per_batch: 1048576" in caught.value.fix
    require_memory(replace(short, free_memory_bytes=22_000_000_000), settings, CPU)


def test_what_was_measured_takes_the_place_of_what_was_computed(decoder: Decoder) -> None:
    settings = TrainSettings(held_out_evaluations=0)
    needed = estimate(decoder, rows(), rows(0), settings, CPU)
    rehearsal = Rehearsal(3_700_000_000, seconds=2.0, tokens=TOKENS // 10, trained_tokens=TRAINED // 10)
    found = measured(needed, rehearsal, decoder, rows(), rows(0), settings, CPU)
    assert found.rehearsed
    assert found.seconds == pytest.approx(20.0)
    assert found.peak_memory_bytes == 3_700_000_000 + 113 * TOKENS
    assert (found.steps, found.disk_bytes) == (needed.steps, needed.disk_bytes)


def test_the_time_told_counts_held_out_losses_and_the_time_that_probes_may_take(decoder: Decoder) -> None:
    settings = TrainSettings(held_out_evaluations=4, probes=0)
    needed = estimate(decoder, rows(), rows(4), settings, CPU)
    rehearsal = Rehearsal(1, 2.0, TOKENS // 10, TRAINED // 10, held_out_seconds=0.5, held_out_tokens=50)

    def seconds(settings: TrainSettings) -> float:
        return measured(needed, rehearsal, decoder, rows(), rows(4), settings, CPU).seconds

    assert seconds(settings) == pytest.approx(20.0 + 4 * 4 * 0.5)
    assert seconds(replace(settings, probes=24)) == pytest.approx(1.1 * 28.0)
