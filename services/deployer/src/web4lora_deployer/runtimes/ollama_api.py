"""Ollama's HTTP API, as far as we need it: version, blobs, create, show, copy, render, ps, delete."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2
from web4lora_chassis.errors import DataLoss, FailedPrecondition, NotFound, Web4Error

from web4lora_deployer.runtimes.http import PROBE_SECONDS, client, reaching, refused

WHAT = "Ollama"
_CALL_SECONDS = 60.0
_CREATE_SECONDS = 900.0  # it may copy the whole file before it says the next word
_LOAD_SECONDS = 900.0
_CHUNK_BYTES = 1 << 20
_LINE_LIMIT_BYTES = 1 << 20


class OllamaApi:
    """Calls Ollama. Every call has a time limit and raises our errors.

    Args:
        address: Where it listens.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._http = client(address, _CALL_SECONDS)

    @property
    def endpoint(self) -> str:
        """Base address of its OpenAI-compatible API."""
        return str(self._http.base_url).rstrip("/") + "/v1"

    def version(self) -> str:
        """Return its version; empty when what answers is not Ollama.

        Raises:
            Unavailable: Nothing answers.
        """
        with reaching(WHAT, self.address):
            answer = self._http.get("/api/version", timeout=PROBE_SECONDS)
        try:
            return str(answer.json()["version"])
        except (ValueError, KeyError, TypeError):
            return ""

    def has_blob(self, sha256: str) -> bool:
        """Say whether a blob is there."""
        with reaching(WHAT, self.address):
            answer = self._http.head(f"/api/blobs/sha256:{sha256}")
        if answer.status_code in (httpx2.codes.OK, httpx2.codes.NOT_FOUND):
            return answer.status_code == httpx2.codes.OK
        raise refused(WHAT, "look for the model's file", answer.status_code, answer.text)

    def put_blob(self, sha256: str, file: Path, advance: Callable[[int], None]) -> None:
        """Upload a file, streamed; there is no way to resume.

        Raises:
            DataLoss: It says that other bytes arrived.
            ResourceExhausted: Its disk is full.
            Unavailable: It went away.
        """
        headers = {"Content-Length": str(file.stat().st_size), "Content-Type": "application/octet-stream"}
        with reaching(WHAT, self.address):
            answer = self._http.post(
                f"/api/blobs/sha256:{sha256}", content=_chunks(file, advance), headers=headers
            )
        if answer.status_code in (httpx2.codes.OK, httpx2.codes.CREATED):
            return
        said = _said(answer)
        if "digest mismatch" in said:
            raise DataLoss(
                f"{file.name} arrived at Ollama as other bytes: {said}",
                fix="Try again; if it happens again, the disk or the memory is at fault.",
            )
        raise refused(WHAT, "take the model's file", answer.status_code, said)

    def create(self, body: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """Create a model; it is there only if the stream's last word is "success".

        Args:
            body: As /api/create takes it.
            say: Told of each status.
        """
        with (
            reaching(WHAT, self.address),
            self._http.stream("POST", "/api/create", json=dict(body), timeout=_CREATE_SECONDS) as answer,
        ):
            if answer.status_code != httpx2.codes.OK:
                answer.read()
                raise _create_error(answer)
            read_create_stream(_lines(answer), say)

    def show(self, model: str) -> Mapping[str, Any]:
        """Return what Ollama knows of a model.

        Raises:
            NotFound: It has no such model.
        """
        return self._json("show the model", "/api/show", {"model": model}, PROBE_SECONDS * 4)

    def digest(self, model: str) -> str:
        """Return the digest of a model's manifest; empty when there is no such model."""
        with reaching(WHAT, self.address):
            answer = self._http.get("/api/tags")
        if answer.status_code != httpx2.codes.OK:
            raise refused(WHAT, "list its models", answer.status_code, _said(answer))
        wanted = _full(model)
        try:
            models = answer.json().get("models") or []
            return next((str(entry["digest"]) for entry in models if _full(entry["name"]) == wanted), "")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise refused(WHAT, "list its models", answer.status_code, answer.text) from error

    def copy(self, source: str, target: str) -> None:
        """Give a model another name, which from then on means this model.

        Raises:
            NotFound: It has no such model.
        """
        self._json("copy the model", "/api/copy", {"source": source, "destination": target}, _CALL_SECONDS)

    def render(
        self, model: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """Return the prompt that a conversation becomes. Loads the model.

        Raises:
            FailedPrecondition: It doesn't tell.
        """
        body = {
            "model": model,
            "messages": list(messages),
            "tools": list(tools),
            "stream": False,
            "_debug_render_only": True,
        }
        answer = self._json("render a prompt", "/api/chat", body, _LOAD_SECONDS)
        try:
            return str(answer["_debug_info"]["rendered_template"])
        except (KeyError, TypeError) as error:
            raise FailedPrecondition(
                "Ollama does not tell how it renders a prompt, so it can't be compared with training's.",
                fix="Use a version of Ollama from 0.31.2 on that still has _debug_render_only.",
                reason="RENDER_NOT_SHOWN",
            ) from error

    def prompt_tokens(
        self, model: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> int:
        """Return how many tokens a conversation is for the model; it answers with one."""
        body = {
            "model": model,
            "messages": list(messages),
            "tools": list(tools),
            "stream": False,
            "options": {"num_predict": 1, "temperature": 0},
        }
        answer = self._json("answer", "/api/chat", body, _LOAD_SECONDS)
        return int(answer.get("prompt_eval_count", 0))

    def loaded(self) -> Sequence[Mapping[str, Any]]:
        """Return the models in memory."""
        with reaching(WHAT, self.address):
            answer = self._http.get("/api/ps", timeout=PROBE_SECONDS * 4)
        if answer.status_code != httpx2.codes.OK:
            raise refused(WHAT, "list the models in memory", answer.status_code, _said(answer))
        return list(answer.json().get("models") or [])

    def unload(self, model: str) -> None:
        """Free a model's memory; a missing model is no error."""
        body = {"model": model, "keep_alive": 0, "stream": False}
        try:
            self._json("unload the model", "/api/generate", body, _CALL_SECONDS)
        except NotFound:
            return

    def delete(self, model: str) -> None:
        """Remove a model; a missing one is no error."""
        with reaching(WHAT, self.address):
            answer = self._http.request("DELETE", "/api/delete", json={"model": model})
        if answer.status_code not in (httpx2.codes.OK, httpx2.codes.NOT_FOUND):
            raise refused(WHAT, "delete the model", answer.status_code, _said(answer))

    def _json(self, doing: str, path: str, body: Mapping[str, Any], seconds: float) -> Mapping[str, Any]:
        with reaching(WHAT, self.address):
            answer = self._http.post(path, json=dict(body), timeout=httpx2.Timeout(seconds, connect=5.0))
        if answer.status_code == httpx2.codes.NOT_FOUND:
            raise NotFound(f"Ollama could not {doing}: {_said(answer)}", fix="Deploy it again.")
        if answer.status_code != httpx2.codes.OK:
            raise refused(WHAT, doing, answer.status_code, _said(answer))
        try:
            data = answer.json() if answer.content else {}
        except ValueError as error:
            raise refused(WHAT, doing, answer.status_code, answer.text) from error
        return data if isinstance(data, dict) else {}


def read_create_stream(lines: Iterable[bytes], say: Callable[[str], None]) -> None:
    """Read what /api/create says until it says "success".

    Its HTTP status says nothing: an error is a line under 200, and a stream that just ends is a failure too.

    Raises:
        FailedPrecondition: It refuses the model.
        ResourceExhausted: Its disk is full.
        Unavailable: The stream ended early.
    """
    last = ""
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise refused(WHAT, "create the model", httpx2.codes.OK, f"it said {line[:200]!r}")
        if "error" in event:
            raise refused(WHAT, "create the model", httpx2.codes.OK, str(event["error"]))
        last = str(event.get("status", ""))
        say(last)
    if last != "success":
        raise httpx2.RemoteProtocolError(f'the answer ended with "{last}" in place of "success"')


def _create_error(answer: httpx2.Response) -> Web4Error:
    """Say why /api/create was refused as a whole."""
    if answer.status_code in (httpx2.codes.NOT_FOUND, httpx2.codes.METHOD_NOT_ALLOWED, httpx2.codes.GONE):
        return FailedPrecondition(
            f"This Ollama no longer takes a GGUF by /api/create (HTTP {answer.status_code}).",
            fix="It is newer than what we know. Deploy to llama-server, or use Ollama 0.31.2 to 0.34.",
            reason="RUNTIME_TOO_NEW",
        )
    return refused(WHAT, "create the model", answer.status_code, _said(answer))


def _said(answer: httpx2.Response) -> str:
    try:
        return str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        return answer.text


def _chunks(file: Path, advance: Callable[[int], None]) -> Iterator[bytes]:
    with file.open("rb") as source:
        while chunk := source.read(_CHUNK_BYTES):
            yield chunk
            advance(len(chunk))


def _lines(answer: httpx2.Response) -> Iterator[bytes]:
    """Yield the lines of an answer as they come, none longer than a bound."""
    rest = b""
    for piece in answer.iter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        yield from (line for line in lines if line.strip())
        if len(rest) > _LINE_LIMIT_BYTES:
            raise httpx2.RemoteProtocolError("a line longer than 1 MiB")
    if rest.strip():
        yield rest


def _full(model: str) -> str:
    return (model if ":" in model else f"{model}:latest").lower()
