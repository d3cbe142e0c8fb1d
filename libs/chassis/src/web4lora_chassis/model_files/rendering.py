"""The process in which a chat template runs: a line of JSON in, a line of JSON out, until its input ends.

What a template finds here is what Transformers' apply_chat_template gives it; a test compares the two.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_MESSAGE_LIMIT = 200
_REASONING = ("reasoning_content", "thinking", "reasoning")


class _Generation(Extension):
    """Lets `{% generation %}` through, which marks what is trained on."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own form

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return str(caller())


class _Namespace(Namespace):
    """Jinja's, without names that lead into Python's insides."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Dict:
    """Makes dicts, and is no class whose attributes lead further."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace can't have the attribute {name!r}")


def _refuse(message: object) -> NoReturn:
    """Serve templates as `raise_exception`."""
    raise TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def compiled(text: str) -> Template:
    """Return a template in the environment that Transformers gives it.

    Raises:
        TemplateError: It can't be parsed.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_refuse,
        dict=_Dict(),
        namespace=_Namespace,
    )
    return environment.from_string(text)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Give a message's reasoning the names that templates read it under."""
    given = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if given is None else {"thinking": given, **message, "reasoning_content": given}


def _bound_memory(size_bytes: int) -> None:
    with contextlib.suppress(ValueError, OSError):  # macOS does not take it; time is bounded all the same
        resource.setrlimit(resource.RLIMIT_AS, (size_bytes, size_bytes))


def _bound_time(seconds: int) -> None:
    """Let the system end this process when it has used so many seconds more."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _answer(setup: Mapping[str, Any], request: Mapping[str, Any], template: Template) -> dict[str, Any]:
    now = datetime.fromisoformat(request["now"]) if request["now"] else datetime.now()
    try:
        text = template.render(
            messages=[_with_reasoning(message) for message in request["messages"]],
            tools=request["tools"],
            documents=None,
            add_generation_prompt=request["add_generation_prompt"],
            strftime_now=lambda pattern: now.strftime(pattern),
            **setup["special"],
        )
    except (MemoryError, RecursionError) as error:
        return _too_much(error)
    except TemplateSyntaxError as error:  # by an include or the like
        return _broken(error)
    except TemplateError as error:
        return _refused(f"refuses a conversation: {_short(error)}.")
    except Exception as error:  # noqa: BLE001 - whatever a template can bring about becomes one line
        return _refused(f"fails with a conversation: {type(error).__name__}: {_short(error)}.")
    if len(text) > setup["output_bytes"]:
        return _refused(f"makes a text of {len(text):,} signs of a conversation; that is not believable.")
    return {"text": text}


def _refused(text: str) -> dict[str, Any]:
    return {"error": text, "broken": False}


def _broken(error: TemplateSyntaxError) -> dict[str, Any]:
    return {"error": f"can't be parsed: line {error.lineno}: {_short(error)}.", "broken": True}


def _too_much(error: Exception) -> dict[str, Any]:
    text = f"was given up: it needs too much memory ({type(error).__name__})."
    return {"error": text, "broken": True}


def _short(error: Exception) -> str:
    text = str(error.message if isinstance(error, TemplateError) and error.message else error)
    return " ".join(text.split())[:_MESSAGE_LIMIT].rstrip(".")


def main() -> None:
    """Render what standard input asks for."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    setup = json.loads(sys.stdin.buffer.readline())
    _bound_memory(setup["memory_bytes"])
    template: Template | None = None
    for line in sys.stdin.buffer:
        _bound_time(setup["cpu_seconds"])
        try:
            template = template or compiled(setup["template"])
            reply = _answer(setup, json.loads(line), template)
        except TemplateSyntaxError as error:
            reply = _broken(error)
        except (MemoryError, RecursionError) as error:
            reply = _too_much(error)
        except (TemplateError, ValueError, SyntaxError) as error:
            reply = {"error": f"can't be compiled: {type(error).__name__}: {_short(error)}.", "broken": True}
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
