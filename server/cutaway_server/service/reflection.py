"""grpc.reflection.v1 and v1alpha: the contract, for clients that have no copy of it.

The two differ in nothing but their name. The library has v1alpha alone, which newer clients do not ask for first, and
some not at all; its messages serve both.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable
from typing import TYPE_CHECKING

from google.protobuf import descriptor_pool, json_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha.reflection_pb2 import DESCRIPTOR, ServerReflectionRequest

from cutaway_server.service.status import Context

if TYPE_CHECKING:
    from google.protobuf.descriptor import ServiceDescriptor

V1 = "grpc.reflection.v1.ServerReflection"
V1ALPHA: ServiceDescriptor = DESCRIPTOR.services_by_name["ServerReflection"]


class Reflection(reflection.aio.ReflectionServicer):  # type: ignore[name-defined,misc]
    """The library's servicer, made to write its answers as the other handlers do."""

    def __init__(self, services: Iterable[str]) -> None:
        """Tell of these services, by full name, and of both versions of this one."""
        _know_v1()
        super().__init__({*services, V1, V1ALPHA.full_name})

    async def ServerReflectionInfo(  # noqa: N802
        self, requests: AsyncIterable[ServerReflectionRequest], context: Context
    ) -> None:
        """Answer each question."""
        async for answer in super().ServerReflectionInfo(requests, context):
            await context.write(answer)


def _know_v1() -> None:
    """Add v1's description, so that it too can be asked about: v1alpha's under the other name."""
    file = FileDescriptorProto()
    DESCRIPTOR.CopyToProto(file)
    file = json_format.Parse(json_format.MessageToJson(file).replace("v1alpha", "v1"), FileDescriptorProto())
    pool = descriptor_pool.Default()
    try:
        pool.FindFileByName(file.name)
    except KeyError:
        pool.AddSerializedFile(file.SerializeToString())
