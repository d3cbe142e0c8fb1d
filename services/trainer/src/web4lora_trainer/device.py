"""Where to train and in which number format: MPS, then CUDA, then CPU; a CPU's formats are measured."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from web4lora_chassis.errors import FailedPrecondition
from web4lora_chassis.jobs.record import write_json
from web4lora_chassis.process import run

if TYPE_CHECKING:
    import psutil
    import torch

Shape = tuple[int, int]
"""Outputs and inputs of a linear layer."""

_PROCESS_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Set by torchrun and by MPI's launchers: how many processes they started. Accelerate reads the same ones."""
_MEASURE_SECONDS = 0.35
_MEASURE_TOKENS = 512
_GLANCE_TOKENS = 64
_HOPELESS = 4.0
_EAGER_LONGEST_ROW_TOKENS = 1024
_KERNELS_KEPT = "64"


def require_one_process(environment: Mapping[str, str]) -> None:
    """Refuse to be one of several processes: each would train an adapter of its own on all of the data.

    Args:
        environment: The process's variables.

    Raises:
        FailedPrecondition: A launcher started more than one.
    """
    for name in _PROCESS_COUNTS:
        count = environment.get(name, "").strip()
        if count.isdigit() and int(count) > 1:
            raise FailedPrecondition(
                f"{name} is {count}: a launcher started this as one of {count} processes, but a training "
                "here is one process, and their gradients would not be brought together.",
                fix=f"Start it without torchrun, accelerate launch or mpirun, or unset {name}.",
                reason="SEVERAL_PROCESSES",
                metadata={"variable": name},
            )


@dataclass(frozen=True)
class Device:
    """Where to train, and how.

    Attributes:
        kind: "mps", "cuda" or "cpu".
        name: Its name for people.
        dtype: Number format of the frozen base: "bf16", "fp16" or "fp32". Adapters are always fp32.
        threads: CPU threads.
        flops_per_second: Measured at the model's own shapes in that format; 0 while unknown.
    """

    kind: str
    name: str
    dtype: str
    threads: int
    flops_per_second: float = 0.0

    def __str__(self) -> str:
        """Return it for people, for example `cpu, 2 threads, bf16`."""
        return f"{self.name}, {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The number format as torch names it."""
        import torch

        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.dtype]

    @property
    def dtype_bytes(self) -> int:
        """Size of a number of the frozen base."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def pad_to_multiple_of(self) -> int:
        """Few different shapes where the allocator keeps a buffer for each of them."""
        return 64 if self.kind == "mps" else 8 if self.kind == "cuda" else 1

    def attention(self, longest_row_tokens: int) -> str:
        """Return the attention to use: on a CPU plain matmuls for short rows; never those on MPS."""
        short = longest_row_tokens <= _EAGER_LONGEST_ROW_TOKENS
        return "eager" if self.kind == "cpu" and short else "sdpa"

    def fallback(self) -> Device | None:
        """Return the same device with the next safer number format, if there is one: bf16 after fp16."""
        if self.dtype == "fp32":
            return None
        safer = "bf16" if self.dtype == "fp16" and has_bf16(self.kind) else "fp32"
        return replace(self, dtype=safer, flops_per_second=0.0)

    def release_memory(self) -> None:
        """Give back what the allocator keeps for later."""
        import torch

        if self.kind != "cpu":
            getattr(torch, self.kind).empty_cache()
        else:
            trim_heap()

    def peak_memory_bytes(self) -> int:
        """Return the most memory that this process had: on a GPU what its allocator took, else resident."""
        if self.kind == "cuda":
            import torch

            return int(torch.cuda.max_memory_reserved())
        if self.kind == "mps":
            import torch

            return max(int(torch.mps.driver_allocated_memory()), resident_peak_bytes())
        return resident_peak_bytes()

    def free_memory_bytes(self, others: Sequence[psutil.Process] = ()) -> int:
        """Return the memory that a new process could use on it now.

        Args:
            others: Processes that will have ended by then: their memory counts as free.
        """
        if self.kind == "cuda":
            import torch

            free, total = torch.cuda.mem_get_info()
            return min(int(free) + _cuda_memory_bytes({each.pid for each in others}), int(total))
        free = free_host_memory_bytes() + memory_bytes(others)
        if self.kind == "mps":  # a Mac's memory is one, but Metal takes only a part of it
            import torch

            free = min(free, int(torch.mps.recommended_max_memory()))
        return free


def trim_heap() -> None:
    """Give the heap's free pages back. Batches of ever other lengths scatter it: it grew with every step."""
    with contextlib.suppress(AttributeError):  # glibc alone keeps them
        ctypes.CDLL(None).malloc_trim(0)


def resident_peak_bytes() -> int:
    """Return the largest resident memory that this process had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def worker_environment() -> dict[str, str]:
    """Return variables that a worker needs before it imports torch.

    MPS: by default its allocator may take more than a Mac has and swap instead of failing; a kernel that
    runs while the display is on may be ended by a watchdog. glibc: buffers of a training step are given back
    and asked for again thousands of times a second unless its thresholds are raised. oneDNN and torch
    keep the last 1024 kernels each, 0.3 MB a kernel; a step needs some thirty, the next step others.
    """
    return {
        "PYTORCH_MPS_HIGH_WATERMARK_RATIO": "1.0",
        "PYTORCH_MPS_LOW_WATERMARK_RATIO": "0.9",
        "AGX_RELAX_CDM_CTXSTORE_TIMEOUT": "1",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": _KERNELS_KEPT,
        "LRU_CACHE_CAPACITY": _KERNELS_KEPT,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }


def choose_device(
    shapes: Sequence[Shape] = (), dtype: str = "auto", kind: str = "auto", rates: Path | None = None
) -> Device:
    """Choose the device and its number format.

    Args:
        shapes: The linear layers of one decoder layer; they are what speed is measured on. Without them
            nothing is measured, and a CPU counts as fp32.
        dtype: A format to use instead of the best.
        kind: A device to use instead of the best.
        rates: Folder in which measured speeds are kept, so that a training takes the format that its prepare
            found best, whatever else the machine does meanwhile; None keeps none.

    Raises:
        FailedPrecondition: The device asked for is not there, or it can't compute in the format asked for.
    """
    import torch

    kind = _best_kind() if kind == "auto" else kind
    threads = torch.get_num_threads()
    if kind == "cpu":
        return _choose_cpu(shapes, dtype, threads, rates)
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise FailedPrecondition("There is no CUDA device.", fix="Leave the device to be chosen.")
        best = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
        name = torch.cuda.get_device_name()
    else:
        best = "bf16" if _apple_generation() >= 3 else "fp16"
        name = f"{apple_chip()} (mps)"
    device = Device(kind, name, best if dtype == "auto" else dtype, threads)
    return replace(device, flops_per_second=_kept_rate(rates, device, shapes)) if shapes else device


def has_bf16(kind: str) -> bool:
    """Tell whether a device computes in bf16: it has fp32's range in fp16's memory.

    CUDA before compute capability 8 only imitates it, slower than fp32; MPS has it from macOS 14 on.
    """
    import torch

    if kind == "cuda":
        return bool(torch.cuda.get_device_capability() >= (8, 0))
    try:
        ones = torch.ones(8, 8, device=kind, dtype=torch.bfloat16)
        return bool((ones @ ones).sum().item() == 512.0)
    except (RuntimeError, TypeError):
        return False


def _best_kind() -> str:
    import torch

    if torch.backends.mps.is_available():
        return "mps"
    return "cuda" if torch.cuda.is_available() else "cpu"


def _choose_cpu(shapes: Sequence[Shape], dtype: str, threads: int, rates: Path | None) -> Device:
    """Measure bf16 against fp32: with AVX512-BF16 or AMX 3 times faster, without 25 times slower."""
    if dtype == "fp16":
        raise FailedPrecondition(
            "A CPU computes fp16 hundreds of times slower than fp32.",
            fix="Set dtype to auto, bf16 or fp32.",
            metadata={"field": "dtype"},
        )
    device = Device("cpu", f"cpu, {threads} thread{'s' if threads != 1 else ''}", "fp32", threads)
    if not shapes:
        return replace(device, dtype=dtype if dtype != "auto" else "fp32")
    if dtype != "auto":
        device = replace(device, dtype=dtype)
        return replace(device, flops_per_second=_kept_rate(rates, device, shapes))
    fp32 = replace(device, flops_per_second=_kept_rate(rates, device, shapes))
    bf16 = replace(device, dtype="bf16")
    bf16 = replace(
        bf16,
        flops_per_second=_kept_rate(rates, bf16, shapes, hopeless_below=fp32.flops_per_second / _HOPELESS),
    )
    return max(fp32, bf16, key=lambda each: each.flops_per_second)


def _kept_rate(
    rates: Path | None, device: Device, shapes: Sequence[Shape], hopeless_below: float = 0.0
) -> float:
    """Return what was measured before on this processor with this torch, or measure and keep it."""
    import torch

    if rates is None:
        return _rate(device, shapes, hopeless_below)
    about = [_processor(), device.name, device.threads, device.dtype, torch.__version__, shapes]
    path = rates / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if (kept := float(json.loads(path.read_text(encoding="utf-8"))["flops_per_second"])) > 0:
            return kept
    rate = _rate(device, shapes, hopeless_below)
    rates.mkdir(parents=True, exist_ok=True)
    write_json(path, {"device": str(device), "flops_per_second": rate})
    return rate


def _processor() -> str:
    """Return what tells one processor's speed from another's: its name and, on Linux, its instructions."""
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
        told = ("model name", "flags", "Features", "CPU implementer", "CPU part")
        if lines := [line for line in first.splitlines() if line.startswith(told)]:
            return "\n".join(lines)
    return apple_chip() if platform.system() == "Darwin" else f"{platform.machine()} {platform.processor()}"


def _rate(device: Device, shapes: Sequence[Shape], hopeless_below: float = 0.0) -> float:
    """Measure multiplications and additions a second: forward and input gradient of one decoder layer.

    A short glance comes first: a format without hardware support would take seconds to measure well. The
    fastest pass counts, on a CPU by the processor's time and not the clock's: what else runs there would make
    the one format look slow and not the other.
    """
    import torch

    dtype = device.torch_dtype
    weights = [torch.randn(shape, device=device.kind).to(dtype) for shape in shapes]
    inputs = [torch.randn(_MEASURE_TOKENS, shape[1], device=device.kind).to(dtype) for shape in shapes]
    outputs = [torch.randn(_MEASURE_TOKENS, shape[0], device=device.kind).to(dtype) for shape in shapes]
    weights_count = sum(rows * columns for rows, columns in shapes)

    def now() -> float:
        return time.process_time() / device.threads if device.kind == "cpu" else time.perf_counter()

    def rate_of(tokens: int) -> float:
        start = now()
        for weight, value, gradient in zip(weights, inputs, outputs, strict=True):
            value[:tokens] @ weight.t()
            gradient[:tokens] @ weight
        if device.kind != "cpu":
            getattr(torch, device.kind).synchronize()
        return 4 * tokens * weights_count / max(now() - start, 1e-9)

    rate_of(_GLANCE_TOKENS)  # the first call sets kernels up
    glance = rate_of(_GLANCE_TOKENS)
    if glance < hopeless_below:
        return glance
    fastest, end = 0.0, time.perf_counter() + _MEASURE_SECONDS
    while time.perf_counter() < end or not fastest:
        fastest = max(fastest, rate_of(_MEASURE_TOKENS))
    return fastest


def free_host_memory_bytes() -> int:
    """Return the host's free memory, or a container's when that is less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text(encoding="ascii").strip()) != "max":
        free = min(free, int(text) - int(used.read_text(encoding="ascii")))
    return max(free, 0)


def memory_bytes(processes: Sequence[psutil.Process]) -> int:
    """Return the memory that comes back once processes have ended; mapped files are free already."""
    import psutil

    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it has ended
            info = process.memory_info()
            total += max(info.rss - getattr(info, "shared", 0), 0)
    return total


def _cuda_memory_bytes(pids: Collection[int]) -> int:
    """Return what processes hold of the GPUs, as the driver tells it."""
    if not pids:
        return 0
    query = ["nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"]
    rows = [line.split(", ") for line in run(query, timeout_seconds=20).splitlines() if line.strip()]
    return sum(int(used) << 20 for pid, used in rows if int(pid) in pids and used.isdigit())


def apple_chip() -> str:
    """Return the name of Apple's chip, for example `Apple M2 Max`."""
    return run(["sysctl", "-n", "machdep.cpu.brand_string"], timeout_seconds=10).strip()


def _apple_generation() -> int:
    """Return the M in M1, M2, …: bf16 has hardware support from M3 on."""
    found = re.search(r"\bM(\d+)", apple_chip())
    return int(found[1]) if found else 1


def describe_without_torch() -> tuple[str, int, int]:
    """Return the device in words, its memory and free memory in bytes, as far as known without torch."""
    import psutil

    memory_bytes, free_bytes = int(psutil.virtual_memory().total), free_host_memory_bytes()
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return f"{apple_chip()} (mps)", memory_bytes, free_bytes
    nvidia = _nvidia()
    if nvidia:
        return nvidia
    count = os.cpu_count() or 1
    return f"cpu, {count} core{'s' if count != 1 else ''}", memory_bytes, free_bytes


def _nvidia() -> tuple[str, int, int] | None:
    """Return the first NVIDIA GPU's name, memory and free memory in bytes, as its driver tells them."""
    if not Path("/proc/driver/nvidia/version").exists():
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    name, total, free = run(query, timeout_seconds=20).splitlines()[0].split(", ")
    return f"{name} (cuda)", int(total) << 20, int(free) << 20
