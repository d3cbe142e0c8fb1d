"""`web4lora deploy`: a run's model or a GGUF from elsewhere into a runtime, without training."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from web4.lora.v1 import deployments_pb2
from web4lora_chassis.errors import InvalidInput

from web4lora.client import Client
from web4lora.commands.follow_job import finish
from web4lora.commands.follow_run import step
from web4lora.commands.options import Json, examples
from web4lora.home import command_name
from web4lora.views import human
from web4lora.views.console import NOTE, OK, data_of, line, mark, print_json

_EXAMPLES = examples(
    "web4lora deploy model.Q4_K_M.gguf --name my-model",
    "web4lora deploy latest --target ollama",
    "web4lora deploy outputs/run_2026-11-22_1 --name web4-demo --target docker --context 8192",
    'web4lora deploy other.gguf --name other --stop "<|end|>" --system "You are brief."',
    "web4lora deploy base.Q4_K_M.gguf --name both --adapter a=one/adapter.gguf --adapter b=two/adapter.gguf",
)
_QUESTION = "Say hi."


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("deploy", epilog=_EXAMPLES)(deploy)


def deploy(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN|GGUF", help="A run's id or folder, or a GGUF file.", show_default=False),
    ],
    name: Annotated[
        str,
        typer.Option("--name", help="What people will call it; a run brings its own.", show_default=False),
    ] = "",
    target: Annotated[
        str,
        typer.Option(
            help="ollama, docker, llama-server, or auto, the first of these that is found; by default the "
            "deployer's own setting, which is auto.",
            show_default=False,
        ),
    ] = "",
    context_tokens: Annotated[
        int,
        typer.Option(
            "--context", min=0, help="Context length in tokens; 0 takes the run's advice, else 4096."
        ),
    ] = 0,
    parallel: Annotated[int, typer.Option(min=0, help="Requests answered at once; 0 takes 4.")] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="A text that ends an answer; may be given often."),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            "--system", metavar="TEXT", help="The system message when none is given.", show_default=False
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, max=2.0, help="Of requests that name none; 0 by default.", show_default=False),
    ] = None,
    license_text: Annotated[
        str | None,
        typer.Option(
            "--license", metavar="TEXT", help="The model's licence, its name or its text.", show_default=False
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME=GGUF",
            help="A LoRA adapter on this GGUF, which is its base then; may be given often. llama-server: "
            "the first is applied, `deployments adapters` switches without a restart.",
        ),
    ] = None,
    promote: Annotated[
        bool,
        typer.Option(
            "--promote/--no-promote",
            help="Let the name stand for it once it has answered; without, it is a candidate beside it.",
        ),
    ] = True,
    as_json: Json = False,
) -> None:
    """Deploy a model without training: a run's, or a GGUF from elsewhere.

    What is there already is neither uploaded nor started again. After Ctrl-C serves what served before.
    """
    with Client() as client:
        job = client.deploy(
            source,
            name,
            target=target,
            context_tokens=context_tokens,
            parallel=parallel,
            stop=stop or (),
            system=system,
            temperature=temperature,
            license_text=license_text,
            adapters=_adapters(adapter or ()),
        )
        if not as_json and target in ("", "auto"):
            _say_found(client)
        kept = "What served before still serves."
        result = finish(client, job, quiet=as_json, kept=kept).result.deploy
        deployment = (
            client.promote(result.deployment.id) if promote else client.deployment(result.deployment.id)
        )
    if as_json:
        print_json(
            {
                "deployment": data_of(deployment),
                "unchanged": result.unchanged,
                "passed_over": list(result.passed_over),
                "ready_seconds": result.ready_seconds,
                "request": request_of(deployment),
            }
        )
        return
    done = (
        "it serves already: nothing was moved" if result.unchanged else human.duration(result.ready_seconds)
    )
    mark(OK, f"{deployment.id} on {deployment.target} {deployment.runtime_version}   {done}")
    for said in result.passed_over:
        mark(NOTE, f"not on {said}")
    if deployment.adapters:
        mark(NOTE, f"adapters: {scales_text(deployment)}")
    if (system or stop) and deployment.target != "ollama":
        mark(NOTE, f"{deployment.target} takes system message and stop texts from each request: send them.")
    _show_next_steps(deployment)


def scales_text(deployment: deployments_pb2.Deployment) -> str:
    """Return a deployment's adapters and how strongly each is applied: `tool 1, style 0`."""
    return ", ".join(f"{adapter.name} {adapter.scale:g}" for adapter in deployment.adapters)


def _adapters(words: Iterable[str]) -> dict[str, str]:
    """Return the adapters' files by their names, of words like `tool=adapter.gguf`."""
    found: dict[str, str] = {}
    for word in words:
        name, sign, file = word.partition("=")
        if not (name and sign and file):
            raise InvalidInput(f"--adapter {word}: it needs NAME=GGUF.", fix=f"--adapter tool={word}")
        if name in found:
            raise InvalidInput(
                f"--adapter {word}: another adapter is called {name}.", fix="Name it otherwise."
            )
        found[name] = file
    return found


def request_of(deployment: deployments_pb2.Deployment) -> dict[str, Any]:
    """Return the HTTP request that asks a deployment something: url and body."""
    return {
        "url": f"{deployment.endpoint}/chat/completions",
        "body": {
            "model": called(deployment),
            "messages": [{"role": "user", "content": _QUESTION}],
            "temperature": 0,
        },
    }


def called(deployment: deployments_pb2.Deployment) -> str:
    """Return what a runtime's own clients call a deployment: its name, where the runtime knows names."""
    named = deployment.promoted and deployment.target in ("ollama", "docker")
    return deployment.name if named else deployment.model


def own_command(deployment: deployments_pb2.Deployment) -> str:
    """Return the command of the runtime's own that asks a deployment something; empty when it has none."""
    programs = {"ollama": "ollama run", "docker": "docker model run"}
    program = programs.get(deployment.target)
    return f"{program} {called(deployment)} {shlex.quote(_QUESTION)}" if program else ""


def _say_found(client: Client) -> None:
    """Print which runtimes were looked for, where, and what was found."""
    for runtime in client.info().runtimes:
        found = f"{runtime.version} at {runtime.address}".strip() if runtime.usable else runtime.detail
        line(f"  {runtime.target:<14} {found}", style="" if runtime.usable else "dim")


def _show_next_steps(deployment: deployments_pb2.Deployment) -> None:
    """Print the name to call, and every way to ask."""
    if deployment.promoted:
        step("Its name", deployment.name)
    else:
        step("A candidate", f"`{command_name()} deployments promote {deployment.id}` gives it the name")
    name = deployment.name if deployment.promoted else deployment.id
    step("Ask it", f"{command_name()} chat {name} {shlex.quote(_QUESTION)}")
    if own := own_command(deployment):
        step("Or", own)
    if len(deployment.adapters) > 1:
        other = deployment.adapters[1].name
        step("Switch", f"{command_name()} deployments adapters {name} --use {other}")
    request = request_of(deployment)
    body = shlex.quote(json.dumps(request["body"]))
    step("Or", f"curl {request['url']} -H 'Content-Type: application/json' -d {body}")
