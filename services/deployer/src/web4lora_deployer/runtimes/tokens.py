"""A model's own tokenizer, which is in its GGUF: asked through llama-server, which knows all kinds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from web4lora_llamacpp import LlamaCpp, LlamaServer

from web4lora_deployer.prompts.gate import Token
from web4lora_deployer.records.names import file_name
from web4lora_deployer.runtimes.http import client, conversation, ends_answer, reaching, refused

_WHAT = "llama-server"
_CALL_SECONDS = 300.0
_LOAD_SECONDS = 900.0
_CONTEXT_TOKENS = 64
# It is asked for its vocabulary, and for one token: no weight is copied or rearranged for that.
_IDLE = ("--no-warmup", "--no-repack", "--gpu-layers", "0")


class Tokenizer:
    """Turns prompts into tokens, as llama-server does for a chat request, and conversations into prompts.

    Args:
        address: Of a llama-server that has the model, without /v1.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._head: Sequence[Token] | None = None

    def served(self, text: str) -> list[Token]:
        """Return the tokens that a rendered prompt goes into the model as.

        Special tokens written out in the text are those tokens. The token that the tokenizer begins every
        prompt with, if it does, comes first, even before the same token in the text.

        Raises:
            Unavailable: The server went away.
        """
        return self._tokens(text, add_special=True)

    def begun_once(self, text: str) -> list[Token]:
        """Return the same, but that a first token in the text that the tokenizer would add is not doubled.

        Raises:
            Unavailable: The server went away.
        """
        if self._head is None:
            self._head = self._tokens("", add_special=True)[:1]
        tokens = self._tokens(text, add_special=False)
        return tokens if tokens[: len(self._head)] == self._head else [*self._head, *tokens]

    def piece(self, token: int) -> str:
        """Return the text of a token; empty when there is no such token.

        Raises:
            Unavailable: The server went away.
        """
        answer = self._post("/detokenize", {"tokens": [token]})
        return str(answer.json().get("content", "")) if answer.status_code == httpx2.codes.OK else ""

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Return the prompt that the server makes of a conversation, by the model's own template.

        Raises:
            Unavailable: The server went away.
            FailedPrecondition: It refuses the conversation.
        """
        answer = self._post("/apply-template", conversation(messages, tools))
        if answer.status_code != httpx2.codes.OK:
            raise refused(_WHAT, "render a prompt", answer.status_code, answer.text)
        return str(answer.json()["prompt"])

    def ends(self, token: int, stop: Sequence[str] = ()) -> bool:
        """Say whether a token ends an answer: it is made the only one that can be chosen.

        Args:
            token: The token.
            stop: Texts that end an answer besides.

        Raises:
            Unavailable: The server went away.
            FailedPrecondition: It does not answer.
        """
        return ends_answer(_WHAT, f"{self._address}/v1", "", token, _CALL_SECONDS, stop)

    def _tokens(self, text: str, *, add_special: bool) -> list[Token]:
        body = {"content": text, "add_special": add_special, "parse_special": True, "with_pieces": True}
        answer = self._post("/tokenize", body)
        if answer.status_code != httpx2.codes.OK:
            raise refused(_WHAT, "tokenize a prompt", answer.status_code, answer.text)
        return [Token(int(entry["id"]), _piece(entry["piece"])) for entry in answer.json()["tokens"]]

    def _post(self, path: str, body: Mapping[str, Any]) -> httpx2.Response:
        with reaching(_WHAT, self._address), client(self._address, _CALL_SECONDS) as http:
            return http.post(path, json=dict(body))


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
