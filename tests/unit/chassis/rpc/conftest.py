from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of each test's own: servers read tokens and principals there, and write their audit log."""
    place = tmp_path / "home"
    place.mkdir()
    monkeypatch.setenv("WEB4LORA_HOME", str(place))
    return place
