"""Calls of cutaway.v1.Introspection: how many, how long, how many bytes each way, and why some were refused."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

import grpc
from cutaway.v1 import introspection_pb2

from cutaway_server.errors import (
    AlreadyExists,
    DeadlineExceeded,
    Draining,
    InvalidField,
    NotFound,
    OverBudget,
    QueueFull,
    Unsupported,
)  # fmt: skip
from cutaway_server.histogram import Histogram
from cutaway_server.service.status import Backlog, Context, Loading, PermissionDenied, Unauthenticated

_SERVICE = introspection_pb2.DESCRIPTOR.services_by_name["Introspection"]
RPCS = {f"/{_SERVICE.full_name}/{method.name}": method.name for method in _SERVICE.methods}  # by path
STREAMED = tuple(f"/{_SERVICE.full_name}/{method.name}" for method in _SERVICE.methods if method.server_streaming)
EDGES = (0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10, 60, 600)  # seconds

REASONS: dict[type[Exception], str] = {
    InvalidField: "invalid",
    AlreadyExists: "invalid",
    OverBudget: "budget",
    QueueFull: "busy",
    Unauthenticated: "denied",
    PermissionDenied: "denied",
    NotFound: "missing",
    Unsupported: "unsupported",
    Loading: "unavailable",
    Draining: "unavailable",
    Backlog: "unread",
    DeadlineExceeded: "deadline",
}
MEMORY, INTERNAL = "memory", "internal"
Behaviour = Callable[[Any, Context], Awaitable[Any]]
if TYPE_CHECKING:  # only the stubs make these generic
    Handler = grpc.RpcMethodHandler[Any, Any]


def reason_of(error: BaseException | None) -> str:
    """Why a call was refused, or ended by the server, in a word."""
    if isinstance(error, QueueFull) and error.what == "captures":
        return MEMORY
    return REASONS.get(type(error), INTERNAL) if isinstance(error, Exception) else INTERNAL


class Inspections:
    """What has been asked of Introspection, by the name of the RPC. Used on the event loop."""

    def __init__(self) -> None:
        names = RPCS.values()
        self.begun = dict.fromkeys(names, 0)
        self.received = dict.fromkeys(names, 0)  # bytes
        self.sent = dict.fromkeys(names, 0)
        self.seconds = {name: Histogram(EDGES) for name in names}
        self.refused = dict.fromkeys([*dict.fromkeys(REASONS.values()), MEMORY, INTERNAL], 0)

    def refuse(self, error: BaseException | None) -> None:
        """A call has ended with `error`."""
        self.refused[reason_of(error)] += 1

    def counted(self, handler: Handler, rpc: str) -> Handler:
        """The handler of an RPC; what goes through it is counted."""
        kind = kind_of(handler)
        inner = cast(Behaviour, getattr(handler, kind))

        async def behaviour(request: Any, context: Context) -> Any:
            began = time.monotonic()
            self.begun[rpc] += 1
            self.received[rpc] += len(request) if isinstance(request, bytes) else 0
            try:
                return await inner(request, context)
            except grpc.aio.AbortError as aborted:
                self.refuse(aborted.__cause__)
                raise
            finally:
                self.seconds[rpc].observe(time.monotonic() - began)

        serialize = handler.response_serializer

        def serializer(message: Any) -> bytes:
            assert serialize is not None, "methods_of sets it"
            data: bytes = serialize(message)
            self.sent[rpc] += len(data)
            return data

        make = getattr(grpc, f"{kind}_rpc_method_handler")
        counting = None if serialize is None else serializer
        return cast("Handler", make(behaviour, handler.request_deserializer, counting))


def kind_of(handler: Handler) -> str:
    """What a handler has its behaviour under: unary_stream, and so on."""
    asked, answered = (
        "stream" if many else "unary" for many in (handler.request_streaming, handler.response_streaming)
    )
    return f"{asked}_{answered}"
