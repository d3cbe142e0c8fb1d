"""The secrets of the stack in containers: `python -m web4lora_chassis.stack_secrets lay` inside it.

A container of its own runs it at every start, without a network. It keeps every secret in one volume, makes
those that nobody gave, and lays into each service's volume that service's own and nothing else.
`docker/make-env`, which runs on the host, takes the names and the form of the secrets from here: this module
needs Python 3.9 or newer and nothing else.

  lay   keep, make and lay out; may be repeated: only what was given anew changes
  show  print the kept secrets as one JSON object, for `docker/make-env`; with a KEY that one alone
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

KEYS: Mapping[str, Callable[[], str]] = {
    "token": lambda: secrets.token_urlsafe(32),
    "trainer_token": lambda: secrets.token_urlsafe(32),
    "packager_token": lambda: secrets.token_urlsafe(32),
    "deployer_token": lambda: secrets.token_urlsafe(32),
    "s3_access_key": lambda: "web4lora" + secrets.token_hex(6),
    "s3_secret_key": lambda: secrets.token_urlsafe(30),
    "minio_root_user": lambda: "admin" + secrets.token_hex(4),
    "minio_root_password": lambda: secrets.token_urlsafe(30),
    "postgres_password": lambda: secrets.token_urlsafe(30),
}
"""What makes each secret; .env.example says what it is for. MinIO bounds the lengths of its keys."""

_STORE = ("s3_access_key", "s3_secret_key")
OWN: Mapping[str, tuple[str, ...]] = {
    "minio": ("minio_root_user", "minio_root_password"),
    "minio-setup": ("minio_root_user", "minio_root_password", *_STORE),
    "postgres": ("postgres_password",),
    "gateway": ("token", "trainer_token", "packager_token", "deployer_token", *_STORE, "database"),
    "packager": ("packager_token", *_STORE),
    "deployer": ("deployer_token", *_STORE),
    "trainer": ("trainer_token", *_STORE),
}
"""By service, the secrets that are its own."""


def database(postgres_password: str) -> str:
    """Return the address of the stack's database, which holds its password."""
    return f"postgresql://web4lora:{postgres_password}@postgres:5432/web4lora"


def lay(kept: Path, given: Path, services: Path) -> list[str]:
    """Bring the volumes up to date.

    Args:
        kept: The folder of all secrets.
        given: A folder of secrets that the stack's owner chose; they win. Other files in it mean nothing.
        services: A folder for each service's own, by its name; one that is not there gets none.

    Returns:
        The names of the secrets that were made.

    Raises:
        ValueError: A given secret is empty or not one line of text.
        OSError: A folder can't be read or written.
    """
    values = {name: _read(given / name) or _read(kept / name) for name in KEYS}
    made = [name for name, value in values.items() if not value]
    values |= {name: KEYS[name]() for name in made}
    for name, value in values.items():
        _write(kept / name, value, mode=0o400)
    values["database"] = database(values["postgres_password"])
    for service, names in OWN.items():
        folder = services / service
        if not folder.is_dir():
            continue
        for name in names:
            # The folder is this one service's; its user is not ours, and differs from image to image.
            _write(folder / name, values[name], mode=0o444)
        for path in folder.iterdir():
            if path.name not in names:
                path.unlink()
    return made


def show(kept: Path, names: Iterable[str] = KEYS) -> Mapping[str, str]:
    """Return kept secrets; those that were never made are missing."""
    return {name: value for name in names if (value := _read(kept / name))}


def _read(path: Path) -> str:
    """Return a secret, or nothing when it is not there."""
    try:
        value = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError:
        value = ""
    if not value or any(not "!" <= letter <= "~" for letter in value):
        raise ValueError(f"{path} must hold one line of ASCII letters, digits and signs without blanks.")
    return value


def _write(path: Path, value: str, *, mode: int) -> None:
    """Write a secret, whole or not at all, unless it is there already."""
    try:
        if path.read_text(encoding="utf-8") == value + "\n":
            return
    except (FileNotFoundError, UnicodeDecodeError):
        pass
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    part.touch(mode=0o600)
    part.write_text(value + "\n", encoding="utf-8")
    part.chmod(mode)
    part.replace(path)


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["lay", "show"])
    parser.add_argument("key", nargs="?", choices=sorted(KEYS), help="for show: this one alone")
    parser.add_argument("--kept", type=Path, default=Path("/secrets/kept"))
    parser.add_argument("--given", type=Path, default=Path("/secrets/given"))
    parser.add_argument("--services", type=Path, default=Path("/secrets/services"))
    arguments = parser.parse_args()
    try:
        if arguments.action == "lay":
            made = lay(arguments.kept, arguments.given, arguments.services)
            sys.stdout.write(f"secrets: {', '.join(made) + ' made' if made else 'complete, none made'}\n")
        elif arguments.key:
            sys.stdout.write(show(arguments.kept, [arguments.key])[arguments.key] + "\n")
        else:
            sys.stdout.write(json.dumps(dict(show(arguments.kept))) + "\n")
    except KeyError:
        sys.stderr.write(f"{arguments.key} was never made: `docker compose up` makes it\n")
        return 1
    except (OSError, ValueError) as error:
        sys.stderr.write(f"secrets: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
