"""`web4lora audit`: what was called, by whom, and whether the log of it is whole."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from web4.lora.v1 import access_pb2
from web4lora_chassis.audit import AuditLog
from web4lora_chassis.errors import DataLoss, NotFound

from web4lora.client import Client
from web4lora.commands.options import Json, examples
from web4lora.home import short
from web4lora.views import human
from web4lora.views.console import OK, data_of, line, mark, out, print_json
from web4lora.views.table import Cell, table


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "audit",
        epilog=examples(
            "web4lora audit --limit 50",
            "web4lora audit --person alice --call CreateRun",
            "web4lora audit --verify",
            "web4lora audit --verify --folder backup/audit",
        ),
    )(audit)


def audit(
    limit: Annotated[int, typer.Option(min=1, help="At most this many, newest first.")] = 20,
    person: Annotated[str, typer.Option(metavar="NAME", help="Only calls of this principal.")] = "",
    call: Annotated[str, typer.Option(metavar="CALL", help='Only this call: "CreateRun".')] = "",
    failed: Annotated[bool, typer.Option("--failed", help="Only calls that failed or were refused.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the whole log: was a line changed or removed?")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(help="With --verify: read this folder, a copy for one, in place of asking the gateway."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the calls that changed something or were refused: who, what, when, from where.

    Exit code 1 when --verify finds something.
    """
    if verify:
        _verify(folder, as_json=as_json)
        return
    with Client() as client:
        entries = list(islice(client.audit_entries(person, call, failed_only=failed), limit))
    if as_json:
        print_json([data_of(entry) for entry in entries])
        return
    if not entries:
        line("There is no such call in the log.")
        return
    rows: list[list[Cell]] = [
        [human.moment(entry.time), _who(entry), entry.call.rpartition("/")[2], entry.resource, entry.result,
         entry.peer]
        for entry in entries
    ]  # fmt: skip
    out.print(table(("when", "who", "call", "what", "result", "from"), rows, whole=("when", "who", "call")))


def _verify(folder: Path | None, *, as_json: bool) -> None:
    if folder is None:
        with Client() as client:
            found = client.verify_audit_log()
    elif not folder.is_dir():
        raise NotFound(f"There is no folder {short(folder)}.", fix="It is `audit` in a stack's home.")
    else:
        read = AuditLog(folder, "gateway").verify()
        found = access_pb2.VerifyAuditLogResponse(
            entries=read.entries, first_number=read.first_number, problems=read.problems
        )
    if as_json:
        print_json(data_of(found))
        if found.problems:
            raise typer.Exit(1)
        return
    if found.problems:
        raise DataLoss(
            "\n".join(["The audit log is not as it was written:", *found.problems]),
            fix="Compare it with a copy. Who can write the stack's home can do this.",
        )
    older = f"; the oldest kept is line {found.first_number}" if found.first_number > 1 else ""
    mark(OK, f"{human.count(found.entries, 'line')}, none changed, none removed{older}.")


def _who(entry: access_pb2.AuditEntry) -> str:
    if entry.on_behalf_of:
        return f"{entry.on_behalf_of} by {entry.principal}"
    return entry.principal or "(nobody known)"
