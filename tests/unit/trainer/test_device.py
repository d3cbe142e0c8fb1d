from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from web4lora_chassis.errors import FailedPrecondition
from web4lora_trainer.device import (
    Device,
    choose_device,
    describe_without_torch,
    has_bf16,
    require_one_process,
    worker_environment,
)

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


def test_what_was_measured_once_is_kept_for_this_processor_and_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def rate(device: Device, shapes: object, _: float = 0.0) -> float:
        measured.append((device.dtype, shapes))
        return {"fp32": 1e9, "bf16": 3e9}[device.dtype] * len(measured)

    monkeypatch.setattr("web4lora_trainer.device._rate", rate)
    first = choose_device(SHAPES, kind="cpu", rates=tmp_path / "speeds")
    assert len(measured) == 2
    assert choose_device(SHAPES, kind="cpu", rates=tmp_path / "speeds") == first
    assert len(measured) == 2
    choose_device([(32, 64)], kind="cpu", rates=tmp_path / "speeds")  # another model's layers
    assert len(measured) == 4
    monkeypatch.setattr("web4lora_trainer.device._processor", lambda: "another processor")
    assert choose_device(SHAPES, kind="cpu", rates=tmp_path / "speeds") != first
    assert len(measured) == 6
    for path in (tmp_path / "speeds").iterdir():
        path.write_text("{", encoding="utf-8")  # a power cut
    choose_device(SHAPES, kind="cpu", rates=tmp_path / "speeds")
    assert len(measured) == 8


def test_short_rows_on_a_cpu_take_plain_attention_and_mps_never_does() -> None:
    cpu, mps = Device("cpu", "cpu", "fp32", 2), Device("mps", "M2", "fp16", 8)
    assert cpu.attention(300) == "eager"
    assert cpu.attention(4000) == "sdpa"
    assert mps.attention(300) == "sdpa"


@pytest.mark.parametrize(("bf16", "down"), [(True, ["bf16", "fp32"]), (False, ["fp32"])])
def test_fp16_falls_back_to_bf16_where_there_is_bf16_and_then_to_fp32(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, down: list[str]
) -> None:
    monkeypatch.setattr("web4lora_trainer.device.has_bf16", lambda _: bf16)
    device: Device | None = Device("mps", "M2", "fp16", 8, 1e12)
    found = []
    while device := device.fallback():
        found.append(device.dtype)
    assert found == down


def test_bf16_is_looked_for_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert has_bf16("cpu")
    for capability, expected in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert has_bf16("cuda") is expected

    def refuse(*_: object, **__: object) -> None:
        raise TypeError("BFloat16 is not supported on MPS")

    monkeypatch.setattr(torch, "ones", refuse)
    assert not has_bf16("mps")


def test_free_memory_on_mps_is_at_most_metals_working_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("web4lora_trainer.device.free_host_memory_bytes", lambda: 12_000_000_000)
    import torch

    mps = Device("mps", "M2", "bf16", 8)
    for most, free in ((9_000_000_000, 9_000_000_000), (99_000_000_000, 12_000_000_000)):
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda most=most: most)
        assert mps.free_memory_bytes() == free


def test_a_worker_keeps_the_kernels_of_few_steps() -> None:
    environment = worker_environment()
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        assert int(environment[name]) < 1024


def test_the_workers_environment_bounds_mps_memory() -> None:
    environment = worker_environment()
    assert environment["PYTORCH_MPS_HIGH_WATERMARK_RATIO"] == "1.0"
    assert float(environment["PYTORCH_MPS_LOW_WATERMARK_RATIO"]) < 1


def test_the_device_is_described_without_torch() -> None:
    name, memory_bytes, free_bytes = describe_without_torch()
    assert name
    assert 0 < free_bytes <= memory_bytes


@pytest.mark.parametrize(
    "variable", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]
)
def test_several_processes_are_refused_and_one_is_not(variable: str) -> None:
    with pytest.raises(FailedPrecondition, match=f"{variable} is 2: a launcher started this") as raised:
        require_one_process({variable: "2"})
    assert raised.value.fix.endswith(f"unset {variable}.")
    for alone in ("1", "", "x"):
        require_one_process({variable: alone})


def test_a_trainer_under_torchrun_ends_with_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "WORLD_SIZE": "2", "WEB4LORA_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "web4lora_trainer"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "WORLD_SIZE is 2" in done.stderr
    assert "Traceback" not in done.stderr
