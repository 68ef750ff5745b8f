"""Calls as gRPC sees them: how many streams are open, and which requests ended in an error."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

import grpc

from cutaway_server.service.caller import current
from cutaway_server.service.metrics.inspections import RPCS, STREAMED, Inspections, kind_of
from cutaway_server.service.status import Context

REQUEST = "/cutaway.v1.Inference/Generate"  # what a request is
STREAMS = (
    REQUEST,
    *STREAMED,
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)
FAILURES = tuple(c for c in grpc.StatusCode if c not in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED))
DEADLINE_TOLERANCE = 0.1  # a client ends its call at its deadline, a little before the server would
Behaviour = Callable[[Any, Context], Awaitable[Any]]
if TYPE_CHECKING:  # only the stubs make these generic
    Handler = grpc.RpcMethodHandler[Any, Any]
    Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    Interceptor = grpc.aio.ServerInterceptor


class CountedCalls(Interceptor):
    """Stands before every other interceptor, so that what those refuse is counted too. Used on the event loop."""

    def __init__(self) -> None:
        self.open = dict.fromkeys(STREAMS, 0)  # by method
        self.failed = {code.name: 0 for code in FAILURES}
        self.inspections = Inspections()

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]], details: grpc.HandlerCallDetails
    ) -> Handler:
        """The handler, counted if it is one of a stream, or of Introspection."""
        handler = await continuation(details)
        if handler is None:
            return handler
        if details.method in RPCS:
            handler = self.inspections.counted(handler, RPCS[details.method])
        if details.method not in self.open:
            return handler
        kind = kind_of(handler)
        counted = self._counted(details.method, cast(Behaviour, getattr(handler, kind)))
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return cast("Handler", make(counted, handler.request_deserializer, handler.response_serializer))

    def _counted(self, method: str, behaviour: Behaviour) -> Behaviour:
        async def counted(request: Any, context: Context) -> Any:
            self.open[method] += 1
            try:
                return await behaviour(request, context)
            except asyncio.CancelledError:
                remaining = context.time_remaining()
                if method == REQUEST and remaining is not None and remaining <= DEADLINE_TOLERANCE:
                    self.failed[grpc.StatusCode.DEADLINE_EXCEEDED.name] += 1
                raise
            except grpc.aio.AbortError as aborted:
                if method == REQUEST:
                    self.failed[_name(context.code())] += 1
                    if current().looks_inside:
                        self.inspections.refuse(aborted.__cause__)
                raise
            finally:
                self.open[method] -= 1

        return counted


def _name(code: object) -> str:
    """The name of a status code, which grpc.aio's contexts keep as a number."""
    for known in FAILURES:
        if code in (known, known.value[0]):
            return known.name
    return grpc.StatusCode.UNKNOWN.name
