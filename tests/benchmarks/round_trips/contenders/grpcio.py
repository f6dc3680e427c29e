"""gRPC as one writes it at first: a unary method and a message with a bytes field, generated code, nothing tuned."""

from concurrent import futures

import grpc
import numpy as np
from google.protobuf.wrappers_pb2 import BytesValue

from benchmarks.round_trips.place import Model, Place, RoundTrip, serving

_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def serve(place: Place) -> None:
    """Serve until killed."""
    model = Model(place.elements)

    def push_pull(request: BytesValue, _: grpc.ServicerContext) -> BytesValue:
        gradient = np.frombuffer(bytearray(request.value), dtype=np.float32)
        model.exchange(gradient, gradient)
        return BytesValue(value=gradient.tobytes())

    server = grpc.server(futures.ThreadPoolExecutor(place.workers + 4), options=_UNLIMITED)
    handler = grpc.unary_unary_rpc_method_handler(push_pull, BytesValue.FromString, BytesValue.SerializeToString)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("plain.Server", {"PushPull": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    serving(f"127.0.0.1:{port}")
    server.wait_for_termination()


def connect(place: Place) -> RoundTrip:
    """A worker's channel."""
    channel = grpc.insecure_channel(place.address, options=_UNLIMITED)
    call = channel.unary_unary("/plain.Server/PushPull", BytesValue.SerializeToString, BytesValue.FromString)
    gradient, parameters = place.gradient(), place.parameters()

    def round_trip() -> None:
        answer = call(BytesValue(value=gradient.tobytes()), wait_for_ready=True)
        parameters[:] = np.frombuffer(answer.value, dtype=np.float32)

    return round_trip
