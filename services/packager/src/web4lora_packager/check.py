"""Checks a GGUF file: what its header says, and that llama-server loads it and answers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from web4lora_chassis.errors import DataLoss
from web4lora_llamacpp import LlamaCpp, LlamaServer

from web4lora_packager.chat_template import Tokenizer
from web4lora_packager.gguf_file import GgufHeader

_PROMPT = "Say hello in one sentence."
_ANSWER_TOKENS = 24
_CONTEXT_TOKENS = 512
_ANSWER_TIMEOUT_SECONDS = 600.0
_SAMPLE_CHARACTERS = 120


@dataclass(frozen=True)
class Loaded:
    """A load check that went well.

    Attributes:
        load_seconds: From starting the server to its being ready.
        sample: What it answered, on one line, shortened.
    """

    load_seconds: float
    sample: str


def check_header(header: GgufHeader, tokenizer: Tokenizer, reference: GgufHeader | None, name: str) -> None:
    """Compare a GGUF's header with the base's tokenizer and, for a quantized one, with the 16-bit file's.

    Args:
        header: The file's header.
        tokenizer: The base's.
        reference: The 16-bit file's header; None for that file itself.
        name: The file's name, for messages.

    Raises:
        DataLoss: They differ; the message says in what.
    """
    if header.chat_template != tokenizer.chat_template:
        raise _wrong(name, "its chat template is not the base's")
    for role, found in (("eos_token", header.eos_id), ("bos_token", header.bos_id)):
        expected = tokenizer.added.get(tokenizer.special.get(role, ""))
        if expected is not None and found != expected:
            raise _wrong(name, f"its {role} has the id {found}, the base's tokenizer says {expected}")
    if reference is None:
        return
    if (header.architecture, header.tensors, header.parameters) != (
        reference.architecture, reference.tensors, reference.parameters,
    ):  # fmt: skip
        raise _wrong(
            name,
            f"it has {header.tensors} tensors with {header.parameters:,} weights, the 16-bit file "
            f"{reference.tensors} with {reference.parameters:,}",
        )


def check_loads(
    llama: LlamaCpp, gguf: Path, *, log: Path, timeout_seconds: float, adapter: Path | None = None
) -> Loaded:
    """Let llama-server load a GGUF and answer one prompt.

    Args:
        llama: Brings llama-server.
        gguf: The file.
        log: The server's output is appended here.
        timeout_seconds: How long loading may take.
        adapter: The GGUF of an adapter to load beside it and to apply in full.

    Raises:
        FailedPrecondition: The server can't load it.
        OutOfMemory: Memory ran out.
        DataLoss: It loads, but does not answer.
        Unavailable: It took too long.
    """
    started = time.monotonic()
    adapters = [(adapter, 1.0)] if adapter else []
    with LlamaServer(
        llama, gguf, context_tokens=_CONTEXT_TOKENS, parallel=1, log_file=log, adapters=adapters
    ) as server:
        server.wait_ready(timeout_seconds)
        load_seconds = time.monotonic() - started
        sample = _ask(server.endpoint, gguf.name)
    return Loaded(load_seconds, sample)


def _ask(endpoint: str, name: str) -> str:
    body = {
        "messages": [{"role": "user", "content": _PROMPT}],
        "max_tokens": _ANSWER_TOKENS,
        "temperature": 0,
        "seed": 0,
    }
    try:
        answer = httpx.post(
            f"{endpoint}/chat/completions", json=body, timeout=_ANSWER_TIMEOUT_SECONDS, trust_env=False
        )
        answer.raise_for_status()
        data = answer.json()
        message, tokens = data["choices"][0]["message"], int(data["usage"]["completion_tokens"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise _wrong(name, f"it loads, but does not answer: {error!r}") from error
    if tokens < 1:
        raise _wrong(name, "it loads, but answers with nothing")
    text = " ".join(str(message.get("content") or message.get("reasoning_content") or "").split())
    return text if len(text) <= _SAMPLE_CHARACTERS else text[: _SAMPLE_CHARACTERS - 1] + "…"


def _wrong(name: str, why: str) -> DataLoss:
    return DataLoss(f"{name} failed its check: {why}.", fix="Package again.", reason="GGUF_CHECK_FAILED")
