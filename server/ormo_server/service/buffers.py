"""Payload buffers that are used again: memory that is already mapped costs a fifth of fresh memory to fill."""

import threading

from ormo_protos.tensors import Payload, PayloadLayout


class BufferPool:
    """Lends payload buffers. It never holds more than were out at one time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[PayloadLayout, list[Payload]] = {}

    def take(self, layout: PayloadLayout) -> Payload:
        """A buffer of this layout, with whatever it held before."""
        with self._lock:
            idle = self._idle.get(layout)
            if idle:
                return idle.pop()
        return Payload(layout)

    def give(self, payload: Payload) -> None:
        """The buffer is not used any more."""
        with self._lock:
            self._idle.setdefault(payload.layout, []).append(payload)
