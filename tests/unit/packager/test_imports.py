"""The service starts without what only its converter needs."""

from __future__ import annotations

import subprocess
import sys


def test_neither_service_nor_worker_import_torch() -> None:
    program = (
        "import sys, web4lora_packager.__main__, web4lora_packager.worker; "
        "sys.exit(' '.join({'torch', 'transformers', 'peft'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "")
