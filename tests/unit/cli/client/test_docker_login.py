"""Docker's configuration as `docker login` writes it, and a program that keeps logins."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from web4lora.client.docker_login import registry_login
from web4lora_chassis.errors import FailedPrecondition

LOGIN = {"username": "atlas", "password": "sesame:1"}
AUTH = base64.b64encode(b"atlas:sesame:1").decode()
KEEPER = """\
#!/bin/sh
read server
[ "$1" = get ] || exit 9
case "$server" in
  kept.example) echo '{"ServerURL": "kept.example", "Username": "atlas", "Secret": "sesame:1"}' ;;
  token.example) echo '{"ServerURL": "token.example", "Username": "<token>", "Secret": "refresh"}' ;;
  locked.example) echo 'the keychain is locked'; exit 1 ;;
  *) echo 'credentials not found in native keychain'; exit 1 ;;
esac
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    keeper = tmp_path / "bin" / "docker-credential-test"
    keeper.parent.mkdir()
    keeper.write_text(KEEPER)
    keeper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{keeper.parent}:/bin:/usr/bin")
    return tmp_path


def write(folder: Path, **config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def test_without_a_configuration_there_is_no_login() -> None:
    assert registry_login("example.com") == {}


@pytest.mark.parametrize("key", ["example.com", "https://example.com", "https://example.com/"])
@pytest.mark.parametrize(
    ("entry", "login"),
    [
        ({"auth": AUTH}, LOGIN),
        (LOGIN, LOGIN),
        ({"auth": AUTH, "identitytoken": "refresh"}, {"identity_token": "refresh"}),
        ({}, {}),
    ],
)
def test_a_login_that_is_written_down_is_found(
    folder: Path, key: str, entry: dict[str, str], login: dict[str, str]
) -> None:
    write(folder, auths={key: entry, "other.example": {"auth": "b3RoZXI6eA=="}})
    assert registry_login("example.com") == login
    assert registry_login("example.com:5000") == {}


def test_docker_hub_has_a_name_of_its_own(folder: Path) -> None:
    write(folder, auths={"https://index.docker.io/v1/": {"auth": AUTH}})
    assert registry_login("docker.io") == LOGIN


@pytest.mark.parametrize("config", [{"credsStore": "test"}, {"credHelpers": {"kept.example": "test"}}])
def test_a_login_that_a_program_keeps_is_asked_for(folder: Path, config: dict[str, Any]) -> None:
    write(folder, auths={"kept.example": {}}, **config)
    assert registry_login("kept.example") == LOGIN
    assert registry_login("unknown.example") == {}


def test_a_kept_token_is_told_from_a_password(folder: Path) -> None:
    write(folder, credsStore="test")
    assert registry_login("token.example") == {"identity_token": "refresh"}


@pytest.mark.parametrize(
    ("config", "host", "why"),
    [
        ({"credsStore": "test"}, "locked.example", "docker-credential-test did not give the login"),
        ({"credsStore": "gone"}, "a.example", "docker-credential-gone can't be run"),
        ({"credsStore": "../evil"}, "a.example", "no program's name"),
        ({"auths": {"a.example": {"auth": "%%%"}}}, "a.example", "another form than Docker writes"),
        ({"auths": []}, "a.example", "another form than Docker writes"),
    ],
)
def test_what_can_t_be_read_is_said_and_no_secret_with_it(
    folder: Path, config: dict[str, Any], host: str, why: str
) -> None:
    write(folder, **config)
    with pytest.raises(FailedPrecondition, match=why) as caught:
        registry_login(host)
    assert "sesame" not in str(caught.value)
