"""`web4lora dataset check`: the rules that the trainer goes by, before anything is started."""

from __future__ import annotations

import codecs
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from web4lora_chassis.dataset import (
    Problem,
    Row,
    check_rows,
    leaks,
    problem_lines,
    repetitions,
    source_formats,
)
from web4lora_chassis.errors import InvalidInput

from web4lora.commands.options import Json, examples
from web4lora.home import short
from web4lora.views import human
from web4lora.views.console import BAD, NOTE, OK, line, mark, print_json
from web4lora.views.dataset import show_example, show_lengths

_SHOWN = 20

app = typer.Typer(help="Check chat data.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command(
    "check",
    epilog=examples(
        "web4lora dataset check train.jsonl --eval eval.jsonl",
        "web4lora dataset check train.jsonl --drop good.jsonl",
    ),
)
def check(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE…", help="JSON Lines files.", show_default=False)
    ],
    eval_files: Annotated[
        list[Path] | None,
        typer.Option("--eval", metavar="FILE", help="Held-out file, checked too; may be given often."),
    ] = None,
    drop: Annotated[
        Path | None,
        typer.Option("--drop", metavar="GOOD_FILE", help="Write the good rows to this new file."),
    ] = None,
    allow_duplicates: Annotated[
        bool, typer.Option("--allow-duplicates", help="Take held-out rows whose question is trained on too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check chat data row by row: the form, the turns, ids, and rows that occur twice.

    Exit code 1 when a row is wrong, unless --drop left it out.
    """
    _named_once([*files, *(eval_files or ())])
    rows: list[Row] = []
    problems: list[Problem] = []
    ids: dict[str, str] = {}
    held_out_from = 0
    for path in files:
        _collect(path, ids, rows, problems)
    held_out_from = len(rows)
    for path in eval_files or ():
        _collect(path, ids, rows, problems)
    leaking = list(leaks(rows[:held_out_from], rows[held_out_from:]))
    warnings = list(repetitions(rows[:held_out_from]))
    (warnings if allow_duplicates else problems).extend(leaking)
    if as_json:
        _print_json(rows, held_out_from, problems, warnings)
    else:
        _show(rows, held_out_from, problems, warnings)
    if drop is not None:
        _write_good(drop, files, rows[:held_out_from])
        if not as_json:
            mark(OK, f"{human.count(held_out_from, 'good row')} in {short(drop)}")
    raise typer.Exit(1 if problems and drop is None else 0)


def _named_once(paths: list[Path]) -> None:
    seen: set[Path] = set()
    for path in paths:
        place = path.absolute()
        if place in seen:
            raise InvalidInput(
                f"{short(path)} is named twice.",
                fix="Name each file once; held-out rows that are trained on measure nothing.",
            )
        seen.add(place)


def _collect(path: Path, ids: dict[str, str], rows: list[Row], problems: list[Problem]) -> None:
    for item in check_rows(path, str(path), ids):
        if isinstance(item, Row):
            rows.append(item)
        else:
            problems.append(item)


def _write_good(target: Path, files: list[Path], rows: list[Row]) -> None:
    """Copy the good rows' own lines to a new file."""
    if target.exists():
        raise InvalidInput(f"{short(target)} is there already.", fix="Name a new file.")
    if not rows:
        raise InvalidInput(f"No row is good; {short(target)} was not written.", fix="Correct the rows.")
    good: dict[str, set[int]] = {str(path): set() for path in files}
    for row in rows:
        good[row.file].add(row.line)
    part = target.with_name(f".part-{target.name}")
    try:
        with part.open("wb") as out_file:
            for path in files:
                with path.open("rb") as in_file:
                    for number, raw in enumerate(in_file, start=1):
                        if number in good[str(path)]:
                            text = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
                            out_file.write(text.rstrip(b"\r\n") + b"\n")
        part.replace(target)
    except OSError as error:
        raise InvalidInput(f"{short(target)} can't be written: {error.strerror}.") from error
    finally:
        part.unlink(missing_ok=True)


def _show(rows: list[Row], held_out_from: int, problems: list[Problem], warnings: list[Problem]) -> None:
    _show_some(problems, BAD)
    _show_some(warnings, NOTE)
    for text in source_formats(rows):
        mark(NOTE, text)
    train, held_out = rows[:held_out_from], rows[held_out_from:]
    text = f"{human.count(len(train), 'good row')}{_cores(train)}"
    if held_out:
        text += f" · {len(held_out):,} held out{_cores(held_out)}"
    mark(OK if rows and not problems else NOTE, text)
    answers = [turn for row in train for turn in row.messages if turn.role == "assistant"]
    if excluded := sum(not turn.trained for turn in answers):
        mark(
            NOTE, f"{excluded:,} of {human.count(len(answers), 'answer')} have a weight of 0: not trained on"
        )
    if bad_rows := len({(problem.file, problem.line) for problem in problems if problem.line}):
        line(f"  {human.count(bad_rows, 'row')} can't be used. --drop GOOD_FILE leaves them out.")
    if train:
        show_lengths(train)
        show_example(train[0])


def _show_some(problems: list[Problem], sign: str) -> None:
    lines = problem_lines(problems)
    for text in lines[:_SHOWN]:
        mark(sign, text)
    if len(lines) > _SHOWN:
        line(f"    … and {len(lines) - _SHOWN:,} more, {len(problems):,} in all")


def _cores(rows: list[Row]) -> str:
    counts = Counter(row.core for row in rows if row.core)
    return (
        f" ({', '.join(f'{core} {number:,}' for core, number in sorted(counts.items()))})" if counts else ""
    )


def _print_json(
    rows: list[Row], held_out_from: int, problems: list[Problem], warnings: list[Problem]
) -> None:
    def data(found: list[Problem]) -> list[dict[str, object]]:
        return [{"file": p.file, "line": p.line, "message": p.message, "fix": p.fix} for p in found]

    print_json(
        {
            "train_rows": held_out_from,
            "eval_rows": len(rows) - held_out_from,
            "formats": dict(Counter(row.source_format for row in rows)),
            "rows_by_core": dict(Counter(row.core for row in rows[:held_out_from] if row.core)),
            "problems": data(problems),
            "warnings": data(warnings),
        }
    )
