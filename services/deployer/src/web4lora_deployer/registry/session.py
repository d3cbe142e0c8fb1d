"""Where an unfinished upload is, so that a later push goes on with it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from web4lora_deployer.registry.reference import Reference


class Session:
    """The address of one unfinished upload, in a file of its own."""

    def __init__(self, folder: Path, place: Reference, sha256: str) -> None:
        name = f"{place.host}/{place.repository}@{sha256}"
        self._file = folder / hashlib.sha256(name.encode()).hexdigest()[:32]

    def address(self) -> str:
        """Return it; empty when there is none."""
        try:
            return self._file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    def keep(self, address: str) -> None:
        """Write it down. It may hold a key to the upload, so it is for us alone."""
        self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file.write_text(address, encoding="utf-8")
        self._file.chmod(0o600)

    def forget(self) -> None:
        """Remove it."""
        self._file.unlink(missing_ok=True)
