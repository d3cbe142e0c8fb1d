"""The runtimes that can take a model. Each meets `Runtime`; a new one is a module and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from web4lora_chassis.errors import InvalidInput

from web4lora_deployer.runtimes import docker_model_runner, llama_server, ollama
from web4lora_deployer.runtimes.base import Runtime
from web4lora_deployer.settings import DeployerSettings

RUNTIMES: Mapping[str, Callable[[DeployerSettings], Runtime]] = MappingProxyType(
    {
        ollama.TARGET: ollama.OllamaRuntime,
        docker_model_runner.TARGET: docker_model_runner.DockerModelRunnerRuntime,
        llama_server.TARGET: llama_server.LlamaServerRuntime,
    }
)
"""By target, in the order in which "auto" prefers them; the last one is always there."""

AUTO = "auto"


def open_runtime(target: str, settings: DeployerSettings) -> Runtime:
    """Return the runtime that a target names.

    Raises:
        InvalidInput: There is no such target.
    """
    check_target(target)
    return RUNTIMES[target](settings)


def check_target(target: str) -> None:
    """Refuse a target that is none.

    Raises:
        InvalidInput: There is no such target.
    """
    if target not in RUNTIMES:
        raise InvalidInput(
            f"{target!r} is not a target.",
            fix=f"The targets are {AUTO}, {', '.join(RUNTIMES)}.",
            metadata={"field": "deploy.target"},
        )


def choose(settings: DeployerSettings) -> Runtime:
    """Return the runtime that "auto" stands for: the first one that is found and can take a model."""
    runtimes = [make(settings) for make in RUNTIMES.values()]
    for runtime in runtimes[:-1]:
        if runtime.probe().usable:
            return runtime
    return runtimes[-1]
