"""The form of chat data: JSON Lines with `messages`, read and checked before anything is loaded.

The command checks files before they travel, the trainer before it trains, and the packager reads its
calibration text, all by this one reader. A row:

    {"id": "tool-0001", "core": "tool", "messages": [{"role": "user", "content": "…"}, …]}

`id` and `core` may be absent; what other keys there may be says `dataset_row`, what other forms
`dataset_formats`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from web4lora_chassis.dataset_formats import MESSAGES
from web4lora_chassis.dataset_row import ROLES, Message, Row, read_row
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.jsonl import Problem, quoted, read_lines

__all__ = [
    "PROBLEMS_SHOWN",
    "ROLES",
    "Dataset",
    "Message",
    "Problem",
    "Row",
    "check_rows",
    "leaks",
    "problem_lines",
    "problems_error",
    "read_dataset",
    "repetitions",
    "source_formats",
]

PROBLEMS_SHOWN = 20
_LINES_NAMED = 3
_WARNINGS_SHOWN = 50
_FIX_ROWS = "Correct the rows, or keep the good ones: `web4lora dataset check FILE --drop GOOD_FILE`."


@dataclass(frozen=True)
class Dataset:
    """Checked data.

    Attributes:
        train: Rows to train on.
        held_out: Rows that are never trained on.
        warnings: What deserves a look but stops nothing, as `file:line: text`.
    """

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    warnings: tuple[str, ...]

    @property
    def rows_by_core(self) -> Mapping[str, int]:
        """Training rows by core; rows without one are left out."""
        return dict(sorted(Counter(row.core for row in self.train if row.core).items()))


def read_dataset(train_files: Sequence[Path], held_out_files: Sequence[Path] = ()) -> Dataset:
    """Read and check chat data.

    Args:
        train_files: JSON Lines files to train on.
        held_out_files: JSON Lines files that are only measured on.

    Returns:
        The checked rows, in the files' order.

    Raises:
        InvalidInput: Something is wrong; the message holds the first 20 problems and their count.
        NotFound: A file is not there or can't be read.
    """
    ids: dict[str, str] = {}
    problems: list[Problem] = []
    rows: dict[bool, list[Row]] = {True: [], False: []}
    for path, is_train in [(path, True) for path in train_files] + [(path, False) for path in held_out_files]:
        for item in check_rows(path, path.name, ids):
            if isinstance(item, Row):
                rows[is_train].append(item)
            else:
                problems.append(item)
    if not rows[True] and not problems:
        names = ", ".join(path.name for path in train_files) or "the dataset"
        problems.append(Problem(names, 0, "there is no row to train on", "give at least one row"))
    if problems:
        raise problems_error(problems, "Nothing was trained.")
    return Dataset(tuple(rows[True]), tuple(rows[False]), tuple(_warnings(rows[True], rows[False])))


def check_rows(path: Path, name: str = "", ids: dict[str, str] | None = None) -> Iterator[Row | Problem]:
    """Read a file of chat data; blank lines are skipped.

    Args:
        path: The file.
        name: What to call it in rows and problems; its path when empty.
        ids: The ids used so far and where; those of this file are added. Ids are unique over all files of a
            dataset.

    Yields:
        In the file's order a `Row` for each good line and a `Problem` for each bad one.

    Raises:
        NotFound: The file is not there or can't be read.
    """
    name = name or str(path)
    ids = {} if ids is None else ids
    for item in read_lines(path, name):
        yield item if isinstance(item, Problem) else _unique(read_row(item[1], name, item[0]), ids)


def problem_lines(problems: Sequence[Problem]) -> list[str]:
    """Return problems as lines; what is wrong with many rows in the same way is one line.

    A thousand rows with one odd key are one thing to mend: the first place is named in full, a few more by
    their line numbers.
    """
    alike: dict[tuple[str, str, str], list[Problem]] = {}
    for problem in problems:
        alike.setdefault((problem.file, problem.message, problem.fix), []).append(problem)
    lines = []
    for same in alike.values():
        also = ", ".join(str(problem.line) for problem in same[1 : 1 + _LINES_NAMED])
        more = f" and {len(same) - 1 - _LINES_NAMED} more" if len(same) > 1 + _LINES_NAMED else ""
        lines.append(f"{same[0]}" + (f" (also line {also}{more})" if also else ""))
    return lines


def problems_error(problems: Sequence[Problem], consequence: str, fix: str = _FIX_ROWS) -> InvalidInput:
    """Return the error that tells of bad rows: the first 20 kinds, then the count.

    Args:
        problems: At least one.
        consequence: What was not done because of them: "Nothing was trained."
        fix: What to do about all of them.
    """
    lines = problem_lines(problems)
    shown = lines[:PROBLEMS_SHOWN]
    if len(lines) > PROBLEMS_SHOWN:
        shown.append(f"… and {len(lines) - PROBLEMS_SHOWN} more")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return InvalidInput(
        "\n".join(shown) + f"\n{count} in the dataset. {consequence}",
        fix=fix,
        reason="DATASET_INVALID",
        metadata={"problems": len(problems)},
    )


def repetitions(train: Iterable[Row]) -> Iterator[Problem]:
    """Yield what stops nothing but deserves a look: rows to train on with the same user text."""
    seen: dict[str, Row] = {}
    for row in train:
        if first := seen.get(row.question):
            same = " and the same answer" if first.messages == row.messages else ""
            yield Problem(
                row.file, row.line, f"the same user text{same} as {first.place}", "one of them may be enough"
            )
        seen.setdefault(row.question, row)


def leaks(train: Iterable[Row], held_out: Iterable[Row]) -> Iterator[Problem]:
    """Yield the held-out rows whose user text is trained on: a score on them measures nothing.

    Args:
        train: Rows to train on.
        held_out: Rows that are never trained on.
    """
    seen: dict[str, Row] = {}
    for row in train:
        seen.setdefault(row.question, row)
    for row in held_out:
        if first := seen.get(row.question):
            yield Problem(
                row.file,
                row.line,
                f"held out, but the same user text is trained on at {first.place}",
                "a score on it says nothing about new questions",
            )


def source_formats(rows: Iterable[Row]) -> Iterator[str]:
    """Yield a line for each file whose rows, or some of them, were in another form than `messages`."""
    counts = Counter((row.file, row.source_format) for row in rows if row.source_format != MESSAGES)
    for (file, name), count in sorted(counts.items()):
        rows_are = "1 row is" if count == 1 else f"{count:,} rows are"
        yield f"{file}: {rows_are} in the form of {name}, read as messages"


def _warnings(train: Sequence[Row], held_out: Sequence[Row]) -> Iterator[str]:
    yield from source_formats([*train, *held_out])
    found = [*leaks(train, held_out), *repetitions(train)]
    yield from map(str, found[:_WARNINGS_SHOWN])
    if len(found) > _WARNINGS_SHOWN:
        yield f"… and {len(found) - _WARNINGS_SHOWN} more of this kind"


def _unique(item: Row | Problem, ids: dict[str, str]) -> Row | Problem:
    """Refuse a row whose id was used before."""
    if isinstance(item, Problem) or not item.id:
        return item
    if item.id in ids:
        return Problem(
            item.file,
            item.line,
            f"the id {quoted(item.id)} was used at {ids[item.id]}",
            "give each row its own id",
        )
    ids[item.id] = item.place
    return item
