"""Addresses of folders in the object store's web console."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote, urlsplit

from google.protobuf.message import Message
from web4.lora.v1 import artifacts_pb2, gateway_pb2
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.rpc import ref_of
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


def refs_in(message: Message) -> Iterator[ArtifactRef]:
    """Yield every artifact that a message names, at any depth."""
    if isinstance(message, artifacts_pb2.ArtifactRef):
        if message.digest:
            yield ref_of(message)
        return
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for each in value if field.is_repeated else (value,):
            yield from refs_in(each)
