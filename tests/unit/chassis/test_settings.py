"""Settings from the environment: secrets from files, frozen, errors that name the variable."""

from __future__ import annotations

from pathlib import Path

import pydantic
import pytest
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.settings import Settings, load, read_pem


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"WEB4LORA_{name.upper()}", raising=False)
        monkeypatch.delenv(f"WEB4LORA_{name.upper()}_FILE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_defaults_lie_below_the_home_folder(tmp_path: Path) -> None:
    settings = load(Settings)
    assert settings.home == tmp_path / ".web4lora"
    assert settings.cache == tmp_path / ".cache" / "web4lora"
    assert settings.store == (tmp_path / ".web4lora" / "store").as_uri()
    assert settings.token.get_secret_value() == ""


def test_environment_and_overrides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WEB4LORA_HOME", "~/elsewhere")
    monkeypatch.setenv("WEB4LORA_TRAINER_ADDRESS", "127.0.0.1:1")
    assert load(Settings).home == tmp_path / "elsewhere"
    assert load(Settings).trainer_address == "127.0.0.1:1"
    assert load(Settings, home=tmp_path / "x").store == (tmp_path / "x" / "store").as_uri()


def test_secrets_come_from_files_and_never_show(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cr3t\n")
    monkeypatch.setenv("WEB4LORA_TOKEN_FILE", str(tmp_path / "token"))
    settings = load(Settings)
    assert settings.token.get_secret_value() == "s3cr3t"
    assert "s3cr3t" not in repr(settings)
    assert "s3cr3t" not in settings.model_dump_json()


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe"])
def test_a_secret_file_that_gives_no_secret_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("WEB4LORA_TOKEN_FILE", str(path))
    with pytest.raises(InvalidInput, match="WEB4LORA_TOKEN_FILE") as caught:
        load(Settings)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("token", ["s3cr3t é", "s3cr3t\n"])
def test_a_token_that_no_header_can_carry_is_refused(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("WEB4LORA_TOKEN", token)
    with pytest.raises(InvalidInput, match="WEB4LORA_TOKEN") as caught:
        load(Settings)
    assert "s3cr3t" not in str(caught.value)


def test_settings_are_frozen() -> None:
    settings = load(Settings)
    with pytest.raises(pydantic.ValidationError):
        settings.home = Path("/")  # type: ignore[misc]


def test_an_error_names_the_variable_and_not_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB4LORA_TLS_CLIENT_REQUIRED", "s3cr3t")
    with pytest.raises(InvalidInput, match="WEB4LORA_TLS_CLIENT_REQUIRED") as caught:
        load(Settings)
    assert "s3cr3t" not in str(caught.value)


def test_pem_files_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="nowhere"):
        read_pem(tmp_path / "nowhere")
    (tmp_path / "der").write_bytes(b"\x30\x82")
    with pytest.raises(InvalidInput, match="PEM"):
        read_pem(tmp_path / "der")


def test_a_file_of_variables_fills_what_the_environment_leaves_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("secret\n")
    (tmp_path / ".env").write_text(
        f"# settings\nPORT=1\nWEB4LORA_TOKEN_FILE={tmp_path}/token\n"
        "WEB4LORA_STORE='s3+http://127.0.0.1:1/b'\nWEB4LORA_S3_REGION=here\n"
    )
    for name in ("TOKEN_FILE", "STORE", "CONSOLE"):  # taken out again when the test ends
        monkeypatch.setenv(f"WEB4LORA_{name}", "")
        monkeypatch.delenv(f"WEB4LORA_{name}")
    monkeypatch.setenv("WEB4LORA_S3_REGION", "there")
    monkeypatch.setenv("WEB4LORA_ENV_FILE", str(tmp_path / ".env"))
    settings = load(Settings)
    assert settings.store == "s3+http://127.0.0.1:1/b"
    assert settings.token.get_secret_value() == "secret"
    assert settings.s3_region == "there"
    monkeypatch.setenv("WEB4LORA_ENV_FILE", str(tmp_path / "gone"))
    with pytest.raises(InvalidInput, match="WEB4LORA_ENV_FILE"):
        load(Settings)
    (tmp_path / ".env").write_bytes(b"\x7fELF\xd0\x00")
    monkeypatch.setenv("WEB4LORA_ENV_FILE", str(tmp_path / ".env"))
    with pytest.raises(InvalidInput, match=r"WEB4LORA_ENV_FILE: can.t read .*it is not text"):
        load(Settings)


@pytest.mark.parametrize("address", [":", "nonsense", "127.0.0.1:", "127.0.0.1:99999", ":8461", "h:²"])
def test_an_address_without_host_or_port_is_refused_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("WEB4LORA_GATEWAY_ADDRESS", address)
    with pytest.raises(InvalidInput, match=r"WEB4LORA_GATEWAY_ADDRESS: .*host:port"):
        load(Settings)
