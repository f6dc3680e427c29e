"""What a stream of Python's gRPC takes for as many bytes there and back: no codec, no update, nothing copied.

It is no contender, but the floor of all that goes over such a stream.
"""

import queue
from collections.abc import Iterator

import grpc

from benchmarks.round_trips.place import GRPC_OPTIONS, Place, RoundTrip, serve_grpc
from ormo_protos.limits import CHUNK_BYTES
from ormo_runtime.process import keep_freed_memory


def _same(message: bytes) -> bytes:
    return message


def serve(place: Place) -> None:
    """Serve until killed: what came goes back."""
    keep_freed_memory()
    messages = -(-4 * place.elements // CHUNK_BYTES)

    def answer(requests: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
        for request in requests:  # all of it first, for an answer depends on the whole gradient
            yield from [request, *(next(requests) for _ in range(messages - 1))]

    serve_grpc(place, "bare.Server", grpc.stream_stream_rpc_method_handler(answer, _same, _same))


def connect(place: Place) -> RoundTrip:
    """A worker's stream."""
    keep_freed_memory()
    gradient = place.gradient().tobytes()
    messages = [gradient[at : at + CHUNK_BYTES] for at in range(0, len(gradient), CHUNK_BYTES)]
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    channel = grpc.insecure_channel(place.address, options=GRPC_OPTIONS)
    answers = channel.stream_stream("/bare.Server/PushPull", _same, _same)(iter(requests.get, None))

    def round_trip() -> None:
        for message in messages:
            requests.put(message)
        for _ in messages:
            next(answers)

    return round_trip
