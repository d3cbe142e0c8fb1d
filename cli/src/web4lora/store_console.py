"""Addresses of folders in the object store's web console."""

from __future__ import annotations

from urllib.parse import quote, urlsplit

from web4.lora.v1 import gateway_pb2
from web4lora_chassis.rpc.artifact_messages import refs_in
from web4lora_chassis.settings import Settings


def run_folders(run: gateway_pb2.Run, settings: Settings) -> list[tuple[str, str]]:
    """Return what a run used and made, each with the address of its folder; none without a console.

    The first is the run's own folder, with the small files that people look for.
    """
    bucket = urlsplit(settings.store).path.strip("/")
    if not settings.console or not bucket:
        return []
    base = f"{settings.console.rstrip('/')}/browser/{quote(bucket)}"
    prefixes = {f"runs/{run.id}": "run"} | {ref.prefix: ref.kind for ref in refs_in(run)}
    return [(kind, f"{base}/{quote(prefix)}/") for prefix, kind in prefixes.items()]
