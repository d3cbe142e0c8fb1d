"""`web4lora runs`: list, show, watch, cancel, retry, export."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from web4.lora.v1 import gateway_pb2

from web4lora.client import STAGES, Client, ended
from web4lora.commands.following import (
    announce,
    conclude,
    exit_code,
    follow,
    say_started,
    show_files,
)
from web4lora.commands.options import Json, RunId, examples
from web4lora.export import export_run
from web4lora.home import short
from web4lora.views import human
from web4lora.views.console import OK, data_of, line, mark, out, print_json
from web4lora.views.follow import overview
from web4lora.views.results import show_scores, verify_result
from web4lora.views.stages import run_state, stage_name
from web4lora.views.table import Cell, table

app = typer.Typer(help="See, follow, cancel and repeat runs.", no_args_is_help=True)


@app.command("list", epilog=examples("web4lora runs list", "web4lora runs list --limit 5 --json"))
def list_runs(
    limit: Annotated[int, typer.Option(min=1, help="At most this many, newest first.")] = 20,
    as_json: Json = False,
) -> None:
    """List runs, newest first."""
    with Client() as client:
        runs = list(islice(client.list_runs(), limit))
    if as_json:
        print_json([data_of(run) for run in runs])
        return
    if not runs:
        line("There are no runs yet. `web4lora run examples/web4/demo.yaml` makes one.")
        return
    rows: list[list[Cell]] = []
    for run in runs:
        tests = verify_result(run)
        verdict = "" if tests is None else "passed" if tests.passed else "limits missed"
        took = human.duration(human.elapsed(run.create_time, run.end_time))
        rows.append([run.id, run.pipeline.name, _state(run), human.moment(run.create_time), took, verdict])
    out.print(
        table(("run", "pipeline", "state", "created", "took", "tests"), rows, whole=("run", "pipeline"))
    )


@app.command("show", epilog=examples("web4lora runs show", "web4lora runs show run_2026-11-22_1 --json"))
def show(run_id: RunId = "latest", as_json: Json = False) -> None:
    """Show a run: its stages, scores and files."""
    with Client() as client:
        run = client.get_run(run_id)
    if as_json:
        print_json(data_of(run))
        return
    announce(run)
    out.print(overview(run))
    show_scores(run)
    line()
    show_files(run)


@app.command("watch", epilog=examples("web4lora runs watch", "web4lora runs watch --json | jq .run.state"))
def watch(run_id: RunId = "latest", as_json: Json = False) -> None:
    """Follow a run to its end. With --json: every snapshot, one a line."""
    with Client() as client:
        if as_json:
            last = gateway_pb2.Run()
            for last in client.watch(run_id):
                print_json({"run": data_of(last)}, one_line=True)
        else:
            run = client.get_run(run_id)
            announce(run)
            followed = follow(client, run.id)
            if followed is None:
                return
            last = followed
            conclude(last)
    raise typer.Exit(exit_code(last, strict=False))


@app.command("cancel", epilog=examples("web4lora runs cancel", "web4lora runs cancel run_2026-11-22_1"))
def cancel(run_id: RunId = "latest", as_json: Json = False) -> None:
    """End a run; what its finished stages made stays."""
    with Client() as client:
        before = client.get_run(run_id)
        run = client.cancel(before.id)
    if as_json:
        print_json(data_of(run))
    elif ended(before):
        line(f"{run.id} had ended already: {run_state(run)}.")
    else:
        mark(OK, f"{run.id} is being cancelled. `web4lora runs retry {run.id}` takes it up again.")


@app.command(
    "retry", epilog=examples("web4lora runs retry", "web4lora runs retry run_2026-11-22_1 --from package")
)
def retry(
    run_id: RunId = "latest",
    from_stage: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="STAGE",
            help=f"First stage to run again: {', '.join(STAGES)}. Else the first that did not succeed.",
            show_default=False,
        ),
    ] = "",
    detach: Annotated[bool, typer.Option("--detach", help="Start it and return at once.")] = False,
    as_json: Json = False,
) -> None:
    """Run a run's pipeline again, as a new run; the stages before are taken over."""
    with Client() as client:
        run = client.retry(run_id, from_stage=from_stage)
        if as_json:
            print_json(data_of(run))
            return
        if detach:
            say_started(run)
            return
        announce(run)
        last = follow(client, run.id)
    if last is not None:
        conclude(last)
        raise typer.Exit(exit_code(last, strict=False))


@app.command("export", epilog=examples("web4lora runs export latest ~/models/web4-demo"))
def export(
    run_id: RunId,
    target: Annotated[Path, typer.Argument(help="A folder that is new or empty.", show_default=False)],
) -> None:
    """Copy everything a run made into a folder of your own, verified against its digests."""
    with Client() as client:
        count, size_bytes = export_run(client.get_run(run_id), client.store, target)
    mark(OK, f"{human.count(count, 'file')}, {human.size(size_bytes)}, in {short(target)}/")


def _state(run: gateway_pb2.Run) -> str:
    """Return a run's state, with the stage at work or the one that failed."""
    wanted = {
        gateway_pb2.RUN_STATE_RUNNING: gateway_pb2.STAGE_STATE_RUNNING,
        gateway_pb2.RUN_STATE_FAILED: gateway_pb2.STAGE_STATE_FAILED,
    }.get(run.state)
    for stage in run.stages:
        if stage.state == wanted:
            return f"{run_state(run)}: {stage_name(stage)}"
    return run_state(run)
