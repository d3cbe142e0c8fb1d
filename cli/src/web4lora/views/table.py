"""Lists that people read line by line and copy names from."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

Cell = str | Text


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    whole: Collection[str],
    right: Collection[str] = (),
) -> Table:
    """Return a table without borders, one line a row.

    Args:
        columns: Their titles.
        rows: A cell for each column.
        whole: Columns that a narrow terminal does not cut: the names that other commands take.
        right: Columns aligned to the right.
    """
    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for index, title in enumerate(columns):
        widest = max((cell_len(str(row[index])) for row in rows), default=0)
        made.add_column(
            title,
            no_wrap=True,
            justify="right" if title in right else "left",
            min_width=max(widest, cell_len(title)) if title in whole else None,
        )
    for row in rows:
        made.add_row(*row)
    return made
