"""`web4lora sweeps`: list, show."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from web4.lora.v1 import gateway_pb2
from web4lora_chassis.errors import FailedPrecondition, InvalidInput

from web4lora.client import Client
from web4lora.commands.options import Json, examples
from web4lora.home import short
from web4lora.views import human
from web4lora.views.console import data_of, line, out, print_json
from web4lora.views.stages import run_state
from web4lora.views.sweep import best_of, comparison, plot
from web4lora.views.table import Cell, table

app = typer.Typer(help="Compare the runs of a sweep.", no_args_is_help=True)


@app.command("list", epilog=examples("web4lora sweeps list"))
def list_sweeps(as_json: Json = False) -> None:
    """List the sweeps, newest first."""
    sweeps: dict[str, list[gateway_pb2.Run]] = {}
    with Client() as client:
        for run in client.list_runs():
            if run.sweep:
                sweeps.setdefault(run.sweep, []).append(run)
    if as_json:
        print_json([{"sweep": name, "runs": [run.id for run in runs]} for name, runs in sweeps.items()])
        return
    if not sweeps:
        line("There are no sweeps yet. A pipeline file with `sweep: {train.lora.rank: [8, 16]}` makes one.")
        return
    rows: list[list[Cell]] = []
    for name, runs in sweeps.items():
        states = Counter(run_state(run) for run in runs)
        said = ", ".join(f"{count} {state}" for state, count in states.items())
        rows.append([name, runs[0].pipeline.name, human.count(len(runs), "run"), said])
    out.print(table(("sweep", "pipeline", "runs", "states"), rows, whole=("sweep", "pipeline")))


@app.command(
    "show",
    epilog=examples(
        "web4lora sweeps show sweep-20261126-101500-5f0c",
        "web4lora sweeps show sweep-20261126-101500-5f0c --plot sweep.png",
    ),
)
def show(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="The sweep's id.", show_default=False)],
    picture: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE", help="Draw the losses too: .png, .svg or .pdf.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare the runs of a sweep in one table; the one with the least loss is marked."""
    with Client() as client:
        runs = client.sweep_runs(sweep)
    if picture is not None:
        draw(runs, picture)
    if as_json:
        print_json([data_of(run) for run in runs])
        return
    show_comparison(runs)
    if picture is not None:
        line(f"  plot       {short(picture)}")


def show_comparison(runs: list[gateway_pb2.Run]) -> None:
    """Print the table that compares a sweep's runs, and what to do with the best."""
    columns, rows = comparison(runs)
    out.print(table(columns, rows, whole=("run",)))
    best = best_of(runs)
    if best is not None:
        line(f"  ★ has the least loss. `web4lora runs show {best.id}` shows what it made.")


def draw(runs: list[gateway_pb2.Run], picture: Path) -> None:
    """Write the plot of a sweep.

    Raises:
        FailedPrecondition: No run was trained yet, or the file can't be written.
        InvalidInput: The file's ending is of no picture.
    """
    if best_of(runs) is None:
        raise FailedPrecondition("No run of this sweep was trained yet.", fix="Draw it once one is.")
    try:
        plot(runs, picture)
    except OSError as error:
        raise FailedPrecondition(
            f"{picture} can't be written: {error.strerror}.", fix="Name another file."
        ) from error
    except ValueError as error:
        raise InvalidInput(
            f"{picture}: {error}", fix="Name a file that ends in .png, .svg or .pdf."
        ) from error
