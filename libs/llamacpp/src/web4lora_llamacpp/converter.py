"""llama.cpp's converters, run in a process that gets nothing of ours and runs no code of a model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from web4lora_llamacpp.run_tool import run_tool

_LAUNCHER = Path(__file__).with_name("launcher.py")
_KEPT = {"PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"}
_KEPT_BEGINNINGS = ("OMP_", "GOMP_", "KMP_", "CUDA_", "NVIDIA_", "GGML_", "MTL_")
"""What Python, torch and llama.cpp may need; all else, tokens and keys among it, stays with us."""


def environment(home: Path) -> dict[str, str]:
    """Return the whole environment of a tool: a converter, a quantizer, a server.

    Args:
        home: Stands for the home folder: what libraries keep lies there, and nothing of the user's is read.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or name.startswith(_KEPT_BEGINNINGS)
    }
    return {**kept, "HOME": str(home), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_converter(
    script: Path, arguments: Sequence[str | Path], *, log: Path, on_line: Callable[[str], None]
) -> int:
    """Run a converter and return its exit code; see `run_tool`.

    Args:
        script: convert_hf_to_gguf.py or convert_lora_to_gguf.py in llama.cpp's source.
        arguments: Its arguments.
        log: Its output is appended here; the log's folder is its home folder.
        on_line: Called with each line of output.

    Raises:
        FailedPrecondition: Python can't be run.
    """
    # -I: neither PYTHON* variables nor the working folder nor the user's own packages lend it modules.
    command: list[str | Path] = [sys.executable, "-I", _LAUNCHER, script, *arguments]
    return run_tool(command, log, on_line, env=environment(log.parent))
