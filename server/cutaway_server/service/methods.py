"""A servicer's methods as gRPC takes them. The generated code would parse messages before any code of ours runs."""

from __future__ import annotations

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from cutaway_server.service.status import answering

MAKERS = {  # by whether requests, and responses, are streams
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def methods_of(
    service: ServiceDescriptor, *servicers: object, name: str | None = None
) -> grpc.GenericRpcHandler[bytes, Message]:
    """The methods of `service`, each of the first servicer that has it, behind `answering`; called by `name`."""
    handlers = {
        method.name: _handler(method, next(servicer for servicer in servicers if hasattr(servicer, method.name)))
        for method in service.methods
    }
    return grpc.method_handlers_generic_handler(name or service.full_name, handlers)


def _handler(method: MethodDescriptor, servicer: object) -> grpc.RpcMethodHandler[bytes, Message]:
    make = MAKERS[method.client_streaming, method.server_streaming]
    behaviour = answering(getattr(servicer, method.name), GetMessageClass(method.input_type))
    return make(behaviour, response_serializer=GetMessageClass(method.output_type).SerializeToString)
