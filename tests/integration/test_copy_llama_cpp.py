"""What docker/copy_llama_cpp.py lays out for images, whoever runs it."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from web4lora_chassis.process import run
from web4lora_chassis.settings import Settings, load
from web4lora_llamacpp import LlamaCpp

SCRIPT = Path(__file__).parents[2] / "docker" / "copy_llama_cpp.py"


def test_the_images_own_user_can_read_it_whatever_the_umask_of_who_made_it(
    llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    target = tmp_path / "llama.cpp"
    os.umask(0o077)
    run([sys.executable, SCRIPT, load(Settings).cache, target], timeout_seconds=300)
    made = [path for path in target.rglob("*") if not path.is_symlink() and "__pycache__" not in path.parts]
    assert len(made) > 10
    closed = [path for path in made if not path.stat().st_mode & stat.S_IROTH]
    closed += [path for path in made if path.is_dir() and not path.stat().st_mode & stat.S_IXOTH]
    assert closed == []
