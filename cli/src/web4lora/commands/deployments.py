"""`web4lora deployments`: what answers on this machine."""

from __future__ import annotations

import typer
from rich.table import Table
from web4.lora.v1 import deployer_pb2

from web4lora.client import Client
from web4lora.commands.options import Json, examples
from web4lora.views import human
from web4lora.views.console import data_of, line, out, print_json

app = typer.Typer(help="See what is deployed.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command("list", epilog=examples("web4lora deployments list", "web4lora deployments list --json"))
def list_deployments(as_json: Json = False) -> None:
    """List deployed models, newest first."""
    with Client() as client:
        deployments = client.deployments()
    if as_json:
        print_json([data_of(deployment) for deployment in deployments])
        return
    if not deployments:
        line("Nothing is deployed. `web4lora run examples/web4/demo.yaml` deploys a model.")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in ("deployment", "state", "runtime", "endpoint", "deployed"):
        table.add_column(column, no_wrap=True)
    for each in deployments:
        table.add_row(
            each.id,
            state_text(each),
            f"{each.target} {each.runtime_version}",
            each.endpoint,
            human.moment(each.create_time),
        )
    out.print(table)
    for each in deployments:
        if each.state == deployer_pb2.DEPLOYMENT_STATE_FAILED and each.detail:
            line(f"{each.id}: {each.detail}", style="red")


def state_text(deployment: deployer_pb2.Deployment) -> str:
    """Return a deployment's state as people write it."""
    name = deployer_pb2.DeploymentState.Name(deployment.state)
    return name.removeprefix("DEPLOYMENT_STATE_").lower()
