"""Builds llama.cpp or tells where it lies: `python -m web4lora_llamacpp build|path`."""

from __future__ import annotations

import argparse
import logging
import sys
import time

from web4lora_chassis.errors import Web4Error
from web4lora_chassis.jobs import Progress
from web4lora_chassis.settings import Settings, load

from web4lora_llamacpp.build import ensure_built
from web4lora_llamacpp.tools import find

_LINE_INTERVAL_SECONDS = 10.0


class _Lines:
    """Prints a line when something new starts, and every few seconds while it goes on."""

    def __init__(self) -> None:
        self._said = ("", 0.0)

    def __call__(self, progress: Progress) -> None:
        what, at = self._said
        now = time.monotonic()
        key = progress.message or progress.phase
        if key == what and now - at < _LINE_INTERVAL_SECONDS and progress.done != progress.total:
            return
        self._said = (key, now)
        if progress.total:
            left = f", about {progress.seconds_left / 60:.0f} min left" if progress.seconds_left > 30 else ""
            print(f"  {progress.phase} {progress.done}/{progress.total}{left}", flush=True)  # noqa: T201
        else:
            print(f"  {progress.phase}: {progress.message}", flush=True)  # noqa: T201


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="web4lora_llamacpp", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="compile llama.cpp unless it is in the cache")
    build.add_argument("--portable", action="store_true", help="for images: fits other processors too")
    commands.add_parser("path", help="print the folder of its tools; fails when it is not built")
    arguments = parser.parse_args()
    logging.basicConfig(handlers=[logging.NullHandler()])  # the lines of progress say it already
    try:
        cache = load(Settings).cache
        if arguments.command == "path":
            found = find(cache)
            print(found.bin if found else "llama.cpp is not built yet")  # noqa: T201
            return 0 if found else 1
        started = time.monotonic()
        llama = ensure_built(cache, _Lines(), portable=arguments.portable)
    except Web4Error as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("Stopped; the next build goes on from here.", file=sys.stderr)  # noqa: T201
        return 130
    origin = "cached" if llama.found else f"built in {time.monotonic() - started:.0f} s"
    print(f"llama.cpp {llama.version} ({origin}): {llama.bin}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
