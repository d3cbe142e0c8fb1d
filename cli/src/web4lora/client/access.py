"""Access: who may call the gateway, and what was called."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp
from web4.lora.v1 import access_pb2, scopes_pb2
from web4lora_chassis.errors import InvalidInput

from web4lora.client.calls import Calls

SCOPES = tuple(name.removeprefix("SCOPE_").lower() for name in scopes_pb2.Scope.keys()[1:])
"""What a principal may do, the least first: each allows what those before it do."""


class Access(Calls):
    """The client's methods for principals and the audit log; each needs the scope admin."""

    def add_principal(
        self, name: str, scope: str = "run", expires: datetime | None = None
    ) -> tuple[access_pb2.Principal, str]:
        """Add a principal; return it and its token, which is never told again.

        Args:
            name: Of a-z, 0-9 and single signs of "-._@", a letter first.
            scope: read, run or admin.
            expires: From when on the token is refused, with its time zone; absent: never.

        Raises:
            InvalidInput: The name, the scope or the time is wrong.
            AlreadyExists: The name is or was another's.
        """
        request = access_pb2.CreatePrincipalRequest(
            name=name, scope=_scope(scope), expire_time=_timestamp(expires)
        )
        answer = self._call(self._access.CreatePrincipal, request)
        return answer.principal, answer.token

    def principals(self) -> Iterator[access_pb2.Principal]:
        """Yield all principals by name, those revoked and expired too."""
        for page in self._pages(self._access.ListPrincipals, access_pb2.ListPrincipalsRequest()):
            yield from page.principals

    def rotate_principal(
        self, name: str, expires: datetime | None = None
    ) -> tuple[access_pb2.Principal, str]:
        """Give a principal another token; the one before is refused from then on.

        Raises:
            NotFound: There is none of that name.
            FailedPrecondition: It was revoked.
            InvalidInput: The time is past.
        """
        request = access_pb2.RotatePrincipalRequest(name=name, expire_time=_timestamp(expires))
        answer = self._call(self._access.RotatePrincipal, request)
        return answer.principal, answer.token

    def revoke_principal(self, name: str) -> access_pb2.Principal:
        """Refuse a principal's token from now on, for good.

        Raises:
            NotFound: There is none of that name.
        """
        request = access_pb2.RevokePrincipalRequest(name=name)
        return self._call(self._access.RevokePrincipal, request).principal

    def audit_entries(
        self, principal: str = "", call: str = "", *, failed_only: bool = False
    ) -> Iterator[access_pb2.AuditEntry]:
        """Yield the gateway's audit log, newest first.

        Args:
            principal: Only calls of this one.
            call: Only calls whose full name ends so: "CreateRun".
            failed_only: Only calls that failed or were refused.
        """
        request = access_pb2.ListAuditEntriesRequest(principal=principal, call=call, failed_only=failed_only)
        for page in self._pages(self._access.ListAuditEntries, request):
            yield from page.entries

    def verify_audit_log(self) -> access_pb2.VerifyAuditLogResponse:
        """Let the gateway read its whole audit log and say what was changed or removed."""
        return self._call(self._access.VerifyAuditLog, access_pb2.VerifyAuditLogRequest())


def _scope(name: str) -> scopes_pb2.Scope.ValueType:
    if name not in SCOPES:
        raise InvalidInput(f"{name!r} is not a scope.", fix=f"The scopes are {', '.join(SCOPES)}.")
    return scopes_pb2.Scope.Value(f"SCOPE_{name.upper()}")


def _timestamp(moment: datetime | None) -> Timestamp | None:
    if moment is None:
        return None
    made = Timestamp()
    made.FromDatetime(moment)
    return made
