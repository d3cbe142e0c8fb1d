"""Runs a converter of llama.cpp so that no model's own code runs: `launcher.py SCRIPT ARGUMENT...`.

llama.cpp's converters load tokenizers with trust_remote_code=True. Here the parts of transformers that fetch,
import or allow such code refuse, before the converter has imported any of them. Not to be imported: it
changes transformers for the whole process. transformers is the converter's; this package does without it.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any, NoReturn

REFUSED = "the model brings code of its own, and that is never run"


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(REFUSED)


def _harden() -> None:
    """Take the way to a model's own code out of transformers."""
    remote = importlib.import_module("transformers.dynamic_module_utils")
    resolve = remote.resolve_trust_remote_code

    def never(_trust_remote_code: Any, *arguments: Any, **options: Any) -> Any:
        return resolve(False, *arguments, **options)

    changes = {
        "resolve_trust_remote_code": never,
        "get_class_from_dynamic_module": _refuse,
        "get_cached_module_file": _refuse,
        "get_class_in_module": _refuse,
    }
    for name, change in changes.items():
        getattr(remote, name)  # a transformers that names it otherwise must not go unnoticed
        setattr(remote, name, change)


def main() -> None:
    """Run the script as Python would, in this process."""
    script = Path(sys.argv[1])
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(script.parent))
    _harden()
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
