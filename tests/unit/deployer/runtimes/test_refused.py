"""What a runtime's refusal means: what passes, what would crash again, what is the model's fault."""

from __future__ import annotations

import pytest
from web4lora_chassis import process
from web4lora_chassis.errors import FailedPrecondition, ResourceExhausted, Unavailable, Web4Error
from web4lora_deployer.runtimes.http import NOT_LOADABLE, refused


@pytest.mark.parametrize(
    ("status", "said", "kind", "reason"),
    [
        (500, "llama runner process has terminated: signal: segmentation fault (core dumped)",
         FailedPrecondition, process.CRASHED),
        (500, "llama runner process has terminated: exit status 2", FailedPrecondition, process.CRASHED),
        (500, "model runner has unexpectedly stopped, this may be due to resource limitations",
         FailedPrecondition, process.CRASHED),
        (503, "unable to load runner: llama.cpp terminated unexpectedly: signal: illegal instruction",
         FailedPrecondition, process.CRASHED),
        (500, "unable to load model: /models/blobs/sha256-1", FailedPrecondition, NOT_LOADABLE),
        (500, "runner process has terminated: out of memory", ResourceExhausted, "NOT_ENOUGH_MEMORY"),
        (500, "model requires more system memory than is available", ResourceExhausted, "NOT_ENOUGH_MEMORY"),
        (503, "server busy", Unavailable, "RUNTIME_BUSY"),
        (400, "unsupported parameter", FailedPrecondition, "RUNTIME_FAILED"),
    ],
)  # fmt: skip
def test_a_crash_is_told_from_what_passes(status: int, said: str, kind: type[Web4Error], reason: str) -> None:
    error = refused("Ollama", "answer", status, said)
    assert isinstance(error, kind)
    assert error.reason == reason
    if reason in (process.CRASHED, NOT_LOADABLE):
        assert "another runtime" in error.fix
        assert "try again" not in str(error).lower()
