"""What a pipeline's settings are made of: a rule for each, which holds its bounds and its default.

A stage's settings are a frozen dataclass whose fields are named as in the contract and declared with
`setting(RULE)`; settings of their own below a name are a dataclass likewise. From that one declaration come
the check of a pipeline file, of a run and of a worker's spec (`problems`, `checked`), the defaults that a run
is stored with (`fill`), and the values that a worker works with (`of`). What is checked is the contract's
message; nothing here knows RPC.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, Self

from google.protobuf.message import Message

from web4lora_chassis.errors import InvalidInput, shown

_SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """Something wrong with a setting.

    Attributes:
        field: Its dotted path, for example "train.lora.rank".
        text: What is wrong.
        fix: What to do; empty when the text says it.
        entry: Its place in a list, behind the path: "[1]".
        between: It is wrong beside other settings, not by itself.
    """

    field: str
    text: str
    fix: str = ""
    entry: str = ""
    between: bool = False

    def __str__(self) -> str:
        """Return the line that people read."""
        return f"{self.field}: {self.text}"


Wrong = tuple[str, str, str]
"""Where in a value (behind its path), what is wrong, and what to do."""


class Rule(Protocol):
    """What a setting may hold, and what it holds when absent."""

    @property
    def default(self) -> Any:
        """The value of an absent setting; None when it depends on the model, the machine or another one."""

    @property
    def default_text(self) -> str:
        """The default in words, where it is no plain value."""

    def wrong(self, value: Any) -> Iterator[Wrong]:
        """Yield what is wrong with a value."""


@dataclass(frozen=True)
class Number:
    """A finite number between two ends, which belong to it unless `above` or `below` is meant."""

    default: float | None = None
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    default_text: str = ""

    def wrong(self, value: float) -> Iterator[Wrong]:
        """See `Rule.wrong`."""
        if math.isfinite(value) and self.low <= value <= self.high and self.above < value < self.below:
            return
        ends = [
            (self.low, "at least"),
            (self.above, "above"),
            (self.high, "at most"),
            (self.below, "below"),
        ]
        words = [f"{word} {end:.10g}" for end, word in ends if math.isfinite(end)]
        yield "", f"{shown(value)} must be {' and '.join(words) or 'a finite number'}.", ""


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    words: tuple[str, ...]
    default: str | None = None
    default_text: str = ""

    def wrong(self, value: str) -> Iterator[Wrong]:
        """See `Rule.wrong`."""
        if value not in self.words:
            yield "", f"{shown(value)} must be one of {', '.join(self.words)}.", ""


@dataclass(frozen=True)
class Text:
    """A text of a form.

    Attributes:
        pattern: Its form.
        what: What it is, for messages: "the id of a run".
    """

    pattern: str
    what: str
    default: str | None = None
    default_text: str = ""

    def wrong(self, value: str) -> Iterator[Wrong]:
        """See `Rule.wrong`."""
        if not re.fullmatch(self.pattern, value):
            yield "", f"{shown(value)} is not {self.what}.", ""


@dataclass(frozen=True)
class Flag:
    """Yes or no."""

    default: bool
    default_text: str = ""

    def wrong(self, _: bool) -> Iterator[Wrong]:
        """See `Rule.wrong`: either is right."""
        yield from ()


@dataclass(frozen=True)
class Names:
    """A list of names, each once.

    Attributes:
        default: The list when none is given.
        what: What each is, for messages: "the name of a layer".
        advice: What to write instead.
        pattern: What a name looks like, where any of that form is taken.
        known: Else the names there are.
        other: Other names of known ones, which are not taken.
        most: Longest list.
    """

    default: tuple[str, ...]
    what: str
    advice: str
    pattern: str = ""
    known: tuple[str, ...] = ()
    other: Mapping[str, str] = field(default_factory=dict)
    most: int = 100
    default_text: str = ""

    def wrong(self, value: Iterable[str]) -> Iterator[Wrong]:
        """See `Rule.wrong`."""
        names = list(value)
        for index, name in enumerate(names):
            entry = f"[{index}]"
            if name in names[:index]:
                yield entry, f"{shown(name)} is there twice; name each once.", ""
            elif not self._is_one(name):
                meant = self._meant(name)
                hint = f"; did you mean {meant}?" if meant else "."
                yield entry, f"{shown(name)} is not {self.what}{hint}", "" if meant else self.advice
        if len(names) > self.most:
            yield "", f"{len(names)} are named; {self.most} are the most.", ""

    def _is_one(self, name: str) -> bool:
        return name in self.known if self.known else re.fullmatch(self.pattern, name) is not None

    def _meant(self, name: str) -> str:
        name = self.other.get(name.upper(), name.upper())
        return next(iter(difflib.get_close_matches(name, self.known, n=1, cutoff=0.75)), "")


@dataclass(frozen=True)
class NumbersByName:
    """Numbers, each under a name.

    Attributes:
        each: What a number may be.
        pattern: What a name looks like; empty where that is for others to judge.
    """

    each: Number
    pattern: str = ""
    default_text: str = ""

    @property
    def default(self) -> dict[str, float]:
        """None is set."""
        return {}

    def wrong(self, value: Mapping[str, float]) -> Iterator[Wrong]:
        """See `Rule.wrong`."""
        for name, number in sorted(value.items()):
            if self.pattern and not re.fullmatch(self.pattern, name):
                yield "", f"{shown(name)} is not the name of a layer.", "Use names like q_proj."
                continue
            for _, text, fix in self.each.wrong(number):
                yield f".{name}", text, fix


@dataclass(frozen=True)
class Percents(NumbersByName):
    """Numbers from 0 to 100, each under a name."""

    each: Number = Number(low=0, high=100)


class StageSettings:
    """What the settings of a stage, or of a part of one, have in common; see the module's docstring."""

    @classmethod
    def rules(cls) -> dict[str, Rule]:
        """Return the rule of each setting by name, without those of its parts."""
        return {
            each.metadata["name"] or each.name: each.metadata["rule"]
            for each in fields(cls)  # type: ignore[arg-type]
            if "rule" in each.metadata
        }

    @classmethod
    def parts(cls) -> dict[str, type[StageSettings]]:
        """Return its parts by name."""
        found: dict[str, type[StageSettings]] = {}
        for each in fields(cls):  # type: ignore[arg-type]
            kind = each.default_factory
            if isinstance(kind, type) and issubclass(kind, StageSettings):
                found[each.name] = kind
        return found

    @classmethod
    def of(cls, message: Message) -> Self:
        """Return a message's values, each absent one at its default, unchecked."""
        values: dict[str, Any] = {name: part.of(getattr(message, name)) for name, part in cls.parts().items()}
        for name, rule in cls.rules().items():
            if _given(message, name):
                found = getattr(message, name)
                kind = type(rule.default)
                values[name] = kind(found) if kind in (tuple, dict) else found
        attributes = {each.metadata.get("name"): each.name for each in fields(cls)}  # type: ignore[arg-type]
        return cls(**{attributes.get(name, name): value for name, value in values.items()})

    @classmethod
    def problems(cls, message: Message, path: str = "") -> list[Problem]:
        """Return what is wrong with a message's values.

        Args:
            message: The contract's message of these settings.
            path: Where they stand in the pipeline, for example "train".
        """
        found: list[Problem] = []
        for name, part in cls.parts().items():
            found += part.problems(getattr(message, name), _join(path, name))
        for name, rule in cls.rules().items():
            if _given(message, name):
                for where, text, fix in rule.wrong(getattr(message, name)):
                    entry = where if where.startswith("[") else ""
                    place = _join(path, name) + where.removeprefix(entry)
                    found.append(Problem(place, text, fix, entry))
        if not found:
            found += [
                Problem(_join(path, name).rstrip("."), text, fix, between=True)
                for name, text, fix in cls.of(message).between()
            ]
        return found

    @classmethod
    def checked(cls, message: Message, path: str = "") -> Self:
        """Return a message's values, each absent one at its default.

        Raises:
            InvalidInput: Something is wrong; see `error_of`.
        """
        if found := cls.problems(message, path):
            raise error_of(found)
        return cls.of(message)

    @classmethod
    def fill(cls, message: Message) -> None:
        """Give each absent value of a message its default, where that does not depend on anything."""
        for name, part in cls.parts().items():
            part.fill(getattr(message, name))
        for name, rule in cls.rules().items():
            if _given(message, name) or rule.default is None:
                continue
            target = getattr(message, name)
            if isinstance(rule.default, tuple):
                target.extend(rule.default)
            elif not isinstance(rule.default, dict):
                setattr(message, name, type(target)(rule.default))

    def between(self) -> Iterator[Wrong]:
        """Yield what is wrong between settings that are right by themselves: name, text, fix."""
        yield from ()


def setting(rule: Rule, name: str = "") -> Any:
    """Declare a setting in a dataclass of `StageSettings`.

    Args:
        rule: Its rule.
        name: Its name in the contract, where Python can't have an attribute of that name.
    """
    metadata = {"rule": rule, "name": name}
    if isinstance(rule.default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=rule.default, metadata=metadata)


def error_of(problems: list[Problem]) -> InvalidInput:
    """Return the error for what is wrong with a pipeline: a line a problem, the first 20.

    Its metadata's `field` holds the path that each line is about, one a line.
    """
    lines = [str(problem) for problem in problems[:_SHOWN]]
    paths = [problem.field for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"… and {len(problems) - _SHOWN} more, {len(problems)} in all")
    fix = problems[0].fix if len(problems) == 1 else ""
    named = paths[0] if len(problems) == 1 else "them"
    return InvalidInput(
        "\n".join(lines),
        fix=fix or f"Correct {named}.",
        metadata={"field": "\n".join(paths)},
    )


def _given(message: Message, name: str) -> bool:
    """Say whether a message has a value of its own; an empty list or map is none."""
    descriptor = message.DESCRIPTOR.fields_by_name[name]
    return bool(getattr(message, name)) if descriptor.is_repeated else message.HasField(name)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
