"""Copies the llama.cpp that a build finds in its cache into an image: `copy_llama_cpp.py CACHE TARGET`.

TARGET gets `bin/` (tools and libraries, without symbols), `source/` (the converters, and what they import)
and LICENSE.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import web4lora_llamacpp

_CONVERTER = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py/gguf")


def main() -> None:
    """Run the command."""
    cache, target = (Path(argument) for argument in sys.argv[1:])
    os.umask(0o022)  # the image's user is another: what is made here is for all to read, whoever makes it
    found = web4lora_llamacpp.find(cache)
    if found is None:
        raise SystemExit(f"There is no llama.cpp in {cache}.")
    shutil.copytree(found.bin, target / "bin", symlinks=True)
    programs = [path for path in sorted((target / "bin").iterdir()) if not path.is_symlink()]
    subprocess.run(["strip", "--strip-unneeded", *programs], check=True)
    for name in _CONVERTER:
        source, place = found.source / name, target / "source" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place)
        else:
            shutil.copy2(source, place)
    shutil.copy2(found.source / "LICENSE", target / "LICENSE")


if __name__ == "__main__":
    main()
