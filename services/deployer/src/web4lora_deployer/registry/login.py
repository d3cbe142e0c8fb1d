"""How a registry is shown who we are: by a password, or by a token that its login server gives for it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx2
from web4lora_chassis.errors import InvalidInput, Unauthenticated, Unavailable

from web4lora_deployer.registry.patience import BUSY, busy

_CLIENT_ID = "web4lora"
_TOKEN_SECONDS = 30.0
_PARAMETER = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"|(\w+)=([^\s",]+)')


@dataclass(frozen=True)
class Credentials:
    """What Docker's configuration holds for a registry; all empty for a registry that asks for nothing.

    Attributes:
        username: The user.
        password: The password, or a token that serves as one.
        identity_token: A refresh token, which some logins give in place of a password.
    """

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """The value of the header Authorization; empty without a password."""
        if not self.password:
            return ""
        pair = f"{self.username}:{self.password}".encode()
        return f"Basic {base64.b64encode(pair).decode()}"


def read_credentials(text: str) -> Credentials:
    """Read credentials from the JSON text that a client hands over; an empty text holds none.

    Raises:
        InvalidInput: It has another form. The text itself is never told.
    """
    if not text:
        return Credentials()
    try:
        data = json.loads(text)
        return Credentials(**{key: str(value) for key, value in data.items()})
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidInput(
            "The registry's credentials are not a JSON object of username, password and identity_token."
        ) from error


class Login:
    """Answers the challenges of one registry.

    A token is always asked for with the right to push: some registries give one for reading when they are
    first asked what they have, and then refuse to write by it without a challenge.

    Args:
        credentials: Who we are.
        http: For the token server.
        repository: Where we push to.
        plain_http: Whether credentials may be sent without TLS.
    """

    def __init__(
        self, credentials: Credentials, http: httpx2.Client, repository: str, *, plain_http: bool
    ) -> None:
        self._credentials = credentials
        self._http = http
        self._scope = f"repository:{repository}:pull,push"
        self._plain_http = plain_http
        self.header = ""
        """The value of the header Authorization; empty until the registry has asked for one."""

    def answer(self, challenges: list[str], host: str) -> None:
        """Set the header that a registry asks for.

        Args:
            challenges: The values of its WWW-Authenticate headers.
            host: The registry, for messages.

        Raises:
            Unauthenticated: Nothing that we have answers it.
            Unavailable: Its token server is out of reach, or busy.
        """
        for challenge in challenges:
            scheme, _, rest = challenge.partition(" ")
            if scheme.lower() == "bearer":
                self.header = f"Bearer {self._token(_parameters(rest), host)}"
                return
            if scheme.lower() == "basic" and self._credentials.basic:
                self.header = self._credentials.basic
                return
        raise denied(host)

    def _token(self, challenge: Mapping[str, str], host: str) -> str:
        """Fetch a token from the server that a challenge names."""
        realm = challenge.get("realm", "")
        if urlsplit(realm).scheme != "https" and not self._plain_http:
            raise Unauthenticated(
                f"{host} wants a login at {realm!r}, without TLS; nothing was sent there.",
                fix="Ask whoever runs the registry; --plain-http allows it in a network that you trust.",
                reason="REGISTRY_LOGIN",
            )
        wanted = {"scope": self._scope}
        if challenge.get("service"):
            wanted["service"] = challenge["service"]
        try:
            if self._credentials.identity_token:
                fields = {
                    "grant_type": "refresh_token",
                    "refresh_token": self._credentials.identity_token,
                    "client_id": _CLIENT_ID,
                    **wanted,
                }
                answer = self._http.post(realm, data=fields, timeout=_TOKEN_SECONDS)
            else:
                basic = self._credentials.basic
                headers = {"Authorization": basic} if basic else {}
                url = httpx2.URL(realm).copy_merge_params(wanted)
                answer = self._http.get(url, headers=headers, timeout=_TOKEN_SECONDS)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise Unavailable(
                f"The login server of {host}, {urlsplit(realm).netloc}, is out of reach: "
                f"{error or type(error).__name__}",
                fix="Try again; what has arrived is not sent again.",
                reason="REGISTRY_UNAVAILABLE",
            ) from error
        if answer.status_code in BUSY:
            raise busy(f"The login server of {host}", answer, f"HTTP {answer.status_code}")
        if answer.status_code != httpx2.codes.OK:
            raise denied(host, f"its login server said HTTP {answer.status_code}")
        try:
            data = answer.json()
            return str(data.get("token") or data["access_token"])
        except (ValueError, KeyError, AttributeError) as error:
            raise denied(host, "its login server gave no token") from error


def denied(host: str, why: str = "") -> Unauthenticated:
    """Return the error for a registry that does not let us in."""
    return Unauthenticated(
        f"{host} does not let us push{f': {why}' if why else ''}.",
        fix=f"`docker login {host}` with an account that may push there, then try again.",
        reason="REGISTRY_LOGIN",
        metadata={"registry": host},
    )


def _parameters(text: str) -> dict[str, str]:
    """Read the parameters of a challenge, each of the form name="value"."""
    found = {}
    for name, quoted, bare_name, bare in _PARAMETER.findall(text):
        found[(name or bare_name).lower()] = re.sub(r"\\(.)", r"\1", quoted) if name else bare
    return found
