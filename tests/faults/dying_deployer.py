"""Does one verb of the deployer and is killed before its n-th step: `dying_deployer.py N VERB JSON GATE`.

With the gate `refused`, the template gate finds a difference, whatever it compares.

A step is whatever changes something outside of the process: a record, a name, a call of a runtime. The
process ends by SIGKILL before step N, so nothing is cleaned up; with fewer steps than N it ends as usual.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from web4lora_chassis.artifacts import ArtifactRef, open_store
from web4lora_chassis.errors import FailedPrecondition
from web4lora_chassis.settings import load
from web4lora_deployer.prompts import gate as template_gate
from web4lora_deployer.prompts.gate import CountDifference
from web4lora_deployer.records.deployments import Deployments
from web4lora_deployer.runtimes import ollama
from web4lora_deployer.runtimes.docker_model_runner import DockerModelRunnerRuntime
from web4lora_deployer.runtimes.llama_server import LlamaServerRuntime
from web4lora_deployer.runtimes.ollama_api import OllamaApi
from web4lora_deployer.runtimes.ownership import Ownership
from web4lora_deployer.serving import deploy as deploying
from web4lora_deployer.serving import promotion
from web4lora_deployer.settings import DeployerSettings

STEPS: dict[type, tuple[str, ...]] = {
    Deployments: ("save", "promote", "go_back", "remove"),
    LlamaServerRuntime: ("deploy", "delete"),
    Ownership: ("note",),
    OllamaApi: ("put_blob", "create", "copy", "unload", "delete"),
    DockerModelRunnerRuntime: ("_load", "_tag", "_configure", "_post", "_delete"),
}


class Countdown:
    """Kills this process before its n-th step."""

    def __init__(self, left: int) -> None:
        self._left = left

    def before(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **fields: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **fields)

        return counted


def main() -> None:
    countdown = Countdown(int(sys.argv[1]))
    for owner, names in STEPS.items():
        for name in names:
            setattr(owner, name, countdown.before(getattr(owner, name)))
    first_answer = countdown.before(promotion.first_answer)
    promotion.first_answer = deploying.first_answer = first_answer
    verb, given = sys.argv[2], json.loads(sys.argv[3])
    if sys.argv[4:] == ["refused"]:
        difference = CountDifference("one question", 1, 2)
        for module in (ollama, template_gate):
            module.compare = countdown.before(lambda *_: difference)  # type: ignore[attr-defined]
    settings = load(DeployerSettings, **given.pop("settings"))
    if verb == "deploy":
        request = deploying.DeployRequest(**{**given, "gguf": ArtifactRef.from_json(given["gguf"])})
        with tempfile.TemporaryDirectory() as work_dir:
            try:
                deploying.deploy(request, settings, open_store(settings), Path(work_dir), lambda _: None)
            except FailedPrecondition as error:
                if error.reason != template_gate.DIFFERS:
                    raise
    elif verb == "promote":
        promotion.promote(given["id"], settings)
    elif verb == "roll_back":
        promotion.roll_back(given["name"], settings, from_id=given["from_id"])


if __name__ == "__main__":
    main()
