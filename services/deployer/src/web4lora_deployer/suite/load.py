"""Reads a suite: `suite.yaml`, the prompt files and the rule files that it names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from web4lora_chassis.errors import InvalidInput, NotFound

from web4lora_deployer.suite.check import shorten
from web4lora_deployer.suite.graders import GRADERS, Grader
from web4lora_deployer.suite.spec import Core, LatencySpec, Prompt, RobustnessSpec, Suite
from web4lora_deployer.suite.strict_yaml import StrictModel, parse_yaml
from web4lora_deployer.suite.style import RULE_NAMES, StyleRules
from web4lora_deployer.suite.tool_call import ANY_CALL

SUITE_FILE = "suite.yaml"
_MAX_FILE_BYTES = 64 * 2**20


class _CoreFile(StrictModel):
    """One core in suite.yaml."""

    check: Literal["tool_call", "style", "guardrail"]
    prompts: str | list[str]
    max_tokens: Annotated[int, Field(ge=1, le=32768)]
    title: str = ""
    rules: str = ""
    constrained: bool = False
    json_schema: str = ""


class _RobustnessFile(StrictModel):
    """`robustness` in suite.yaml."""

    long_prompt_percent: Annotated[int, Field(ge=0, le=90)] = 70
    unicode: bool = True
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 80


class _LatencyFile(StrictModel):
    """`latency` in suite.yaml."""

    requests_at_once: Annotated[
        list[Annotated[int, Field(ge=1, le=64)]], Field(min_length=1, max_length=8)
    ] = Field(default_factory=lambda: [1, 4])
    requests: Annotated[int, Field(ge=1, le=1000)] = 8
    max_tokens: Annotated[int, Field(ge=2, le=4096)] = 64


class _SuiteFile(StrictModel):
    """suite.yaml."""

    name: Annotated[str, Field(min_length=1, max_length=80)]
    cores: Annotated[dict[str, _CoreFile], Field(min_length=1)]
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = 300.0
    repeats: Annotated[int, Field(ge=1, le=100)] = 1
    llama_bench: bool = False
    robustness: _RobustnessFile | None = None
    latency: _LatencyFile | None = None


class _RuleFile(StrictModel):
    """A rule file of the style grader."""

    fence: Annotated[str, Field(pattern=r"^[A-Za-z]+$")] = "ts"
    max_lines: Annotated[int, Field(ge=1, le=100_000)] = 14
    indent_spaces: Annotated[int, Field(ge=1, le=8)] = 2
    quotes: Literal["single", "double"] = "single"
    extra_methods: bool = False
    rules: dict[str, bool] = Field(default_factory=dict)

    @field_validator("rules")
    @classmethod
    def _known(cls, rules: dict[str, bool]) -> dict[str, bool]:
        if unknown := set(rules) - set(RULE_NAMES):
            raise ValueError(f'unknown rule "{min(unknown)}"; known are {", ".join(RULE_NAMES)}')
        return rules


def load_suite(folder: Path) -> Suite:
    """Read a suite from its folder.

    Args:
        folder: Holds suite.yaml and the files that it names.

    Returns:
        The suite, every prompt checked.

    Raises:
        NotFound: There is no suite.yaml, or a file that it names is missing.
        InvalidInput: Something in a file is wrong: the message is one line with file and line.
    """
    content = _Files(folder)
    path = folder / SUITE_FILE
    spec = parse_yaml(content.read(SUITE_FILE, named_by=""), str(path), _SuiteFile)
    cores: list[Core] = []
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    for name, core in spec.cores.items():
        if other := next((c.name for c in cores if c.grader == core.check), ""):
            raise InvalidInput(
                f'{path}: cores "{other}" and "{name}" both have the check {core.check}, so their scores '
                "would have the same name.",
                fix="Make them one core: `prompts` may be a list of files.",
            )
        rules = _read_rules(content, folder, name, core)
        schema = _read_schema(content, folder, name, core)
        cores.append(Core(name, core.title or name, core.check, core.max_tokens, rules, schema))
        for file in [core.prompts] if isinstance(core.prompts, str) else core.prompts:
            text = content.read(file, named_by=f"cores.{name}.prompts")
            prompts.extend(_read_prompts(text, folder / file, name, GRADERS[core.check], seen))
    return Suite(
        name=spec.name,
        seed=spec.seed,
        timeout_seconds=spec.timeout_seconds,
        cores=tuple(cores),
        prompts=tuple(prompts),
        latency=_latency(spec.latency),
        robustness=_robustness(spec.robustness),
        digest=content.digest(),
        repeats=spec.repeats,
        llama_bench=spec.llama_bench,
    )


def _latency(spec: _LatencyFile | None) -> LatencySpec | None:
    return LatencySpec(tuple(spec.requests_at_once), spec.requests, spec.max_tokens) if spec else None


def _robustness(spec: _RobustnessFile | None) -> RobustnessSpec | None:
    return RobustnessSpec(spec.long_prompt_percent, spec.unicode, spec.max_tokens) if spec else None


class _Files:
    """Reads files of the suite's folder, and only those, and remembers their digests."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digests: dict[str, str] = {}

    def read(self, name: str, *, named_by: str) -> str:
        path = self._folder / name
        where = f"{self._folder / SUITE_FILE}: {named_by}" if named_by else str(path)
        relative = PurePosixPath(name)
        if (
            relative.is_absolute()
            or ".." in relative.parts
            or not path.resolve().is_relative_to(self._folder.resolve())
        ):
            raise InvalidInput(f"{where}: {name} is not inside the suite's folder.")
        if not path.is_file():
            raise NotFound(f"{where}: there is no file {name}." if named_by else f"There is no file {path}.")
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise InvalidInput(f"{path} is larger than {_MAX_FILE_BYTES // 2**20} MiB.")
        data = path.read_bytes()
        self._digests[name] = hashlib.sha256(data).hexdigest()
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            raise InvalidInput(f"{path}:{line}: not UTF-8.") from error

    def digest(self) -> str:
        lines = (f"{digest}  {name}\n" for name, digest in sorted(self._digests.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def _read_rules(content: _Files, folder: Path, name: str, core: _CoreFile) -> StyleRules:
    if not core.rules:
        return StyleRules()
    if core.check != "style":
        raise InvalidInput(f"{folder / SUITE_FILE}: cores.{name}.rules: only the check style has rules.")
    text = content.read(core.rules, named_by=f"cores.{name}.rules")
    spec = parse_yaml(text, str(folder / core.rules), _RuleFile)
    return StyleRules(
        off=frozenset(rule for rule, on in spec.rules.items() if not on),
        fence=spec.fence,
        max_lines=spec.max_lines,
        indent_spaces=spec.indent_spaces,
        quotes=spec.quotes,
        extra_methods=spec.extra_methods,
    )


def _read_schema(content: _Files, folder: Path, name: str, core: _CoreFile) -> Mapping[str, Any] | None:
    """Return the schema that constrained answers are held to; None when the core asks for none."""
    where = f"{folder / SUITE_FILE}: cores.{name}"
    if core.constrained and core.check != "tool_call":
        raise InvalidInput(f"{where}.constrained: only the check tool_call has answers that a schema fits.")
    if core.json_schema and not core.constrained:
        raise InvalidInput(f"{where}.json_schema: set `constrained: true` too, or leave it out.")
    if not core.constrained:
        return None
    if not core.json_schema:
        return ANY_CALL
    text = content.read(core.json_schema, named_by=f"cores.{name}.json_schema")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{folder / core.json_schema}: not JSON: {shorten(error)}.") from error
    if not isinstance(schema, dict):
        raise InvalidInput(f"{folder / core.json_schema}: a JSON Schema is an object.")
    return schema


def _read_prompts(text: str, path: Path, core: str, grader: Grader, seen: dict[str, str]) -> list[Prompt]:
    prompts = []
    # Not splitlines(): it also splits at signs like U+2028, which a JSON string may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        prompt = _read_row(line, where, core, grader)
        if prompt.id in seen:
            raise InvalidInput(
                f'{where}: the id "{shorten(prompt.id)}" was used before, at {seen[prompt.id]}.'
            )
        seen[prompt.id] = where
        prompts.append(prompt)
    if not prompts:
        raise InvalidInput(f"{path}: holds no prompts.")
    return prompts


def _read_row(line: str, where: str, core: str, grader: Grader) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{where}: not JSON: {shorten(error)}.") from error
    if not isinstance(row, dict):
        raise InvalidInput(f"{where}: not a JSON object.")
    if problem := _row_problem(row, core):
        raise InvalidInput(f"{where}: {problem}.")
    if problem := grader.validate_check(row["check"]):
        raise InvalidInput(f"{where}: {problem}.")
    *messages, last = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
    return Prompt(row["id"], core, tuple(messages), last["content"], row["check"])


def _row_problem(row: Mapping[str, Any], core: str) -> str:
    for key in ("id", "core", "messages", "check"):
        if key not in row:
            return f'the key "{key}" is missing'
    if unknown := set(row) - {"id", "core", "messages", "check"}:
        return f'unknown key "{shorten(min(unknown))}"'
    if not isinstance(row["id"], str) or not row["id"]:
        return "id must be a text"
    if row["core"] != core:
        return f"core is {shorten(json.dumps(row['core']))}, but suite.yaml has this file under {core}"
    if not isinstance(row["check"], dict):
        return "check must be an object"
    return _messages_problem(row["messages"])


def _messages_problem(messages: Any) -> str:
    if not isinstance(messages, list) or len(messages) < 2:
        return "messages must be a list of at least two: a question and the wanted answer"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            return f'message {number} must have the keys "role" and "content", and no others'
        if message["role"] not in ("system", "user", "assistant"):
            return f"message {number}: the role {shorten(json.dumps(message['role']))} is unknown"
        if not isinstance(message["content"], str) or not message["content"].strip():
            return f"message {number} has no text"
    if messages[-1]["role"] != "assistant" or messages[-2]["role"] != "user":
        return 'the last two messages must be from "user" and from "assistant", the wanted answer'
    return ""
