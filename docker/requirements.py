"""Prints what our distributions need from elsewhere: `requirements.py FOLDER... [--without NAME...]`.

An image installs these in a layer of their own, which a change of our code leaves as it is.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9._-]+")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--without", nargs="*", default=[], help="what the image does not need at run time")
    arguments = parser.parse_args()
    needs = set()
    for folder in arguments.folders:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for requirement in project.get("dependencies", ()):
            found = _NAME.match(requirement)
            if found and not found[0].startswith("web4lora") and found[0] not in arguments.without:
                needs.add(requirement)
    sys.stdout.write("\n".join(sorted(needs)) + "\n")


if __name__ == "__main__":
    main()
