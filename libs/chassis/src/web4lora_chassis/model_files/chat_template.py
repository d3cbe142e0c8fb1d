"""Chat templates: found in a model's folder, and rendered as Transformers' apply_chat_template does.

A template is a program that came with a model, so it runs in a process of its own (`rendering`), without our
environment, and with bounds on time, memory and output.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from web4lora_chassis import process
from web4lora_chassis.errors import InvalidInput

Message = Mapping[str, Any]

SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
"""The tokens that templates may write by name."""
_JINJA, _JSON, _CONFIG = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"
_USER, _SYSTEM = "3f2a user 9c1e", "5d6c system 1a0b"


@dataclass(frozen=True)
class Bounds:
    """What one template may use.

    Attributes:
        cpu_seconds: Of processor time, for one conversation.
        wall_seconds: Of time in all, for one conversation, on a machine however busy.
        memory_bytes: Address space of the process.
        output_bytes: Of one rendered conversation.
    """

    cpu_seconds: int = 10
    wall_seconds: float = 120.0
    memory_bytes: int = 1 << 30
    output_bytes: int = 16 << 20


class BrokenTemplate(InvalidInput):
    """A template can't be used at all: it does not parse, or wants more than it may use."""


class ChatTemplate:
    """A chat template, ready to render. Not for several threads at once.

    Args:
        text: In Jinja.
        special: Texts of the special tokens by role: bos_token, eos_token, …. One that is not there is
            undefined in the template, as in Transformers.
        bounds: What it may use.
    """

    def __init__(
        self, text: str, special: Mapping[str, str] | None = None, bounds: Bounds | None = None
    ) -> None:
        self.text = text
        self._special = dict(special or {})
        self._bounds = bounds or Bounds()
        self._process: subprocess.Popen[bytes] | None = None

    def render(
        self,
        messages: Sequence[Message],
        *,
        answer_next: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        now: datetime | None = None,
    ) -> str:
        """Return a conversation as the model reads it.

        Args:
            messages: Role and content of each turn.
            answer_next: End with the beginning of the assistant's turn.
            tools: JSON schemas of tools, where the template takes them.
            now: The time that it writes, where it writes the date; None is the present.

        Raises:
            InvalidInput: The template refuses these messages.
            BrokenTemplate: It can't be parsed, or wants more than it may use.
        """
        child = self._process or self._start()
        request = {
            "messages": list(messages),
            "add_generation_prompt": answer_next,
            "tools": tools,
            "now": now.isoformat() if now else "",
        }
        try:
            reply = self._ask(child, request)
        except BaseException:
            self.close()
            raise
        if "text" not in reply:
            kind = BrokenTemplate if reply["broken"] else InvalidInput
            raise kind(
                f"The chat template {reply['error']}",
                fix="Correct the model's chat template, or choose another model or other messages.",
                reason="CHAT_TEMPLATE",
            )
        return str(reply["text"])

    @property
    def dated(self) -> bool:
        """True when it may write the date."""
        return "strftime_now" in self.text

    def default_system(self, now: datetime | None = None) -> str:
        """Return the system message that the template puts in when there is none, or an empty text.

        It is found by rendering with and without a marked system message, and proved by rendering with it.

        Args:
            now: As for `render`.

        Raises:
            InvalidInput: The template can't even render a question.
        """
        if not self.text:
            return ""
        now = now or datetime.now()  # the same for all
        user = {"role": "user", "content": _USER}
        bare = self.render([user], now=now)
        try:
            marked = self.render([{"role": "system", "content": _SYSTEM}, user], now=now)
        except BrokenTemplate:
            raise
        except InvalidInput:
            return ""  # takes no system messages at all
        before, found, after = marked.partition(_SYSTEM)
        if not found or len(bare) <= len(before) + len(after):
            return ""
        if not (bare.startswith(before) and bare.endswith(after)):
            return ""
        system = bare[len(before) : len(bare) - len(after)]
        return system if self.render([{"role": "system", "content": system}, user], now=now) == bare else ""

    def close(self) -> None:
        """End its process; rendering again starts another."""
        child, self._process = self._process, None
        if child is not None:
            _end(child)

    def _start(self) -> subprocess.Popen[bytes]:
        keep = (
            "TZ",
            "TZDIR",
            "SYSTEMROOT",
        )  # for strftime_now; nothing else of ours is the template's business
        child = process.start(
            [sys.executable, "-I", "-m", "web4lora_chassis.model_files.rendering"],
            env={name: os.environ[name] for name in keep if name in os.environ},
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        weakref.finalize(self, _end, child)
        self._process = child
        bounds = self._bounds
        _send(
            child,
            {
                "template": self.text,
                "special": self._special,
                "cpu_seconds": bounds.cpu_seconds,
                "memory_bytes": bounds.memory_bytes,
                "output_bytes": bounds.output_bytes,
            },
        )
        return child

    def _ask(self, child: subprocess.Popen[bytes], request: Mapping[str, Any]) -> dict[str, Any]:
        line = b""
        with contextlib.suppress(BrokenPipeError):
            _send(child, request)
            line = _read_line(child, self._bounds.wall_seconds)
        if not line.endswith(b"\n"):
            self.close()
            return {
                "error": f"was given up: one conversation took more than {self._bounds.cpu_seconds} s of "
                f"processor time, or more than {self._bounds.memory_bytes >> 20} MiB of memory.",
                "broken": True,
            }
        reply: dict[str, Any] = json.loads(line)
        return reply


def default_template(value: object) -> str:
    """Return the default template of what a tokenizer's configuration has: a text, or several by name."""
    if isinstance(value, list):
        value = {
            str(entry.get("name")): entry.get("template") for entry in value if isinstance(entry, Mapping)
        }
    if isinstance(value, Mapping):
        value = value.get("default")
    return value if isinstance(value, str) else ""


def template_in(folder: Path, tokenizer_config: Mapping[str, Any]) -> str:
    """Return the default template of a model's folder, from where Transformers' versions have kept it.

    Line ends are read as Transformers and llama.cpp's converter read them: each becomes a line feed.

    Args:
        folder: The model's.
        tokenizer_config: The content of its tokenizer_config.json.

    Raises:
        InvalidInput: A file can't be read as text or JSON.
    """
    try:
        if (folder / _JINJA).is_file():
            return (folder / _JINJA).read_text(encoding="utf-8")
        legacy: object = {}
        if (folder / _JSON).is_file():
            legacy = json.loads((folder / _JSON).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidInput(
            f"The chat template of {folder} can't be read: {error}.", fix="Fetch the model anew."
        ) from error
    own = legacy.get("chat_template") if isinstance(legacy, Mapping) else None
    return default_template(own or tokenizer_config.get("chat_template"))


def _send(child: subprocess.Popen[bytes], data: Mapping[str, Any]) -> None:
    assert child.stdin is not None
    child.stdin.write(json.dumps(data).encode() + b"\n")
    child.stdin.flush()


def _read_line(child: subprocess.Popen[bytes], seconds: float) -> bytes:
    """Return the child's next line; what there was of it when the child ended or time ran out."""
    assert child.stdout is not None
    deadline = time.monotonic() + seconds
    line = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n") and selector.select(max(0.0, deadline - time.monotonic())):
            piece = os.read(child.stdout.fileno(), 1 << 16)
            if not piece:
                break
            line += piece
    return bytes(line)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    child.wait()
