"""pyzmq without copies, with this project's settings of the allocator: fast, with none of gRPC's services."""

import numpy as np
import zmq

from benchmarks.round_trips.place import Model, Place, RoundTrip, serving
from ormo_runtime.process import keep_freed_memory


def serve(place: Place) -> None:
    """Serve until killed."""
    keep_freed_memory()
    model = Model(place.elements)
    router = zmq.Context.instance().socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    serving(f"127.0.0.1:{port}")
    while True:
        worker, _, frame = router.recv_multipart(copy=False)
        parameters = np.empty(place.elements, dtype=np.float32)  # in the hands of zmq until it has been sent
        model.exchange(np.frombuffer(frame.buffer, dtype=np.float32).copy(), parameters)
        router.send_multipart([worker, b"", parameters], copy=False)


def connect(place: Place) -> RoundTrip:
    """A worker's socket."""
    keep_freed_memory()
    requests = zmq.Context.instance().socket(zmq.REQ)
    requests.connect(f"tcp://{place.address}")
    gradient, parameters = place.gradient(), place.parameters()

    def round_trip() -> None:
        requests.send(gradient, copy=False)
        parameters[:] = np.frombuffer(requests.recv(copy=False).buffer, dtype=np.float32)

    return round_trip
