"""Artifacts: list them, look one up, bring its files here; and the store they lie in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import grpc
from web4.lora.v1 import artifacts_pb2
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore, Manifest, open_store
from web4lora_chassis.errors import InvalidInput, NotFound
from web4lora_chassis.rpc import ref_of
from web4lora_chassis.settings import Settings, load

from web4lora.client.calls import Calls

if TYPE_CHECKING:
    from minio.credentials.providers import Provider

_KIND_PREFIX = "ARTIFACT_KIND_"


class Artifacts(Calls):
    """The client's methods for artifacts."""

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        self._stores: dict[bool, ArtifactStore] = {}

    def artifacts(self, kind: str = "", name: str = "") -> Iterator[artifacts_pb2.Artifact]:
        """Yield the artifacts of a kind and a name, newest first; empty means any.

        Raises:
            InvalidInput: There is no such kind.
        """
        request = artifacts_pb2.ListArtifactsRequest(kind=_kind_value(kind), name=name)
        for page in self._pages(self._artifacts.ListArtifacts, request):
            yield from page.artifacts

    def artifact(self, name: str) -> artifacts_pb2.Artifact:
        """Return an artifact's manifest.

        Args:
            name: `kind/name@digest`, the digest in full or its first 8 or more digits, or just those; or
                `kind/name` for the newest.

        Raises:
            NotFound: No such artifact.
            InvalidInput: The name has another form, or a short digest fits more than one.
        """
        if "@" not in name and "/" in name:
            kind, _, plain = name.partition("/")
            for artifact in self.artifacts(kind, plain):
                return artifact
            raise NotFound(f"There is no artifact {name}.", fix="`web4lora artifacts list` shows them.")
        return self._call(self._artifacts.GetArtifact, artifacts_pb2.GetArtifactRequest(name=name)).artifact

    def get_artifact(self, artifact: str | artifacts_pb2.ArtifactRef | ArtifactRef, target: Path) -> Manifest:
        """Bring an artifact's files below a folder, each verified before it is seen there.

        Args:
            artifact: Its name as for `artifact`, or its reference.
            target: The folder, made when missing. Files in it may be links into the store and are read-only.

        Raises:
            NotFound: No such artifact.
            DataLoss: Bytes are not what their digest says.
            Unavailable: The gateway or the store is out of reach.
        """
        if isinstance(artifact, str):
            artifact = self.artifact(artifact).ref
        ref = ref_of(artifact) if isinstance(artifact, artifacts_pb2.ArtifactRef) else artifact
        return self.store.get(ref, target)

    def collect_garbage(
        self, *, delete: bool = False, keep_runs: int | None = None
    ) -> Iterator[artifacts_pb2.CollectGarbageResponse]:
        """Yield every artifact with what it is kept for, and what uploads left that were cut off.

        Args:
            delete: Delete those that are kept for nothing, and the uploads; else nothing is.
            keep_runs: Of the runs that have ended and are not kept, only the newest this many count.
                None: all.

        Raises:
            Unavailable: The gateway, the deployer or the store is out of reach.
        """
        request = artifacts_pb2.CollectGarbageRequest(dry_run=not delete, keep_runs=keep_runs)
        try:
            yield from self._artifacts.CollectGarbage(request)
        except grpc.RpcError as call:
            raise self._error(call) from call

    @property
    def store(self) -> ArtifactStore:
        """The artifact store: the one the settings name; else, on one machine, the gateway's own.

        An S3 store of which the settings name no key is opened with one that the gateway issues: it reads.

        Raises:
            Unavailable: The gateway is out of reach.
        """
        return self._opened(write=False)

    @property
    def store_to_write(self) -> ArtifactStore:
        """The same, to add artifacts; a key that the gateway issues needs the scope run.

        Raises:
            Unavailable: The gateway is out of reach.
        """
        return self._opened(write=True)

    def _opened(self, *, write: bool) -> ArtifactStore:
        if write not in self._stores:
            settings = self._settings
            theirs = self.info().store
            here = settings.gateway_address.startswith(("127.", "localhost:", "[::1]:"))
            if here and "store" not in settings.model_fields_set and urlsplit(theirs).scheme == "file":
                settings = load(
                    type(settings), **{**settings.model_dump(exclude_unset=True), "store": theirs}
                )
            needs_key = settings.store.startswith("s3") and not settings.s3_access_key.get_secret_value()
            self._stores[write] = open_store(settings, self._issued_key(write=write) if needs_key else None)
        return self._stores[write]

    def _issued_key(self, *, write: bool) -> Provider:
        """Return what asks the gateway for a key to the store, and again once that has ended."""
        from minio.credentials.credentials import Credentials  # here, because it takes a while to import
        from minio.credentials.providers import Provider

        def ask() -> Credentials:
            if write:
                request = artifacts_pb2.IssueWriteCredentialsRequest()
                key = self._call(self._artifacts.IssueWriteCredentials, request).credentials
            else:
                asked = artifacts_pb2.IssueReadCredentialsRequest()
                key = self._call(self._artifacts.IssueReadCredentials, asked).credentials
            until = key.expire_time.ToDatetime(tzinfo=UTC)
            return Credentials(key.access_key, key.secret_key, key.session_token, until)

        class Issued(Provider):
            def __init__(self) -> None:
                self._held: Credentials | None = None
                self._lock = threading.Lock()

            def retrieve(self) -> Credentials:
                with self._lock:  # parts of a file are sent by several threads
                    if self._held is None or self._held.is_expired():
                        self._held = ask()
                    return self._held

        return Issued()


def _kind_value(name: str) -> artifacts_pb2.ArtifactKind.ValueType:
    kinds = [kind.removeprefix(_KIND_PREFIX).lower() for kind in artifacts_pb2.ArtifactKind.keys()[1:]]
    if name and name not in kinds:
        raise InvalidInput(f"{name!r} is not an artifact kind.", fix=f"The kinds are {', '.join(kinds)}.")
    return artifacts_pb2.ArtifactKind.Value(f"{_KIND_PREFIX}{name.upper() or 'UNSPECIFIED'}")
