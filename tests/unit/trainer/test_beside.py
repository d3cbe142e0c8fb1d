"""A prepare beside a training: what it waits for, and whose memory it counts as free."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from web4lora_trainer import beside, device
from web4lora_trainer.device import Device

CPU = Device("cpu", "cpu, 2 threads", "fp32", 2)
HOLDS = 300 << 20


def test_a_prepare_waits_for_its_memory_and_a_training_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "free_host_memory_bytes", lambda: 1_900_000_000)
    said = beside.lacks("prepare")
    assert "1.9 GB are free" in said
    assert "2.5 GB are needed" in said
    assert beside.lacks("train") == ""
    monkeypatch.setattr(beside, "free_host_memory_bytes", lambda: 2_500_000_000)
    assert beside.lacks("prepare") == ""


def test_memory_of_jobs_that_will_have_ended_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    program = f"data = bytearray(b'x' * {HOLDS}); print('held', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        monkeypatch.setattr(device, "free_host_memory_bytes", lambda: 1000)
        free = CPU.free_memory_bytes([psutil.Process(other.pid)])
        assert HOLDS <= free < 2 * HOLDS
    finally:
        other.communicate(b"\n")
    gone = psutil.Process()
    monkeypatch.setattr(gone, "memory_info", lambda: (_ for _ in ()).throw(psutil.NoSuchProcess(1)))
    assert CPU.free_memory_bytes([gone]) == 1000


def test_the_other_jobs_are_the_services_other_children_and_theirs(tmp_path: Path) -> None:
    """As in the trainer: a service with two children, one of which asks."""
    job = "from web4lora_trainer.beside import other_jobs; print(sorted(each.pid for each in other_jobs()))"
    service = f"""
import subprocess, sys
nap = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
other = subprocess.Popen([sys.executable, "-c", nap], **pipes)
other.stdout.readline()
asked = subprocess.run([sys.executable, "-c", {job!r}], capture_output=True, check=True, text=True)
print(other.pid, asked.stdout)
other.communicate(b"\\n")
"""
    said = subprocess.run([sys.executable, "-c", service], capture_output=True, check=True, text=True).stdout
    pid, _, found = said.partition(" ")
    pids = json.loads(found)
    assert int(pid) in pids
    assert len(pids) == 2


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="Linux alone has it")
def test_a_prepare_is_ended_before_the_training() -> None:
    program = (
        "from web4lora_trainer.beside import yield_memory; yield_memory(); "
        "print(open('/proc/self/oom_score_adj').read())"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout
    assert said.strip() == "1000"


def test_what_the_driver_says_of_a_gpus_processes_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "run", lambda *_args, **_more: "11, 1000\n12, 24\n13, [N/A]\n")
    assert device._cuda_memory_bytes({11, 13}) == 1000 << 20
    assert device._cuda_memory_bytes(()) == 0
