"""The rules of TypeScript's layout that need the tree: semicolons and indentation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

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
    for node, parent, follower in _walk(root):
        if node.type in _ENDS_WITH_SEMICOLON:
            # The head of a `for` holds declarations, whose semicolon is the loop's own.
            in_loop_head = parent is not None and parent.type.startswith("for_") and node != _body(parent)
            if not in_loop_head and not _ends_with_semicolon(node):
                return node
        elif node.type in _SEMICOLON_FOLLOWS and parent is not None and parent.type == "class_body":
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
    # Brackets and statements lie within each other or apart: what is around a line is a stack, kept from line
    # to line, for an answer may have as many of both as a model's context has room for.
    spans = sorted(_spans(root), key=lambda span: (span.start, -span.end))
    nodes = [node for node, _, _ in _walk(root)]
    starts = [(n.start_point.row, n.end_point.row) for n in nodes if _is_statement(n)]
    free = {
        row
        for node in nodes
        if node.type in _FREE_TEXT
        for row in range(node.start_point.row + 1, node.end_point.row + 1)
    }
    lines = code.split("\n")
    closing = {span.end for span in spans if not span.is_case}
    around: list[_Span] = []
    begun: list[tuple[int, int]] = []
    next_span = next_start = offset = 0
    for row, line in enumerate(lines):
        blanks = line[: len(line) - len(line.lstrip())]
        first = offset + len(blanks.encode())
        offset += len(line.encode()) + 1
        while next_span < len(spans) and spans[next_span].start < first:
            _leave(around, spans[next_span].start)
            around.append(spans[next_span])
            next_span += 1
        _leave(around, first)
        while next_start < len(starts) and starts[next_start][0] < row:
            begun.append(starts[next_start])
            next_start += 1
        while begun and begun[-1][1] < row:
            begun.pop()
        if not line.strip() or row in free:
            continue
        if blanks.strip(" "):
            return f"line {row + 1}: indented with something other than spaces"
        innermost = around[-1] if around else None
        allowed = _allowed(first, innermost, lines, spaces)
        # The line goes on with a statement that an earlier line inside the same brackets began.
        opened = innermost.first_row if innermost else -1
        if first not in closing and begun and begun[-1][0] > opened:
            allowed = {*allowed, max(allowed) + spaces}
        if len(blanks) not in allowed:
            return f"line {row + 1}: {len(blanks)} spaces, wanted {min(allowed)}"
    return ""


def _leave(around: list[_Span], place: int) -> None:
    """Take away the brackets that closed before a place."""
    while around and around[-1].end < place:
        around.pop()


def _allowed(first: int, innermost: _Span | None, lines: list[str], spaces: int) -> set[int]:
    if innermost is None:
        return {0}
    opener = lines[innermost.first_row]
    base = len(opener) - len(opener.lstrip())
    closes = first == innermost.end and not innermost.is_case
    return {base if closes else base + spaces}


def _is_statement(node: Node) -> bool:
    return node.type.endswith(("_statement", "_declaration", "_definition", "_signature")) and node.type != (
        "export_statement"
    )


def _spans(root: Node) -> Iterator[_Span]:
    for node, _, _ in _walk(root):
        if node.type in _CASES:
            yield _Span(node.start_byte, node.end_byte - 1, node.start_point.row, True)
        opening: list[Node] = []
        for child in node.children:
            if child.type in _CLOSING:
                opening.append(child)
            elif opening and child.type == _CLOSING[opening[-1].type]:
                start = opening.pop()
                yield _Span(start.start_byte, child.start_byte, start.start_point.row, False)


def _walk(root: Node) -> Iterator[tuple[Node, Node | None, Node | None]]:
    """Yield each node with its parent and next sibling; asking a node for them looks through all others."""
    pending: list[tuple[Node, Node | None, Node | None]] = [(root, None, None)]
    while pending:
        node, parent, follower = pending.pop()
        yield node, parent, follower
        children = node.children
        rows = [(child, node, behind) for child, behind in zip_longest(children, children[1:])]
        pending.extend(reversed(rows))
