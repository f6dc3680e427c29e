"""The service's methods as gRPC calls them: which reads and writes messages how."""

import functools
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from ormo_protos.framing import Framing
from ormo_protos.limits import Parser
from ormo_server.security.roles import SERVICE
from ormo_server.service.servicer import Servicer


def handlers(servicer: Servicer) -> grpc.GenericRpcHandler:
    """The table of the contract's methods. Generated code would copy tensors through protobuf objects."""
    return grpc.method_handlers_generic_handler(
        SERVICE.full_name, {method.name: _handler(method, getattr(servicer, method.name)) for method in SERVICE.methods}
    )


def _handler(method: MethodDescriptor, behaviour: Callable[..., Any]) -> "grpc.RpcMethodHandler[Any, Any]":
    words = {True: "stream", False: "unary"}
    make = getattr(grpc, f"{words[method.client_streaming]}_{words[method.server_streaming]}_rpc_method_handler")
    decode = _reader(method.input_type)

    # Not as a deserializer: gRPC has one thread for these and all news of calls, and a large message would hold it.
    @functools.wraps(behaviour)
    def decoded(request: Any, context: grpc.ServicerContext) -> Any:
        return behaviour(map(decode, request) if method.client_streaming else decode(request), context)

    handler: grpc.RpcMethodHandler[Any, Any] = make(decoded, response_serializer=_writer(method.output_type))
    return handler


def _reader(kind: Descriptor) -> Callable[[bytes], Any]:
    made = GetMessageClass(kind)
    return Framing(made).decode if "chunk" in kind.fields_by_name else Parser(made).parse


def _writer(kind: Descriptor) -> Callable[[Any], bytes]:
    made = GetMessageClass(kind)
    return Framing(made).encode if "chunk" in kind.fields_by_name else made.SerializeToString
