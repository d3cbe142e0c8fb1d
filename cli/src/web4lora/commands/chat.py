"""`web4lora chat`: ask a deployed model through its OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx2
import typer
from web4.lora.v1 import deployments_pb2
from web4lora_chassis.dataset import Row, check_rows
from web4lora_chassis.errors import Internal, InvalidInput, NotFound, Unavailable

from web4lora.client import Client
from web4lora.commands.options import Json, examples
from web4lora.views import console
from web4lora.views.console import print_json

_CONNECT_SECONDS = 5.0
_TOKEN_SECONDS = 300.0
_MORE_EVENTS = 64  # than tokens: the first one, the figures, a token that is sent in parts
_MOST_BYTES = 1 << 20
_EXAMPLES = examples(
    'web4lora chat web4-demo "Create an agent named atlas"',
    "web4lora chat web4-demo --system-from examples/web4/tool_core.eval.jsonl",
    'echo "Stop agent maple" | web4lora chat web4-demo',
    'web4lora chat web4-demo --system "" "Who are you?"',
)

Turns = list[dict[str, str]]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("chat", epilog=_EXAMPLES)(chat)


def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A deployment's name or id.", show_default=False)
    ],
    text: Annotated[
        str,
        typer.Argument(metavar="TEXT", help="What to ask; without it, a conversation.", show_default=False),
    ] = "",
    system: Annotated[
        str | None,
        typer.Option(
            "--system",
            metavar="TEXT",
            help='The system message; "" for none. Without it, the one that the model was trained with most.',
            show_default=False,
        ),
    ] = None,
    system_from: Annotated[
        str,
        typer.Option(
            "--system-from",
            metavar="FILE.jsonl:LINE",
            help="Take the system message of a row of chat data; without a line, of the first that has one.",
            show_default=False,
        ),
    ] = "",
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 gives the likeliest answer.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="The answer ends after this many tokens.")] = 512,
    as_json: Json = False,
) -> None:
    """Ask a deployed model, with the system message that it was trained with unless another one is given.

    Without TEXT: a conversation on a terminal; on a pipe the question is read.
    """
    with Client() as client:
        deployment = client.deployment(model)
    if deployment.state != deployments_pb2.DEPLOYMENT_STATE_SERVING:
        raise Unavailable(
            f"{deployment.id} does not answer{': ' if deployment.detail else ''}{deployment.detail}.",
            fix="`web4lora deployments list` shows its state.",
        )
    if system_from:
        system = system_of(system_from)
    elif system is None:
        system = deployment.trained_system
    turns: Turns = [{"role": "system", "content": system}] if system else []
    conversation = Conversation(deployment, turns, temperature=temperature, max_tokens=max_tokens)
    if not text and not sys.stdin.isatty():
        text = well_formed(sys.stdin.read()).strip()
        if not text:
            raise InvalidInput("There is no question.", fix=f'`web4lora chat {model} "…"` asks one.')
    if not text:
        _talk(conversation)
    elif as_json:
        answer = "".join(conversation.ask(text))
        print_json({"model": deployment.id, "system": system, "answer": answer, **conversation.figures})
    else:
        if system and system == deployment.trained_system:
            console.note(f"System message: {textwrap.shorten(system, 100)}")
        _print(conversation.ask(text))


class Conversation:
    """Asks a deployment, turn by turn.

    Args:
        deployment: Whom to ask.
        turns: The conversation so far; it grows with each question.
        temperature: 0 gives the likeliest answer.
        max_tokens: An answer ends after this many tokens.
    """

    def __init__(
        self, deployment: deployments_pb2.Deployment, turns: Turns, *, temperature: float, max_tokens: int
    ) -> None:
        self._deployment = deployment
        self._temperature = temperature
        self._max_tokens = max_tokens
        self.turns = turns
        self.figures: dict[str, Any] = {}

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer piece by piece.

        Raises:
            Unavailable: The runtime is out of reach, or went away while it answered.
            Internal: It refused the question, or its answer can't be read.
        """
        self.turns.append({"role": "user", "content": well_formed(text)})
        body = {
            "model": self._deployment.model,
            "messages": self.turns,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": self._temperature,
            "max_tokens": self._max_tokens,
        }
        url = f"{self._deployment.endpoint.rstrip('/')}/chat/completions"
        timeout = httpx2.Timeout(_TOKEN_SECONDS, connect=_CONNECT_SECONDS)
        pieces = []
        try:
            with httpx2.stream("POST", url, json=body, timeout=timeout, trust_env=False) as response:
                if response.status_code != httpx2.codes.OK:
                    raise Internal(
                        f"{self._deployment.id} refused: {_reason(response)} (HTTP {response.status_code}).",
                        fix="A shorter question, or --max-tokens, may help.",
                    )
                for piece in joined(self._pieces(response)):
                    pieces.append(piece)
                    yield piece
        except httpx2.HTTPError as error:
            raise Unavailable(
                f"{self._deployment.id} at {self._deployment.endpoint} is out of reach: {error}.",
                fix="`web4lora deployments list` shows its state.",
            ) from error
        self.turns.append({"role": "assistant", "content": "".join(pieces)})

    def _pieces(self, response: httpx2.Response) -> Iterator[str]:
        """Yield the text of a stream of server-sent events; keep its figures."""
        for number, event in enumerate(self._events(response), start=1):
            if problem := event.get("error"):
                said = problem.get("message", problem) if isinstance(problem, dict) else problem
                raise Internal(f"{self._deployment.id}: {said}")
            if usage := event.get("usage"):
                self.figures["completion_tokens"] = usage.get("completion_tokens", 0)
            if timings := event.get("timings"):
                self.figures["tokens_per_second"] = round(float(timings.get("predicted_per_second", 0)), 1)
            for choice in event.get("choices") or ():
                if choice.get("finish_reason"):
                    self.figures["finish_reason"] = choice["finish_reason"]
                if content := (choice.get("delta") or {}).get("content"):
                    yield str(content)
            if number > self._max_tokens + _MORE_EVENTS:  # what it only thinks, and empty ones, count too
                self.figures["finish_reason"] = "length"
                return

    def _events(self, response: httpx2.Response) -> Iterator[dict[str, Any]]:
        """Yield the events of a stream.

        Raises:
            Internal: One can't be read.
        """
        rest = b""
        # Not iter_lines(): it splits at all that Unicode calls a line end, U+2028 within a JSON text too.
        for piece in response.iter_bytes():
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                data = line.removeprefix(b"data:").strip()
                if not line.startswith(b"data:") or data in (b"", b"[DONE]"):
                    continue
                try:
                    event = json.loads(data)
                except ValueError:
                    event = None
                if not isinstance(event, dict):
                    raise Internal(
                        f"{self._deployment.id} sent what is no part of an answer: {data[:100]!r}.",
                        fix=f"Does a program of another kind listen at {self._deployment.endpoint}?",
                    )
                yield event
            if len(rest) > _MOST_BYTES:
                raise Internal(f"{self._deployment.id} sent a line longer than {_MOST_BYTES >> 20} MiB.")


def well_formed(text: str) -> str:
    """Replace half a surrogate pair by U+FFFD: it is no sign, and no terminal and no request takes it."""
    return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


def joined(pieces: Iterable[str]) -> Iterator[str]:
    """Yield pieces of a text so that no sign is split between two of them."""
    kept = ""
    for piece in pieces:
        text = kept + piece
        kept = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
        if whole := text[: len(text) - len(kept)]:
            yield well_formed(whole)
    if kept:
        yield well_formed(kept)


def system_of(place: str) -> str:
    """Return the system message of a row of chat data.

    Args:
        place: `file.jsonl:line`, or a file alone for its first row that has one.

    Raises:
        NotFound: The file is not there.
        InvalidInput: No such row, or it has no system message.
    """
    name, colon, number = place.rpartition(":")
    name, number = (name, number) if colon and number.isdigit() else (place, "")
    path = Path(name)
    if not path.is_file():
        raise NotFound(f"{name} is not there.", fix="Name a JSON Lines file, for example train.jsonl:1.")
    for item in check_rows(path):
        if isinstance(item, Row) and item.messages[0].role == "system" and number in ("", str(item.line)):
            return item.messages[0].content
    where = f"Line {number} of {name}" if number else name
    raise InvalidInput(f"{where} has no system message.", fix="Name another row, or use --system.")


def _print(pieces: Iterator[str]) -> None:
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _talk(conversation: Conversation) -> None:
    """Ask question after question until the end of input."""
    console.note("/new forgets the conversation · /system TEXT changes the system message · Ctrl-D ends")
    if conversation.turns:
        console.note(f"System message: {textwrap.shorten(conversation.turns[0]['content'], 100)}")
    while True:
        try:
            text = input("▸ ").strip()
        except (EOFError, KeyboardInterrupt):
            console.line()
            return
        if text == "/new":
            del conversation.turns[1 if conversation.turns[:1] and _is_system(conversation.turns[0]) else 0 :]
        elif text.startswith("/system"):
            system = text.removeprefix("/system").strip()
            conversation.turns[:] = [{"role": "system", "content": system}] if system else []
        elif text.startswith("/"):
            console.note(f"{text.split()[0]} is not known here: /new, /system TEXT, Ctrl-D")
        elif text:
            _answer(conversation, text)


def _answer(conversation: Conversation, text: str) -> None:
    """Print one answer; Ctrl-C ends it and nothing else."""
    try:
        _print(conversation.ask(text))
    except KeyboardInterrupt:
        conversation.turns.pop()
        console.line()
        console.note("The answer was cut off; the question is forgotten.")
        return
    if rate := conversation.figures.get("tokens_per_second"):
        console.note(f"{conversation.figures.get('completion_tokens', 0)} tokens, {rate:.0f} tokens/s")


def _is_system(turn: dict[str, str]) -> bool:
    return turn["role"] == "system"


def _reason(response: httpx2.Response) -> str:
    text = response.read().decode("utf-8", errors="replace").strip()
    try:
        problem = json.loads(text)["error"]
        return str(problem.get("message", problem) if isinstance(problem, dict) else problem)
    except (ValueError, KeyError, TypeError):
        return text[:300] or "no reason given"
