"""The catalogue of the artifact store, for clients."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import grpc
from web4.lora.v1 import artifacts_pb2, artifacts_pb2_grpc
from web4lora_chassis.artifacts import KINDS, ArtifactStore, Manifest
from web4lora_chassis.artifacts.index import Indexed, ManifestIndex
from web4lora_chassis.artifacts.issue import IssuedKey, issue
from web4lora_chassis.errors import InvalidInput, NotFound
from web4lora_chassis.rpc import manifest_message, ref_message
from web4lora_chassis.rpc.bounds import fitting
from web4lora_chassis.rpc.jobs import page_size, timestamp
from web4lora_chassis.settings import Settings

from web4lora_gateway.collection import Collected, Collector
from web4lora_gateway.pools import STORE

_NAME = re.compile(
    rf"(?:(?P<kind>{'|'.join(KINDS)})/(?P<name>[a-z0-9][a-z0-9._-]{{0,79}})@)?(?P<digest>[0-9a-f]{{8,64}})"
)

_LISTINGS = 16
"""Listings that are remembered for those who asked while they were made."""

Context = grpc.aio.ServicerContext[Any, Any]


class ArtifactService(artifacts_pb2_grpc.ArtifactServiceServicer):
    """Answers calls about artifacts from the store.

    Args:
        store: The store.
        settings: Its address and the gateway's key to it.
        index: Its manifests.
        collector: Finds what nothing needs.
    """

    def __init__(
        self, store: ArtifactStore, settings: Settings, index: ManifestIndex, collector: Collector
    ) -> None:
        self._store = store
        self._settings = settings
        self._collector = collector
        self._index = index
        self._lock = asyncio.Lock()
        self._turn = 0
        self._listed: dict[tuple[str, str], tuple[int, list[Indexed]]] = {}

    async def ListArtifacts(
        self, request: artifacts_pb2.ListArtifactsRequest, _: Context
    ) -> artifacts_pb2.ListArtifactsResponse:
        """See the contract."""
        after = _place(request.page_token)
        size = page_size(request)
        rows = await self._rows(_kind(request.kind), request.name)
        if after is not None:
            rows = [row for row in rows if row.place < after]
        shown = await STORE.run(self._index.manifests, rows[:size])
        messages = [manifest_message(manifest) for manifest in shown]
        places = {row.ref.digest: row.place for row in rows[:size]}
        token = _token(rows[size - 1].place) if size < len(rows) else ""
        messages, token = fitting(messages, token, lambda artifact: _token(places[artifact.ref.digest]))
        return artifacts_pb2.ListArtifactsResponse(artifacts=messages, next_page_token=token)

    async def _rows(self, kind: str, name: str) -> list[Indexed]:
        """Return a listing that was begun after this call: many calls at once share it."""
        self._turn += 1
        asked = self._turn
        async with self._lock:
            begun, rows = self._listed.get((kind, name), (0, []))
            if begun <= asked:
                self._turn += 1
                begun = self._turn
                rows = await STORE.run(self._index.newest, kind, name)
                if len(self._listed) >= _LISTINGS:
                    self._listed.clear()
                self._listed[kind, name] = (begun, rows)
        return rows

    async def GetArtifact(
        self, request: artifacts_pb2.GetArtifactRequest, _: Context
    ) -> artifacts_pb2.GetArtifactResponse:
        """See the contract."""
        manifest = await STORE.run(self._one, request.name)
        return artifacts_pb2.GetArtifactResponse(artifact=manifest_message(manifest))

    async def IssueReadCredentials(
        self, _request: artifacts_pb2.IssueReadCredentialsRequest, _: Context
    ) -> artifacts_pb2.IssueReadCredentialsResponse:
        """See the contract."""
        made = await STORE.run(issue, self._settings, write=False)
        return artifacts_pb2.IssueReadCredentialsResponse(credentials=_credentials_message(made))

    async def IssueWriteCredentials(
        self, _request: artifacts_pb2.IssueWriteCredentialsRequest, _: Context
    ) -> artifacts_pb2.IssueWriteCredentialsResponse:
        """See the contract."""
        made = await STORE.run(issue, self._settings, write=True)
        return artifacts_pb2.IssueWriteCredentialsResponse(credentials=_credentials_message(made))

    async def CollectGarbage(
        self, request: artifacts_pb2.CollectGarbageRequest, _: Context
    ) -> AsyncIterator[artifacts_pb2.CollectGarbageResponse]:
        """See the contract."""
        keep_runs = request.keep_runs if request.HasField("keep_runs") else None
        if keep_runs is not None and keep_runs < 0:
            raise InvalidInput("keep_runs can't be negative.", metadata={"field": "keep_runs"})
        async for found in self._collector.collect(dry_run=request.dry_run, keep_runs=keep_runs):
            if isinstance(found, Collected):
                artifact = artifacts_pb2.CollectedArtifact(
                    ref=ref_message(found.ref), kept_for=found.kept_for
                )
                yield artifacts_pb2.CollectGarbageResponse(artifact=artifact)
            else:
                upload = artifacts_pb2.CutOffUpload(place=found.prefix, size_bytes=found.size_bytes)
                yield artifacts_pb2.CollectGarbageResponse(upload=upload)

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


def _credentials_message(key: IssuedKey) -> artifacts_pb2.StoreCredentials:
    return artifacts_pb2.StoreCredentials(
        access_key=key.access_key,
        secret_key=key.secret_key,
        session_token=key.session_token,
        expire_time=timestamp(key.expires_at),
    )


def _kind(kind: artifacts_pb2.ArtifactKind.ValueType) -> str:
    """Return a kind as the store writes it; empty when unspecified.

    Raises:
        InvalidInput: There is no such kind.
    """
    if kind not in artifacts_pb2.ArtifactKind.values():
        raise InvalidInput(f"{kind} is not an artifact kind.", metadata={"field": "kind"})
    return artifacts_pb2.ArtifactKind.Name(kind).removeprefix("ARTIFACT_KIND_").lower() if kind else ""


def _token(place: tuple[float, str]) -> str:
    """Return the token of the page behind an artifact: its place, which stays when the artifact goes."""
    return f"{place[0]!r}@{place[1]}"


def _place(token: str) -> tuple[float, str] | None:
    """Return the place that a token stands for; None for the first page.

    Raises:
        InvalidInput: It is no token of ours.
    """
    if not token:
        return None
    try:
        created_at, digest = token.split("@")
        return float(created_at), digest
    except ValueError as error:
        raise InvalidInput(
            "page_token names no page of this listing.", metadata={"field": "page_token"}
        ) from error
