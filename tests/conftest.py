"""What all tests share: the real servers, and an environment that no user's settings reach."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from web4lora_chassis.settings import PREFIX, Settings

sys.path.insert(0, str(Path(__file__).parents[1]))  # what tests share is imported as `tests.…`

from tests.servers.fixtures import NOT_BUILT, bucket, minio, minio_proxy, toxiproxy
from tests.servers.llama_cpp import llama_cpp
from tests.servers.postgresql import postgresql, postgresql_server

__all__ = ["bucket", "llama_cpp", "minio", "minio_proxy", "postgresql", "postgresql_server", "toxiproxy"]


# Some tests run three llama-servers. OpenMP's threads would spin while they wait for each other, and where
# there are fewer cores than that one token would take seconds.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

# The command's tables are as wide as on a pipe, whatever terminal the tests were started from.
os.environ.pop("COLUMNS", None)

# Shells start background jobs with Ctrl-C ignored, and every child would inherit that: the tests need it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _settings_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the user's settings out of the environment; the cache stays, it holds what took long to make."""
    for name in Settings.model_fields:
        if name != "cache":
            monkeypatch.delenv(f"{PREFIX}{name.upper()}", raising=False)
            monkeypatch.delenv(f"{PREFIX}{name.upper()}_FILE", raising=False)


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """What a service closes to other users stays closed in its own test alone."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the servers that were missing, and what that left untested."""
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    missing = Counter(name for reason in reasons for name in re.findall(rf"([\w-]+){NOT_BUILT}", reason))
    if missing:
        terminalreporter.section("servers that are not built")
    for name, count in sorted(missing.items()):
        terminalreporter.line(f"{name}: {count} skipped. Build it: python tests/servers/build.py {name}")
