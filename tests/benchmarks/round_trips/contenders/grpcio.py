"""gRPC as one writes it at first: a unary method and a message with a bytes field, generated code, nothing tuned."""

import grpc
import numpy as np
from google.protobuf.wrappers_pb2 import BytesValue

from benchmarks.round_trips.place import GRPC_OPTIONS, Model, Place, RoundTrip, serve_grpc


def serve(place: Place) -> None:
    """Serve until killed."""
    model = Model(place.elements)

    def push_pull(request: BytesValue, _: grpc.ServicerContext) -> BytesValue:
        gradient = np.frombuffer(bytearray(request.value), dtype=np.float32)
        model.exchange(gradient, gradient)
        return BytesValue(value=gradient.tobytes())

    handler = grpc.unary_unary_rpc_method_handler(push_pull, BytesValue.FromString, BytesValue.SerializeToString)
    serve_grpc(place, "plain.Server", handler)


def connect(place: Place) -> RoundTrip:
    """A worker's channel."""
    channel = grpc.insecure_channel(place.address, options=GRPC_OPTIONS)
    call = channel.unary_unary("/plain.Server/PushPull", BytesValue.SerializeToString, BytesValue.FromString)
    gradient, parameters = place.gradient(), place.parameters()

    def round_trip() -> None:
        answer = call(BytesValue(value=gradient.tobytes()), wait_for_ready=True)
        parameters[:] = np.frombuffer(answer.value, dtype=np.float32)

    return round_trip
