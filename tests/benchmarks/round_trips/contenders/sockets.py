"""Bare TCP: what everything else is measured by. Buffers are made once, a thread serves a connection."""

import socket
import threading

import numpy as np

from benchmarks.round_trips.place import Model, Place, RoundTrip, serving
from ormo_runtime.process import keep_freed_memory


def serve(place: Place) -> None:
    """Serve until killed."""
    keep_freed_memory()
    model = Model(place.elements)
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    serving(f"127.0.0.1:{listener.getsockname()[1]}")
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_serve, args=(connection, model, place.elements), daemon=True).start()


def _serve(connection: socket.socket, model: Model, elements: int) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = np.zeros(elements, dtype=np.float32)
    view = buffer.data.cast("B")
    while _filled(connection, view):
        model.exchange(buffer, buffer)
        connection.sendall(view)


def connect(place: Place) -> RoundTrip:
    """A worker's connection."""
    host, port = place.address.split(":")
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    gradient, parameters = place.gradient().data.cast("B"), place.parameters().data.cast("B")

    def round_trip() -> None:
        connection.sendall(gradient)
        assert _filled(connection, parameters)

    return round_trip


def _filled(connection: socket.socket, view: memoryview) -> bool:
    """Receive as much as the view holds; False if the peer has gone."""
    received = 0
    while received < len(view):
        size = connection.recv_into(view[received:])
        if not size:
            return False
        received += size
    return True
