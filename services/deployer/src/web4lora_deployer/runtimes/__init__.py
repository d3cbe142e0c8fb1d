"""The runtimes that can take a model. Each meets `Runtime`; a new one is a module and a line here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from web4lora_chassis.pipeline.deploy import AUTO, TARGET
from web4lora_chassis.pipeline.rules import Problem, error_of

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
_RUNTIME = replace(TARGET, words=tuple(word for word in TARGET.words if word != AUTO))


def open_runtime(target: str, settings: DeployerSettings) -> Runtime:
    """Return the runtime that a target names.

    Raises:
        InvalidInput: There is no such target, or it is "auto", which `choose` makes one of them.
    """
    if problems := [Problem("deploy.target", text, fix) for _, text, fix in _RUNTIME.wrong(target)]:
        raise error_of(problems)
    return RUNTIMES[target](settings)


def choose(settings: DeployerSettings) -> Runtime:
    """Return the runtime that "auto" prefers: the first one that is found and can take a model."""
    return next(usable(settings))


def usable(settings: DeployerSettings) -> Iterator[Runtime]:
    """Yield the runtimes that are found and can take a model, as "auto" prefers them; at least the last."""
    runtimes = [make(settings) for make in RUNTIMES.values()]
    for runtime in runtimes[:-1]:
        if runtime.probe().usable:
            yield runtime
    yield runtimes[-1]
