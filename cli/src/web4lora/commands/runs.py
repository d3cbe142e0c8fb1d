"""`web4lora runs`: list, show, watch, cancel, retry, delete, keep, export."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from web4.lora.v1 import gateway_pb2

from web4lora.client import STAGES, STATES, Client, ended
from web4lora.commands.finding import Labels, labels_of, moment_of
from web4lora.commands.follow_run import (
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
from web4lora.views.run_progress import overview
from web4lora.views.stages import queued_text, run_state, stage_name
from web4lora.views.table import Cell, table
from web4lora.views.verdict import TESTS, show_scores, state_of, verify_result

app = typer.Typer(help="See, follow, cancel, repeat, keep and delete runs.", no_args_is_help=True)


@app.command(
    "list",
    epilog=examples(
        "web4lora runs list",
        "web4lora runs list --state failed --since 7d",
        "web4lora runs list --label team=a --limit 5 --json",
    ),
)
def list_runs(
    limit: Annotated[int, typer.Option(min=1, help="At most this many, newest first.")] = 20,
    states: Annotated[
        list[str] | None,
        typer.Option(
            "--state", metavar="STATE", help=f"{', '.join(STATES)}; may be given often.", show_default=False
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Runs of pipelines with this name.", show_default=False)] = "",
    owner: Annotated[str, typer.Option(help="Runs of this owner.", show_default=False)] = "",
    labels: Labels = None,
    since: Annotated[
        str,
        typer.Option(metavar="TIME", help="Created since: 12h, 7d, 2026-11-26.", show_default=False),
    ] = "",
    until: Annotated[
        str, typer.Option(metavar="TIME", help="Created before, likewise.", show_default=False)
    ] = "",
    as_json: Json = False,
) -> None:
    """List runs, newest first: those that all options hold for."""
    now = datetime.now(UTC)
    wanted: dict[str, Any] = {
        "states": states or (),
        "name": name,
        "owner": owner,
        "labels": labels_of(labels),
        "created_after": moment_of(since, now),
        "created_before": moment_of(until, now),
    }
    with Client() as client:
        runs = list(islice(client.list_runs(**wanted), limit))
    if as_json:
        print_json([data_of(run) for run in runs])
        return
    if not runs and any(wanted.values()):
        line("There are no such runs. `web4lora runs list` shows all.")
        return
    if not runs:
        line("There are no runs yet. `web4lora run examples/web4/demo.yaml` makes one.")
        return
    rows: list[list[Cell]] = []
    for run in runs:
        tests = verify_result(run)
        verdict = "" if tests is None else TESTS[state_of(tests)]
        took = human.duration(human.elapsed(run.create_time, run.end_time))
        rows.append(
            [run.id, run.pipeline.name, _state(run), run.owner, human.moment(run.create_time), took, verdict]
        )
    out.print(
        table(
            ("run", "pipeline", "state", "owner", "created", "took", "tests"), rows, whole=("run", "pipeline")
        )
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


@app.command(
    "cancel", epilog=examples("web4lora runs cancel", "web4lora runs cancel --keep run_2026-11-22_1")
)
def cancel(
    run_id: RunId = "latest",
    keep: Annotated[
        bool,
        typer.Option("--keep", help="End the training alone, keep its adapter and go on with packaging."),
    ] = False,
    as_json: Json = False,
) -> None:
    """End a run; what its finished stages made stays."""
    with Client() as client:
        before = client.get_run(run_id)
        run = client.cancel(before.id, keep=keep)
    if as_json:
        print_json(data_of(run))
    elif ended(before):
        line(f"{run.id} had ended already: {run_state(run)}.")
    elif keep:
        mark(OK, f"{run.id} ends its training after this step and goes on with packaging.")
    else:
        mark(OK, f"{run.id} is being cancelled. `web4lora runs retry {run.id}` takes it up again.")


@app.command(
    "retry",
    epilog=examples(
        "web4lora runs retry",
        "web4lora runs retry run_2026-11-22_1 --from package",
        "web4lora runs retry --set train.epochs=2",
    ),
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
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a setting; finished stages that it does not touch are taken over.",
        ),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Start it and return at once.")] = False,
    as_json: Json = False,
) -> None:
    """Run a run's pipeline again, as a new run; the stages before are taken over."""
    with Client() as client:
        run = client.retry(run_id, from_stage=from_stage, overrides=overrides or ())
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


@app.command("delete", epilog=examples("web4lora runs delete run_2026-11-22_1 run_2026-11-22_2"))
def delete(
    run_ids: Annotated[list[str], typer.Argument(metavar="RUN…", help="Their ids.", show_default=False)],
) -> None:
    """Delete runs that have ended: their records and folders.

    What they made stays in the store until `web4lora gc --delete`, and for as long as anything needs it.
    """
    with Client() as client:
        for run_id in run_ids:
            client.delete(run_id)
            mark(OK, f"{run_id} was deleted.")
    line("`web4lora gc` says which artifacts nothing needs any more.", style="dim")


@app.command("keep", epilog=examples("web4lora runs keep", "web4lora runs keep --release run_2026-11-22_1"))
def keep(
    run_id: RunId = "latest",
    release: Annotated[bool, typer.Option("--release", help="No longer keep it.")] = False,
    as_json: Json = False,
) -> None:
    """Keep a run and its artifacts, whatever the retention settings and `gc` say."""
    with Client() as client:
        run = client.keep(run_id, release=release)
    if as_json:
        print_json(data_of(run))
    else:
        mark(OK, f"{run.id} is {'no longer kept' if release else 'kept'}.")


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
    """Return a run's state, with the stage at work or the one that failed, and what it waits for."""
    for stage in run.stages:
        if run.state == gateway_pb2.RUN_STATE_QUEUED and stage.state == gateway_pb2.STAGE_STATE_QUEUED:
            return f"{run_state(run)}: {stage_name(stage)}, {queued_text(stage)}"
    wanted = {
        gateway_pb2.RUN_STATE_RUNNING: gateway_pb2.STAGE_STATE_RUNNING,
        gateway_pb2.RUN_STATE_FAILED: gateway_pb2.STAGE_STATE_FAILED,
    }.get(run.state)
    for stage in run.stages:
        if stage.state == wanted:
            return f"{run_state(run)}: {stage_name(stage)}"
    return run_state(run)
