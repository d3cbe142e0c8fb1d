"""The rules of TypeScript's layout that need the tree: semicolons and indentation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tree_sitter import Node

_ENDS_WITH_SEMICOLON = frozenset(
    [
        "expression_statement", "return_statement", "lexical_declaration", "variable_declaration",
        "throw_statement", "break_statement", "continue_statement", "debugger_statement", "do_statement",
        "import_statement", "type_alias_declaration", "import_alias",
    ]
)  # fmt: skip
_SEMICOLON_FOLLOWS = frozenset(
    ["public_field_definition", "method_signature", "abstract_method_signature", "index_signature"]
)
_CLOSING = {"{": "}", "[": "]", "(": ")", "${": "}"}
_CASES = ("switch_case", "switch_default")
_FREE_TEXT = ("template_string", "comment")


def missing_semicolon(root: Node) -> Node | None:
    """Return the first statement or class member that does not end with a semicolon."""
    for node in _walk(root):
        parent = node.parent
        if node.type in _ENDS_WITH_SEMICOLON:
            # The head of a `for` holds declarations, whose semicolon is the loop's own.
            in_loop_head = parent is not None and parent.type.startswith("for_") and node != _body(parent)
            if not in_loop_head and not _ends_with_semicolon(node):
                return node
        elif node.type in _SEMICOLON_FOLLOWS and parent is not None and parent.type == "class_body":
            follower = node.next_sibling
            if follower is None or follower.type != ";":
                return node
        elif node.type == "export_statement" and not _exports_a_body(node) and not _ends_with_semicolon(node):
            return node
    return None


def _ends_with_semicolon(node: Node) -> bool:
    return bool(node.children) and node.children[-1].type == ";" and not node.children[-1].is_missing


def _exports_a_body(export: Node) -> bool:
    return export.child_by_field_name("declaration") is not None


def _body(loop: Node) -> Node | None:
    return loop.child_by_field_name("body")


@dataclass(frozen=True)
class _Span:
    """A pair of brackets, or a case of a switch: what lies on later lines inside is one level deeper."""

    start: int
    end: int
    first_row: int
    last_row: int
    is_case: bool


def wrong_indentation(root: Node, code: str, spaces: int) -> str:
    """Check that each line is one level deeper than the line that opened the bracket around it.

    A line that goes on with the statement of an earlier line may be one level deeper still. The text of
    template strings and the inside of comments are free.

    Args:
        root: The parsed code.
        code: The code.
        spaces: Spaces a level.

    Returns:
        The first line that is wrong, in words; "" when none is.
    """
    spans = list(_spans(root))
    starts = [(n.start_point.row, n.end_point.row) for n in _walk(root) if _is_statement(n)]
    free = {
        row
        for node in _walk(root)
        if node.type in _FREE_TEXT
        for row in range(node.start_point.row + 1, node.end_point.row + 1)
    }
    lines = code.split("\n")
    offset = 0
    for row, line in enumerate(lines):
        first = offset + len(line[: len(line) - len(line.lstrip())].encode())
        offset += len(line.encode()) + 1
        if not line.strip() or row in free:
            continue
        indent = line[: len(line) - len(line.lstrip())]
        if indent.strip(" "):
            return f"line {row + 1}: indented with something other than spaces"
        allowed = _allowed(row, first, spans, lines, spaces)
        if _goes_on(row, first, spans, starts):
            allowed = {*allowed, max(allowed) + spaces}
        if len(indent) not in allowed:
            return f"line {row + 1}: {len(indent)} spaces, wanted {min(allowed)}"
    return ""


def _allowed(row: int, first: int, spans: list[_Span], lines: list[str], spaces: int) -> set[int]:
    inside = [span for span in spans if span.first_row < row and span.start < first <= span.end]
    if not inside:
        return {0}
    innermost = max(inside, key=lambda span: span.start)
    opener = lines[innermost.first_row]
    base = len(opener) - len(opener.lstrip())
    closes = first == innermost.end and not innermost.is_case
    return {base if closes else base + spaces}


def _goes_on(row: int, first: int, spans: list[_Span], starts: list[tuple[int, int]]) -> bool:
    """Whether the line goes on with a statement that an earlier line began, and isn't a closing bracket."""
    if any(first == span.end and not span.is_case for span in spans):
        return False
    inside = [span for span in spans if span.first_row < row and span.start < first <= span.end]
    opened = max((span.first_row for span in inside), default=-1)
    return any(opened < start < row <= end for start, end in starts)


def _is_statement(node: Node) -> bool:
    return node.type.endswith(("_statement", "_declaration", "_definition", "_signature")) and node.type != (
        "export_statement"
    )


def _spans(root: Node) -> Iterator[_Span]:
    for node in _walk(root):
        if node.type in _CASES:
            yield _Span(node.start_byte, node.end_byte - 1, node.start_point.row, node.end_point.row, True)
        opening: list[Node] = []
        for child in node.children:
            if child.type in _CLOSING:
                opening.append(child)
            elif opening and child.type == _CLOSING[opening[-1].type]:
                start = opening.pop()
                yield _Span(
                    start.start_byte, child.start_byte, start.start_point.row, child.start_point.row, False
                )


def _walk(node: Node) -> Iterator[Node]:
    pending = [node]
    while pending:
        current = pending.pop()
        yield current
        pending.extend(reversed(current.children))
