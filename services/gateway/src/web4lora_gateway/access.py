"""The principals and the audit log, for those who may administer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
from web4.lora.v1 import access_pb2, access_pb2_grpc, scopes_pb2
from web4lora_chassis.audit import AuditEntry, AuditLog
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.principals import Principal, Principals, Scope
from web4lora_chassis.rpc.jobs import page, page_size, timestamp

_LAST_SECOND = 253_402_300_800  # of the year 9999

Context = grpc.aio.ServicerContext[Any, Any]


class AccessService(access_pb2_grpc.AccessServiceServicer):
    """Answers calls about principals and the gateway's audit log.

    Args:
        principals: The principals.
        home: The stack's home, where both are kept.
    """

    def __init__(self, principals: Principals, home: Path) -> None:
        self._principals = principals
        self._audit = AuditLog(home / "audit", "gateway")

    async def CreatePrincipal(
        self, request: access_pb2.CreatePrincipalRequest, _: Context
    ) -> access_pb2.CreatePrincipalResponse:
        """See the contract."""
        if int(request.scope) not in set(Scope):
            raise InvalidInput("A principal needs a scope: read, run or admin.", metadata={"field": "scope"})
        principal, token = await asyncio.to_thread(
            self._principals.add, request.name, Scope(request.scope), _seconds(request, "expire_time")
        )
        return access_pb2.CreatePrincipalResponse(principal=_principal_message(principal), token=token)

    async def ListPrincipals(
        self, request: access_pb2.ListPrincipalsRequest, _: Context
    ) -> access_pb2.ListPrincipalsResponse:
        """See the contract."""
        rows, token = page(self._principals.all(), request, lambda principal: principal.name)
        return access_pb2.ListPrincipalsResponse(
            principals=map(_principal_message, rows), next_page_token=token
        )

    async def RotatePrincipal(
        self, request: access_pb2.RotatePrincipalRequest, _: Context
    ) -> access_pb2.RotatePrincipalResponse:
        """See the contract."""
        principal, token = await asyncio.to_thread(
            self._principals.rotate, request.name, _seconds(request, "expire_time")
        )
        return access_pb2.RotatePrincipalResponse(principal=_principal_message(principal), token=token)

    async def RevokePrincipal(
        self, request: access_pb2.RevokePrincipalRequest, _: Context
    ) -> access_pb2.RevokePrincipalResponse:
        """See the contract."""
        principal = await asyncio.to_thread(self._principals.revoke, request.name)
        return access_pb2.RevokePrincipalResponse(principal=_principal_message(principal))

    async def ListAuditEntries(
        self, request: access_pb2.ListAuditEntriesRequest, _: Context
    ) -> access_pb2.ListAuditEntriesResponse:
        """See the contract."""
        size = page_size(request)
        wanted = _filter(request)
        found = await asyncio.to_thread(lambda: list(islice(filter(wanted, self._audit.entries()), size + 1)))
        rows = found[:size]
        return access_pb2.ListAuditEntriesResponse(
            entries=map(_entry_message, rows),
            next_page_token=str(rows[-1].number) if len(found) > size else "",
        )

    async def VerifyAuditLog(
        self, _request: access_pb2.VerifyAuditLogRequest, _: Context
    ) -> access_pb2.VerifyAuditLogResponse:
        """See the contract."""
        found = await asyncio.to_thread(self._audit.verify)
        return access_pb2.VerifyAuditLogResponse(
            entries=found.entries, first_number=found.first_number, problems=found.problems
        )


def _filter(request: access_pb2.ListAuditEntriesRequest) -> Callable[[AuditEntry], bool]:
    """Return what says whether an entry is asked for.

    Raises:
        InvalidInput: The page token is none.
    """
    token = request.page_token
    if token and not (token.isascii() and token.isdigit() and len(token) < 20):
        raise InvalidInput("page_token names no page of this listing.", metadata={"field": "page_token"})
    before = int(token) if token else 0

    def wanted(entry: AuditEntry) -> bool:
        return (
            (not before or entry.number < before)
            and (not request.principal or request.principal in (entry.principal, entry.on_behalf_of))
            and entry.call.endswith(request.call)
            and not (request.failed_only and entry.result == "OK")
        )

    return wanted


def _seconds(request: Any, field: str) -> float:
    """Return a time in seconds since 1970; 0 when it is absent.

    Raises:
        InvalidInput: It is out of bounds.
    """
    if not request.HasField(field):
        return 0.0
    seconds = int(getattr(request, field).seconds)
    if not 0 < seconds < _LAST_SECOND:
        raise InvalidInput(f"{field} is out of bounds.", metadata={"field": field})
    return float(seconds)


def _principal_message(principal: Principal) -> access_pb2.Principal:
    return access_pb2.Principal(
        name=principal.name,
        scope=scopes_pb2.Scope.Name(principal.scope),  # type: ignore[arg-type]
        create_time=timestamp(principal.created_at),
        expire_time=timestamp(principal.expires_at),
        revoke_time=timestamp(principal.revoked_at),
    )


def _entry_message(entry: AuditEntry) -> access_pb2.AuditEntry:
    return access_pb2.AuditEntry(
        number=entry.number,
        time=timestamp(entry.time),
        principal=entry.principal,
        on_behalf_of=entry.on_behalf_of,
        call=entry.call,
        resource=entry.resource,
        result=entry.result,
        peer=entry.peer,
        request_id=entry.request_id,
        skipped=entry.skipped,
    )
