"""`web4lora artifacts`: list, get, verify."""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from web4.lora.v1 import artifacts_pb2
from web4lora_chassis.artifacts import ArtifactStore
from web4lora_chassis.errors import DataLoss, NotFound
from web4lora_chassis.rpc import ref_of

from web4lora.client import Client
from web4lora.commands.options import Json, examples
from web4lora.home import load_settings, short
from web4lora.views import human
from web4lora.views.console import BAD, OK, data_of, line, mark, out, print_json
from web4lora.views.table import table

app = typer.Typer(help="See, fetch and check what is in the artifact store.", no_args_is_help=True)
_NAME_HELP = "kind/name@digest, kind/name for the newest, or 8 or more digits of a digest."


@app.command("list", epilog=examples("web4lora artifacts list", "web4lora artifacts list --kind gguf --json"))
def list_artifacts(
    kind: Annotated[str, typer.Option(help="Only this kind: dataset, base_model, adapter, gguf, …")] = "",
    name: Annotated[str, typer.Option(help="Only this name.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="At most this many, newest first.")] = 50,
    as_json: Json = False,
) -> None:
    """List artifacts, newest first."""
    with Client() as client:
        artifacts = list(islice(client.artifacts(kind, name), limit))
    if as_json:
        print_json([data_of(artifact) for artifact in artifacts])
        return
    if not artifacts:
        line("There are no such artifacts.")
        return
    rows = [
        [
            str(ref_of(artifact.ref)),
            human.size(artifact.ref.size_bytes),
            str(len(artifact.files)),
            artifact.created_by,
            human.moment(artifact.create_time),
            ", ".join(f"{_kind(ref)} {ref.digest[:8]}" for ref in artifact.inputs),
        ]
        for artifact in artifacts
    ]
    titles = ("artifact", "size", "files", "made by", "made", "from")
    out.print(table(titles, rows, whole=("artifact",), right=("size", "files")))


@app.command("get", epilog=examples("web4lora artifacts get gguf/web4-demo ./model"))
def get(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help=_NAME_HELP, show_default=False)],
    target: Annotated[Path, typer.Argument(help="The folder to bring it to.", show_default=False)],
) -> None:
    """Bring an artifact's files to a folder, verified; they are read-only, change a copy."""
    with Client() as client:
        manifest = client.get_artifact(artifact, target)
    files = human.count(len(manifest.files), "file")
    mark(OK, f"{manifest.ref}: {files}, {human.size(manifest.size_bytes)}, in {short(target)}/")


@app.command(
    "verify", epilog=examples("web4lora artifacts verify", "web4lora artifacts verify gguf/web4-demo")
)
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="ARTIFACT…", help=f"{_NAME_HELP} All when absent.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hash every file again and compare it with its manifest. Exit code 1 when one is not what it was."""
    reports: list[dict[str, Any]] = []
    with Client() as client:
        found = [client.artifact(name) for name in names] if names else list(client.artifacts())
        for artifact in found:
            problems = _problems(client.store, artifact)
            ref = ref_of(artifact.ref)
            reports.append(
                {"artifact": str(ref), "digest": ref.digest, "ok": not problems, "problems": problems}
            )
            if not as_json:
                files = human.count(len(artifact.files), "file")
                mark(BAD if problems else OK, f"{ref}  {files}, {human.size(ref.size_bytes)}")
                for problem in problems:
                    line(f"      {problem}", style="red")
    bad = sum(not report["ok"] for report in reports)
    if as_json:
        print_json(reports)
    elif bad:
        line(f"{bad} of {len(reports)} are not what they were. What was made from them can't be trusted.")
        line("Delete them from the store and make them again: `web4lora run PIPELINE.yaml --from STAGE`.")
    elif not reports:
        line("There are no artifacts yet.")
    raise typer.Exit(1 if bad else 0)


def _problems(store: ArtifactStore, artifact: artifacts_pb2.Artifact) -> list[str]:
    """Read an artifact's files again; return what is wrong with them."""
    problems = []
    ref = ref_of(artifact.ref)
    home = load_settings().home
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="verify-", dir=home) as folder:  # there a file may be linked
        for entry in artifact.files:
            place = Path(folder) / entry.path
            try:
                store.get(ref, Path(folder), only=[entry.path])
            except (DataLoss, NotFound) as error:
                problems.append(f"{entry.path}: {error.message}")
            place.unlink(missing_ok=True)
    return problems


def _kind(ref: artifacts_pb2.ArtifactRef) -> str:
    return ref_of(ref).kind
