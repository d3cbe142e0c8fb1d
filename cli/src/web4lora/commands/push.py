"""`web4lora deployments push`: a deployed model into an OCI registry, as Docker Model Runner pulls it."""

from __future__ import annotations

from typing import Annotated

import typer

from web4lora.client import Client
from web4lora.commands.follow_job import finish
from web4lora.commands.follow_run import step
from web4lora.commands.options import Json, examples
from web4lora.views import human
from web4lora.views.console import OK, data_of, mark, print_json

_EXAMPLES = examples(
    "web4lora deployments push web4-demo localhost:5000/web4/demo:v1",
    "web4lora deployments push web4-demo:v1a2b3c4d docker.io/you/web4-demo",
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("push", epilog=_EXAMPLES)(push)


def push(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A deployment's name or id.", show_default=False)
    ],
    reference: Annotated[
        str,
        typer.Argument(
            metavar="REGISTRY/REPOSITORY[:TAG]",
            help="Where to; without a tag that of the deployment's id is taken.",
            show_default=False,
        ),
    ],
    plain_http: Annotated[
        bool, typer.Option("--plain-http", help="Speak without TLS to a registry beyond this machine.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Push a deployed model to an OCI registry, as Docker Model Runner pulls it.

    The login is Docker's own: `docker login REGISTRY`. What the registry has is not sent again, and a push
    that broke off goes on where it ended.
    """
    with Client() as client:
        job = client.push(name, reference, plain_http=plain_http)
        kept = "What has arrived is not sent again."
        result = finish(client, job, quiet=as_json, kept=kept).result.push
    if as_json:
        print_json(data_of(result))
        return
    sent = f"{human.size(result.sent_bytes)} sent" if result.sent_bytes else "it was there already"
    mark(OK, f"{result.reference}  {human.size(result.size_bytes)}, {sent}")
    step("Its digest", result.digest)
    step("Pull it", f"docker model pull {result.reference}")
