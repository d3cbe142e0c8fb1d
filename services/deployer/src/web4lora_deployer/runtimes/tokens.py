"""A model's own tokenizer, which is in its GGUF: asked through llama-server, which knows all kinds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from web4lora_chassis.errors import Unavailable
from web4lora_llamacpp import LlamaCpp, LlamaServer

from web4lora_deployer.names import file_name
from web4lora_deployer.runtimes.http import client, reaching
from web4lora_deployer.template_gate import Token

_WHAT = "llama-server"
_CALL_SECONDS = 60.0
_LOAD_SECONDS = 900.0
_CONTEXT_TOKENS = 64
# Only its vocabulary is needed: no weight is read as long as nothing is computed, copied or rearranged.
_IDLE = ("--no-warmup", "--no-repack", "--gpu-layers", "0")


class Tokenizer:
    """Turns prompts into tokens.

    Args:
        address: Of a llama-server that has the model, without /v1.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._head: Sequence[Token] | None = None

    def prompt(self, text: str) -> list[Token]:
        """Return the tokens of a rendered prompt as they go into the model.

        Special tokens written out in the text are those tokens. The token that the model's tokenizer begins
        every prompt with comes first, once, whether the text begins with it or not.

        Raises:
            Unavailable: The server went away.
        """
        if self._head is None:
            self._head = self._ask("", add_special=True)[:1]
        tokens = self._ask(text, add_special=False)
        return tokens if tokens[: len(self._head)] == self._head else [*self._head, *tokens]

    def _ask(self, text: str, *, add_special: bool) -> list[Token]:
        body = {"content": text, "add_special": add_special, "parse_special": True, "with_pieces": True}
        with reaching(_WHAT, self._address), client(self._address, _CALL_SECONDS) as http:
            answer = http.post("/tokenize", json=body)
        if answer.status_code != httpx.codes.OK:
            raise Unavailable(
                f"{_WHAT} did not tokenize a prompt: HTTP {answer.status_code}, {answer.text[:300]}"
            )
        return [Token(int(entry["id"]), _piece(entry["piece"])) for entry in answer.json()["tokens"]]


@contextmanager
def tokenizer_of(llama: LlamaCpp, file: Path, log_file: Path) -> Iterator[Tokenizer]:
    """Open the tokenizer of a GGUF for the time of a block.

    Args:
        llama: The tools.
        file: The GGUF.
        log_file: Where the server's output goes, in place of an earlier one's.

    Raises:
        FailedPrecondition: llama-server can't load the file.
        OutOfMemory: Memory ran out.
    """
    log_file.unlink(missing_ok=True)
    server = LlamaServer(
        llama, file, context_tokens=_CONTEXT_TOKENS, parallel=1, log_file=log_file, options=_IDLE
    )
    with server:
        server.wait_ready(_LOAD_SECONDS)
        yield Tokenizer(server.endpoint.removesuffix("/v1"))


def tokenizer_log(root: Path, deployment_id: str) -> Path:
    """Return where the output of a deployment's tokenizer goes."""
    return root / "logs" / file_name(deployment_id).replace(".json", ".tokenizer.log")


def _piece(piece: Any) -> str:
    """Return a token's text; a token may be a part of a sign, then llama-server gives its bytes."""
    return piece if isinstance(piece, str) else bytes(piece).decode("utf-8", errors="replace")
