"""Reads a suite: `suite.yaml`, the prompt files and the rule files that it names."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from web4lora_chassis.errors import InvalidInput, NotFound
from web4lora_chassis.graders import GRADERS
from web4lora_chassis.graders.check import shorten
from web4lora_chassis.graders.style import RULE_NAMES, StyleRules
from web4lora_chassis.graders.tool_call import ANY_CALL

from web4lora_deployer.suite.problems import Problems
from web4lora_deployer.suite.prompts import read_prompts
from web4lora_deployer.suite.spec import Core, LatencySpec, Prompt, RobustnessSpec, Suite
from web4lora_deployer.suite.strict_yaml import StrictModel, read_yaml

SUITE_FILE = "suite.yaml"
_BESIDE = "Put the file beside suite.yaml, or below it."
_SCHEMA = 'Write a JSON Schema, for example {"type": "object"}.'
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
        NotFound: There is no suite.yaml, or nothing is wrong but that a file that it names is missing.
        InvalidInput: Something is wrong: the message has a line a problem, with file and line, the first 20.
    """
    problems = Problems()
    content = _Files(folder)
    path = folder / SUITE_FILE
    document = read_yaml(content.text(SUITE_FILE, named_by=""), str(path))
    spec: _SuiteFile | None = None
    with problems.noted():
        spec = document.model(_SuiteFile)
    cores: list[Core] = []
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    for name, core in (spec.cores if spec else _good_cores(document.data)).items():
        with problems.noted():
            _refuse_same_check(path, name, core, cores)
        rules, schema = StyleRules(), None
        with problems.noted():
            rules = _read_rules(content, folder, name, core)
        with problems.noted():
            schema = _read_schema(content, folder, name, core)
        cores.append(Core(name, core.title or name, core.check, core.max_tokens, rules, schema))
        for file in [core.prompts] if isinstance(core.prompts, str) else core.prompts:
            with problems.noted():
                place = content.path(file, named_by=f"cores.{name}.prompts")
                prompts += read_prompts(place, folder / file, name, GRADERS[core.check], seen, problems)
    problems.refuse_any()
    assert spec is not None
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


def _good_cores(data: Any) -> dict[str, _CoreFile]:
    """Return the cores of a wrong suite.yaml that are right by themselves, so that their files are read."""
    found: dict[str, _CoreFile] = {}
    cores = data.get("cores") if isinstance(data, dict) else None
    for name, core in cores.items() if isinstance(cores, dict) else ():
        with contextlib.suppress(ValidationError):
            found[str(name)] = _CoreFile.model_validate(core)
    return found


def _refuse_same_check(path: Path, name: str, core: _CoreFile, others: Iterable[Core]) -> None:
    if other := next((each.name for each in others if each.grader == core.check), ""):
        raise InvalidInput(
            f'{path}: cores "{other}" and "{name}" both have the check {core.check}, so their scores would '
            "have the same name.",
            fix="Make them one core: `prompts` may be a list of files.",
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

    def path(self, name: str, *, named_by: str) -> Path:
        """Return where a file lies, which is inside the folder and not huge."""
        path = self._folder / name
        where = f"{self._folder / SUITE_FILE}: {named_by}" if named_by else str(path)
        relative = PurePosixPath(name)
        try:
            place, there = path.resolve(), path.is_file()
        except (OSError, ValueError):  # no name that a file can have: too long, or with a NUL in it
            place, there = path.absolute(), False
        if (
            relative.is_absolute()
            or ".." in relative.parts
            or not place.is_relative_to(self._folder.resolve())
        ):
            raise InvalidInput(f"{where}: {shorten(name)} is not inside the suite's folder.", fix=_BESIDE)
        if not there:
            what = f"{where}: there is no file {shorten(name)}." if named_by else f"There is no file {path}."
            raise NotFound(what, fix="Correct the path, or add the file.")
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise InvalidInput(f"{path} is larger than {_MAX_FILE_BYTES // 2**20} MiB.")
        self._digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return path

    def text(self, name: str, *, named_by: str) -> str:
        """Return the text of a file that is no JSON Lines."""
        path = self.path(name, named_by=named_by)
        data = path.read_bytes()
        try:
            return data.decode("utf-8-sig")
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
    text = content.text(core.rules, named_by=f"cores.{name}.rules")
    spec = read_yaml(text, str(folder / core.rules)).model(_RuleFile)
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
    text = content.text(core.json_schema, named_by=f"cores.{name}.json_schema")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(
            f"{folder / core.json_schema}: not JSON: {shorten(error)}.", fix=_SCHEMA
        ) from error
    if not isinstance(schema, dict):
        raise InvalidInput(f"{folder / core.json_schema}: a JSON Schema is an object.", fix=_SCHEMA)
    return schema
