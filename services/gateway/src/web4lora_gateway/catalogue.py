"""The catalogue of the artifact store, for clients."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import grpc
from web4.lora.v1 import artifacts_pb2, artifacts_pb2_grpc
from web4lora_chassis.artifacts import KINDS, ArtifactStore, Manifest
from web4lora_chassis.errors import InvalidInput, NotFound
from web4lora_chassis.rpc import manifest_message
from web4lora_chassis.rpc.jobs import page

_NAME = re.compile(
    rf"(?:(?P<kind>{'|'.join(KINDS)})/(?P<name>[a-z0-9][a-z0-9._-]{{0,79}})@)?(?P<digest>[0-9a-f]{{8,64}})"
)

Context = grpc.aio.ServicerContext[Any, Any]


class ArtifactService(artifacts_pb2_grpc.ArtifactServiceServicer):
    """Answers calls about artifacts from the store."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    async def ListArtifacts(
        self, request: artifacts_pb2.ListArtifactsRequest, _: Context
    ) -> artifacts_pb2.ListArtifactsResponse:
        """See the contract."""
        kind = artifacts_pb2.ArtifactKind.Name(request.kind).removeprefix("ARTIFACT_KIND_").lower()
        found = await asyncio.to_thread(self._store.find, kind if request.kind else "", request.name)
        rows, token = page(found, request, lambda manifest: manifest.digest)
        return artifacts_pb2.ListArtifactsResponse(
            artifacts=[manifest_message(manifest) for manifest in rows], next_page_token=token
        )

    async def GetArtifact(
        self, request: artifacts_pb2.GetArtifactRequest, _: Context
    ) -> artifacts_pb2.GetArtifactResponse:
        """See the contract."""
        manifest = await asyncio.to_thread(self._one, request.name)
        return artifacts_pb2.GetArtifactResponse(artifact=manifest_message(manifest))

    def _one(self, name: str) -> Manifest:
        match = _NAME.fullmatch(name)
        if not match:
            raise InvalidInput(
                f"{name!r} does not name an artifact.",
                fix="Use kind/name@digest or a digest of 8 to 64 digits.",
                metadata={"field": "name"},
            )
        found = self._store.find(match["kind"] or "", match["name"] or "", match["digest"])
        if not found:
            raise NotFound(f"{name} is not in the store {self._store.url}.", metadata={"artifact": name})
        if len(found) > 1:
            raise InvalidInput(
                f"{name} fits {len(found)} artifacts: {', '.join(str(each.ref) for each in found[:5])}.",
                fix="Give more digits.",
                metadata={"field": "name"},
            )
        return found[0]
