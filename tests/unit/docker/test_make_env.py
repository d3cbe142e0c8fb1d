from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

from web4lora_chassis.stack_secrets import KEYS

ROOT = Path(__file__).resolve().parents[3]


def _make(folder: Path, *arguments: str) -> None:
    command = [
        sys.executable,
        ROOT / "docker" / "make-env",
        "--folder",
        folder,
        "--project",
        "web4lora-no-such-stack",
    ]
    command += arguments
    subprocess.run(command, check=True, capture_output=True)


def _secrets(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text().strip() for path in (folder / ".secrets").iterdir()}


def test_only_we_can_enter_the_folder_and_read_the_settings(tmp_path: Path) -> None:
    _make(tmp_path)
    assert stat.S_IMODE((tmp_path / ".secrets").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / ".secrets").iterdir()} == {0o444}


def test_every_secret_is_another_one_and_none_is_in_the_settings(tmp_path: Path) -> None:
    _make(tmp_path)
    made = _secrets(tmp_path)
    assert made.keys() == KEYS.keys()
    assert len(set(made.values())) == len(made)
    text = (tmp_path / ".env").read_text()
    assert not [name for name, value in made.items() if value in text]
    assert f"WEB4LORA_TOKEN_FILE={tmp_path}/.secrets/token" in text


def test_what_is_there_stays(tmp_path: Path) -> None:
    _make(tmp_path)
    (tmp_path / ".env").write_text("MINE=1\n")
    before = _secrets(tmp_path)
    _make(tmp_path)
    assert _secrets(tmp_path) == before
    assert (tmp_path / ".env").read_text() == "MINE=1\n"


def test_rotating_changes_one(tmp_path: Path) -> None:
    _make(tmp_path)
    before = _secrets(tmp_path)
    _make(tmp_path, "--rotate", "postgres_password")
    after = _secrets(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {"postgres_password"}


def test_minio_takes_the_keys(tmp_path: Path) -> None:
    """MinIO bounds an access key to 3 to 20 characters and a secret key to 8 to 40."""
    _make(tmp_path)
    made = _secrets(tmp_path)
    assert 3 <= len(made["s3_access_key"]) <= 20
    assert 8 <= len(made["s3_secret_key"]) <= 40
