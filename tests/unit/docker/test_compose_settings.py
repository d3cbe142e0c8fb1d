"""Settings of the services reach the containers."""

from __future__ import annotations

from pathlib import Path

import yaml
from web4lora_chassis.keeping import Keeping
from web4lora_chassis.settings import WORKERS

ROOT = Path(__file__).resolve().parents[3]
SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]


def test_every_setting_of_what_is_kept_reaches_every_service() -> None:
    wanted = {f"WEB4LORA_{name.upper()}" for name in Keeping.model_fields}
    for service in ("gateway", *WORKERS):
        assert wanted <= SERVICES[service]["environment"].keys(), service


def test_a_worker_knows_its_own_token_and_no_other() -> None:
    for service in WORKERS:
        tokens = {name for name in SERVICES[service]["environment"] if "TOKEN" in name}
        assert tokens == {f"WEB4LORA_{service.upper()}_TOKEN_FILE"}
