"""Every service gets its own secrets and nobody else's; what is there stays, what is given wins."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import yaml
from web4lora_chassis.stack_secrets import KEYS, OWN, database, lay, main, show

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def volumes(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Empty volumes: kept, given, and one for each service."""
    for name in ("kept", "given", *(f"services/{service}" for service in OWN)):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path / "kept", tmp_path / "given", tmp_path / "services"


def laid(services: Path) -> dict[str, dict[str, str]]:
    return {
        folder.name: {path.name: path.read_text().strip() for path in folder.iterdir()}
        for folder in services.iterdir()
    }


def test_each_service_gets_its_own_and_they_agree(volumes: tuple[Path, Path, Path]) -> None:
    assert lay(*volumes) == list(KEYS)
    found = laid(volumes[2])
    assert {service: set(values) for service, values in found.items()} == {
        service: set(names) for service, names in OWN.items()
    }
    kept = show(volumes[0])
    assert len(set(kept.values())) == len(KEYS)
    assert found["gateway"]["database"] == database(kept["postgres_password"])
    for values in found.values():
        assert {name: kept[name] for name in values if name in kept} == {
            name: value for name, value in values.items() if name != "database"
        }


def test_what_is_there_stays_and_what_is_given_wins(volumes: tuple[Path, Path, Path]) -> None:
    lay(*volumes)
    before = laid(volumes[2])
    assert lay(*volumes) == []
    assert laid(volumes[2]) == before
    (volumes[1] / "token").write_text("chosen\n")
    (volumes[1] / "README").write_text("not a secret")
    assert lay(*volumes) == []
    after = laid(volumes[2])
    assert {service for service in after if after[service] != before[service]} == {
        service for service, names in OWN.items() if "token" in names
    }
    assert after["gateway"]["token"] == show(volumes[0])["token"] == "chosen"


def test_a_secret_that_is_no_longer_a_services_own_is_taken_away(volumes: tuple[Path, Path, Path]) -> None:
    (volumes[2] / "postgres" / "token").write_text("old")
    lay(*volumes)
    assert [path.name for path in (volumes[2] / "postgres").iterdir()] == ["postgres_password"]


@pytest.mark.parametrize("text", ["", "\n", "two\nlines", "with blank", "caf\u00e9"])
def test_a_given_secret_that_is_none_is_refused_and_nothing_is_laid(
    volumes: tuple[Path, Path, Path], text: str
) -> None:
    (volumes[1] / "token").write_text(text)
    with pytest.raises(ValueError, match="token must hold one line"):
        lay(*volumes)
    assert not any(laid(volumes[2]).values())


def test_all_secrets_are_for_those_alone_who_enter_the_volume(volumes: tuple[Path, Path, Path]) -> None:
    lay(*volumes)
    assert {stat.S_IMODE(path.stat().st_mode) for path in volumes[0].iterdir()} == {0o400}


def test_the_command_says_what_it_made_and_what_is_missing(
    volumes: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        f"--{name}={folder}" for name, folder in zip(("kept", "given", "services"), volumes, strict=True)
    ]
    monkeypatch.setattr("sys.argv", ["stack_secrets", "show", "token", *folders])
    assert main() == 1
    assert "never made" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["stack_secrets", "lay", *folders])
    assert main() == 0
    monkeypatch.setattr("sys.argv", ["stack_secrets", "show", "token", *folders])
    capsys.readouterr()
    assert main() == 0
    assert capsys.readouterr().out.strip() == show(volumes[0])["token"]


def test_compose_gives_each_service_the_volume_of_its_own_secrets() -> None:
    stack = yaml.safe_load((ROOT / "compose.yaml").read_text())
    mounted = {
        name: [each for each in service.get("volumes", ()) if each.endswith(":/run/secrets:ro")]
        for name, service in stack["services"].items()
    }
    assert {name: volumes for name, volumes in mounted.items() if volumes} == {
        name: [f"secrets-{name}:/run/secrets:ro"] for name in OWN
    }
    laid_by_secrets = [each for each in stack["services"]["secrets"]["volumes"] if "/services/" in each]
    assert laid_by_secrets == [f"secrets-{name}:/secrets/services/{name}" for name in OWN]
