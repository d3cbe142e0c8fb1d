"""One table between our errors and gRPC status codes, used in both directions.

Every status carries `google.rpc.ErrorInfo`: the reason, the domain `web4.lora`, and the metadata, in which
`fix` says what to do. Where `retry_after_seconds` is in it, the status carries `google.rpc.RetryInfo` too.
"""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from web4lora_chassis import errors

DOMAIN = "web4.lora"
RETRY_AFTER = "retry_after_seconds"
"""In the metadata of an error that goes away by itself, and when."""

_CODES: dict[type[errors.Web4Error], grpc.StatusCode] = {
    errors.InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.OutOfMemory: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DataLoss: grpc.StatusCode.DATA_LOSS,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.Internal: grpc.StatusCode.INTERNAL,
}
_MESSAGE_LENGTH = 8_000  # a status travels in the answer's headers, whose size is bounded
_CLASSES = {code: kind for kind, code in _CODES.items() if kind is not errors.OutOfMemory}


def status_of(error: errors.Web4Error) -> status_pb2.Status:
    """Return the gRPC status that tells a client of an error."""
    code = next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), grpc.StatusCode.INTERNAL)
    message = error.message.strip()
    if len(message) > _MESSAGE_LENGTH:
        message = f"{message[:_MESSAGE_LENGTH]}… (shortened; the log has the rest)"
    metadata = dict(error.metadata)
    if error.fix:
        metadata["fix"] = error.fix
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))
    details = [info]
    if RETRY_AFTER in error.metadata:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(float(error.metadata[RETRY_AFTER]) * 1000))
        details.append(any_pb2.Any())
        details[-1].Pack(retry)
    return status_pb2.Status(code=code.value[0], message=message, details=details)


def error_of(call: grpc.RpcError, service: str = "the service") -> errors.Web4Error:
    """Return the error that a failed call stands for.

    Args:
        call: What the gRPC library raised.
        service: Whom the call went to, for messages of gRPC's own.
    """
    if not isinstance(call, grpc.Call | grpc.aio.AioRpcError):
        return errors.Internal(f"{service}: {call}")
    code = call.code()
    text = call.details() or code.name
    kind = _CLASSES.get(code, errors.Internal)
    for detail in _details(call):
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            if info.reason == errors.OutOfMemory.default_reason:
                kind = errors.OutOfMemory
            metadata = dict(info.metadata)
            return kind(text, fix=metadata.pop("fix", ""), reason=info.reason, metadata=metadata)
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return errors.Unavailable(
            f"{service} is out of reach: {text}", fix="Is it running? `web4lora status` tells."
        )
    return kind(f"{service}: {text}")


def answered(call: grpc.RpcError) -> bool:
    """Tell whether a service of ours said why a call failed, rather than that the call did not reach it."""
    return isinstance(call, grpc.Call | grpc.aio.AioRpcError) and bool(_details(call))


def _details(call: grpc.Call | grpc.aio.AioRpcError) -> list[any_pb2.Any]:
    """Return the details of a failed call's status; none when a proxy on the way changed its message."""
    try:
        status = rpc_status.from_call(call)  # type: ignore[arg-type]  # asyncio's errors have all it needs
    except ValueError:
        return []
    return list(status.details) if status else []
