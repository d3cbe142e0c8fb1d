from __future__ import annotations

import pytest
from web4lora_chassis.errors import FailedPrecondition
from web4lora_trainer.device import Device, choose_device, describe_without_torch, worker_environment

SHAPES = [(64, 64), (128, 64)]


def test_a_cpu_never_computes_in_fp16() -> None:
    with pytest.raises(FailedPrecondition, match="fp16"):
        choose_device(SHAPES, dtype="fp16", kind="cpu")
    assert choose_device(SHAPES, kind="cpu").dtype in ("fp32", "bf16")


@pytest.mark.parametrize(("bf16", "expected"), [(3.0, "bf16"), (0.9, "fp32"), (0.01, "fp32")])
def test_a_cpu_takes_the_format_that_is_faster(
    bf16: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rate(device: Device, _: object, hopeless_below: float = 0.0) -> float:
        return {"fp32": 1e9, "bf16": bf16 * 1e9}[device.dtype]

    monkeypatch.setattr("web4lora_trainer.device._rate", rate)
    assert choose_device(SHAPES, kind="cpu").dtype == expected


def test_a_format_asked_for_is_kept_and_measured() -> None:
    device = choose_device(SHAPES, dtype="bf16", kind="cpu")
    assert device.dtype == "bf16"
    assert device.flops_per_second > 0


def test_short_rows_on_a_cpu_take_plain_attention_and_mps_never_does() -> None:
    cpu, mps = Device("cpu", "cpu", "fp32", 2), Device("mps", "M2", "fp16", 8)
    assert cpu.attention(300) == "eager"
    assert cpu.attention(4000) == "sdpa"
    assert mps.attention(300) == "sdpa"


def test_every_format_falls_back_to_fp32() -> None:
    fallback = Device("mps", "M2", "fp16", 8, 1e12).fallback()
    assert fallback is not None
    assert fallback.dtype == "fp32"
    assert fallback.fallback() is None


def test_the_workers_environment_bounds_mps_memory() -> None:
    environment = worker_environment()
    assert environment["PYTORCH_MPS_HIGH_WATERMARK_RATIO"] == "1.0"
    assert float(environment["PYTORCH_MPS_LOW_WATERMARK_RATIO"]) < 1


def test_the_device_is_described_without_torch() -> None:
    name, memory_bytes, free_bytes = describe_without_torch()
    assert name
    assert 0 < free_bytes <= memory_bytes
