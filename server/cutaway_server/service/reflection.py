"""grpc.reflection.v1alpha: the contract, for clients that have no copy of it."""

from __future__ import annotations

from collections.abc import AsyncIterable

from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest

from cutaway_server.service.status import Context


class Reflection(reflection.aio.ReflectionServicer):  # type: ignore[name-defined,misc]
    """The library's servicer, made to write its answers as the other handlers do."""

    async def ServerReflectionInfo(  # noqa: N802
        self, requests: AsyncIterable[ServerReflectionRequest], context: Context
    ) -> None:
        """Answer each question."""
        async for answer in super().ServerReflectionInfo(requests, context):
            await context.write(answer)
