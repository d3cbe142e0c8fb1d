"""The login that Docker has for a registry: from its configuration, or from the program that keeps it."""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from web4lora_chassis.errors import FailedPrecondition
from web4lora_chassis.process import ending, start
from web4lora_chassis.settings import PREFIX

_PROGRAM = re.compile(r"[A-Za-z0-9._-]+")
_PROGRAM_SECONDS = 60.0  # a keychain may ask its owner first
_NOT_THERE = "credentials not found"
_TOKEN_USER = "<token>"  # noqa: S105 - what stands for a user's name when the secret is a token
_DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")
_DOCKER_HUB_KEY = "https://index.docker.io/v1/"


def registry_login(host: str) -> dict[str, str]:
    """Return Docker's login for a registry; empty when it has none.

    Args:
        host: The registry, with its port when it has one.

    Returns:
        `username` and `password`, or `identity_token`.

    Raises:
        FailedPrecondition: Docker's configuration, or the program that keeps the login, can't be read.
    """
    folder = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
    config = _read(folder / "config.json")
    for name in _names(host):
        helper = config.get("credHelpers", {}).get(name)
        if helper:
            return _from_helper(helper, name)
    if config.get("credsStore"):
        for name in _names(host):
            if found := _from_helper(config["credsStore"], name):
                return found
    for name in _names(host):
        if found := _from_config(config.get("auths", {}).get(name), folder / "config.json"):
            return found
    return {}


def _names(host: str) -> tuple[str, ...]:
    """Return the names under which Docker may have a registry's login."""
    if host in _DOCKER_HUB:
        return (_DOCKER_HUB_KEY, *_DOCKER_HUB)
    return (host, f"https://{host}", f"https://{host}/", f"http://{host}")


def _read(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise FailedPrecondition(
            f"Docker's configuration {path} can't be read: {error}.", fix="Correct it, or move it away."
        ) from error
    sections = ("auths", "credHelpers")
    if not isinstance(config, dict) or not all(isinstance(config.get(key, {}), dict) for key in sections):
        raise FailedPrecondition(
            f"Docker's configuration {path} has another form than Docker writes.",
            fix="Correct it, or move it away.",
        )
    return config


def _from_helper(helper: str, name: str) -> dict[str, str]:
    """Ask the program docker-credential-<helper>."""
    if not isinstance(helper, str) or not _PROGRAM.fullmatch(helper):
        raise FailedPrecondition(
            f"Docker's configuration names {helper!r} as the keeper of logins, which is no program's name."
        )
    program = f"docker-credential-{helper}"
    # A helper may take its own login, AWS's for one, from the environment.
    env = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX)}
    process = start([program, "get"], env=env, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        said, _ = process.communicate(name.encode(), timeout=_PROGRAM_SECONDS)
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.communicate()
        raise FailedPrecondition(
            f"{program} did not give the login for {name} in time.",
            fix="Does it ask for something? Unlock it.",
        ) from error
    text = said.decode(errors="replace")
    if process.returncode != 0 and _NOT_THERE in text:
        return {}
    try:
        data = json.loads(text)
        user, secret = str(data["Username"]), str(data["Secret"])
    except (ValueError, KeyError, TypeError) as error:
        outcome = ending(process.returncode) if process.returncode else "gave something else"
        raise FailedPrecondition(
            f"{program} did not give the login for {name}; it {outcome}.",
            fix=f"`docker login {name}` keeps it anew.",
        ) from error
    return {"identity_token": secret} if user == _TOKEN_USER else {"username": user, "password": secret}


def _from_config(entry: object, path: Path) -> dict[str, str]:
    """Read a login that stands in the configuration itself."""
    if not isinstance(entry, dict):
        return {}
    if entry.get("identitytoken"):
        return {"identity_token": str(entry["identitytoken"])}
    if entry.get("username") and entry.get("password"):
        return {"username": str(entry["username"]), "password": str(entry["password"])}
    if not entry.get("auth"):
        return {}
    try:
        user, colon, password = base64.b64decode(str(entry["auth"]), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        user = colon = password = ""
    if not colon:
        raise FailedPrecondition(
            f"Docker's configuration {path} holds a login of another form than Docker writes.",
            fix="`docker login` writes it anew.",
        )
    return {"username": user, "password": password.rstrip("\0")}
