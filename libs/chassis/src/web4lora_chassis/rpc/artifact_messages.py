"""Artifacts as messages of the contract, and back."""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.message import Message
from web4.lora.v1 import artifacts_pb2

from web4lora_chassis.artifacts import ArtifactRef, Manifest

_PREFIX = "ARTIFACT_KIND_"


def ref_message(ref: ArtifactRef) -> artifacts_pb2.ArtifactRef:
    """Return a reference as a message."""
    return artifacts_pb2.ArtifactRef(
        kind=artifacts_pb2.ArtifactKind.Value(_PREFIX + ref.kind.upper()),
        name=ref.name,
        digest=ref.digest,
        size_bytes=ref.size_bytes,
    )


def ref_of(message: artifacts_pb2.ArtifactRef) -> ArtifactRef:
    """Return the reference that a message holds.

    Raises:
        InvalidInput: It has no valid kind, name or digest.
    """
    known = artifacts_pb2.ArtifactKind.DESCRIPTOR.values_by_number.get(message.kind)
    kind = known.name.removeprefix(_PREFIX).lower() if known else str(message.kind)
    return ArtifactRef(kind, message.name, message.digest, message.size_bytes)


def manifest_message(manifest: Manifest) -> artifacts_pb2.Artifact:
    """Return a manifest as a message."""
    message = artifacts_pb2.Artifact(
        ref=ref_message(manifest.ref),
        files=[
            artifacts_pb2.ArtifactFile(path=entry.path, sha256=entry.sha256, size_bytes=entry.size_bytes)
            for entry in manifest.files
        ],
        inputs=[ref_message(ref) for ref in manifest.inputs],
        parameters=manifest.parameters,
        tools=manifest.tools,
        created_by=manifest.created_by,
    )
    message.create_time.FromMilliseconds(int(manifest.created_at * 1000))
    return message


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
