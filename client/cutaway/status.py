"""From gRPC's status codes to our exceptions: one table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import grpc

from cutaway.errors import (
    AlreadyExists,
    Cancelled,
    CutawayError,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    QueueFull,
    ResourceExhausted,
    ServerError,
    Unauthenticated,
    Unavailable,
)

RETRY_AFTER = "retry-after-ms"  # trailing metadata: an integer

ERRORS: dict[grpc.StatusCode, type[CutawayError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}


def error_of(error: grpc.RpcError, address: str) -> CutawayError:
    """The exception to raise instead of a call's error; what the table does not know is a ServerError."""
    # Both kinds of client raise errors that are a call as well, but only one kind is declared as such.
    call = cast("grpc.Call", error)
    code, details = call.code(), call.details() or "no details"
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unavailable(f"{address}: {details}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        seconds = _retry_after(call.trailing_metadata() or ())
        return ResourceExhausted(details) if seconds is None else QueueFull(details, seconds)
    kind = ERRORS.get(code, ServerError)
    return kind(f"{code.name}: {details}" if kind is ServerError else details)


def _retry_after(metadata: Iterable[tuple[str, str | bytes]]) -> float | None:
    for key, value in metadata:
        if key == RETRY_AFTER:
            try:
                return int(value) / 1000
            except ValueError:
                return None
    return None
