"""What an image installs from elsewhere.

`requirements.py needs FOLDER... [--without NAME...]` prints what our distributions in these folders need, a
line each. An image installs it in a layer of its own, which a change of our code leaves as it is.

`requirements.py locked REPORT` prints the same with all that it needs in turn, out of pip's report, each with
the digests that docker/hashes.txt names.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9._-]+")
_HASHES = Path(__file__).with_name("hashes.txt")


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    needs = actions.add_parser("needs")
    needs.add_argument("folders", nargs="+", type=Path)
    needs.add_argument("--without", nargs="*", default=[], help="what the image does not need at run time")
    actions.add_parser("locked").add_argument("report", type=Path)
    arguments = parser.parse_args()
    try:
        if arguments.action == "needs":
            lines = needed(arguments.folders, arguments.without)
        else:
            lines = locked(json.loads(arguments.report.read_text(encoding="utf-8")), _HASHES)
    except KeyError as error:
        sys.stderr.write(f"{error.args[0]} is not in docker/hashes.txt: docker/make-hashes writes it anew.\n")
        return 1
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def needed(folders: list[Path], without: list[str]) -> list[str]:
    """Return the requirements of our distributions that others make."""
    needs = set()
    for folder in folders:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for requirement in project.get("dependencies", ()):
            found = _NAME.match(requirement)
            if found and not found[0].startswith("web4lora") and found[0] not in without:
                needs.add(requirement)
    return sorted(needs)


def locked(report: dict, hashes: Path) -> list[str]:
    """Return what pip would install as requirements with digests.

    Raises:
        KeyError: One of them is not in the file of digests, by its name and version.
    """
    known = {}
    for line in hashes.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if not line.startswith("#"):
            pin, *digests = line.split()
            known[_canonical(pin)] = f"{pin} {' '.join(digests)}"
    wanted = [f"{each['metadata']['name']}=={each['metadata']['version']}" for each in report["install"]]
    return [known[_canonical(pin)] for pin in sorted(wanted)]


def _canonical(pin: str) -> str:
    """Return a pin as packages are compared: PEP 503."""
    return re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() + "==" + pin.split("==")[1]


if __name__ == "__main__":
    sys.exit(main())
