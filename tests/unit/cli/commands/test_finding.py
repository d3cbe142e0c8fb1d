"""Labels and times as options give them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from web4lora.commands.finding import labels_of, moment_of
from web4lora_chassis.errors import InvalidInput

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)


def test_labels() -> None:
    assert labels_of(None) == {}
    assert labels_of(["team=a", "why=x=y", "empty="]) == {"team": "a", "why": "x=y", "empty": ""}
    for wrong in (["team"], ["=a"], ["team=a", "team=b"]):
        with pytest.raises(InvalidInput, match="--label"):
            labels_of(wrong)


def test_ages_and_dates() -> None:
    assert moment_of("", NOW) is None
    assert moment_of("7d", NOW) == NOW - timedelta(days=7)
    assert moment_of("90m", NOW) == NOW - timedelta(minutes=90)
    assert moment_of("2026-11-20T10:00:00+02:00", NOW) == datetime(2026, 11, 20, 8, tzinfo=UTC)
    assert moment_of("2026-11-20", NOW) == datetime(2026, 11, 20).astimezone(UTC)
    for wrong in ("soon", "7", "d", "-7d", "999999w", "2026-13-01"):
        with pytest.raises(InvalidInput, match="is no time"):
            moment_of(wrong, NOW)
