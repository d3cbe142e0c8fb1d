"""Who may make which call of a service: looked at before a call's message is read, and written down."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.message import Message
from web4.lora.v1 import scopes_pb2

from web4lora_chassis.audit import AuditLog
from web4lora_chassis.errors import Internal, PermissionDenied, Unauthenticated, Web4Error
from web4lora_chassis.principals import ADMIN, GATEWAY, LOCAL, Principal, Principals, Scope
from web4lora_chassis.rpc.handlers import Behavior, Context, wrapped
from web4lora_chassis.rpc.limits import Bucket, Limits
from web4lora_chassis.settings import WORKERS, Settings

log = logging.getLogger(__name__)

ON_BEHALF_OF = "web4lora-on-behalf-of"
"""Header by which the gateway tells a worker whose call it passes on."""

_HEALTH = "/grpc.health.v1.Health/Check"
_OTHERS = {
    _HEALTH: Scope.READ,  # open to all; see `Guard._open`
    "/grpc.health.v1.Health/List": Scope.READ,
    "/grpc.health.v1.Health/Watch": Scope.READ,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Scope.READ,
}
"""Calls that are none of the contract's."""

_MAX_OPEN_CALLS = 32
_REFUSALS_PER_SECOND = 1.0
_REFUSALS_AT_ONCE = 100
"""Refused calls of nobody we know that are written down: anyone can make them."""
_TEXT_LENGTH = 200


@dataclass(frozen=True)
class Caller:
    """Who makes a call.

    Attributes:
        principal: Who showed a token.
        on_behalf_of: For whom the gateway passes it on; empty for itself.
    """

    principal: Principal
    on_behalf_of: str = ""

    @property
    def name(self) -> str:
        """Whose call it is in the end."""
        return self.on_behalf_of or self.principal.name


_CALLER: ContextVar[Caller] = ContextVar("caller")


def caller() -> Caller:
    """Return who makes the call that is being answered.

    Raises:
        Internal: No call is.
    """
    try:
        return _CALLER.get()
    except LookupError:
        raise Internal("There is no call, and so no caller.") from None


def require_owner(owner: str, what: str) -> None:
    """Refuse the caller what is another's, unless it may administer.

    Args:
        owner: Whose it is; empty: nobody's.
        what: What it is, for the error: "run_2026-11-22_1".

    Raises:
        PermissionDenied: It is another's.
    """
    who = caller()
    if who.principal.scope < Scope.ADMIN and who.name != owner:
        raise PermissionDenied(
            f"{what} is {f'{owner}’s' if owner else 'nobody’s'}, and {who.name} may end only its own.",
            fix="Ask its owner, or a principal of scope admin.",
            reason="NOT_OWNER",
        )


def scopes(services: Iterable[str]) -> Mapping[str, Scope]:
    """Return what each call of the contract's services needs, by its full name, "/service/method".

    A call without an entry is refused to everybody.

    Args:
        services: Full names of services; one that is not in the contract adds nothing.
    """
    found = dict(_OTHERS)
    for name in services:
        try:
            service = descriptor_pool.Default().FindServiceByName(name)
        except KeyError:
            continue
        for method in service.methods:
            number = method.GetOptions().Extensions[scopes_pb2.scope]
            if number:
                found[f"/{name}/{method.name}"] = Scope(number)
    return found


class Guard(grpc.aio.ServerInterceptor):
    """Refuses what a caller may not do, bounds what it may, and writes down what it changed.

    Args:
        service: trainer, packager, deployer or gateway.
        services: Full names of what it serves.
        settings: Tokens, home and limits.
    """

    def __init__(self, service: str, services: Iterable[str], settings: Settings) -> None:
        self._is_worker = service in WORKERS
        self._scopes = scopes(services)
        self._principals = Principals(settings.home)
        self._tokens = {ADMIN: settings.shared_token.encode()}
        if self._is_worker:
            self._tokens[GATEWAY] = settings.worker_token(service).encode()
        self._limits = Limits(settings.calls_per_second, settings.calls_at_once, settings.streams_at_once)
        self._audit = AuditLog(settings.home / "audit", service)
        self._open_calls = asyncio.Semaphore(_MAX_OPEN_CALLS)
        self._refusals = Bucket(_REFUSALS_PER_SECOND, _REFUSALS_AT_ONCE)
        self._skipped = 0

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """See gRPC."""
        handler = await continuation(details)
        method = details.method
        metadata = dict(details.invocation_metadata or ())
        who: Caller | None = None
        try:
            who = self._authenticated(metadata)
            if handler is None:
                return None
            self._authorize(who, method)
            if self._bounded(who) and method != _HEALTH:
                self._limits.take(who.name)
        except Web4Error as error:
            if who is None and method == _HEALTH:
                return self._open(handler)
            return self._refusal(error, who, method, metadata)
        return wrapped(
            handler,
            lambda behavior: self._single(behavior, who, method, metadata),
            lambda behavior: self._stream(behavior, who),
        )

    def _authenticated(self, metadata: Mapping[str, Any]) -> Caller:
        """Return who makes a call.

        Raises:
            Unauthenticated: Nobody we know.
            FailedPrecondition: The principals can't be read.
        """
        shown = metadata.get("authorization", "")
        token = shown.removeprefix("Bearer ") if isinstance(shown, str) else ""
        for name, expected in self._tokens.items():
            if expected and hmac.compare_digest(token.encode(), expected):
                behalf = str(metadata.get(ON_BEHALF_OF, "")) if self._is_worker else ""
                return Caller(Principal(name, Scope.ADMIN), behalf)
        if not any(self._tokens.values()) and not self._principals.all():
            return Caller(Principal(LOCAL, Scope.ADMIN))  # beyond the loopback the server asked for a token
        if not token:
            raise Unauthenticated(
                "This call needs a token.",
                fix="It is in the stack's home: run the command in its folder, or set WEB4LORA_HOME or "
                "WEB4LORA_TOKEN_FILE. `web4lora people` gives others.",
            )
        return Caller(self._principals.check(token))

    def _authorize(self, who: Caller, method: str) -> None:
        """Refuse a call that needs a larger scope, or whose scope the contract does not tell.

        Raises:
            PermissionDenied: It is one.
        """
        needed = self._scopes.get(method)
        if needed is None:
            raise PermissionDenied(
                f"{method[1:]} has no scope in the contract.", fix="This is a defect.", reason="NO_SCOPE"
            )
        if self._is_worker and needed is Scope.RUN:
            needed = Scope.ADMIN
        if who.principal.scope < needed:
            raise PermissionDenied(
                f"{method[1:]} needs the scope {needed.name.lower()}; {who.name} has "
                f"{who.principal.scope.name.lower()}.",
                fix="Ask who administers the stack.",
                reason="SCOPE_TOO_SMALL",
                metadata={"needed": needed.name.lower()},
            )

    def _bounded(self, who: Caller) -> bool:
        """Say whether calls are counted: the gateway's at a worker are those of everybody's runs."""
        return bool(who.principal.id) or not self._is_worker

    def _single(self, behavior: Behavior, who: Caller, method: str, metadata: Mapping[str, Any]) -> Behavior:
        async def call(request: Any, context: Context) -> Any:
            _CALLER.set(who)
            response, result = None, "CANCELLED"
            try:
                response = await behavior(request, context)
                result = "OK"
            except Web4Error as error:
                result = error.reason
                raise
            except grpc.aio.AbortError:
                result = _code_name(context)
                raise
            except Exception:
                result = Internal.default_reason
                raise
            finally:
                if self._scopes[method] > Scope.READ:
                    self._write(who, method, metadata, context, result, request, response)
            return response

        return call

    def _stream(self, behavior: Behavior, who: Caller) -> Behavior:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            _CALLER.set(who)
            counted = self._limits.stream(who.name) if self._bounded(who) else contextlib.nullcontext()
            with counted:
                async for message in behavior(request, context):
                    if who.principal.id:
                        self._principals.require_valid(who.principal)
                    yield message

        return call

    def _refusal(self, error: Web4Error, who: Caller | None, method: str, metadata: Mapping[str, Any]) -> Any:
        """Return what ends a call without having read what it sent: streams are read when they are asked."""

        async def refuse(_requests: AsyncIterator[Any], context: Context) -> None:
            if who is not None or not self._refusals.take():
                self._write(who, method, metadata, context, error.reason)
            else:
                self._skipped += 1
            raise error

        return grpc.stream_unary_rpc_method_handler(refuse)

    def _open(self, handler: Any) -> Any:
        """Answer a call that needs no token; its message is read only while few such calls are at work."""

        async def call(requests: AsyncIterator[Any], context: Context) -> Any:
            if self._open_calls.locked():
                await context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED, "Too many calls without a token at once."
                )
            async with self._open_calls:
                request = await anext(requests, None)
                if request is None:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "The call sent no message.")
                return await handler.unary_unary(request, context)

        return grpc.stream_unary_rpc_method_handler(
            call, handler.request_deserializer, handler.response_serializer
        )

    def _write(
        self,
        who: Caller | None,
        method: str,
        metadata: Mapping[str, Any],
        context: Context,
        result: str,
        request: Any = None,
        response: Any = None,
    ) -> None:
        """Add a line to the audit log. One that can't be written is in the service's log instead."""
        key = getattr(request, "request_id", "") or metadata.get("x-request-id", "")
        entry = {
            "principal": who.principal.name if who else "",
            "on_behalf_of": who.on_behalf_of if who else "",
            "call": method[1:][:_TEXT_LENGTH],
            "resource": (_resource(response) or _resource(request))[:_TEXT_LENGTH],
            "result": result,
            "peer": context.peer(),
            "request_id": str(key)[:_TEXT_LENGTH],
            "skipped": self._skipped,
        }
        try:
            self._audit.append(**entry)
            self._skipped = 0
        except OSError as error:
            log.error("the audit log can't be written: %s; it misses %s", error, entry)


def _resource(message: Any) -> str:
    """Return the id or name of what a message is about; empty when it names nothing."""
    if not isinstance(message, Message):
        return ""
    known = message.DESCRIPTOR.fields_by_name
    for field in ("run", "job", "deployment", "principal"):
        if field in known and known[field].message_type:
            return _resource(getattr(message, field))
    return next((str(getattr(message, field)) for field in ("id", "name") if field in known), "")


def _code_name(context: Context) -> str:
    code = context.code()
    return code.name if isinstance(code, grpc.StatusCode) else Internal.default_reason
