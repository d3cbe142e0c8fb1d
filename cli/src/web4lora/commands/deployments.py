"""`web4lora deployments`: what answers on this machine, and which model a name stands for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer
from rich.text import Text
from web4.lora.v1 import deployments_pb2
from web4lora_chassis.errors import FailedPrecondition, InvalidInput
from web4lora_chassis.rpc import ref_of

from web4lora.client import Client
from web4lora.commands.deploy import scales_text
from web4lora.commands.options import Json, examples
from web4lora.views import human
from web4lora.views.console import OK, STYLES, data_of, line, mark, out, print_json
from web4lora.views.table import Cell, table

app = typer.Typer(help="See what is deployed, promote it, roll it back.", no_args_is_help=True)
DeploymentId = Annotated[
    str, typer.Argument(metavar="ID", help="As `list` shows it: web4-demo:v1a2b3c4d.", show_default=False)
]


@app.callback()
def _group() -> None:
    pass


@app.command("list", epilog=examples("web4lora deployments list", "web4lora deployments list --json"))
def list_deployments(as_json: Json = False) -> None:
    """List deployed models, newest first; a tick marks the one that its name stands for."""
    with Client() as client:
        deployments = client.deployments()
    if as_json:
        print_json([data_of(deployment) for deployment in deployments])
        return
    if not deployments:
        line("Nothing is deployed. `web4lora run examples/web4/demo.yaml` deploys a model.")
        return
    rows: list[list[Cell]] = [
        [
            each.id,
            Text(OK, STYLES[OK]) if each.promoted else "",
            state_text(each),
            f"{each.target} {each.runtime_version}",
            each.endpoint,
            human.moment(each.create_time),
        ]
        for each in deployments
    ]
    titles = ("deployment", "promoted", "state", "runtime", "endpoint", "deployed")
    out.print(table(titles, rows, whole=("deployment", "endpoint")))
    for each in deployments:
        if each.adapters:
            line(f"{each.id}: adapters {scales_text(each)}")
    for each in deployments:
        if each.detail:
            failed = each.state == deployments_pb2.DEPLOYMENT_STATE_FAILED
            line(f"{each.id}: {each.detail}", style="red" if failed else "yellow")


@app.command("show", epilog=examples("web4lora deployments show web4-demo"))
def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A deployment's name or id.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Show one deployment: where it answers, what it is made of, its trained system message."""
    with Client() as client:
        deployment = client.deployment(name)
    if as_json:
        print_json(data_of(deployment))
        return
    state = state_text(deployment)
    facts = {
        "deployment": deployment.id,
        "state": f"{state}: {deployment.detail}" if deployment.detail else state,
        "promoted": f"{deployment.name} stands for it" if deployment.promoted else "no",
        "runtime": f"{deployment.target} {deployment.runtime_version}".rstrip(),
        "endpoint": deployment.endpoint,
        "model": deployment.model,
        "context": f"{deployment.context_tokens:,} tokens",
        "made of": str(ref_of(deployment.gguf)),
        "adapters": scales_text(deployment) if deployment.adapters else "",
        "deployed": human.moment(deployment.create_time),
        "system": deployment.trained_system or "none; `chat` sends none",
    }
    for title, text in facts.items():
        if text:
            first, *more = text.splitlines()
            line(f"{title:<11} {first}")
            for row in more:
                line(f"{'':<11} {row}")


@app.command("promote", epilog=examples("web4lora deployments promote web4-demo:v1a2b3c4d"))
def promote(deployment_id: DeploymentId, as_json: Json = False) -> None:
    """Let a name stand for this deployment, once it has answered.

    The one before is unloaded and kept, so that `rollback` can take it back.
    """
    with Client() as client:
        deployment = client.promote(_checked(deployment_id))
    _say_serving(deployment, as_json=as_json)


@app.command("rollback", epilog=examples("web4lora deployments rollback web4-demo"))
def roll_back(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name people call.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Let a name stand for the deployment before again, once that one has answered."""
    if ":" in name:
        raise InvalidInput(
            f"{name} is a deployment; a rollback needs the name people call.",
            fix=f"`web4lora deployments rollback {name.partition(':')[0]}`, or promote the one you want.",
        )
    with Client() as client:
        current = next((each for each in client.deployments() if each.name == name and each.promoted), None)
        deployment = client.roll_back(name, from_id=current.id if current else "")
    _say_serving(deployment, as_json=as_json)


@app.command(
    "adapters",
    epilog=examples(
        "web4lora deployments adapters both",
        "web4lora deployments adapters both --use style",
        "web4lora deployments adapters both --set tool=1 --set style=0.5",
    ),
)
def adapters(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A deployment's name or id.", show_default=False)
    ],
    use: Annotated[
        str, typer.Option("--use", metavar="ADAPTER", help="Apply this one alone.", show_default=False)
    ] = "",
    scales: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="ADAPTER=SCALE",
            help="Apply it so strongly, 0 to 2; may be given often, and the others stay as they are.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show or switch the LoRA adapters of a deployment, without a restart.

    A scale of 0 is not at all, 1 as it was trained; several at once are added up. Answers at work end as they
    began, every later one comes with the new scales. They are kept, also when the server starts again.
    """
    if use and scales:
        raise InvalidInput("--use and --set can't go together.", fix="Take --use for one alone, else --set.")
    wanted = _scales(scales or ())
    with Client() as client:
        if use:
            deployment = client.use_adapter(name, use)
        elif wanted:
            deployment = client.set_adapters(name, wanted)
        else:
            deployment = client.deployment(name)
    if as_json:
        print_json(data_of(deployment))
        return
    if not deployment.adapters:
        line(
            f"{deployment.id} has no adapters. `web4lora deploy --help` tells how to deploy a base with some."
        )
        return
    rows: list[list[Cell]] = [
        [
            Text(cell, "" if each.scale else "dim")
            for cell in (each.name, f"{each.scale:g}", str(ref_of(each.gguf)))
        ]
        for each in deployment.adapters
    ]
    out.print(table(("adapter", "scale", "made of"), rows, whole=("adapter",)))


@app.command("delete", epilog=examples("web4lora deployments delete web4-demo:v1a2b3c4d"))
def delete(
    deployment_id: DeploymentId,
    force: Annotated[
        bool, typer.Option("--force", help="Also when a name stands for it: then nothing serves under that.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Take a deployment out of its runtime; what is gone already is no error."""
    with Client() as client:
        found = next((each for each in client.deployments() if each.id == _checked(deployment_id)), None)
        if found is not None and found.promoted and not force:
            raise FailedPrecondition(
                f"{found.name} stands for {found.id}: without it nothing serves under that name.",
                fix="Promote another one or roll back first, or add --force.",
                reason="PROMOTED",
            )
        client.delete_deployment(deployment_id)
    if as_json:
        print_json({"deleted": deployment_id, "found": found is not None})
    elif found is None:
        line(f"There was no deployment {deployment_id}.")
    else:
        mark(OK, f"{deployment_id} is gone from {found.target}.")


def state_text(deployment: deployments_pb2.Deployment) -> str:
    """Return a deployment's state as people write it."""
    name = deployments_pb2.DeploymentState.Name(deployment.state)
    return name.removeprefix("DEPLOYMENT_STATE_").lower()


def _scales(words: Iterable[str]) -> dict[str, float]:
    """Return scales by the adapters' names, of words like `style=0.5`."""
    found: dict[str, float] = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            found[name] = float(text)
        except ValueError as error:
            raise InvalidInput(f"--set {word}: it needs ADAPTER=SCALE.", fix="--set style=0.5") from error
    return found


def _checked(deployment_id: str) -> str:
    """Return a deployment's id; a mere name is refused, because it may mean another one tomorrow."""
    if ":" not in deployment_id:
        raise InvalidInput(
            f"{deployment_id} is not the id of a deployment.",
            fix="An id is like web4-demo:v1a2b3c4d; `web4lora deployments list` shows them.",
        )
    return deployment_id


def _say_serving(deployment: deployments_pb2.Deployment, *, as_json: bool) -> None:
    if as_json:
        print_json(data_of(deployment))
        return
    where = f"{deployment.target}, {deployment.endpoint}"
    mark(OK, f"{deployment.name} stands for {deployment.id} now: {where}")
