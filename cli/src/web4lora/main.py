"""The command `web4lora`. Exit codes: 0 all is well, 1 it failed, 2 the command or a file is wrong."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from web4lora_chassis.errors import FailedPrecondition, Internal, InvalidInput, Web4Error
from web4lora_chassis.settings import ENV_FILE

from web4lora.commands import (
    artifacts,
    audit,
    chat,
    dataset,
    demo,
    deploy,
    deployments,
    evaluate,
    gc,
    people,
    push,
    run,
    runs,
    stack,
    sweeps,
    trainer,
    trainers,
)
from web4lora.commands.options import examples
from web4lora.views import console

app = typer.Typer(
    name="web4lora",
    help="Turn a dataset into a model that answers on this machine, and prove it is the one you trained.",
    epilog=examples(
        "web4lora up", "web4lora run examples/web4/demo.yaml", 'web4lora chat web4-demo "Create an agent"'
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
stack.register(app)
run.register(app)
deploy.register(app)
chat.register(app)
evaluate.register(app)
demo.register(app)
gc.register(app)
audit.register(app)
app.add_typer(runs.app, name="runs")
app.add_typer(artifacts.app, name="artifacts")
app.add_typer(dataset.app, name="dataset")
push.register(deployments.app)
app.add_typer(deployments.app, name="deployments")
app.add_typer(trainer.app, name="trainer")
app.add_typer(people.app, name="people")
app.add_typer(sweeps.app, name="sweeps")
app.add_typer(trainers.app, name="trainers")


def _show_version(wanted: bool) -> None:
    if wanted:
        console.line(f"web4lora {version('web4lora')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    env_file: Annotated[
        Path | None,
        typer.Option(
            "--env-file", envvar=ENV_FILE, help="Speak to the stack of this .env: the one in containers."
        ),
    ] = None,
) -> None:
    if env_file:
        os.environ[ENV_FILE] = str(env_file.absolute())


def main() -> None:
    """Run the command; every error is a message with what to do, without a stack trace."""
    debug = os.environ.get("WEB4LORA_DEBUG") == "1"
    logging.basicConfig(level=logging.DEBUG if debug else logging.ERROR, format="%(name)s: %(message)s")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ✓ shows ?
    try:
        app()
    except Web4Error as error:
        _fail(error, debug=debug)
    except Exception as error:  # noqa: BLE001 - the last resort: named, and its trace shown on request
        problem = _foreign(error)
        problem.__cause__ = error
        _fail(problem, debug=debug)


def _foreign(error: Exception) -> Web4Error:
    """Say for people what an error that is none of ours means; what a file or a text caused is no defect."""
    if isinstance(error, OSError) and error.filename:
        return FailedPrecondition(
            f"{os.fsdecode(error.filename)}: {error.strerror}.", fix="Correct the path, or what is there."
        )
    if isinstance(error, UnicodeError):
        return InvalidInput(f"A text that was given is not UTF-8: {error}.", fix="Write it anew.")
    return Internal(
        f"{type(error).__name__}: {error}",
        fix="This is a defect. WEB4LORA_DEBUG=1 shows where it happened.",
    )


def _fail(problem: Web4Error, *, debug: bool) -> NoReturn:
    """Print an error and end with its exit code."""
    if debug:
        traceback.print_exception(problem)
    console.error(problem)
    sys.exit(2 if isinstance(problem, InvalidInput) else 1)
