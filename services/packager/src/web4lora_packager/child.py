"""Work that needs torch, in a child process: its memory returns when it ends, and it gets nothing of ours.

`python -I -m web4lora_packager.child WORK FOLDER...` prints one line of JSON: what came of it, or an error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from web4lora_chassis import errors, process
from web4lora_chassis.errors import Internal, Web4Error
from web4lora_llamacpp.converter import environment


def ask(work: str, home: Path, *folders: Path) -> dict[str, Any]:
    """Run a work in a child and return what came of it.

    Args:
        work: describe or expect (of base and adapter), or prove (of base, adapter and merged model).
        home: The child's home folder.
        folders: What it is about.

    Raises:
        Web4Error: What the child raised.
        Internal: It failed otherwise; the message has its last lines.
    """
    command: list[str | Path] = [sys.executable, "-I", "-m", __name__, work, *folders]
    # Threads that spin while they wait starve each other on a busy machine.
    env = {"OMP_WAIT_POLICY": "passive"} | environment(home)
    answer: dict[str, Any] = json.loads(process.run(command, env=env).strip().splitlines()[-1])
    raise_error(answer)
    return answer


def error_data(error: Web4Error) -> dict[str, Any]:
    """Return an error as JSON data, for `raise_error` in the parent."""
    return {
        "error": type(error).__name__,
        "message": error.message,
        "fix": error.fix,
        "reason": error.reason,
    }


def raise_error(answer: Mapping[str, Any]) -> None:
    """Raise the error that a child's answer holds, if any.

    Raises:
        Web4Error: What the child raised.
    """
    if "error" in answer:
        kind = getattr(errors, answer["error"], Internal)
        raise kind(answer["message"], fix=answer["fix"], reason=answer["reason"])


def main(work: str, *folders: str) -> dict[str, Any]:
    """Do a work in this process and return what came of it, or its error, as JSON data."""
    paths = [Path(folder) for folder in folders]
    try:
        if work == "describe":
            from web4lora_packager.proof import require_fit
            from web4lora_packager.skeleton import describe

            base, _ = paths
            layout = dict(describe(base))
            require_fit(*paths)
            return layout
        if work == "expect":
            from web4lora_packager.expected import expect

            return expect(*paths)
        from web4lora_packager.proof import prove

        return dict(prove(*paths))
    except Web4Error as error:
        return error_data(error)


if __name__ == "__main__":
    sys.stdout.write(f"\n{json.dumps(main(*sys.argv[1:]))}\n")
