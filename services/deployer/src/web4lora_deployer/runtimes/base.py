"""What a runtime must do to take our models. `docs/runtimes.md` says how to add one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from web4lora_chassis.jobs import Progress

from web4lora_deployer.records.deployments import Deployment

Report = Callable[[Progress], None]


class State(StrEnum):
    """Where a deployment stands; the names of the contract's DeploymentState."""

    STARTING = "STARTING"
    SERVING = "SERVING"
    FAILED = "FAILED"
    STOPPED = "STOPPED"


@dataclass(frozen=True)
class RuntimeStatus:
    """Whether a runtime was found; see the contract's Runtime."""

    target: str
    usable: bool
    address: str = ""
    version: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Deployed:
    """Where a deployment answers.

    Attributes:
        endpoint: Base address of the OpenAI-compatible API, ending in /v1.
        model: The model's name in requests to it.
        version: The runtime's version.
    """

    endpoint: str
    model: str
    version: str


@dataclass(frozen=True)
class Health:
    """How a deployment does.

    Attributes:
        state: Where it stands.
        detail: More, for people.
        deployed: Where it answers; None while it has no address.
        broken: It fails though its runtime is there, and will go on to: another model may do better. A
            runtime that is out of reach says nothing about the model.
    """

    state: State
    detail: str = ""
    deployed: Deployed | None = None
    broken: bool = False


class Runtime(Protocol):
    """A program on this machine that serves models. Calls block; every one of them has a time limit.

    A model is deployed under its own immutable id, beside whatever serves under the name people call;
    `promote` then points that name at it. So a failure on the way leaves the old model serving.
    """

    target: str
    """Its name: "llama-server", "ollama" or "docker"."""

    def probe(self) -> RuntimeStatus:
        """Say whether it is there and can take a model. Never raises for what it finds; takes seconds."""

    def deploy(self, deployment: Deployment, file: Path, report: Report) -> Deployed:
        """Bring a model in under its id, ready to answer. What is there already is looked at, not changed.

        It has its id only once its prompts were found to be training's: whatever ends this call before,
        nobody finds the model by that.

        Args:
            deployment: What is wanted.
            file: The GGUF, verified, which stays where it is.
            report: Takes progress.

        Raises:
            InvalidInput: The runtime refuses a name or parameter.
            Unavailable: The runtime is out of reach, or went away meanwhile.
            FailedPrecondition: It can't take this model, or somebody else's has the name; the message says
                why and what to do.
            ResourceExhausted: Memory or disk don't suffice.
            DataLoss: What arrived is not what was sent.
        """

    def promote(self, deployment: Deployment) -> None:
        """Point the name people call at a deployment, where the runtime knows such names; safe to repeat.

        Raises:
            FailedPrecondition: Somebody else's model has the name.
            Unavailable: The runtime is out of reach.
            NotFound: The runtime no longer has the candidate.
        """

    def withdraw(self, deployment: Deployment) -> None:
        """Take the name people call away again if it is ours; what is gone already is no error."""

    def health(self, deployment: Deployment) -> Health:
        """Say how a deployment does. Never raises for what it finds; takes seconds at most."""

    def memory_bytes(self, deployment: Deployment) -> int:
        """Return the resident memory of a loaded model; 0 when the runtime doesn't tell."""

    def unload(self, deployment: Deployment) -> None:
        """Free a model's memory until its next request, where the runtime can do that."""

    def restore(self, deployment: Deployment) -> None:
        """Give a deployment back what a restart of runtime or service took from it; safe to repeat."""

    def delete(self, deployment: Deployment) -> None:
        """Take a deployment out if it is ours; what is gone already is no error.

        Raises:
            Unavailable: The runtime is out of reach.
        """
