"""The program of the test jobs: `python -m job_child FOLDER`, as a service's worker module would be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from web4lora_chassis.artifacts import open_store
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.jobs import JobContext, Progress, worker_main
from web4lora_chassis.settings import Settings

sys.stdout.write('loading: a library that prints on import\n["json", "too"]\n')
sys.stdout.flush()


def succeed(context: JobContext) -> Mapping[str, Any]:
    steps = int(context.spec.get("steps", 3))
    for step in range(steps + 1):
        context.report(Progress("count", step, steps, "steps", figures={"loss": 0.5}))
    sys.stdout.write("this goes to the log\n")
    return {"attempt": context.attempt, "echo": context.spec.get("echo", "")}


def note(context: JobContext) -> Mapping[str, Any]:
    """Write down when it worked, so that a test can see order and overlap."""
    with Path(context.spec["file"]).open("a") as file:
        file.write(f"begin {context.spec['name']}\n")
    time.sleep(0.1)
    with Path(context.spec["file"]).open("a") as file:
        file.write(f"end {context.spec['name']}\n")
    return {}


def fail(context: JobContext) -> Mapping[str, Any]:
    raise InvalidInput("data.jsonl:3: no answer.", fix="Add one.", reason="NO_ANSWER", metadata={"line": 3})


def need_the_store(context: JobContext) -> Mapping[str, Any]:
    """Ask a store that does not answer, but for the second time."""
    asked = context.work_dir / "asked"
    if not asked.exists():
        asked.touch()
        open_store(Settings(store=context.spec["store"], s3_access_key="x", s3_secret_key="y")).find("gguf")
    return {"attempt": context.attempt}


def crash(context: JobContext) -> Mapping[str, Any]:
    raise RuntimeError("tensor of the wrong shape")


def unserializable(context: JobContext) -> Mapping[str, Any]:
    return {"path": Path("x")}


def leave(context: JobContext) -> Mapping[str, Any]:
    os._exit(7)


def run_out_of_memory(context: JobContext) -> Mapping[str, Any]:
    """End as the system's out-of-memory killer would end it, until it was started `needed` times."""
    (context.work_dir / f"attempt{context.attempt}").touch()
    if context.memory_failures < context.spec["needed"]:
        os.kill(os.getpid(), 9)
    return {
        "memory_failures": context.memory_failures,
        "seen": sorted(path.name for path in context.work_dir.iterdir()),
    }


def segfault(context: JobContext) -> Mapping[str, Any]:
    os.kill(os.getpid(), 11)
    return {}


def raise_memory_error(context: JobContext) -> Mapping[str, Any]:
    raise MemoryError


def hang(context: JobContext) -> Mapping[str, Any]:
    """Start a grandchild, say who is who, and stay until killed; `stubborn` ignores the polite request."""
    program = "import time; time.sleep(600)"
    if context.spec.get("stubborn"):
        program = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + program
    grandchild = subprocess.Popen([sys.executable, "-c", program])
    try:
        pids = {"child": os.getpid(), "grandchild": grandchild.pid, "attempt": context.attempt}
        part = Path(context.spec["pids"] + ".part")
        part.write_text(json.dumps(pids))
        part.replace(context.spec["pids"])
        context.report(Progress("hang", 1, 0, "steps"))
        while not (context.spec.get("release") and Path(context.spec["release"]).exists()):
            try:
                time.sleep(0.05)
            except KeyboardInterrupt:
                if not context.spec.get("stubborn"):
                    raise
        grandchild.kill()
        return {"attempt": context.attempt}
    finally:
        Path(context.spec["pids"] + ".cleaned").touch()


def hold(context: JobContext) -> Mapping[str, Any]:
    """Say how long each secret is, and that none is in the environment."""
    seen = any(secret in text for secret in context.secrets.values() for text in os.environ.values())
    return {"lengths": {name: len(value) for name, value in context.secrets.items()}, "in_env": seen}


def count_up(context: JobContext) -> Mapping[str, Any]:
    """Count until asked to end early; end at once, by a kill, in the first attempt."""
    steps = 0
    while not context.end_early():
        steps += 1
        context.report(Progress("count", steps, 0, "steps"))
        time.sleep(0.02)
    if context.attempt <= context.spec.get("killed_attempts", 0):
        os.kill(os.getpid(), 9)
    return {"attempt": context.attempt, "counted": steps > 0}


def fork(context: JobContext) -> Mapping[str, Any]:
    """Leave a forked grandchild behind that holds our pipes open."""
    if os.fork() == 0:
        time.sleep(600)
        os._exit(0)
    os._exit(3)


if __name__ == "__main__":
    sys.exit(
        worker_main(
            {
                "succeed": succeed,
                "note": note,
                "fail": fail,
                "need_the_store": need_the_store,
                "crash": crash,
                "unserializable": unserializable,
                "leave": leave,
                "run_out_of_memory": run_out_of_memory,
                "segfault": segfault,
                "raise_memory_error": raise_memory_error,
                "hang": hang,
                "fork": fork,
                "hold": hold,
                "count_up": count_up,
            }
        )
    )
