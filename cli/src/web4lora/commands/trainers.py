"""`web4lora trainers`: list, pause, drain, resume."""

from __future__ import annotations

from typing import Annotated

import typer
from web4.lora.v1 import gateway_pb2

from web4lora.client import Client
from web4lora.commands.options import Json, examples
from web4lora.views import human
from web4lora.views.console import OK, data_of, mark, out, print_json
from web4lora.views.table import Cell, table

app = typer.Typer(help="See the trainers, and say which of them may work.", no_args_is_help=False)
Name = Annotated[str, typer.Argument(metavar="NAME", help="Its name or its address.", show_default=False)]


@app.callback(invoke_without_command=True)
def trainers(context: typer.Context) -> None:
    """List the trainers when no command is given."""
    if context.invoked_subcommand is None:
        list_trainers()


@app.command("list", epilog=examples("web4lora trainers", "web4lora trainers list --json"))
def list_trainers(as_json: Json = False) -> None:
    """List the trainers, in the order in which runs are given to them."""
    with Client() as client:
        found = client.trainers()
    if as_json:
        print_json([data_of(each) for each in found])
        return
    rows: list[list[Cell]] = [
        [each.name, each.address, state_of(each), each.device, _memory(each), ", ".join(each.runs)]
        for each in found
    ]
    columns = ("trainer", "address", "state", "device", "memory", "runs")
    out.print(table(columns, rows, whole=("trainer", "address")))


@app.command("pause", epilog=examples("web4lora trainers pause gpu-1"))
def pause(name: Name, as_json: Json = False) -> None:
    """Stop a trainer's work: it goes on from its last checkpoint when the trainer is resumed."""
    _set(
        name, "paused", "is paused; its training goes on from the last checkpoint when you resume it", as_json
    )


@app.command("drain", epilog=examples("web4lora trainers drain gpu-1"))
def drain(name: Name, as_json: Json = False) -> None:
    """Let a trainer end what is at work and take nothing new."""
    _set(name, "draining", "ends what is at work and takes nothing new", as_json)


@app.command("resume", epilog=examples("web4lora trainers resume gpu-1"))
def resume(name: Name, as_json: Json = False) -> None:
    """Let a trainer work again."""
    _set(name, "active", "takes work", as_json)


def state_of(trainer: gateway_pb2.TrainerStatus) -> str:
    """Return in words how a trainer is: what people allow it, and whether it is in reach."""
    words = []
    if trainer.mode == gateway_pb2.TRAINER_MODE_PAUSED:
        words.append("paused")
    elif trainer.mode == gateway_pb2.TRAINER_MODE_DRAINING:
        words.append("draining" if trainer.runs else "drained")
    if trainer.HasField("lost_time"):
        words.append(f"lost since {human.moment(trainer.lost_time)}")
    elif not trainer.HasField("seen_time"):
        words.append("not seen yet")
    elif not words:
        words.append("at work" if trainer.runs else "free")
    return ", ".join(words)


def _memory(trainer: gateway_pb2.TrainerStatus) -> str:
    if not trainer.memory_bytes:
        return ""
    return f"{human.size(trainer.free_memory_bytes)} of {human.size(trainer.memory_bytes)} free"


def _set(name: str, mode: str, words: str, as_json: bool) -> None:
    with Client() as client:
        trainer = client.set_trainer_mode(name, mode)
    if as_json:
        print_json(data_of(trainer))
    else:
        mark(OK, f"{trainer.name} {words}.")
