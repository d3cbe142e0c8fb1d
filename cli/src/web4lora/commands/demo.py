"""`web4lora demo`: a whole pass, from starting the services to answers, and everything stopped again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from web4.lora.v1 import gateway_pb2
from web4lora_chassis.dataset import Row, check_rows

from web4lora.client import Client
from web4lora.commands.follow_run import (
    announce,
    conclude,
    deployed_name,
    exit_code,
    follow,
    show_files,
    step,
)
from web4lora.commands.options import examples
from web4lora.commands.stack import local_stack
from web4lora.home import command_name, load_settings, short
from web4lora.pipeline_file import PipelineFile, read_pipeline
from web4lora.stack import Stack
from web4lora.views.console import BAD, OK, line, mark, out
from web4lora.views.verdict import show_samples, show_scores, verify_result


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo", epilog=examples("web4lora demo examples/web4/demo.yaml"))(demo)


def demo(
    pipeline: Annotated[
        Path, typer.Argument(metavar="PIPELINE.yaml", help="What to run.", show_default=False)
    ],
) -> None:
    """Start what is not up, run a pipeline, show its scores and answers, stop what was started."""
    file = read_pipeline(pipeline)
    settings = load_settings()
    stack = local_stack(settings)
    model = file.pipeline.base.model
    line(f"Web4 LoRA Core · demo on {model} · everything stays on this machine", style="bold")
    line()
    with out.status("starting the services …"):
        started = stack.up(_say_nothing)
    keep = False
    try:
        with Client(settings) as client:
            _show_services(client)
            run = client.run(file)
            announce(run)
            last = follow(client, run.id)
            if last is None:
                keep = True  # the run needs the services
                line(f"  The services stay up for it; `{command_name()} down` stops them.")
                return
            _conclude(last, file, started=bool(started))
    finally:
        if not keep:
            _stop(stack, started)
    raise typer.Exit(exit_code(last, strict=False))


def _say_nothing(name: str, what: str) -> None:
    del name, what


def _show_services(client: Client) -> None:
    """Print one line with all services and what they run on."""
    info = client.info()
    parts = [f"gateway {OK}"]
    for each in info.services:
        parts.append(f"{each.name} {OK if each.serving else BAD}")
    line(f"  services    {'  '.join(parts)}")
    for each in info.services:
        if each.detail and (each.name == "trainer" or not each.serving):
            line(f"              {each.name}: {each.detail}", style="dim")


def _conclude(run: gateway_pb2.Run, file: PipelineFile, *, started: bool) -> None:
    """Print the scores, an answer for each core, and what to try next."""
    if run.state != gateway_pb2.RUN_STATE_SUCCEEDED:
        conclude(run)
        return
    show_scores(run)
    tests = verify_result(run)
    show_samples(tests.samples if tests else ())
    line()
    command = command_name()
    if name := deployed_name(run):
        first = f"{command} up && " if started else ""
        step("Ask it yourself", f"{first}{command} chat {name}{_question(file)}")
    step("Your own data", f"{short(file.path.parent)}/README.md")
    show_files(run)


def _question(file: PipelineFile) -> str:
    """Return arguments of `chat` that ask a held-out question under the system message it was written for."""
    for path in file.eval_files:
        for item in check_rows(path):
            if isinstance(item, Row) and len(item.messages) == 3 and "\n" not in item.messages[1].content:
                place = f"{short(path)}:{item.line}"
                return f" --system-from {shlex.quote(place)} {shlex.quote(item.messages[1].content)}"
    return ""


def _stop(stack: Stack, started: list[str]) -> None:
    if started:
        line()
        with out.status("stopping the services …"):
            stopped = stack.down(_say_nothing, started)
        if stopped:
            mark(OK, f"stopped what was started: {', '.join(stopped)}")
