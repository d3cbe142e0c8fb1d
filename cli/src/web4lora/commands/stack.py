"""`web4lora up`, `down`, `status`, `doctor`: the services of this machine."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from web4.lora.v1 import deployments_pb2, gateway_pb2
from web4lora_chassis.errors import InvalidInput, Unavailable, Web4Error
from web4lora_chassis.settings import ENV_FILE, Settings

from web4lora import doctor as machine
from web4lora.client import UNENDED, Client
from web4lora.commands.deployments import state_text
from web4lora.commands.options import Json, examples
from web4lora.home import command_name, load_settings, short
from web4lora.stack import SERVICES, Stack
from web4lora.views.console import BAD, NOTE, OK, data_of, line, mark, out, print_json
from web4lora.views.stages import progress_text, queued_text, run_state, stage_name

_WIDTH = 10
_LOOK_SECONDS = 1.0


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("up", epilog=examples("web4lora up", "web4lora up trainer", "web4lora up --foreground"))(up)
    app.command("down", epilog=examples("web4lora down", "web4lora down trainer"))(down)
    app.command("status", epilog=examples("web4lora status", "web4lora status --json"))(status)
    app.command("doctor", epilog=examples("web4lora doctor", "web4lora doctor --json"))(doctor)


Names = Annotated[
    list[str] | None, typer.Argument(metavar="SERVICE…", help=f"Just these: {', '.join(SERVICES)}.")
]


def local_stack(settings: Settings) -> Stack:
    """Return this machine's stack; runs' folders go to `outputs` in the working folder."""
    return Stack(settings, Path.cwd() / "outputs")


def show_step(name: str, what: str) -> None:
    """Print what became of a service."""
    mark(NOTE if what == "not running" else OK, f"{name:<{_WIDTH}} {what}")


def up(
    names: Names = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay until Ctrl-C, then stop what was started.")
    ] = False,
) -> None:
    """Start the services on this machine.

    Those that are up are left alone. Runs that were cut off go on.
    """
    settings = load_settings()
    stack = local_stack(settings)
    wanted = _checked(names)
    if foreground:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with out.status("starting …"):
        started = stack.up(show_step, wanted)
    line(f"  logs       {short(settings.home / 'logs')}/", style="dim")
    if foreground:
        _stay(stack, started)
    else:
        line(f"  next       {command_name()} run examples/web4/demo.yaml", style="dim")


def down(names: Names = None) -> None:
    """Stop the services that `up` started.

    Runs at work go on at the next `web4lora up`.
    """
    settings = load_settings()
    stack = local_stack(settings)
    wanted = _checked(names)
    at_work = [run.id for run in _runs_at_work(settings)] if _gateway_is_up(stack) else []
    with out.status("stopping …"):
        stack.down(show_step, wanted)
    for run_id in at_work:
        mark(NOTE, f"{run_id} was at work; it goes on at the next `{command_name()} up`.")


def status(as_json: Json = False) -> None:
    """Show the services, the runs at work and what is deployed.

    Exit code 1 when a service is not up.
    """
    settings = load_settings()
    stack = local_stack(settings)
    services = _services(stack, settings)
    gateway_is_up = services[0]["serving"]
    runs = _runs_at_work(settings) if gateway_is_up else []
    deployments = _deployments(settings) if gateway_is_up else []
    if as_json:
        print_json(
            {
                "home": str(settings.home),
                "services": services,
                "runs": [data_of(run) for run in runs],
                "deployments": [data_of(each) for each in deployments],
            }
        )
    else:
        _show_status(settings, services, runs, deployments)
    raise typer.Exit(0 if all(each["serving"] for each in services) else 1)


def doctor(as_json: Json = False) -> None:
    """Look at this machine: device, memory, disk, tools and runtimes, each with what to do.

    Exit code 1 only when something that is needed is missing.
    """
    checks = []
    for check in machine.examine(load_settings()):
        checks.append(check)
        if not as_json:
            mark(check.sign, f"{check.name:<20} {check.text}")
    if as_json:
        words = {OK: "ok", NOTE: "note", BAD: "missing"}
        print_json([{**asdict(check), "sign": words[check.sign]} for check in checks])
    raise typer.Exit(1 if any(check.sign == BAD for check in checks) else 0)


def _checked(names: list[str] | None) -> tuple[str, ...]:
    for name in names or ():
        if name not in SERVICES:
            raise InvalidInput(f"{name!r} is not a service.", fix=f"The services are {', '.join(SERVICES)}.")
    return tuple(names or SERVICES)


def _stay(stack: Stack, started: list[str]) -> None:
    """Wait until Ctrl-C or until a service ends, then stop what was started here."""
    watched = [each for each in stack.services if each.name in started]
    try:
        line("  Ctrl-C stops them.")
        while True:
            time.sleep(_LOOK_SECONDS)
            for each in watched:
                if stack.process(each) is None:
                    raise Unavailable(f"The {each.name} has ended.", fix=f"Its log says why: {each.log_file}")
    except KeyboardInterrupt:
        line()
    finally:
        stack.down(show_step, started)


def _gateway_is_up(stack: Stack) -> bool:
    return stack.serving(next(each for each in stack.services if each.name == "gateway"))


def _services(stack: Stack, settings: Settings) -> list[dict[str, Any]]:
    """Return what is known of each service, the gateway first: from the gateway when it is up."""
    known: dict[str, gateway_pb2.ServiceStatus] = {}
    gateway: dict[str, Any] = {}
    if _gateway_is_up(stack):
        try:
            with Client(settings) as client:
                info = client.info()
            gateway = {
                "version": info.version,
                "detail": f"artifacts in {info.store}",
                "warnings": list(info.warnings),
            }
            known = {each.name: each for each in info.services}
        except Web4Error as error:
            gateway = {"serving": False, "detail": error.message}
    rows = []
    for each in reversed(stack.services):
        row = {"name": each.name, "address": each.address, "version": "", "detail": "", "serving": False}
        if each.name == "gateway":
            row |= {"serving": bool(gateway), **gateway}
        elif each.name in known:
            row |= {key: value for key, value in data_of(known[each.name]).items() if key in row}
        else:
            row["serving"] = stack.serving(each)
        if not row["serving"] and not row["detail"]:
            row["detail"] = _start_hint(each.name)
        rows.append(row)
    return rows


def _start_hint(name: str) -> str:
    """Say what to do about a service that does not answer, in containers or natively."""
    if not os.environ.get(ENV_FILE):
        return f"not running; `{command_name()} up` starts it"
    if name == "trainer":
        return f"not running; `{command_name()} trainer start` starts it"
    return f"not running; `docker compose up -d {name}` starts it, `docker compose logs {name}` may say why"


def _runs_at_work(settings: Settings) -> list[gateway_pb2.Run]:
    with suppress(Web4Error), Client(settings) as client:
        return list(client.list_runs(states=UNENDED))
    return []


def _deployments(settings: Settings) -> list[deployments_pb2.Deployment]:
    with suppress(Web4Error), Client(settings) as client:
        return client.deployments()
    return []


def _show_status(
    settings: Settings,
    services: list[dict[str, Any]],
    runs: list[gateway_pb2.Run],
    deployments: list[deployments_pb2.Deployment],
) -> None:
    for row in services:
        text = f"{row['name']:<{_WIDTH}} {row['address']:<16} {row['version']:<7} {row['detail']}"
        mark(OK if row["serving"] else BAD, text.rstrip())
        if not row["serving"] and (log := settings.home / "logs" / f"{row['name']}.log").exists():
            line(f"               its log: {short(log)}", style="dim")
        for warning in row.get("warnings", ()):
            mark(NOTE, f"{'':<{_WIDTH}} {warning}")
    for run in runs:
        at_work = [stage for stage in run.stages if stage.state == gateway_pb2.STAGE_STATE_RUNNING]
        queued = [stage for stage in run.stages if stage.state == gateway_pb2.STAGE_STATE_QUEUED]
        text = f"{stage_name(at_work[0])} {progress_text(at_work[0].progress)}" if at_work else run_state(run)
        if queued:
            text = f"{run_state(run)}: {stage_name(queued[0])}, {queued_text(queued[0])}"
        line(f"    run        {run.id} · {run.pipeline.name} · {text}")
    for each in deployments:
        line(f"    deployed   {each.id} · {state_text(each)} · {each.target} · {each.endpoint}")
