"""`web4lora run`: start a pipeline and follow it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from web4lora.client import STAGES, Client
from web4lora.commands.following import announce, conclude, exit_code, follow, say_started
from web4lora.commands.options import Json, examples
from web4lora.views.console import data_of, print_json

_EXAMPLES = examples(
    "web4lora run examples/web4/demo.yaml",
    "web4lora run demo.yaml --set train.epochs=2 --set train.learning_rate=1e-3",
    "web4lora run demo.yaml --from package --detach",
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("run", epilog=_EXAMPLES)(run)


def run(
    pipeline: Annotated[
        Path, typer.Argument(metavar="PIPELINE.yaml", help="What to run.", show_default=False)
    ],
    from_stage: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="STAGE",
            help=f"Run this stage and those after it even if nothing changed: {', '.join(STAGES)}.",
            show_default=False,
        ),
    ] = "",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the file; may be given often."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Start it and return at once.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when a limit is missed.")] = False,
    as_json: Json = False,
) -> None:
    """Run a pipeline: prepare, train, package, deploy, verify, promote.

    Stages whose inputs did not change are taken over from earlier runs. Ctrl-C asks: detach, cancel or go on.
    """
    with Client() as client:
        started = client.run(pipeline, from_stage=from_stage, overrides=overrides or ())
        if detach:
            print_json(data_of(started)) if as_json else say_started(started)
            return
        if as_json:
            last = client.wait(started.id)
            print_json(data_of(last))
        else:
            announce(started)
            followed = follow(client, started.id)
            if followed is None:
                return
            last = followed
            conclude(last)
    raise typer.Exit(exit_code(last, strict=strict))
