from __future__ import annotations

import configparser
import plistlib
from pathlib import Path

import pytest
from web4lora.commands import trainer
from web4lora_chassis.errors import InvalidInput, NotFound

ENV = {"WEB4LORA_ENV_FILE": "/home/ann/a & b/.env", "WEB4LORA_TRAINER_ADDRESS": "172.17.0.1:8462"}


def test_the_launchd_agent_is_a_property_list() -> None:
    made = plistlib.loads(trainer.launchd_agent("/opt/venv/bin/python", ENV, Path("/home/ann/log")).encode())
    assert made["ProgramArguments"] == ["/opt/venv/bin/python", "-m", "web4lora_trainer"]
    assert made["EnvironmentVariables"] == ENV


def test_the_systemd_unit_starts_the_trainer_with_the_stacks_settings() -> None:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    text = trainer.systemd_unit("/opt/venv/bin/python", ENV)
    parser.read_string(text)
    assert parser["Service"]["ExecStart"] == '"/opt/venv/bin/python" -m web4lora_trainer'
    for name, value in ENV.items():
        assert f'Environment="{name}={value}"' in text


def test_without_the_stacks_settings_it_says_where_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WEB4LORA_ENV_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound, match="--env-file"):
        trainer.start()


def test_a_store_that_containers_do_not_share_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEB4LORA_ENV_FILE", str(tmp_path / ".env"))
    (tmp_path / ".env").write_text("GATEWAY_PORT=1\n")
    with pytest.raises(InvalidInput, match="WEB4LORA_STORE"):
        trainer.start()
