"""What an image installs: our distributions' needs, and for each file a digest that we know."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "docker" / "requirements.py"


def requirements(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def hashes() -> dict[str, list[str]]:
    text = (ROOT / "docker" / "hashes.txt").read_text().replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    return {pin: digests for pin, *digests in lines}


def test_every_pinned_version_has_its_digests() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert list(hashes()) == [pin for pin in pins if pin]
    for pin, digests in hashes().items():
        assert digests, pin
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", digest) for digest in digests), pin


def test_needs_are_those_of_others_and_without_what_is_left_out() -> None:
    lines = requirements("needs", "libs/chassis", "libs/llamacpp", "--without", "cmake").stdout.splitlines()
    assert any(line.startswith("pydantic-settings") for line in lines)
    assert not any(line.startswith(("web4lora", "cmake")) for line in lines)


def test_what_pip_would_install_is_locked(tmp_path: Path) -> None:
    known = next(pin for pin in hashes() if "_" in pin)  # pip may write the name in another of its forms
    name, version = known.split("==")
    report = tmp_path / "report.json"
    report.write_text(
        json.dumps({"install": [{"metadata": {"name": name.replace("_", "-"), "version": version}}]})
    )
    assert requirements("locked", report).stdout.split() == [known, *hashes()[known]]


def test_what_has_no_digest_is_refused_by_name(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"install": [{"metadata": {"name": "unknown", "version": "1.0"}}]}))
    done = requirements("locked", report)
    assert done.returncode == 1
    assert done.stderr == "unknown==1.0 is not in docker/hashes.txt: docker/make-hashes writes it anew.\n"
