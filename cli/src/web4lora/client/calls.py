"""Calls to the gateway: time limits and errors, listings page by page, streams that outlive a restart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import grpc
from web4.lora.v1 import (
    access_pb2_grpc,
    artifacts_pb2_grpc,
    deployments_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
    jobs_pb2_grpc,
)
from web4lora_chassis.errors import Unavailable, Web4Error
from web4lora_chassis.rpc import channel, error_of
from web4lora_chassis.settings import Settings

from web4lora.home import load_settings

_CALL_SECONDS = 30.0
_AWAY_SECONDS = 60.0
_AGAIN_SECONDS = 1.0
_PAGE = 100


class Page(Protocol):
    """One page of a listing."""

    @property
    def next_page_token(self) -> str:
        """What the next page is asked by; empty on the last one."""


class Snapshot(Protocol):
    """How a run or a job is at one moment."""

    @property
    def id(self) -> str:
        """Whose snapshot it is."""

    @property
    def revision(self) -> int:
        """Grows with every change."""


R = TypeVar("R")
P = TypeVar("P", bound=Page)
S = TypeVar("S", bound=Snapshot)


class Calls:
    """A connection to a gateway, which the client's parts share.

    Args:
        settings: Which gateway and which store; read from the environment when absent.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or load_settings()
        self._channel = channel(self._settings.gateway_address, self._settings)
        self._gateway = gateway_pb2_grpc.GatewayServiceStub(self._channel)
        self._jobs = jobs_pb2_grpc.JobServiceStub(self._channel)
        self._deployments = deployments_pb2_grpc.DeploymentServiceStub(self._channel)
        self._artifacts = artifacts_pb2_grpc.ArtifactServiceStub(self._channel)
        self._access = access_pb2_grpc.AccessServiceStub(self._channel)

    def __enter__(self) -> Self:
        """Return the client; leaving the block closes its connection."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection to the gateway."""
        self._channel.close()

    def info(self) -> gateway_pb2.GetGatewayInfoResponse:
        """Return the gateway's version, store, services and runtimes."""
        return self._call(self._gateway.GetGatewayInfo, gateway_pb2.GetGatewayInfoRequest())

    def _call(self, method: Callable[..., R], request: Any, seconds: float = _CALL_SECONDS) -> R:
        try:
            return method(request, timeout=seconds)
        except grpc.RpcError as call:
            raise self._error(call) from call

    def _pages(self, method: Callable[..., P], request: Any) -> Iterator[P]:
        """Yield a listing's pages; each is fetched when it is needed."""
        request.page_size = _PAGE
        while True:
            page = self._call(method, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def _follow(
        self,
        method: Callable[..., Any],
        request: Any,
        snapshot_of: Callable[[Any], S],
        ended: Callable[[S], bool],
        command: str = "",
    ) -> Iterator[S]:
        """Yield snapshots, the current one first, until one is the last; wait for a gateway that is away.

        Args:
            method: The call that streams them.
            request: Its request, with the id of what is followed.
            snapshot_of: Takes the snapshot out of an answer.
            ended: True for the last one.
            command: The command that follows it too, to which its id is added; told when the gateway stays
                away.

        Raises:
            NotFound: There is nothing of that id.
            Unavailable: The gateway was never there, or stayed away.
        """
        seen = -1
        away_since = 0.0
        while True:
            stream = method(request)
            try:
                for answer in stream:
                    snapshot = snapshot_of(answer)
                    away_since = 0.0
                    request.id = snapshot.id  # "latest" must not change while it is followed
                    if snapshot.revision > seen:
                        seen = snapshot.revision
                        yield snapshot
                    if ended(snapshot):
                        return
            except grpc.RpcError as call:
                error = self._error(call)
                away_since = away_since or time.monotonic()
                if seen < 0 or not isinstance(error, Unavailable):
                    raise error from call
                if time.monotonic() - away_since > _AWAY_SECONDS:
                    again = f", then `{command} {request.id}`" if command else ""
                    raise Unavailable(
                        f"{error.message} It has been away for {_AWAY_SECONDS:.0f} s.",
                        fix=f"{request.id} goes on when it is back: `web4lora up`{again}.",
                        reason=error.reason,
                    ) from call
            finally:
                stream.cancel()
            time.sleep(_AGAIN_SECONDS)

    def _error(self, call: grpc.RpcError) -> Web4Error:
        address = self._settings.gateway_address
        error = error_of(call, f"The gateway at {address}")
        if isinstance(error, Unavailable) and error.reason == Unavailable.default_reason:
            return Unavailable(
                f"The gateway at {address} is out of reach.",
                fix="`web4lora up` starts it here; `web4lora status` tells more.",
                reason="GATEWAY_AWAY",
            )
        return error
