"""Looks at the machine: what is there for training, packaging and deploying, and what to do next."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx2
import psutil
import web4lora_llamacpp
from web4.lora.v1 import trainer_pb2, trainer_pb2_grpc
from web4lora_chassis import process
from web4lora_chassis.errors import Web4Error
from web4lora_chassis.keeping import disk_warning
from web4lora_chassis.rpc import channel
from web4lora_chassis.settings import PREFIX, Settings
from web4lora_llamacpp import levels

from web4lora.stack import Stack, service
from web4lora.views import human
from web4lora.views.console import BAD, NOTE, OK

_PROBE_SECONDS = 60.0
_HTTP_SECONDS = 2.0
_OLDEST_OLLAMA = (0, 31, 2)
_DISK_NEEDED_BYTES = 3 * 10**9
_DISK_7B_BYTES = 40 * 10**9
_MEMORY_NEEDED_BYTES = 3 * 10**9
_MODEL_RUNNERS = ("http://127.0.0.1:12434", "http://model-runner.docker.internal")
_DEVICE_PROBE = """
import json
from web4lora_trainer.device import describe_without_torch
print(json.dumps(describe_without_torch()))
"""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        sign: `OK`; `NOTE` for what is optional and absent; `BAD` for what is needed and missing.
        name: What it is.
        text: What was found, and what to do about it.
    """

    sign: str
    name: str
    text: str


def examine(settings: Settings) -> Iterator[Check]:
    """Yield what is found, one thing after the other; some take a second or two."""
    for look in (
        _python,
        _device,
        _memory,
        _disk,
        _compiler,
        _cmake,
        _llama_cpp,
        _ollama,
        _model_runner,
        _docker,
    ):
        yield look(settings)


def _python(settings: Settings) -> Check:
    del settings
    missing = [name for name in ("trainer", "packager", "deployer", "gateway") if not _installed(name)]
    if missing:
        names = ", ".join(f"web4lora-{name}" for name in missing)
        return Check(
            BAD, "Python", f"{platform.python_version()}, without {names}.  `make setup` installs them"
        )
    return Check(OK, "Python", f"{platform.python_version()}, every service is installed")


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(f"web4lora_{name}") is not None


def _device(settings: Settings) -> Check:
    """Ask the trainer, or look in a process of its own, since this one never loads torch."""
    trainer = service("trainer", settings)
    if Stack(settings, Path()).serving(trainer):
        with channel(trainer.address, settings) as line:
            try:
                info = trainer_pb2_grpc.TrainerServiceStub(line).GetTrainerInfo(
                    trainer_pb2.GetTrainerInfoRequest(), timeout=_PROBE_SECONDS
                )
                return _device_check(info.device, info.memory_bytes, info.free_memory_bytes)
            except grpc.RpcError as call:
                return Check(NOTE, "device", f"the trainer doesn't tell: {call.details()}")
    try:
        text = process.run([sys.executable, "-c", _DEVICE_PROBE], timeout_seconds=_PROBE_SECONDS)
        device, memory_bytes, free_bytes = json.loads(text.strip().splitlines()[-1])
    except (Web4Error, ValueError, IndexError):
        return Check(BAD, "device", "the trainer's package can't be loaded.  `make setup` installs it")
    return _device_check(device, memory_bytes, free_bytes)


def _device_check(device: str, memory_bytes: int, free_bytes: int) -> Check:
    text = f"{device}, {human.size(memory_bytes)} of memory, {human.size(free_bytes)} free"
    if device.startswith("cpu"):
        text += " (fine for models up to about 1B; a 7B wants a GPU or Apple silicon)"
    return Check(OK, "device", text)


def _memory(settings: Settings) -> Check:
    del settings
    free = psutil.virtual_memory().available
    text = f"{human.size(free)} free"
    if free < _MEMORY_NEEDED_BYTES:
        wanted = human.size(_MEMORY_NEEDED_BYTES)
        return Check(BAD, "memory", f"{text}; the demo needs about {wanted}.  Close other programs")
    return Check(OK, "memory", text)


def _disk(settings: Settings) -> Check:
    folder = settings.home
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{human.size(free)} free for {settings.home} (a 7B run needs about {human.size(_DISK_7B_BYTES)})"
    if free < _DISK_NEEDED_BYTES:
        return Check(BAD, "disk", f"{text}; the demo needs {human.size(_DISK_NEEDED_BYTES)}.  Free some")
    if warning := disk_warning(folder, settings):
        return Check(NOTE, "disk", f"{text}; {warning}")
    return Check(OK if free >= _DISK_7B_BYTES else NOTE, "disk", text)


def _compiler(settings: Settings) -> Check:
    for name in (os.environ.get("CXX") or "c++", "clang++", "g++"):
        if version := _first_line([name, "--version"]):
            return Check(OK, "compiler", "; ".join(filter(None, [version, levels.left_out()])))
    if _built(settings):
        return Check(NOTE, "compiler", "none; not needed, llama.cpp is built")
    hint = (
        "`xcode-select --install`" if sys.platform == "darwin" else "`apt install g++` or your system's like"
    )
    return Check(BAD, "compiler", f"none; llama.cpp can't be built.  {hint}")


def _cmake(settings: Settings) -> Check:
    beside = Path(sys.executable).with_name("cmake")
    if version := _first_line([str(beside) if beside.exists() else "cmake", "--version"]):
        return Check(OK, "CMake", version.removeprefix("cmake version "))
    if _built(settings):
        return Check(NOTE, "CMake", "none; not needed, llama.cpp is built")
    return Check(BAD, "CMake", "none; llama.cpp can't be built.  `make setup` installs it")


def _llama_cpp(settings: Settings) -> Check:
    """Test a build that is there, unless it was tested on this machine before: that takes a second or two."""
    try:
        found = web4lora_llamacpp.find_working(settings.cache)
    except Web4Error as error:
        return Check(BAD, "llama.cpp", f"{error.message}  {error.fix}")
    if found:
        text = f"{found.version}, tested here with {found.level}, in {found.bin}"
        return Check(NOTE if found.avoided else OK, "llama.cpp", "  ".join([text, *found.avoided]))
    return Check(
        NOTE, "llama.cpp", "not built yet; `make setup` or the first run builds it, about 11 minutes"
    )


def _built(settings: Settings) -> bool:
    try:
        return web4lora_llamacpp.find(settings.cache) is not None
    except Web4Error:  # told by the look at llama.cpp itself
        return False


def _ollama(settings: Settings) -> Check:
    del settings
    address = os.environ.get(f"{PREFIX}OLLAMA", "http://127.0.0.1:11434").rstrip("/")
    found = _get(f"{address}/api/version")
    if found is None:
        return Check(
            NOTE, "Ollama", f"not at {address}.  Optional: https://ollama.com; llama-server serves without"
        )
    try:
        version = str(found.json()["version"])
    except (ValueError, KeyError, TypeError):
        return Check(NOTE, "Ollama", f"{address} answers, but not like Ollama")
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if numbers < _OLDEST_OLLAMA:
        wanted = ".".join(map(str, _OLDEST_OLLAMA))
        text = f"{version} at {address}; {wanted} or newer is needed to take a quantized GGUF.  Update it"
        return Check(NOTE, "Ollama", text)
    return Check(OK, "Ollama", f"{version} at {address}")


def _model_runner(settings: Settings) -> Check:
    del settings
    name = "Docker Model Runner"
    given = os.environ.get(f"{PREFIX}DOCKER_MODEL_RUNNER", "").rstrip("/")
    for address in (given,) if given else _MODEL_RUNNERS:
        if _get(f"{address}/engines/status") is not None:
            found = _get(f"{address}/version")
            match = re.search(r"\d+\.\d+\.\d+", found.text) if found else None
            return Check(OK, name, f"{match[0] if match else 'answers'} at {address}")
    hint = "Optional. Docker Desktop: Settings → AI → Enable Docker Model Runner, host-side TCP 12434"
    return Check(NOTE, name, f"not found.  {hint}")


def _docker(settings: Settings) -> Check:
    del settings
    version = _first_line(["docker", "version", "--format", "{{.Server.Version}}"])
    if version and re.match(r"\d", version):
        return Check(OK, "Docker", version)
    return Check(NOTE, "Docker", "not found.  Optional: only `docker compose up` needs it")


def _first_line(command: list[str]) -> str:
    """Return the first line that a program prints; empty when it is not there, fails or hangs."""
    try:
        rows = process.run(command, timeout_seconds=10).strip().splitlines()
    except Web4Error:
        return ""
    return rows[0].strip() if rows else ""


def _get(url: str) -> httpx2.Response | None:
    try:
        response = httpx2.get(url, timeout=_HTTP_SECONDS, trust_env=False)
    except httpx2.HTTPError:
        return None
    return response if response.status_code == httpx2.codes.OK else None
