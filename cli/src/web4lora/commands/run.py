"""`web4lora run`: start a pipeline and follow it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from web4.lora.v1 import gateway_pb2

from web4lora.client import PRIORITIES, STAGES, Client
from web4lora.commands.finding import Labels, labels_of
from web4lora.commands.follow_run import announce, conclude, exit_code, follow, say_started
from web4lora.commands.options import Json, examples
from web4lora.commands.sweeps import show_comparison
from web4lora.home import command_name
from web4lora.pipeline_file import read_sweep
from web4lora.views.console import OK, data_of, line, mark, print_json

_EXAMPLES = examples(
    "web4lora run examples/web4/demo.yaml",
    "web4lora run demo.yaml --set train.epochs=2 --set train.learning_rate=1e-3",
    "web4lora run demo.yaml --from package --detach",
    "web4lora run demo.yaml --label team=a --label why=baseline",
    "web4lora run demo.yaml --check",
    "web4lora run urgent.yaml --priority high --device cuda",
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
    labels: Labels = None,
    check: Annotated[
        bool, typer.Option("--check", help="Say what is wrong with pipeline, data and suite; start nothing.")
    ] = False,
    priority: Annotated[
        str,
        typer.Option(help=f"What comes first where runs wait: {', '.join(PRIORITIES)}.", show_default=False),
    ] = "",
    device: Annotated[
        str,
        typer.Option(
            metavar="WORD",
            help="Train only where this is in the trainer's device: cuda, mps, cpu.",
            show_default=False,
        ),
    ] = "",
    detach: Annotated[bool, typer.Option("--detach", help="Start it and return at once.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when a limit is missed.")] = False,
    as_json: Json = False,
) -> None:
    """Run a pipeline: prepare, train, package, deploy, verify, promote.

    Stages whose inputs did not change are taken over from earlier runs. A file with lists of values under
    `sweep` makes a run of each combination, and compares them. Ctrl-C asks: detach, cancel or go on.
    """
    with Client() as client:
        file = client.read(pipeline, overrides or ())
        if not check and (sweep := read_sweep(pipeline, overrides or ()) if file.sweep else []):
            runs = client.sweep(
                sweep, from_stage=from_stage, priority=priority, device=device, labels=labels_of(labels)
            )
            raise typer.Exit(_follow_sweep(client, runs, detach=detach, as_json=as_json))
        started = client.run(
            file,
            from_stage=from_stage,
            labels=labels_of(labels),
            validate_only=check,
            priority=priority,
            device=device,
        )
        if check:
            print_json(data_of(started)) if as_json else mark(OK, f"{pipeline} can be run.")
            return
        if detach:
            print_json(data_of(started)) if as_json else say_started(started)
            return
        if as_json:
            last = client.wait(started.id)
            print_json(data_of(last))
        else:
            announce(started)
            followed = follow(client, started.id, file)
            if followed is None:
                return
            last = followed
            conclude(last)
    raise typer.Exit(exit_code(last, strict=strict))


def _follow_sweep(client: Client, runs: list[gateway_pb2.Run], *, detach: bool, as_json: bool) -> int:
    """Follow the runs of a sweep one after the other, and compare them in the end; return the exit code."""
    if detach:
        if as_json:
            print_json([data_of(run) for run in runs])
        else:
            for run in runs:
                values = ", ".join(f"{key} {value}" for key, value in sorted(run.sweep_values.items()))
                line(f"{run.id} · {values}")
            line(f"  Compare them     {command_name()} sweeps show {runs[0].sweep}")
        return 0
    ended = []
    for run in runs:
        if as_json:
            ended.append(client.wait(run.id))
            continue
        announce(run)
        followed = follow(client, run.id)
        if followed is None:
            return 0
        ended.append(followed)
        line()
    if as_json:
        print_json([data_of(run) for run in ended])
    else:
        show_comparison(ended)
    return max(exit_code(run, strict=False) for run in ended)
