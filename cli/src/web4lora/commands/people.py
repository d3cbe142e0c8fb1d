"""`web4lora people`: who may call the gateway."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from web4.lora.v1 import access_pb2, scopes_pb2
from web4lora_chassis.errors import InvalidInput

from web4lora.client import Client
from web4lora.client.access import SCOPES
from web4lora.commands.options import Json, examples
from web4lora.views import human
from web4lora.views.console import OK, data_of, line, mark, note, out, print_json
from web4lora.views.table import Cell, table

app = typer.Typer(
    help="Who may call the gateway: people and programs, each with a token of its own.", no_args_is_help=True
)

_SPAN = re.compile(r"([1-9][0-9]{0,4})([hdw])")
_HOURS = {"h": 1, "d": 24, "w": 24 * 7}

Name = Annotated[str, typer.Argument(metavar="NAME", help="The principal's name.", show_default=False)]
Expires = Annotated[
    str,
    typer.Option(metavar="SPAN", help='How long the token is good: "12h", "30d", "8w", or "never".'),
]


@app.command(
    "add",
    epilog=examples(
        "web4lora people add alice --scope run --expires 30d", "web4lora people add ci > ~/ci.token"
    ),
)
def add(
    name: Name,
    scope: Annotated[str, typer.Option(metavar="SCOPE", help=f"{', '.join(SCOPES)}.")] = "run",
    expires: Expires = "90d",
    as_json: Json = False,
) -> None:
    """Add a principal and print its token, this once.

    read: sees everything. run: starts runs and jobs, and ends its own. admin: everything.
    """
    until = _until(expires)
    with Client() as client:
        principal, token = client.add_principal(name, scope, until)
    _tell(principal, token, as_json=as_json)


@app.command("list", epilog=examples("web4lora people list", "web4lora people list --json"))
def list_principals(as_json: Json = False) -> None:
    """List the principals, those revoked and expired too."""
    with Client() as client:
        principals = list(client.principals())
    if as_json:
        print_json([data_of(principal) for principal in principals])
        return
    if not principals:
        line("There are none: the stack's own token is all there is. `web4lora people add NAME` adds one.")
        return
    rows: list[list[Cell]] = [
        [each.name, _scope(each), human.moment(each.create_time), _state(each)] for each in principals
    ]
    out.print(table(("name", "scope", "added", "token"), rows, whole=("name",)))


@app.command("rotate", epilog=examples("web4lora people rotate alice --expires 30d"))
def rotate(name: Name, expires: Expires = "90d", as_json: Json = False) -> None:
    """Give a principal another token, and print it; the one before is refused from then on."""
    until = _until(expires)
    with Client() as client:
        principal, token = client.rotate_principal(name, until)
    _tell(principal, token, as_json=as_json)


@app.command("revoke", epilog=examples("web4lora people revoke alice"))
def revoke(name: Name, as_json: Json = False) -> None:
    """Refuse a principal's token from now on, for good; its runs go on."""
    with Client() as client:
        principal = client.revoke_principal(name)
    if as_json:
        print_json(data_of(principal))
    else:
        mark(OK, f"{principal.name} may call no more.")


def _tell(principal: access_pb2.Principal, token: str, *, as_json: bool) -> None:
    """Print a token on standard output, alone on its line, and what to do with it beside it."""
    if as_json:
        print_json({"principal": data_of(principal), "token": token})
        return
    note(f"{principal.name}, {_scope(principal)}, {_state(principal)}. This token is told once:")
    line(token)
    note("Put it into a file of its own and name that in WEB4LORA_TOKEN_FILE where it is to be used.")


def _until(span: str) -> datetime | None:
    """Return when a span from now ends; None for "never".

    Raises:
        InvalidInput: It is none.
    """
    if span == "never":
        return None
    match = _SPAN.fullmatch(span)
    if match is None:
        raise InvalidInput(
            f"--expires: {span!r} is no span of time.", fix='Write "12h", "30d", "8w", or "never".'
        )
    return datetime.now(UTC) + timedelta(hours=int(match[1]) * _HOURS[match[2]])


def _scope(principal: access_pb2.Principal) -> str:
    return scopes_pb2.Scope.Name(principal.scope).removeprefix("SCOPE_").lower()


def _state(principal: access_pb2.Principal) -> str:
    if principal.HasField("revoke_time"):
        return f"revoked {human.moment(principal.revoke_time)}"
    if not principal.HasField("expire_time"):
        return "never expires"
    past = principal.expire_time.ToDatetime(tzinfo=UTC) <= datetime.now(UTC)
    return f"{'expired' if past else 'expires'} {human.moment(principal.expire_time)}"
