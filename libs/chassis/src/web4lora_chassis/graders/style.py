"""Grades TypeScript against a house style: parsed with tree-sitter, one result a rule.

Each rule is a function from the parsed answer to the reason why it fails, "" when it passes. Which rules
count, and their limits, is `StyleRules`, which a suite can take from the user's own rule file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import tree_sitter_typescript
from tree_sitter import Language, Node, Parser

from web4lora_chassis.graders.check import Check, check, shorten
from web4lora_chassis.graders.style_layout import missing_semicolon, wrong_indentation

# Parsing this much takes seconds; no class is as long.
_MAX_CHARACTERS = 2**16

TITLES: Mapping[str, str] = {"style.all_rules": "house style, all rules"}


@dataclass(frozen=True)
class StyleRules:
    """Which rules count, and their limits.

    Attributes:
        off: Names of the rules that don't count: not graded at all.
        fence: What the code block's fence names.
        max_lines: Most lines inside the fence.
        indent_spaces: Spaces a level.
        quotes: "single" or "double".
        extra_methods: Whether the class may have methods that weren't asked for.
    """

    off: frozenset[str] = field(default_factory=frozenset)
    fence: str = "ts"
    max_lines: int = 14
    indent_spaces: int = 2
    quotes: str = "single"
    extra_methods: bool = False


@dataclass(frozen=True)
class _Answer:
    """An answer as the rules see it. `classes` are the exported ones; `code` is "" when there is none."""

    text: str
    code: str
    root: Node
    classes: tuple[Node, ...]
    wanted_class: str
    wanted_methods: tuple[str, ...]
    rules: StyleRules

    @property
    def members(self) -> list[Node]:
        """The members of the exported classes."""
        bodies = [_field(node, "body") for node in self.classes]
        return [member for body in bodies if body for member in body.named_children]

    @property
    def methods(self) -> list[Node]:
        """Methods, constructors, and the signatures of both."""
        return [member for member in self.members if member.type in _METHODS]


_METHODS = ("method_definition", "method_signature", "abstract_method_signature")
_CLASSES = ("class_declaration", "abstract_class_declaration")


def validate_check(expected: Mapping[str, Any]) -> str:
    """Say what is wrong with a prompt's `check`; empty when it is right."""
    if set(expected) != {"class", "methods"}:
        return 'check must be {"class": NAME, "methods": [NAME, …]}'
    methods = expected["methods"]
    if not isinstance(expected["class"], str) or not isinstance(methods, list):
        return "check.class must be a string and check.methods a list of strings"
    return "" if all(isinstance(name, str) for name in methods) else "check.methods must be a list of strings"


def grade(text: str, expected: Mapping[str, Any], rules: StyleRules | None = None) -> list[Check]:
    """Grade one answer.

    Args:
        text: The whole answer; white space around it is ignored.
        expected: The `class` and the `methods` that it must have.
        rules: Which rules count; the defaults when absent.

    Returns:
        style.all_rules, then style.<rule> for each rule that counts. The rules that need a class fail when
        there is none; every rule fails on an answer without code, and on one too long to be read.
    """
    unread = ""
    if len(text) > _MAX_CHARACTERS:
        unread = f"{len(text):,} characters; an answer of more than {_MAX_CHARACTERS:,} is not read"
    answer = _parse("" if unread else text, expected, rules or StyleRules())
    results: list[Check] = []
    for name, (_, rule, needs_class) in _RULES.items():
        if name in answer.rules.off:
            continue
        if unread:
            reason = unread
        elif not answer.code.strip():
            reason = "there is no code"
        elif needs_class and not answer.classes:
            reason = "there is no exported class"
        else:
            reason = rule(answer)
        results.append(check(f"style.{name}", reason))
    failed = [result for result in results if not result.passed]
    reason = "; ".join(f"{result.name.removeprefix('style.')}: {result.reason}" for result in failed)
    return [check("style.all_rules", unread or reason), *results]


@cache
def _parser() -> Parser:
    return Parser(Language(tree_sitter_typescript.language_typescript()))


def _parse(text: str, expected: Mapping[str, Any], rules: StyleRules) -> _Answer:
    # Half of a pair of surrogates is no text that could be parsed.
    stripped = text.encode("utf-8", errors="replace").decode("utf-8").strip()
    # Also an answer with words around its block is looked at: one broken rule should not hide the others.
    code = _inside_fence(stripped)
    root = _parser().parse(code.encode("utf-8")).root_node
    exports = [node for node in root.named_children if node.type == "export_statement"]
    classes = [
        n for e in exports if (n := _field(e, "declaration")) and n.type in _CLASSES and not _default(e)
    ]
    return _Answer(stripped, code, root, tuple(classes), expected["class"], tuple(expected["methods"]), rules)


def _inside_fence(text: str) -> str:
    """Return what the first code block holds, closed or not; the whole text when there is none."""
    fence = text.find("```")
    begin = text.find("\n", fence) + 1 if fence >= 0 else 0
    if not begin:
        return text
    end = text.find("```", begin)
    return text[begin:] if end < 0 else text[begin:end].removesuffix("\n")


def _field(node: Node, name: str) -> Node | None:
    return node.child_by_field_name(name)


def _text(node: Node | None) -> str:
    return (node.text or b"").decode("utf-8", errors="replace") if node else ""


def _walk(node: Node) -> Iterator[Node]:
    pending = [node]
    while pending:
        current = pending.pop()
        yield current
        pending.extend(reversed(current.children))


def _default(export: Node) -> bool:
    return any(child.type == "default" for child in export.children)


def _at(node: Node) -> str:
    return f"line {node.start_point.row + 1}"


# The rules.


def _one_block(answer: _Answer) -> str:
    fence = re.escape(answer.rules.fence)
    if re.fullmatch(rf"```{fence}\n(?:(?!```).)*\n```", answer.text, re.DOTALL):
        return ""
    count = answer.text.count("```")
    if count == 0:
        return "there is no code block"
    if count == 1:
        return "the code block is not closed"
    if not answer.text.startswith(f"```{answer.rules.fence}\n"):
        return f'starts with "{shorten(answer.text.splitlines()[0], 40)}", wanted ```{answer.rules.fence}'
    return "there is something besides the one code block"


def _parses(answer: _Answer) -> str:
    if not answer.root.has_error:
        return ""
    broken = next(node for node in _walk(answer.root) if node.is_missing or node.type == "ERROR")
    what = (
        f"{broken.type} is missing" if broken.is_missing else f"syntax error at {shorten(_text(broken), 30)}"
    )
    return f"{_at(broken)}: {what}"


def _one_class(answer: _Answer) -> str:
    count = len(answer.classes)
    return "" if count == 1 else f"there are {count} exported classes, wanted one"


def _class_name(answer: _Answer) -> str:
    name = _text(_field(answer.classes[0], "name"))
    if name != answer.wanted_class:
        return f"the class is {shorten(name, 40)}, wanted {answer.wanted_class}"
    return "" if re.fullmatch(r"[A-Z][A-Za-z0-9]*", name) else f"{name} is not PascalCase"


def _method_names(answer: _Answer) -> str:
    names = {_text(_field(method, "name")) for method in answer.methods} - {"constructor"}
    if missing := [name for name in answer.wanted_methods if name not in names]:
        return f"no method {', '.join(missing)}"
    extra = sorted(names - set(answer.wanted_methods))
    return (
        f"method {shorten(', '.join(extra))} was not asked for"
        if extra and not answer.rules.extra_methods
        else ""
    )


def _jsdoc(answer: _Answer) -> str:
    export = answer.classes[0].parent
    above = export.prev_named_sibling if export else None
    if export is None or above is None or above.type != "comment":
        return "no comment above the class"
    if not re.fullmatch(r"/\*\*\s*\S.*\*/", _text(above), re.DOTALL) or not _text(above)[3:-2].strip():
        return f"{_at(above)}: not JSDoc"
    if above.start_point.row != above.end_point.row:
        return f"{_at(above)}: JSDoc of more than one line"
    if above.end_point.row + 1 != export.start_point.row:
        return f"{_at(above)}: not directly above the class"
    before = above.prev_named_sibling
    if before is not None and before.type == "comment":
        return f"{_at(before)}: one comment too many above the class"
    return ""


def _private_readonly(answer: _Answer) -> str:
    fields = [member for member in answer.members if member.type == "public_field_definition"]
    for node in fields + [parameter for parameter in _parameters(answer) if _is_property(parameter)]:
        kinds = {child.type: _text(child) for child in node.children}
        if kinds.get("accessibility_modifier") != "private" or "readonly" not in kinds:
            name = _text(_field(node, "name") or _field(node, "pattern"))
            return f"{_at(node)}: {shorten(name, 40)} is not private readonly"
    return ""


def _is_property(parameter: Node) -> bool:
    return any(child.type in ("accessibility_modifier", "readonly") for child in parameter.children)


def _parameters(answer: _Answer) -> list[Node]:
    lists = [_field(method, "parameters") for method in answer.methods]
    return [p for ps in lists if ps for p in ps.named_children if p.type.endswith("_parameter")]


def _typed_parameters(answer: _Answer) -> str:
    untyped = next((p for p in _parameters(answer) if _field(p, "type") is None), None)
    return f"{_at(untyped)}: parameter {shorten(_text(untyped), 40)} has no type" if untyped else ""


def _return_types(answer: _Answer) -> str:
    for method in answer.methods:
        name = _text(_field(method, "name"))
        # TypeScript allows no return type on a constructor or a setter.
        exempt = name == "constructor" or any(child.type == "set" for child in method.children)
        if not exempt and _field(method, "return_type") is None:
            return f"{_at(method)}: {shorten(name, 40)} has no return type"
    return ""


def _quotes(answer: _Answer) -> str:
    quote = "'" if answer.rules.quotes == "single" else '"'
    strings = (node for node in _walk(answer.root) if node.type == "string" and node.is_named)
    wrong = next((node for node in strings if not _text(node).startswith(quote)), None)
    return f"{_at(wrong)}: {shorten(_text(wrong), 40)}" if wrong else ""


def _semicolons(answer: _Answer) -> str:
    node = missing_semicolon(answer.root)
    return f"line {node.end_point.row + 1}: no semicolon" if node else ""


def _indentation(answer: _Answer) -> str:
    return wrong_indentation(answer.root, answer.code, answer.rules.indent_spaces)


def _max_lines(answer: _Answer) -> str:
    count = len(answer.code.split("\n"))
    return f"{count} lines, at most {answer.rules.max_lines}" if count > answer.rules.max_lines else ""


def _no_any(answer: _Answer) -> str:
    found = next((n for n in _walk(answer.root) if n.type == "predefined_type" and _text(n) == "any"), None)
    return f"{_at(found)}: any" if found else ""


def _no_default_export(answer: _Answer) -> str:
    # `export { X as default }` is one too.
    for node in _walk(answer.root):
        if node.type == "export_statement" and _default(node):
            return f"{_at(node)}: export default"
        if node.type == "export_specifier" and _text(_field(node, "alias")) == "default":
            return f"{_at(node)}: exported as default"
    return ""


def _no_console(answer: _Answer) -> str:
    found = next((n for n in _walk(answer.root) if n.type == "identifier" and _text(n) == "console"), None)
    return f"{_at(found)}: console" if found else ""


_Rule = Callable[[_Answer], str]
_RULES: Mapping[str, tuple[str, _Rule, bool]] = {
    "one_block": ("one code block and nothing else", _one_block, False),
    "parses": ("no syntax errors", _parses, False),
    "one_class": ("exactly one exported class", _one_class, False),
    "class_name": ("the class has its name, in PascalCase", _class_name, True),
    "methods": ("the class has its methods", _method_names, True),
    "jsdoc": ("one JSDoc line directly above the class", _jsdoc, True),
    "private_readonly": ("fields are private readonly", _private_readonly, True),
    "typed_parameters": ("parameters are typed", _typed_parameters, True),
    "return_types": ("methods have return types", _return_types, True),
    "quotes": ("quotes", _quotes, False),
    "semicolons": ("semicolons", _semicolons, False),
    "indentation": ("indentation", _indentation, False),
    "max_lines": ("length", _max_lines, False),
    "no_any": ("no any", _no_any, False),
    "no_default_export": ("no default export", _no_default_export, False),
    "no_console": ("no console", _no_console, False),
}
RULE_NAMES = tuple(_RULES)
DETAIL_TITLES: Mapping[str, str] = {f"style.{name}": title for name, (title, _, _) in _RULES.items()}
