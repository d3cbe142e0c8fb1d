"""`web4lora gc`: frees the store of artifacts that no run worth keeping needs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Annotated

import typer
from web4lora_chassis.artifacts import ArtifactRef, Manifest

from web4lora.client import Client, ended
from web4lora.commands.options import Json, examples
from web4lora.store_console import refs_in
from web4lora.views import human
from web4lora.views.console import NOTE, OK, line, mark, print_json

_YOUNG_SECONDS = 3600.0
"""What is younger may belong to a run that is only about to begin."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("gc", epilog=examples("web4lora gc", "web4lora gc --keep-runs 3 --delete"))(gc)


def gc(
    keep_runs: Annotated[int, typer.Option(min=0, help="Keep what the newest N runs used and made.")] = 10,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete it; without, only say what would be.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Free the store of artifacts that no run worth keeping needs.

    Kept: what the newest runs, every run that has not ended and everything deployed used and made, and what
    that was made from. A later run makes again what it needs and no longer finds.
    """
    with Client() as client:
        stored = client.store.find()
        garbage = unneeded(stored, _roots(client, keep_runs))
        freed = sum(manifest.size_bytes for manifest in garbage)
        for manifest in garbage:
            if delete:
                client.store.delete(manifest.ref)
            if not as_json:
                mark(OK if delete else NOTE, f"{manifest.ref}  {human.size(manifest.size_bytes)}")
    if as_json:
        artifacts = [manifest.ref.to_json() for manifest in garbage]
        print_json({"deleted": delete, "size_bytes": freed, "artifacts": artifacts})
    elif not garbage:
        line(f"Nothing to free: all {human.count(len(stored), 'artifact')} are needed.")
    elif delete:
        line(f"{human.size(freed)} freed.")
    else:
        what = human.count(len(garbage), "artifact")
        line(
            f"{what}, {human.size(freed)}, would go; nothing is deleted yet. `web4lora gc --delete` deletes."
        )


def unneeded(stored: Iterable[Manifest], roots: Iterable[ArtifactRef]) -> list[Manifest]:
    """Return the artifacts that no root needs, itself or as what it was made from; the young ones stay.

    Args:
        stored: Everything in the store.
        roots: What must stay.
    """
    by_digest = {manifest.digest: manifest for manifest in stored}
    needed: set[str] = set()
    waiting = [ref.digest for ref in roots]
    while waiting:
        digest = waiting.pop()
        if digest in needed:
            continue
        needed.add(digest)
        if manifest := by_digest.get(digest):
            waiting += [ref.digest for ref in manifest.inputs]
    limit = time.time() - _YOUNG_SECONDS
    return [
        manifest
        for digest, manifest in by_digest.items()
        if digest not in needed and manifest.created_at < limit
    ]


def _roots(client: Client, keep_runs: int) -> Iterator[ArtifactRef]:
    runs = client.list_runs()
    for run in islice(runs, keep_runs):
        yield from refs_in(run)
    for run in runs:
        if not ended(run):
            yield from refs_in(run)
    for deployment in client.deployments():
        yield from refs_in(deployment)
