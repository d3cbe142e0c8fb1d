"""Names of models in registries: `host[:port]/repository[:tag]`."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from web4lora_chassis.errors import InvalidInput

_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::\d{1,5})?")
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_LENGTH = 255
_DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")


@dataclass(frozen=True)
class Reference:
    """A place for a model in a registry.

    Attributes:
        host: The registry, with its port when it has one.
        repository: The path below it, for example web4/demo.
        tag: The tag; empty when none was given.
    """

    host: str
    repository: str
    tag: str = ""

    def __str__(self) -> str:
        """Return it as people write it."""
        return f"{self.host}/{self.repository}" + (f":{self.tag}" if self.tag else "")

    @property
    def loopback(self) -> bool:
        """True when the registry is on this machine."""
        name = re.sub(r":\d+$", "", self.host).strip("[]")
        try:
            return name == "localhost" or ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    def address(self, *, plain_http: bool) -> str:
        """Return the address of the registry's API.

        Args:
            plain_http: Without TLS also beyond this machine; on this machine there is none anyway.
        """
        host = "registry-1.docker.io" if self.host in _DOCKER_HUB else self.host
        return f"{'http' if plain_http or self.loopback else 'https'}://{host}"


def parse_reference(text: str) -> Reference:
    """Read `host[:port]/repository[:tag]`. The host is never guessed: a model must not end up elsewhere.

    Raises:
        InvalidInput: It has another form.
    """
    host, _, path = text.partition("/")
    repository, _, tag = path.partition(":")
    named = host == "localhost" or any(sign in host for sign in ".:")
    if (
        not named
        or not _HOST.fullmatch(host)
        or not _REPOSITORY.fullmatch(repository)
        or len(f"{host}/{repository}") > _LENGTH
        or (":" in path and not _TAG.fullmatch(tag))
    ):
        raise InvalidInput(
            f"{text!r} does not name a place in a registry.",
            fix="Write registry/repository:tag, for example docker.io/you/web4-demo:v1 or "
            "localhost:5000/web4/demo:v1; the repository is in lower case.",
            metadata={"field": "reference"},
        )
    return Reference(host, repository, tag)
