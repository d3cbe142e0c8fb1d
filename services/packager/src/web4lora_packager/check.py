"""Checks a GGUF file that was made here: what its header says, and that llama-server loads it and answers."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2
from web4lora_chassis.errors import DataLoss, FailedPrecondition, InvalidInput, NotFound
from web4lora_chassis.model_files.gguf import K_BLOCK_WEIGHTS, GgufHeader, read_gguf
from web4lora_llamacpp import LlamaCpp, LlamaServer

from web4lora_packager.chat_template import Tokenizer
from web4lora_packager.next_tokens import Answer, Said, ask_server

_PATIENT = {"OMP_WAIT_POLICY": "passive"}
"""Threads that spin while they wait make a hundred short questions minutes long on a busy machine."""
_PROMPT = "Say hello in one sentence."
_ANSWER_TOKENS = 24
_CONTEXT_TOKENS = 512
_ANSWER_TIMEOUT_SECONDS = 600.0
_SAMPLE_CHARACTERS = 120
_TELL_ENDS = ("--verbosity", "4")
_END = re.compile(rb"EOG token\s+= (\d+) ")


@dataclass(frozen=True)
class Loaded:
    """A load check that went well.

    Attributes:
        load_seconds: From starting the server to its being ready.
        sample: What it answered, on one line, shortened.
        end_ids: Tokens that llama.cpp takes as an end of generation, by their ids.
        said: What it says of the answers that it was asked about; None without any.
    """

    load_seconds: float
    sample: str
    end_ids: frozenset[int] = frozenset()
    said: Said | None = None


def read_made(path: Path) -> GgufHeader:
    """Read the header of a GGUF file that a tool of ours has just written.

    Raises:
        DataLoss: It is no GGUF file, or holds no model, or was cut off.
    """
    try:
        header, size = read_gguf(path), path.stat().st_size
    except (InvalidInput, NotFound) as error:
        raise DataLoss(error.message, fix="Package again.", reason="GGUF_BROKEN") from error
    if not header.architecture or not header.parameters:
        raise DataLoss(f"{path} holds no model.", fix="Package again.", reason="GGUF_BROKEN")
    if size < header.end_bytes:
        raise DataLoss(
            f"{path} is cut off: it has {size:,} of {header.end_bytes:,} bytes.",
            fix="Package again.",
            reason="GGUF_BROKEN",
        )
    return header


def contents(header: GgufHeader, kind: str) -> str:
    """Return which types a file really has, in words; empty where its type's blocks fit all its rows.

    Args:
        header: The file's header.
        kind: Its type, such as Q4_K_M.
    """
    if not header.odd_rows or not ("_K" in kind or kind.startswith("IQ")) or kind == "IQ4_NL":
        return ""
    counts = header.weights_by_type.items()
    shares = [f"{100 * count / header.parameters:.0f} % {name}" for name, count in counts if name != "F32"]
    rows = " and ".join(str(length) for length in header.odd_rows)
    return f"{', '.join(shares)}, because rows of {rows} are no multiples of {K_BLOCK_WEIGHTS}"


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
    for role, found in (("eos_token", header.token_id("eos")), ("bos_token", header.token_id("bos"))):
        expected = tokenizer.added.get(tokenizer.special.get(role, ""))
        if expected is not None and found != expected:
            raise _wrong(name, f"its {role} has the id {found}, the base's tokenizer says {expected}")
    if reference is None:
        return
    if (header.architecture, header.shapes) != (reference.architecture, reference.shapes):
        raise _wrong(
            name,
            f"its {len(header.tensors)} tensors with {header.parameters:,} weights are not the "
            f"{len(reference.tensors)} with {reference.parameters:,} of the 16-bit file",
        )


def check_loads(
    llama: LlamaCpp,
    gguf: Path,
    *,
    log: Path,
    timeout_seconds: float,
    adapter: Path | None = None,
    answers: Sequence[Answer] = (),
) -> Loaded:
    """Let llama-server load a GGUF and answer one prompt.

    Args:
        llama: Brings llama-server.
        gguf: The file.
        log: The server's output is appended here.
        timeout_seconds: How long loading may take.
        adapter: The GGUF of an adapter to load beside it and to apply in full.
        answers: Trained answers to ask about: how likely is each of their tokens?

    Raises:
        FailedPrecondition: The server can't load it.
        OutOfMemory: Memory ran out.
        DataLoss: It loads, but does not answer.
        Unavailable: It took too long.
    """
    started, log_start = time.monotonic(), log.stat().st_size if log.is_file() else 0
    adapters = [(adapter, 1.0)] if adapter else []
    context_tokens = max(_CONTEXT_TOKENS, *(len(answer.tokens) + 1 for answer in answers), 0)
    with LlamaServer(
        llama, gguf,
        context_tokens=context_tokens, parallel=1, log_file=log, adapters=adapters, options=_TELL_ENDS,
        env=_PATIENT,
    ) as server:  # fmt: skip
        server.wait_ready(timeout_seconds)
        load_seconds = time.monotonic() - started
        sample = _ask(server.endpoint, gguf.name)
        said = ask_server(server.endpoint, answers, gguf.name) if answers else None
    with log.open("rb") as file:
        file.seek(log_start)
        ends = frozenset(int(found) for found in _END.findall(file.read()))
    return Loaded(load_seconds, sample, ends, said)


def check_stops(loaded: Loaded, stops: Iterable[int], name: str) -> None:
    """Refuse a file whose answers would not end where training ended them.

    Args:
        loaded: The file's load check.
        stops: Tokens that training put behind answers, by their ids.
        name: The file's name, for messages.

    Raises:
        FailedPrecondition: llama.cpp takes one of them for a token like any other.
    """
    if missing := sorted(set(stops) - loaded.end_ids):
        raise FailedPrecondition(
            f"{name}: training ended answers with the token {missing[0]}, where llama.cpp goes on; "
            f"it ends at {sorted(loaded.end_ids)}.",
            fix="Use a base whose chat template ends turns with a token that llama.cpp knows.",
            reason="STOPS_UNKNOWN",
        )


def _ask(endpoint: str, name: str) -> str:
    body = {
        "messages": [{"role": "user", "content": _PROMPT}],
        "max_tokens": _ANSWER_TOKENS,
        "temperature": 0,
        "seed": 0,
    }
    try:
        answer = httpx2.post(
            f"{endpoint}/chat/completions", json=body, timeout=_ANSWER_TIMEOUT_SECONDS, trust_env=False
        )
        answer.raise_for_status()
        data = answer.json()
        message, tokens = data["choices"][0]["message"], int(data["usage"]["completion_tokens"])
    except (httpx2.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise _wrong(name, f"it loads, but does not answer: {error!r}") from error
    if tokens < 1:
        raise _wrong(name, "it loads, but answers with nothing")
    text = " ".join(str(message.get("content") or message.get("reasoning_content") or "").split())
    return text if len(text) <= _SAMPLE_CHARACTERS else text[: _SAMPLE_CHARACTERS - 1] + "…"


def _wrong(name: str, why: str) -> DataLoss:
    return DataLoss(f"{name} failed its check: {why}.", fix="Package again.", reason="GGUF_CHECK_FAILED")
