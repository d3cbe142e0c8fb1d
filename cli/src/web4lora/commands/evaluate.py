"""`web4lora eval`: the test suite on a model, wherever it answers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from web4.lora.v1 import deployer_pb2
from web4lora_chassis.errors import InvalidInput

from web4lora.client import Client
from web4lora.client.evaluation import EvalModel, budgets_of, suite_file
from web4lora.commands.follow_job import finish
from web4lora.commands.follow_run import step
from web4lora.commands.options import Json, examples
from web4lora.home import command_name, short
from web4lora.views.console import OK, data_of, line, mark, print_json
from web4lora.views.stages import verified
from web4lora.views.verdict import missed, show_result

_EXAMPLES = examples(
    "web4lora eval web4-demo",
    "web4lora eval web4-demo --limit min_score_percent.tool_call.valid=95 --out tested",
    "web4lora eval web4-demo --against web4-demo-ollama --against smollm2@http://127.0.0.1:11434/v1",
    "web4lora eval some-model --endpoint https://HOST/v1 --api-key-env MY_KEY --suite mine/suite.yaml",
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("eval", epilog=_EXAMPLES)(evaluate)


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A deployment's name or id; with --endpoint, the model's name there.",
            show_default=False,
        ),
    ],
    suite: Annotated[
        Path | None,
        typer.Option(metavar="SUITE.yaml", help="The suite; by default the sample's, or the pipeline's."),
    ] = None,
    pipeline: Annotated[
        Path | None,
        typer.Option(metavar="PIPELINE.yaml", help="Take suite and limits from this file's `verify`."),
    ] = None,
    limits: Annotated[
        list[str] | None,
        typer.Option("--limit", metavar="KEY=VALUE", help="A limit for the verdict; may be given often."),
    ] = None,
    endpoint: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="An OpenAI-compatible API, http://HOST:PORT/v1, as the deployer reaches it.",
            show_default=False,
        ),
    ] = "",
    api_key_env: Annotated[
        str,
        typer.Option(metavar="NAME", help="The environment variable with the API's key.", show_default=False),
    ] = "",
    context_tokens: Annotated[
        int,
        typer.Option("--context", min=0, help="Context of the endpoint's model; 0: no long prompt is sent."),
    ] = 0,
    parallel: Annotated[int, typer.Option(min=0, max=64, help="Requests at once to the endpoint; 0: 4.")] = 0,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL[@URL]",
            help="Compare with this one, prompt by prompt; drops are measured from the first.",
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(help="Name of the report; by default the model's and -eval.", show_default=False)
    ] = "",
    out_dir: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Bring eval_log.md, eval.json and plots here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a test suite on a model: a deployment, or any OpenAI-compatible endpoint.

    Every request says temperature 0. Exit code 1 when a limit is missed.
    """
    first = EvalModel(model, endpoint, _key(api_key_env, endpoint), context_tokens, parallel)
    chosen = suite_file(suite, pipeline)
    with Client() as client:
        job = client.evaluate(
            first,
            chosen,
            against=[EvalModel.of(text) for text in against or ()],
            budgets=budgets_of(limits or (), pipeline),
            name=name,
        )
        if not as_json:
            line(f"{model} · {short(chosen)}", style="bold")
        result = finish(client, job, quiet=as_json, kept="Nothing was kept.").result.evaluate
        if out_dir is not None:
            client.get_artifact(result.report, out_dir)
    if as_json:
        print_json(data_of(result))
    else:
        _show(result, model, job.spec.evaluate, out_dir)
    raise typer.Exit(1 if missed(result) else 0)


def _show(
    result: deployer_pb2.VerifyResult, model: str, spec: deployer_pb2.EvaluateSpec, out_dir: Path | None
) -> None:
    first = spec.against[0] if spec.against else deployer_pb2.EvaluatedModel()
    other = first.deployment or first.model
    mark(OK, verified(result, other))
    show_result(result, model, other)
    line()
    if out_dir is not None:
        step("The report", f"{short(out_dir)}/eval_log.md")
    else:
        ref = result.report
        named = f"report/{ref.name}@{ref.digest[:12]}"
        step("The report", f"{command_name()} artifacts get {named} DIR")


def _key(variable: str, endpoint: str) -> str:
    """Return the key that an environment variable holds.

    Raises:
        InvalidInput: It is not set, or there is no endpoint to send it to.
    """
    if not variable:
        return ""
    if not endpoint:
        raise InvalidInput("--api-key-env needs --endpoint: a deployment here takes no key.")
    value = os.environ.get(variable, "")
    if not value:
        raise InvalidInput(f"{variable} is not set.", fix=f"export {variable}=…, then try again.")
    return value
