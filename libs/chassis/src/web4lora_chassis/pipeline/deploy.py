"""How to deploy: every setting of `deploy`, its bounds and its default."""

from __future__ import annotations

from dataclasses import dataclass, replace

from web4lora_chassis.pipeline.package import CONTEXT_TOKENS
from web4lora_chassis.pipeline.rules import Choice, Number, StageSettings, setting

AUTO = "auto"
TARGET = Choice(
    (AUTO, "ollama", "docker", "llama-server"), default_text="what the deployer's WEB4LORA_TARGET says, auto"
)


@dataclass(frozen=True)
class DeploySettings(StageSettings):
    """How to deploy.

    Attributes:
        target: A runtime, or auto; None takes the deployer's own setting.
        context_tokens: Context length of one request; None takes the packager's advice, else 4096, at most
            the model's own.
        parallel: Requests answered at once, where the runtime lets us choose.
        promote: When the name people call is pointed at the new model.
    """

    target: str | None = setting(TARGET)
    context_tokens: int | None = setting(
        replace(CONTEXT_TOKENS, default_text=f"the packager's advice, which is {CONTEXT_TOKENS.default_text}")
    )
    parallel: int = setting(Number(4, low=1, high=64))
    promote: str = setting(Choice(("passed", "proven", "always", "never"), "passed"))
