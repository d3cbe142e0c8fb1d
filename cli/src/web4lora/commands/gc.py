"""`web4lora gc`: frees the store of artifacts that nothing needs, and of uploads that were cut off."""

from __future__ import annotations

from typing import Annotated

import typer
from web4.lora.v1 import artifacts_pb2
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.rpc import ref_of

from web4lora.client import Client
from web4lora.commands.options import Json, examples
from web4lora.views import human
from web4lora.views.console import NOTE, OK, line, mark, print_json

_REASONS_SHOWN = 3


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "gc", epilog=examples("web4lora gc", "web4lora gc --kept", "web4lora gc --keep-runs 3 --delete")
    )(gc)


def gc(
    keep_runs: Annotated[
        int, typer.Option(min=0, help="Of the runs that have ended, only the newest N count.")
    ] = 10,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete it; without, only say what would be.")
    ] = False,
    kept: Annotated[
        bool, typer.Option("--kept", help="Also say what each of the other artifacts is kept for.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Free the store of artifacts that nothing needs, and of uploads that were cut off.

    Kept: what the newest runs, those of `runs keep`, every run that has not ended, everything deployed and
    every evaluation on record used and made, what that was made from, and what is younger than
    WEB4LORA_KEEP_NEW_HOURS (24). A later run makes again what it needs and no longer finds.
    """
    gone: list[ArtifactRef] = []
    stay: list[tuple[ArtifactRef, list[str]]] = []
    uploads: list[artifacts_pb2.CutOffUpload] = []
    with Client() as client:
        for found in client.collect_garbage(delete=delete, keep_runs=keep_runs):
            if found.HasField("upload"):
                uploads.append(found.upload)
                text = (
                    f"{found.upload.place}  {human.size(found.upload.size_bytes)}, an upload that was cut off"
                )
            else:
                ref, reasons = ref_of(found.artifact.ref), list(found.artifact.kept_for)
                if reasons:
                    stay.append((ref, reasons))
                    continue
                gone.append(ref)
                text = f"{ref}  {human.size(ref.size_bytes)}"
            if not as_json:
                mark(OK if delete else NOTE, text)
    freed = sum(ref.size_bytes for ref in gone) + sum(upload.size_bytes for upload in uploads)
    if as_json:
        print_json(
            {
                "deleted": delete,
                "size_bytes": freed,
                "artifacts": [ref.to_json() for ref in gone],
                "uploads": [{"place": each.place, "size_bytes": each.size_bytes} for each in uploads],
                "kept": [{**ref.to_json(), "kept_for": reasons} for ref, reasons in stay],
            }
        )
        return
    if kept:
        _show_kept(stay)
    _conclude(len(gone), len(uploads), freed, len(stay), delete=delete)


def _show_kept(stay: list[tuple[ArtifactRef, list[str]]]) -> None:
    for ref, reasons in stay:
        more = f", and {len(reasons) - _REASONS_SHOWN} more" if len(reasons) > _REASONS_SHOWN else ""
        line(f"    {ref}  {human.size(ref.size_bytes)}, kept for {'; '.join(reasons[:_REASONS_SHOWN])}{more}")


def _conclude(gone: int, uploads: int, freed: int, stay: int, *, delete: bool) -> None:
    if not gone and not uploads:
        line(
            f"Nothing to free: all {human.count(stay, 'artifact')} are needed. "
            "`web4lora gc --kept` says what for."
        )
    elif delete:
        line(f"{human.size(freed)} freed.")
    else:
        parts = [human.count(gone, "artifact")] if gone else []
        parts += [human.count(uploads, "cut-off upload")] if uploads else []
        line(
            f"{' and '.join(parts)}, {human.size(freed)}, would go; nothing is deleted yet. "
            "`web4lora gc --delete` deletes, `web4lora gc --kept` says what the rest is kept for."
        )
