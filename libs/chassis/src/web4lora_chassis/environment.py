"""What child processes get of our environment: no secret that they do not need."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatchcase

from web4lora_chassis.settings import ENV_FILE, PREFIX

STORE_KEY = (f"{PREFIX}S3_ACCESS_KEY*", f"{PREFIX}S3_SECRET_KEY*")
"""The artifact store's key, or where it is: for jobs, which read and write artifacts."""
HUB_TOKEN = ("HF_*", "HUGGING_FACE_HUB_TOKEN")
"""For who fetches base models from the hub."""

_SECRET = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|COOKIE|(API|ACCESS|PRIVATE|ENCRYPTION|SIGNING)_?KEY",
    re.IGNORECASE,
)
_OURS_SECRET = (f"{PREFIX}DATABASE*", f"{PREFIX}S3_ROOT_*", ENV_FILE)
"""Beside those whose names say so: an address with a password, and a file that names all the others."""


def environment(*needed: str, ours: bool = False) -> dict[str, str]:
    """Return our environment without secrets, and without our settings, for a child process.

    Args:
        needed: Names, with * for any end, of secrets that the child is to have all the same.
        ours: Leave it our settings: it is a program of ours, which reads them.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if any(fnmatchcase(name, pattern) for pattern in needed)
        or (not is_secret(name) and (ours or not name.startswith(PREFIX)))
    }


def is_secret(name: str) -> bool:
    """Say whether a variable's name tells that it holds a secret, or where one is."""
    return bool(_SECRET.search(name)) or any(fnmatchcase(name, pattern) for pattern in _OURS_SECRET)
